"""What to call a model with: the caller's inputs, or the model's own example, as copies that a forward may change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from taskgraph_offload.errors import SettingsError

from .recorder import tensors_in
from .untouched import everything_below

Convert = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    def converted(self, convert: Convert) -> Inputs:
        """A deep copy. Every tensor, also one inside a cache or a custom object, is converted, each once."""
        tree = (self.args, dict(self.kwargs or {}))
        memo: dict[int, Any] = {}
        for tensor in tensors_in(tree):
            memo[id(tensor)] = convert(tensor)
        for thing, _ in everything_below([tree]):
            if isinstance(thing, torch.Generator):
                memo[id(thing)] = _cloned(thing)
        with _ConvertCopies(convert):
            args, kwargs = copy.deepcopy(tree, memo)
        return Inputs(args, kwargs)

    def __str__(self) -> str:
        """The call as a person would write it.

        >>> str(Inputs((torch.zeros(2, 3),), {"flag": True}))
            '(float32[2, 3], flag=True)'
        """
        named = [f"{key}={_short(value)}" for key, value in (self.kwargs or {}).items()]
        return f"({', '.join([_short(value) for value in self.args] + named)})"


def read_inputs(given: Any) -> Inputs:
    """Inputs from what a caller gives.

    A tuple or list is positional, a mapping is by keyword, a tensor is the only argument. `(args, kwargs)`, a tuple of
    a tuple or list and a dict, is both. A function is called, and returns one of these.

    >>> str(read_inputs(((torch.zeros(2),), {"flag": True}))), str(read_inputs((torch.zeros(2), {"flag": True})))
    ('(float32[2], flag=True)', "(float32[2], {'flag': True})")
    """
    if callable(given) and not isinstance(given, Mapping | Tensor):
        given = _called(given)
    if isinstance(given, Tensor):
        return Inputs((given,))
    if isinstance(given, Mapping):
        return Inputs((), {str(key): value for key, value in given.items()})
    if _is_args_and_kwargs(given):
        args, kwargs = given
        return Inputs(tuple(args), dict(kwargs))
    if isinstance(given, tuple | list):
        return Inputs(tuple(given))
    raise SettingsError(
        f"inputs= is a {type(given).__name__}; give a tuple (positional), a dict (keywords), (args, kwargs), a tensor, "
        "or a function that returns one of these"
    )


def _is_args_and_kwargs(given: Any) -> bool:
    if not isinstance(given, tuple) or len(given) != 2:
        return False
    args, kwargs = given
    return (
        isinstance(args, tuple | list) and isinstance(kwargs, Mapping) and all(isinstance(key, str) for key in kwargs)
    )


def example_of(model: nn.Module, entry: str) -> Inputs | None:
    """The model's own `dummy_inputs`, if it has some that are of use. They are for its forward only."""
    try:
        given = getattr(model, "dummy_inputs", None) if entry == "forward" else None
        return None if given is None else read_inputs(given)
    except Exception:  # the model's own example may be broken: then there is none
        return None


class _ConvertCopies(TorchFunctionMode):
    """While on, a deep copy of a tensor is its conversion."""

    def __init__(self, convert: Convert) -> None:
        super().__init__()
        self.convert = convert

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = self.convert(tensor)
        return memo[id(tensor)]


def _called(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        raise SettingsError(f"inputs= is a function that failed: {type(error).__name__}: {error}") from error


def _cloned(generator: torch.Generator) -> torch.Generator:
    """A generator that gives the same numbers."""
    clone = torch.Generator(generator.device)
    clone.set_state(generator.get_state())
    return clone


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(_short(item) for item in value)}]"
    text = repr(value)
    return text if len(text) <= 40 else f"<{type(value).__name__}>"
