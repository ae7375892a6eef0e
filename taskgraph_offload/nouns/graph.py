"""Tasks, their text form, and the explicit graph that they make. This module orders nothing and decides nothing.

The text form of a task is one line, which a person reads and a test writes:

    compute blocks.3                                  a call
    h2d blocks.4                                      a bundle of weights comes to its seat
    h2d blocks.4 [0:33554432]                         only these bytes of it
    h2d blocks.4 after compute blocks.2               and not before that call has ended, even if it could
    d2h ~down.1 before compute mid                    an activation leaves, and is gone when that call begins
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import networkx as nx

from ..errors import PlanError

Kind: TypeAlias = Literal["compute", "h2d", "d2h"]
Lane: TypeAlias = Literal["compute", "h2d", "d2h"]  # one FIFO per kind of task
Reason: TypeAlias = Literal["data", "reuse", "issue", "order"]

LANES: tuple[Lane, ...] = ("compute", "h2d", "d2h")
ACTIVATION = "~"  # the names of activations start with it, where the names of bundles never do

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\[\d+:\d+\]|[^\s"]+')
_PLAIN_NAME = re.compile(r'[^\s"\[\],]+')


@dataclass(frozen=True, slots=True)
class Task:
    """One unit of work in a lane: a call (`compute`) or the copy of a bundle, a part of it, or an activation.

    `after` names a call that must have ended first, `before` one that must not begin earlier, where a strategy wants
    more than the bytes demand: the nearest earlier, the nearest later call of that name.

    >>> Task.parse("h2d blocks.4 [0:512] after compute blocks.2")
    Task(kind='h2d', name='blocks.4', start=0, stop=512, after='blocks.2', before=None)
    """

    kind: Kind
    name: str
    start: int = 0
    stop: int | None = None
    after: str | None = None
    before: str | None = None

    @property
    def lane(self) -> Lane:
        return self.kind

    @property
    def is_activation(self) -> bool:
        """Whether this copies an activation, not weights."""
        return self.kind != "compute" and self.name.startswith(ACTIVATION)

    def __str__(self) -> str:
        words = [self.kind, quoted(self.name)]
        if self.stop is not None:
            words.append(f"[{self.start}:{self.stop}]")
        if self.after is not None:
            words += ["after compute", quoted(self.after)]
        if self.before is not None:
            words += ["before compute", quoted(self.before)]
        return " ".join(words)

    @staticmethod
    def parse(line: str) -> Task:
        """Read one line of the text form."""
        words = tokens(line)
        if len(words) < 2 or words[0] not in LANES:
            raise PlanError(f"not a task: {line.strip()!r}; a task reads like 'h2d blocks.4 after compute blocks.2'")
        kind, name, rest = words[0], words[1], words[2:]
        start, stop = 0, None
        if rest and (part := re.fullmatch(r"\[(\d+):(\d+)\]", rest[0])):
            start, stop, rest = int(part[1]), int(part[2]), rest[1:]
        gates: dict[str, str] = {}
        while len(rest) >= 3 and rest[0] in ("after", "before") and rest[1] == "compute" and rest[0] not in gates:
            gates[rest[0]], rest = rest[2], rest[3:]
        if rest:
            raise PlanError(f"cannot read {' '.join(rest)!r} in the task {line.strip()!r}")
        return Task(kind, name, start, stop, gates.get("after"), gates.get("before"))


def parse_tasks(text: str) -> tuple[Task, ...]:
    """Read tasks, one a line; empty lines are skipped.

    >>> [task.kind for task in parse_tasks('''
    ...     h2d a
    ...     compute a
    ... ''')]
    ['h2d', 'compute']
    """
    return tuple(Task.parse(line) for line in text.splitlines() if line.strip())


def print_tasks(tasks: Iterable[Task]) -> str:
    """The text form of a list of tasks."""
    return "\n".join(map(str, tasks))


def quoted(name: str) -> str:
    """A name as the text form writes it: in quotes only where it has to be.

    >>> print(quoted("blocks.3"), quoted("my block"))
    blocks.3 "my block"
    """
    return name if name.isprintable() and _PLAIN_NAME.fullmatch(name) else json.dumps(name)


def tokens(line: str) -> list[str]:
    """The words of a line of the text form, quotes taken off."""
    words = _TOKEN.findall(line)
    if _TOKEN.sub("", line).strip():
        raise PlanError(f"cannot read the line {line.strip()!r}")
    try:
        return [json.loads(word) if word.startswith('"') else word for word in words]
    except ValueError:
        raise PlanError(f"cannot read the quotes in {line.strip()!r}") from None


class TaskGraph:
    """A plan unrolled over cycles: a directed acyclic graph of tasks, in the order in which the host issues them.

    `dag` is a networkx graph. A node is named `cycle/task`, as in `1/h2d blocks.4`, and has the data `kind`, `lane`,
    `call` (which it is, or for which it copies), `cycle`, `task`, `seconds`, `nbytes`; an edge has its `reason`.
    """

    def __init__(self, dag: nx.DiGraph[str], cycles: int) -> None:
        self.dag = dag
        self.cycles = cycles

    @property
    def nodes(self) -> tuple[str, ...]:
        """All nodes in the order of issue."""
        return tuple(self.dag)

    def lane(self, lane: Lane) -> tuple[str, ...]:
        """The nodes of one lane, in order."""
        return tuple(node for node, data in self.dag.nodes(data=True) if data["lane"] == lane)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return iter(self.dag.nodes(data=True))

    def __str__(self) -> str:
        return "\n".join(self._line(node) for node in self.dag)

    def _line(self, node: str) -> str:
        waits = [
            f"{before} ({edge['reason']})"
            for before, _, edge in self.dag.in_edges(node, data=True)
            if edge["reason"] != "order"
        ]
        return node + (f" after {', '.join(waits)}" if waits else "")
