"""One model of a run: what its methods are called with, which plan serves that, and the executor that follows it.

A call that looks like an earlier one, or needs no more memory than was reserved for one, follows the plan that is
there. Any other one is traced anew before it runs: if it needs more memory, it gets another plan, over the same homes.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import TYPE_CHECKING, Any, Protocol
from warnings import warn

from torch import nn

from ..errors import BudgetError, ExecutionError, NothingReadError, OffloadError, TraceError
from ..nouns.trace import Trace
from ..nouns.weights import named_tensors
from ..plan.plan import Plan
from .executor import Executor
from .hooks import StandIn
from .signatures import Signature

if TYPE_CHECKING:
    from .run import Run

MOST = 256  # signatures that are kept for a plan
LIBRARIES = ("torch.", "transformers.modeling_utils", "transformers.generation", "diffusers.models.modeling_utils")


class Planning(Protocol):
    """What this module asks of the planner, for one component."""

    def trace(self, model: nn.Module, entry: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace:
        """What one call needs."""
        ...

    def plan(self, trace: Trace, budget_bytes: int, reserved_bytes: int) -> Plan:
        """A plan for a trace. `reserved_bytes` stay free besides, for calls that need more."""
        ...

    def margin_bytes(self, trace: Trace) -> int:
        """What the device needs for itself."""
        ...


@dataclass(frozen=True)
class Part:
    """One model of a target, how it is planned, and the methods to watch besides those that models offer."""

    model: nn.Module
    planning: Planning
    entries: tuple[str, ...] = ()


@dataclass(eq=False)
class Served:
    """A plan, and the calls that it was made for, or turned out to have room for, with the activations of each."""

    plan: Plan
    made_for: Trace  # as it was captured; the plan may have cut it finer
    room: int  # bytes of activations
    signatures: deque[tuple[Signature, int]] = field(default_factory=lambda: deque(maxlen=MOST))
    untraced: deque[Signature] = field(default_factory=lambda: deque(maxlen=MOST))  # calls that could not be traced

    def has_room_for(self, signature: Signature) -> bool:
        """Whether a call needs no more than one that was traced, if memory grows at most as the square of inputs."""
        return signature in self.untraced or any(
            known.kind == signature.kind and needed * signature.growth_over(known) ** 2 <= self.room
            for known, needed in self.signatures
        )

    def serves(self, trace: Trace) -> bool:
        """Whether this plan runs the calls of another trace, with as much memory as they need."""
        if trace.entry != self.plan.trace.entry or trace.activation_bytes > self.room:
            return False
        return _steps(trace) == _steps(self.made_for)


class Component:
    """One model of a run: its entries, the plans that were made for them, and the executor that follows one."""

    def __init__(self, name: str, part: Part, run: Run) -> None:
        self.name, self.model, self.run = name, part.model, run
        asked_for = (entry for entry in part.entries if callable(getattr(part.model, entry, None)))
        self.planning, self._watched = part.planning, dict.fromkeys((*entries_of(part.model), *asked_for))
        self.executor: Executor | None = None
        self.plans: list[Served] = []
        self._entries: dict[str, Called] = {}
        self._thread: int | None = None  # where it runs
        self._is_aside = False  # True: calls pass through
        self._weightless = set[str]()  # methods that read no weight
        self._names = frozenset[str]()  # of its tensors, when the executor was attached

    @property
    def is_running(self) -> bool:
        """Whether one of its methods runs."""
        return self._thread is not None

    @property
    def plan(self) -> Plan | None:
        """The plan that is followed now."""
        return None if self.executor is None else self.executor.plan

    @property
    def arena_bytes(self) -> int:
        """What it holds on the device between its calls."""
        executor = self.executor
        is_there = executor is not None and executor.is_attached and not executor.is_paused
        return executor.plan.arena_bytes if executor is not None and is_there else 0

    @property
    def held_bytes(self) -> int:
        """What it needs on the device now: while it runs, its activations too."""
        return self.executor.plan.peak_bytes if self.executor is not None and self.is_running else self.arena_bytes

    def call(self, called: Called, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an entry, as planned. One entry may call another one."""
        if self._thread == get_ident() or self._is_aside or called.name in self._weightless:
            return called.original(*args, **kwargs)
        if self.run.traced is not None:
            raise TraceError(
                f"{self.run.traced} calls {who(self, called.name)}, another component, so it cannot be traced alone: "
                f"leave one out, as in exclude=[{self.name!r}]"
            )
        if self.is_running:
            raise ExecutionError(f"{who(self, called.name)} is called while another thread runs it: wait for that one")
        if self.run.is_paused:
            raise ExecutionError(f"{who(self, called.name)}: this run is paused; call resume() first")
        self._thread = get_ident()
        try:
            try:
                self.prepare(called.name, args, kwargs)
            except NothingReadError:
                self._weightless.add(called.name)
                return called.original(*args, **kwargs)
            try:
                return self._entries[called.name].original(*args, **kwargs)  # now the executor's
            finally:
                self.run.has_run(self, called.name)
        finally:
            self._thread = None

    def prepare(self, entry: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Have a plan that serves a call, and memory for it."""
        served = self._served(entry, args, kwargs)
        self.run.make_room(self, served.plan)
        self._follow(served.plan)

    def remove(self) -> None:
        """Give the model back as it was found."""
        self._take_off()
        if self.executor is not None:
            self.executor.detach()

    def _served(self, entry: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Served:
        """The plan for a call. A call that is like none before is traced, and gets a plan if none has room for it."""
        signature = Signature.of(entry, args, kwargs)
        if (known := next((served for served in self.plans if served.has_room_for(signature)), None)) is not None:
            return known
        if self.executor is not None and self.executor.is_attached and self._names != _names(self.model):
            with self._entries_aside():  # modules came or went: the homes are those of another model
                self.executor.detach()
            self.plans.clear()
        try:
            with self._as_found():
                trace = self.run.trace(self, entry, args, kwargs)
        except TraceError as error:
            served = next((served for served in self.plans if served.made_for.entry == entry), None)
            if served is None:
                raise
            warn(f"{error}\nIt runs as an earlier call was planned; the budget may not hold", stacklevel=5)
            served.untraced.append(signature)
            return served
        served = next((served for served in self.plans if served.serves(trace)), None)
        if served is None:
            served = self.run.planned(self, trace)
            self.plans.insert(0, served)
        served.signatures.append((signature, trace.activation_bytes))
        return served

    def _follow(self, plan: Plan) -> None:
        if self.executor is None or not self.executor.is_attached:
            with self._entries_aside():
                self.executor = Executor(self.model, plan, **self.run.executor_arguments).attach()
            self._names, self.executor.wakes = _names(self.model), self._wake
        elif self.executor.plan is not plan or not self.executor.is_hooked:
            with self._entries_aside():
                self.executor.follow(plan)
        if self.executor.is_paused:
            self.executor.resume()

    def _wake(self) -> None:
        """Something outside of the entries needs the device, and another component has it."""
        if self.executor is not None and not self.run.is_paused:
            self.run.make_room(self, self.executor.plan)
            self.executor.resume()

    @contextmanager
    def _as_found(self) -> Iterator[None]:
        """The model without anything of ours, as far as a trace can see."""
        with self._entries_aside(), self.run.silent():
            if self.executor is None or not self.executor.is_attached:
                yield
            else:
                with self.executor.unhooked():
                    yield

    @contextmanager
    def _entries_aside(self) -> Iterator[None]:
        """The model without what watches its methods, and without what a user has put around that."""
        here, covers = vars(self.model), dict[Called, Any]()
        self._is_aside = True
        try:
            for name, called in self._entries.items():
                if name in here and not called.is_removed:
                    covers[called] = here[name]
                    called.uncover()
            yield
        finally:
            for called, cover in covers.items():
                called.cover_with(cover)
            self._is_aside = False

    def put_entries(self) -> None:
        """Let calls of the model come here first."""
        for name in self._watched:
            self._entries[name] = Called(self, name)

    def _take_off(self) -> None:
        for called in self._entries.values():
            called.remove()


class Called(StandIn):
    """A method of a model that begins a forward: it may need a plan."""

    is_offloading = False  # a trace finds the model without it

    def __init__(self, component: Component, name: str) -> None:
        super().__init__(component.model, name, None)
        self._component, self.run = component, component.run

    @property
    def original(self) -> Callable[..., Any]:
        """The method that this one stands in for."""
        return self._method()

    def uncover(self) -> None:
        """Put back what was there before."""
        if self._own is None:
            del vars(self._module)[self.name]
        else:
            vars(self._module)[self.name] = self._own

    def cover_with(self, outermost: Any) -> None:
        """Stand in for what is there now; the model holds `outermost`: this, or what a user has put around it."""
        self._own = vars(self._module).get(self.name)
        vars(self._module)[self.name] = outermost

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_removed:
            return self._method()(*args, **kwargs)
        return self._component.call(self, args, kwargs)


def entries_of(model: nn.Module) -> list[str]:
    """The methods of a model that may begin a forward: `forward`, and what its own classes offer besides.

    >>> entries_of(nn.Linear(1, 1))
    ['forward']
    """
    found: dict[str, None] = {"forward": None}
    for kind in type(model).__mro__:
        library = kind.__module__.startswith(LIBRARIES) or kind.__name__.endswith("Mixin")
        if kind is nn.Module or library:
            continue
        for name, value in vars(kind).items():
            is_known = name in ("encode", "decode") or (name.startswith("get_") and name.endswith("_features"))
            if is_known and inspect.isfunction(value):
                found[name] = None
    return list(found)


@contextmanager
def named(component: Component, entry: str) -> Iterator[None]:
    """Let errors say which component they are about."""
    try:
        yield
    except BudgetError as error:
        raise BudgetError(f"{who(component, entry)}: {error}", error.smallest_bytes) from error
    except OffloadError as error:
        raise type(error)(f"{who(component, entry)}: {error}") from error


def who(component: Component, entry: str) -> str:
    """A method of a component, as errors name it."""
    return f"{component.name or type(component.model).__name__}.{entry}"


def _steps(trace: Trace) -> list[tuple[str, Any, Any]]:
    return [(call.name, call.reads, call.writes) for call in trace.calls]


def _names(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, _ in named_tensors(model))
