"""The racers: how a user attaches each library to a model, with the one knob that its memory depends on.

To add a racer, write a function that attaches it and gives the forward, and list it at the end of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

import taskgraph_offload as tgo

from .models import CHAINS, Case, nbytes

CUDA = torch.device("cuda", 0)
TYPICAL_FORWARDS = 4  # that a plan is calibrated with


@dataclass
class Attached:
    """A model that is ready to run: its forward, and what a racer wants to report when all steps have run."""

    forward: Callable[..., Any]
    report: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True)
class Racer:
    """A library, or one way to use it.

    `attach` takes a case, the knob in bytes, and the machine (None: a real one, to be measured). The knob is the
    budget, or the bytes of weights that stay on the device. `tuned`: whether there is such a knob.
    """

    attach: Callable[[Case, int, tgo.Machine | None], Attached]
    note: str
    packages: dict[str, str] = field(default_factory=dict)  # what is imported: what is installed
    tuned: bool = True
    knob_is_budget: bool = False
    needs_chain: bool = False

    def missing(self) -> list[str]:
        """The packages to install."""
        return [package for name, package in self.packages.items() if not _is_found(name)]


def _is_found(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


# This library


def _ours(case: Case, knob: int, machine: tgo.Machine | None) -> Attached:
    plan = tgo.Planner(case.model, f"{knob}B", inputs=case.inputs, machine=machine).plan()
    return _executed(case, plan)


def _ours_calibrated(case: Case, knob: int, machine: tgo.Machine | None) -> Attached:
    planner = tgo.Planner(case.model, f"{knob}B", inputs=case.inputs, machine=machine)
    with tgo.Executor(case.model, planner.plan(), device="cuda") as run:
        inputs = case.inputs
        for _ in range(TYPICAL_FORWARDS):
            _, inputs = case.step(case.model, inputs)
    plan = planner.calibrate(run.timeline()).plan()
    torch.cuda.empty_cache()
    return _executed(case, plan)


def _executed(case: Case, plan: tgo.Plan) -> Attached:
    run = tgo.Executor(case.model, plan, device="cuda", preload=True).attach()
    facts = dict(predicted=plan.settled_seconds, bound=plan.bound.step_seconds, arena=plan.arena_bytes)
    return Attached(case.model, lambda: {**facts, "divergences": run.stats.divergences, **_waits(plan, run.timeline())})


def _waits(plan: tgo.Plan, measured: tgo.Timeline) -> dict[str, Any]:
    """The longest waits of the last step, as [seconds, call, what it waited for], beside the predicted ones."""
    return {"waits": _longest_waits(measured), "predicted_waits": _longest_waits(plan.predict())}


def _longest_waits(timeline: tgo.Timeline, count: int = 8) -> list[list[Any]]:
    spans = sorted(timeline.lane("compute", timeline.cycles - 1), key=lambda span: span.start)
    before = timeline.lane("compute", timeline.cycles - 2) if timeline.cycles > 1 else ()
    stop, waits = max((span.stop for span in before), default=spans[0].start), []
    for span in spans:
        waits.append([span.start - stop, span.call])
        stop = span.stop
    return sorted(waits, reverse=True)[:count]


# accelerate


def _accelerate_cpu_offload(case: Case, knob: int, machine: tgo.Machine | None) -> Attached:
    from accelerate import cpu_offload

    cpu_offload(case.model, execution_device=CUDA)
    return Attached(case.model)


def _accelerate_dispatch(case: Case, knob: int, machine: tgo.Machine | None) -> Attached:
    from accelerate import dispatch_model, infer_auto_device_map

    room = {0: knob, "cpu": 2**50}
    places = infer_auto_device_map(case.model, room, no_split_module_classes=list(case.block_classes))
    stay = sum(place == 0 for place in places.values())
    dispatch_model(case.model, places, main_device=0)
    return Attached(case.model, lambda: {"stay": stay})


# diffusers


def _model_offload(case: Case, knob: int, machine: tgo.Machine | None) -> Attached:
    """What `enable_model_cpu_offload` does with each component."""
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(case.model, CUDA)
    return Attached(case.model)


def _group_offload(
    case: Case, knob: int, machine: tgo.Machine | None, *, level: str, stream: bool = True, record: bool = False
) -> Attached:
    """Offload groups; take the hooks off some blocks, spread evenly, which then stay.

    A block is what has a group of its own: where groups are blocks, diffusers says which.
    """
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        case.model,
        onload_device=CUDA,
        offload_device=torch.device("cpu"),
        offload_type=f"{level}_level",
        num_blocks_per_group=1 if level == "block" else None,
        non_blocking=True,
        use_stream=stream,
        record_stream=record,
    )
    grouped = [module for module in case.model.modules() if hasattr(module, "_diffusers_hook")]
    staying = _spread(case.blocks if level == "leaf" else [m for m in grouped if m is not case.model], knob)
    for block in staying:
        for module in block.modules():
            if (registry := getattr(module, "_diffusers_hook", None)) is not None:
                for name in list(registry.hooks):
                    registry.remove_hook(name, recurse=False)
        block.to(CUDA)
    return Attached(case.model, lambda: {"stay": len(staying)})


# RamTorch


def _ramtorch_linear(case: Case, knob: int, machine: tgo.Machine | None) -> Attached:
    from ramtorch.helpers import move_model_to_device, replace_linear_with_ramtorch

    replace_linear_with_ramtorch(case.model, "cuda")
    for parameter in case.model.parameters():
        if getattr(parameter, "is_ramtorch", False):
            parameter.data = parameter.data.pin_memory()
    move_model_to_device(case.model, CUDA)
    return Attached(case.model)


def _ramtorch_offload(case: Case, knob: int, machine: tgo.Machine | None, *, window: int) -> Attached:
    """The model as a list of modules, cut by hand. The first and the last module stay, and blocks, spread evenly."""
    import ramtorch

    chain = CHAINS[case.name](case.model)
    ends = {0, len(chain.modules) - 1}
    staying = _spread(chain.modules[1:-1], knob - sum(nbytes(chain.modules[end]) for end in ends))
    kept = {index for index, module in enumerate(chain.modules) if any(module is stays for stays in staying)}
    big = ramtorch.OffloadModel(list(chain.modules), device="cuda:0", window=window, pin_layers=sorted(ends | kept))
    return Attached(lambda **inputs: (big(chain.begin(inputs)),), lambda: {"stay": len(kept)})


# mmgp


def _mmgp(case: Case, knob: int, machine: tgo.Machine | None) -> Attached:
    from mmgp import offload

    dtype = next(case.model.parameters()).dtype
    offload.all(
        {"transformer": case.model},
        pinnedMemory=True,
        quantizeTransformer=False,
        budgets={"transformer": knob / 2**20},
        asyncTransfers=True,
        convertWeightsFloatTo=dtype,
        perc_reserved_mem_max=0.9,
        verboseLevel=0,
    )
    torch.set_default_device("cpu")  # mmgp sets it to the GPU
    return Attached(case.model)


def _resident(case: Case, knob: int, machine: tgo.Machine | None) -> Attached:
    case.model.to(CUDA)
    return Attached(case.model)


def _spread(modules: Sequence[nn.Module], room: int) -> list[nn.Module]:
    """As many modules as fit into the room, evenly spread.

    >>> [module.in_features for module in _spread([nn.Linear(n, 1, bias=False) for n in (1, 2, 3, 4)], 25)]
    [2, 4]
    """
    best: list[nn.Module] = []
    for count in range(len(modules) + 1):
        chosen = [modules[int((place + 0.5) * len(modules) / count)] for place in range(count)]
        if sum(map(nbytes, chosen)) <= room:
            best = chosen
    return best


_OURS = {"taskgraph_offload.planner": "taskgraph-offload"}
_ACCELERATE = {"accelerate": "accelerate"}
_DIFFUSERS = {"diffusers.hooks": "diffusers"}
_RAMTORCH = {"ramtorch": "ramtorch"}
_BY_HAND = "hooks taken off some blocks by hand"

RACERS: dict[str, Racer] = {
    "resident": Racer(_resident, "all weights on the device", tuned=False),
    "ours": Racer(_ours, "", _OURS, knob_is_budget=True),
    "ours-calibrated": Racer(_ours_calibrated, "planned again after four measured steps", _OURS, knob_is_budget=True),
    "accelerate-cpu": Racer(_accelerate_cpu_offload, "cpu_offload", _ACCELERATE, tuned=False),
    "accelerate-dispatch": Racer(_accelerate_dispatch, "dispatch_model, max_memory", _ACCELERATE),
    "diffusers-model": Racer(_model_offload, "the whole model at once", _DIFFUSERS | _ACCELERATE, tuned=False),
    "group-block": Racer(partial(_group_offload, level="block", stream=False), f"no stream; {_BY_HAND}", _DIFFUSERS),
    "group-block-stream": Racer(partial(_group_offload, level="block"), f"a stream; {_BY_HAND}", _DIFFUSERS),
    "group-block-record": Racer(
        partial(_group_offload, level="block", record=True), f"a stream and record_stream; {_BY_HAND}", _DIFFUSERS
    ),
    "group-leaf": Racer(partial(_group_offload, level="leaf", stream=False), f"no stream; {_BY_HAND}", _DIFFUSERS),
    "group-leaf-stream": Racer(partial(_group_offload, level="leaf"), f"a stream; {_BY_HAND}", _DIFFUSERS),
    "group-leaf-record": Racer(
        partial(_group_offload, level="leaf", record=True), f"a stream and record_stream; {_BY_HAND}", _DIFFUSERS
    ),
    "ramtorch-linear": Racer(_ramtorch_linear, "every Linear streams", _RAMTORCH, tuned=False),
    "ramtorch-window2": Racer(
        partial(_ramtorch_offload, window=2), "OffloadModel; the model cut by hand", _RAMTORCH, needs_chain=True
    ),
    "ramtorch-window3": Racer(
        partial(_ramtorch_offload, window=3), "OffloadModel; the model cut by hand", _RAMTORCH, needs_chain=True
    ),
    "mmgp": Racer(_mmgp, "budgets, asyncTransfers", {"optimum.quanto": "optimum-quanto", "mmgp.offload": "mmgp"}),
}
