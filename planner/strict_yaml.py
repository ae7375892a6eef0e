"""Reads a small YAML file strictly: plain mappings, lists and values, each with its line; anything else is refused.

YAML has features that a settings file never needs and that can do harm: anchors that expand without end, tags that
build objects, keys that silently replace equal keys. The parser's events are read one by one, so an error is raised
before anything is built.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from taskgraph_offload.errors import SettingsError, shown

Scalar: TypeAlias = str | int | float | bool | None

LARGEST_FILE = 64 * 2**10  # bytes
DEEPEST = 4  # mappings and lists inside one another
LONGEST_VALUE = 200  # characters of one key or value


_INTEGER = re.compile(r"[-+]?[0-9]+")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Scalar] = {"": None, "~": None, "null": None, "true": True, "false": False}
_NO_TEXT = re.compile(r"[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")


class Refusal(SettingsError):
    """An error in one line of a file. `inside`: the keys that lead to it, with "-" for a list."""

    def __init__(self, line: int, problem: str, inside: Sequence[str] = ()) -> None:
        super().__init__(f"line {line}: {problem}")
        self.inside = tuple(inside)


@dataclass(frozen=True, slots=True)
class Node:
    """A value of the file: a scalar, a list of nodes or a dict of nodes by key; its line, and the keys that lead to it.

    >>> parse_strictly("machine: {name: mine}").value["machine"].value
    {'name': Node(value='mine', line=1, inside=('machine',))}
    """

    value: Any
    line: int
    inside: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """What it is, in a word."""
        kinds = {dict: "a mapping", list: "a list", bool: "true or false", type(None): "nothing", str: "a text"}
        return kinds.get(type(self.value), "a number")

    def refusal(self, problem: str) -> Refusal:
        """The error about it."""
        return Refusal(self.line, problem, self.inside)


def read_strictly(path: Path) -> Node:
    """The mapping that a file holds, or `SettingsError` with the line of what is wrong."""
    return parse_strictly(_text_of(path))


def parse_strictly(text: str) -> Node:
    """The same for a text.

    >>> parse_strictly("budget: 12GiB").value
    {'budget': Node(value='12GiB', line=1, inside=())}
    """
    if stray := _NO_TEXT.search(text):
        line = text.count("\n", 0, stray.start()) + 1
        raise Refusal(line, f"the character {stray[0]!r} has no place in a text file")
    reader = _Reader(yaml.parse(text, Loader=yaml.SafeLoader))
    try:
        return reader.document()
    except yaml.YAMLError as error:
        raise _unreadable(error, reader.inside) from None


def scalar(text: str) -> Scalar:
    """A plain value as YAML 1.2 reads it: true, false, null, a number, or else the text itself.

    >>> [scalar(text) for text in ("2", "1e-3", "true", "null", "spread", "yes")]
    [2, 0.001, True, None, 'spread', 'yes']
    """
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) and math.isfinite(float(text)) else text


def _text_of(path: Path) -> str:
    """The text of a file, if it is a small one."""
    try:
        if not path.is_file():
            raise SettingsError("there is no such file")
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise Refusal(content.count(b"\n") + 1, f"the file is larger than {LARGEST_FILE // 2**10} KiB")
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refusal(content.count(b"\n", 0, error.start) + 1, "this is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _unreadable(error: yaml.YAMLError, inside: Sequence[str]) -> Refusal:
    """What the YAML parser did not like, on one line."""
    mark = getattr(error, "problem_mark", None)
    problem = " ".join(str(getattr(error, "problem", None) or "it cannot be read").split())
    return Refusal(mark.line + 1 if mark else 1, f"not YAML: {problem[:100]}", inside)


class _Reader:
    """Turns the parser's events into nodes, and raises an error at the first event that a settings file does not need.

    `inside`: the keys that lead to the place that is being read, or to the error.
    """

    def __init__(self, events: Iterator[Any]) -> None:
        self.events = events
        self.inside: list[str] = []

    def document(self) -> Node:
        """The one document of the file."""
        next(self.events)  # the stream begins
        if isinstance(next(self.events), yaml.StreamEndEvent):
            raise Refusal(1, "the file holds nothing")
        node = self.node(next(self.events))
        next(self.events)  # the document ends
        if not isinstance(event := next(self.events), yaml.StreamEndEvent):
            raise self.refusal(event, "a second document begins; a file holds one")
        if not isinstance(node.value, dict):
            raise node.refusal(f"the file must be a mapping of keys to values, not {node.kind}")
        return node

    def refusal(self, event: Any, problem: str) -> Refusal:
        """The error about what was just read."""
        return Refusal(_line(event), problem, self.inside)

    def node(self, event: Any) -> Node:
        """The value that begins with this event."""
        if isinstance(event, yaml.AliasEvent):
            raise self.refusal(event, f"the alias *{str(event.anchor)[:40]} is refused: write the value out")
        if event.anchor is not None:
            raise self.refusal(
                event, f"the anchor &{event.anchor[:40]} is refused: write the value out where it is needed"
            )
        if event.tag is not None:
            raise self.refusal(event, f"the tag {shown(event.tag)} is refused: values are plain")
        if isinstance(event, yaml.ScalarEvent):
            return Node(self.scalar(event), _line(event), tuple(self.inside))
        if len(self.inside) == DEEPEST:
            raise self.refusal(event, f"more than {DEEPEST} mappings and lists inside one another")
        content = self.mapping() if isinstance(event, yaml.MappingStartEvent) else self.list()
        return Node(content, _line(event), tuple(self.inside))

    def scalar(self, event: Any) -> Scalar:
        """A single value; in quotes, it is a text."""
        if len(event.value) > LONGEST_VALUE:
            raise self.refusal(event, f"a value of {len(event.value)} characters; at most {LONGEST_VALUE} are read")
        return scalar(event.value) if event.implicit[0] else str(event.value)

    def list(self) -> list[Node]:
        """The items up to the end of this list."""
        items: list[Node] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.node_inside("-", event))
        return items

    def mapping(self) -> dict[str, Node]:
        """The values by key up to the end of this mapping; a node's line is that of its key."""
        entries: dict[str, Node] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.key(event)
            if key in entries:
                first = entries[key].line
                raise self.refusal(event, f"the key {shown(key)} comes twice, first in line {first}")
            node = self.node_inside(key, next(self.events))
            entries[key] = Node(node.value, _line(event), tuple(self.inside))
        return entries

    def key(self, event: Any) -> str:
        """A key is a single plain word."""
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            raise self.refusal(event, "a key is a single word")
        self.node(event)
        return str(event.value)

    def node_inside(self, key: str, event: Any) -> Node:
        """The value that begins with this event, and stands inside a key or a list."""
        self.inside.append(key)
        node = self.node(event)
        self.inside.pop()
        return node


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1
