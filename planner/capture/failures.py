"""Why a forward that was traced failed, and what to do about it. Never runs or changes anything."""

from __future__ import annotations

import dis
import re
import traceback
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch._subclasses import fake_tensor

from taskgraph_offload.errors import TraceError

from .recorder import tensors_in
from .weights import MixedDtypesError, WeightMap

if TYPE_CHECKING:
    from .tracing import Inputs

NEEDS_REAL_DATA = {  # by name: not every torch has all of them
    *("DataDependentOutputException", "DynamicOutputShapeException", "UnsupportedFakeTensorException"),
    *("UnsupportedOperatorException", "UnsupportedMutationAliasingException", "MetadataMismatchError"),
}
SPEAKS_OF_DATA = (
    "faketensor",
    "fake tensor",
    "data pointer",
    "data_ptr",
    "tensor subclass",
    "meta tensor",
    "data-dependent",
)
SPEAKS_OF_DTYPES = re.compile(r"dtype|scalar type|(input|bias|weight) type", re.IGNORECASE)
HOOK_FILES = re.compile(r"[/\\](diffusers|accelerate)[/\\]hooks\b")
BAD_ARGUMENT = (TypeError, ValueError, LookupError, AttributeError, AssertionError)

GIVE_INPUTS = "Give inputs= that it accepts."
NO_CONTEXT = (
    "Its cache hooks of diffusers need a context. Plan inside `with model.cache_context('cond'):`, "
    "or call model.disable_cache() first."
)
COMPILED = (
    "A compiled part failed. Trace the module before it is compiled: for what torch.compile returned, `_orig_mod`."
)
HOOK = "A hook that {library} put on the model failed. The model must run as it is, or without the hook."
NOT_THE_INPUTS = "The model's own code raised this error. The model must run by itself before it can be planned."


def may_succeed_for_real(error: BaseException) -> bool:
    """Whether a run on fakes failed because they are fakes. Operators on fakes are at times stricter than real ones."""
    frames = traceback.extract_tb(error.__traceback__)
    refused = any(frame.filename == fake_tensor.__file__ for frame in frames)
    return refused or isinstance(error, MixedDtypesError) or looks_at_data(error)


def looks_at_data(error: BaseException | None) -> bool:
    """Whether a run failed because the forward looks at data, which fakes do not have."""
    while error is not None:
        text = str(error).lower()
        if type(error).__name__ in NEEDS_REAL_DATA or any(phrase in text for phrase in SPEAKS_OF_DATA):
            return True
        error = error.__cause__ or error.__context__
    return False


def failure(model: nn.Module, where: WeightMap, entry: str, inputs: Inputs, error: BaseException) -> TraceError:
    """The error that says why a forward failed, and what to do."""
    who = f"{type(model).__name__}.{entry}{inputs}"
    reason = f"{type(error).__name__}: {error}".strip()
    if where.device.type == "meta" and looks_at_data(error):
        return TraceError(
            f"{who} looks at data: it must run once for real, and its weights are on the meta device. "
            f"Load them on a device that can run it, and trace that. {reason}"
        )
    return TraceError(f"{who} failed, so it cannot be traced. {_advice(where, inputs, error)} {reason}")


def _advice(where: WeightMap, inputs: Inputs, error: BaseException) -> str:
    text, innermost = str(error), _innermost(error)
    if "cache context" in text:
        return NO_CONTEXT
    if type(error).__module__.startswith("torch._dynamo"):
        return COMPILED
    if innermost and (library := HOOK_FILES.search(innermost.tb_frame.f_code.co_filename)):
        return HOOK.format(library=library[1])
    if SPEAKS_OF_DTYPES.search(text) and (advice := _dtype_advice(where, inputs)):
        return advice
    if not isinstance(error, BAD_ARGUMENT) and innermost and _is_raised_by_python(innermost):
        return NOT_THE_INPUTS
    return GIVE_INPUTS


def _dtype_advice(where: WeightMap, inputs: Inputs) -> str | None:
    """What to do about inputs of a floating dtype that no weight has."""
    given = {
        str(t.dtype).removeprefix("torch.")
        for t in tensors_in((inputs.args, dict(inputs.kwargs or {})))
        if t.is_floating_point()
    }
    floats = [weight for weight in where.weights.values() if getattr(torch, weight.dtype).is_floating_point]
    if not floats or given <= {weight.dtype for weight in floats}:
        return None
    dtype = max(floats, key=lambda weight: weight.nbytes).dtype
    strange = " and ".join(sorted(given - {weight.dtype for weight in floats}))
    return f"Its inputs are {strange}, its weights {dtype}: give inputs= of that dtype, as in x.to(torch.{dtype})."


def _innermost(error: BaseException) -> TracebackType | None:
    """Where the error was raised."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place


def _is_raised_by_python(place: TracebackType) -> bool:
    """Whether a `raise` statement outside torch raised an error, and not an operator."""
    code = place.tb_frame.f_code
    is_raise = code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return is_raise and not code.co_filename.startswith(torch.__path__[0])
