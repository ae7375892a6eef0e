"""Tasks, their text form, and the explicit graph of tasks. This module orders nothing and decides nothing.

The text form of a task is one line, which a person reads and a test writes:

    compute blocks.3                                  a call
    h2d blocks.4                                      copies a bundle of weights to its seat
    h2d blocks.4 [0:33554432]                         copies only these bytes of it
    h2d blocks.4 after compute blocks.2               starts when that call has ended, not earlier
    d2h ~down.1 before compute mid                    copies an activation away; that call starts after the copy
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import networkx as nx

from ..errors import PlanError

# A new link is one more name in `Link`: kinds, lanes and the text form follow from it.
Link: TypeAlias = Literal["h2d", "d2h"]  # a way for bytes from one place to another
Kind: TypeAlias = Literal["compute", Link]  # what a task does: it runs a call, or it copies over a link
Lane: TypeAlias = Literal["compute", Link]  # where a task waits its turn: a FIFO of compute, or of one link
Reason: TypeAlias = Literal["data", "reuse", "issue", "order"]

LINKS: tuple[Link, ...] = get_args(Link)
LANES: tuple[Lane, ...] = ("compute", *LINKS)
ACTIVATION = "~"  # the names of activations start with it; the names of bundles never do

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\[\d+:\d+\]|[^\s"]+')
_PLAIN_NAME = re.compile(r'[^\s"\[\],]+')


@dataclass(frozen=True, slots=True)
class Task:
    """A call (`compute`), or a copy over one link (`h2d`, `d2h`) of a bundle, of a part of it, or of an activation.

    A strategy may ask for more order than the bytes need. `after` is a call that ends before this task begins: the
    nearest earlier call of that name. `before` is a call that begins after this task has ended: the nearest later one.

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
        """The lane in which the task waits its turn: compute for a call, the link for a copy."""
        return self.kind

    @property
    def is_activation(self) -> bool:
        """Whether the task copies an activation, not weights."""
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
    """Read one task from each line; skip empty lines.

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
    """Give a name as the text form writes it: in quotes only where it needs them.

    >>> print(quoted("blocks.3"), quoted("my block"))
    blocks.3 "my block"
    """
    return name if name.isprintable() and _PLAIN_NAME.fullmatch(name) else json.dumps(name)


def tokens(line: str) -> list[str]:
    """Split a line of the text form into words, without their quotes."""
    words = _TOKEN.findall(line)
    if _TOKEN.sub("", line).strip():
        raise PlanError(f"cannot read the line {line.strip()!r}")
    try:
        return [json.loads(word) if word.startswith('"') else word for word in words]
    except ValueError:
        raise PlanError(f"cannot read the quotes in {line.strip()!r}") from None


@dataclass(frozen=True, eq=False)
class TaskGraph:
    """A plan unrolled over cycles: a directed acyclic graph of tasks, in the order in which the host issues them.

    `dag` is a networkx graph. A node's name is `cycle/task`, as in `1/h2d blocks.4`. Its data are `kind`, `lane`,
    `call` (the call that it runs or copies for), `cycle`, `task`, `seconds`, `nbytes`. An edge has its `reason`.
    """

    dag: nx.DiGraph[str]

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
