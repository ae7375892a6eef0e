"""The settings file: what `Planner` takes, written down in YAML and checked strictly, each complaint with its line.

budget: 12GiB             # or 30%, or a number of GiB
machine: rtx4090          # a preset, or a mapping of Machine's fields
strategy: layerwise
options: {residents: spread, prefetch: 2}
blocks: ["transformer_blocks.*"]
entry: forward
margin: 200MiB
components:               # of a pipeline: these values replace the ones above, for the component of that name
  vae: {strategy: resident, entry: decode}
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from keyword import iskeyword
from pathlib import Path
from typing import Any, TypeVar

from taskgraph_offload.errors import SettingsError, shown
from taskgraph_offload.nouns.budget import parse_budget
from taskgraph_offload.nouns.machine import Machine

from . import strategies
from .planner import parse_margin
from .strict_yaml import Node, Refusal, Scalar, read_strictly

Checked = TypeVar("Checked")


@dataclass(frozen=True)
class Settings:
    """The values of a settings file; missing ones are the defaults of `Planner`."""

    budget: float | str | None = None
    machine: Machine | str | None = None
    strategy: str = strategies.DEFAULT
    options: Mapping[str, Scalar] = field(default_factory=dict)
    blocks: tuple[str, ...] | None = None
    entry: str = "forward"
    margin: float | str | None = None

    def arguments(self) -> dict[str, Any]:
        """The arguments of `Planner` besides the model, its inputs and the budget."""
        margin = {} if self.margin is None else {"margin": self.margin}
        chosen = {"machine": self.machine, "strategy": self.strategy, "blocks": self.blocks, "entry": self.entry}
        return chosen | margin | dict(self.options)


def read_settings(path: str | os.PathLike[str], component: str | None = None) -> Settings:
    """Read a settings file, or raise a `SettingsError` of one line that says where and what is wrong.

    With a component: the settings of that component.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "offload.yaml")
    >>> _ = file.write_text("budget: 12GiB\\nmachine: rtx9999")
    >>> read_settings(file)
    Traceback (most recent call last):
    taskgraph_offload.errors.SettingsError: ...offload.yaml: line 2: unknown machine 'rtx9999'; known are rtx3060, ...
    """
    everyone, components = read_all_settings(path)
    if component is None:
        return everyone
    if component not in components:
        known = ", ".join(components) or "none"
        raise SettingsError(f"settings file {os.fspath(path)}: no component {component!r}; there are {known}")
    return components[component]


def read_all_settings(path: str | os.PathLike[str]) -> tuple[Settings, dict[str, Settings]]:
    """The settings for all, and those of each component that the file names."""
    try:
        return _settings(read_strictly(Path(path)))
    except Refusal as error:
        accepted = ", ".join(_accepted_keys(error.inside))
        raise SettingsError(f"settings file {os.fspath(path)}: {error}; accepted keys are {accepted}") from None
    except SettingsError as error:
        raise SettingsError(f"settings file {os.fspath(path)}: {error}") from None


def _settings(content: Node) -> tuple[Settings, dict[str, Settings]]:
    """The settings for all, and the settings of each component."""
    _check_keys(content, ACCEPTED)
    given = dict(content.value)
    listed = given.pop("components", Node({}, content.line))
    everyone = _over(Settings(), Node(given, content.line))
    components = {}
    for name, node in _expect(listed, "components is a mapping of names to settings", dict).items():
        _expect(node, f"component {shown(name)} is a mapping", dict)
        _check_keys(node, OF_COMPONENT, f" of component {shown(name)}")
        components[name] = _over(everyone, node)
    return everyone, components


def _over(base: Settings, node: Node) -> Settings:
    """`base` with the values of a mapping. Another strategy drops the options of the former one."""
    values = {key: _READERS[key](entry) for key, entry in node.value.items()}
    if values.get("strategy", base.strategy) != base.strategy:
        base = replace(base, options={})
    settings = replace(base, **values)
    for option, value in values.get("options", {}).items():
        _located(node.value["options"].value[option], strategies.check_options, settings.strategy, {option: value})
    return settings


def _check_keys(node: Node, accepted: Sequence[str], of: str = "") -> None:
    for key, entry in node.value.items():
        if key not in accepted:
            raise entry.refusal(f"unknown key {shown(key)}{of}")


def _located(node: Node, check: Callable[..., Checked], *arguments: Any) -> Checked:
    """Return what `check` returns; add the line of the node to its error."""
    try:
        return check(*arguments)
    except SettingsError as error:
        raise node.refusal(str(error)) from None


def _expect(node: Node, what: str, *types: type) -> Any:
    """The node's value, if it has one of these types exactly: true is no number."""
    if type(node.value) not in types:
        got = shown(node.value) if isinstance(node.value, str | int | float) else node.kind
        raise node.refusal(f"{what}, not {got}")
    return node.value


def _budget(node: Node) -> float | str:
    value: float | str = _expect(node, "budget is an amount of memory, as 12GiB", str, int, float)
    _located(node, parse_budget, value)
    return value


def _margin(node: Node) -> float | str:
    value: float | str = _expect(node, "margin is an amount of memory, as 200MiB", str, int, float)
    _located(node, parse_margin, value)
    return value


def _machine(node: Node) -> Machine:
    if not isinstance(node.value, dict):
        name = _expect(node, "machine is the name of a preset, or a mapping", str)
        if name not in Machine.presets():
            raise node.refusal(f"unknown machine {shown(name)}; known are {', '.join(Machine.presets())}, or a mapping")
        return Machine.preset(name)
    _check_keys(node, OF_MACHINE, " of machine")
    rates = {key: _single(entry, f"{key} of machine") for key, entry in node.value.items()}
    sound = Machine.preset("cpu").to_dict() | {"name": str(rates.get("name"))}
    for key, entry in node.value.items():  # one at a time, so that a complaint has the line of the rate that is wrong
        _located(entry, Machine.from_dict, sound | {key: rates[key]})
    inside = replace(node, inside=("machine",))  # where a key may be missing
    return _located(inside, Machine.from_dict, rates)


def _strategy(node: Node) -> str:
    name: str = _expect(node, f"strategy is one of {', '.join(strategies.names())}", str)
    _located(node, strategies.find, name)
    return name


def _options(node: Node) -> dict[str, Scalar]:
    entries = _expect(node, "options is a mapping of the strategy's options", dict)
    return {name: _single(entry, f"option {shown(name)}") for name, entry in entries.items()}


def _single(node: Node, what: str) -> Scalar:
    value: Scalar = _expect(node, f"{what} is a single value", str, int, float, bool, type(None))
    return value


def _blocks(node: Node) -> tuple[str, ...]:
    items = _expect(node, "blocks is a list of name patterns, as ['blocks.*']", list)
    if not items:
        raise node.refusal("blocks is a list of at least one name pattern, as ['blocks.*'], not an empty one")
    return tuple(_expect(item, "a pattern of blocks is a text", str) for item in items)


def _entry(node: Node) -> str:
    what = "entry is the name of a method, as decode"
    name: str = _expect(node, what, str)
    if not name.isidentifier() or iskeyword(name) or name.startswith("__"):
        raise node.refusal(f"{what}, not {shown(name)}")
    return name


_READERS: dict[str, Callable[[Node], Any]] = {
    "budget": _budget,
    "machine": _machine,
    "strategy": _strategy,
    "options": _options,
    "blocks": _blocks,
    "entry": _entry,
    "margin": _margin,
}
ACCEPTED = (*_READERS, "components")
OF_COMPONENT = ("strategy", "options", "blocks", "entry")  # budget and machine are shared by all
OF_MACHINE = tuple(entry.name for entry in fields(Machine))


def _accepted_keys(inside: tuple[str, ...]) -> Sequence[str]:
    """The keys that are accepted at a place of the file. `inside`: the keys that lead there."""
    match inside:
        case ("machine", *_):
            return OF_MACHINE
        case ("options", *_) | ("components", _, "options", *_):
            known = {
                name: ", ".join(strategies.options_of(strategies.find(name).schedule)) for name in strategies.names()
            }
            return [f"{options} (of {name})" for name, options in known.items() if options]
        case ("components", *_):
            return OF_COMPONENT
        case _:
            return ACCEPTED
