"""Settings files that make no sense: one line that says where, and which keys are accepted there."""

import os
from typing import Any

import pytest
import torch
from taskgraph_offload.planner import strategies
from taskgraph_offload.planner.settings import ACCEPTED, OF_COMPONENT, OF_MACHINE, read_settings
from taskgraph_offload.planner.strict_yaml import LARGEST_FILE

import taskgraph_offload as tgo

from .test_settings import COMPONENTS

OPTIONS = {name: list(strategies.options_of(strategies.find(name).schedule)) for name in strategies.names()}


def refused(tmp_path, content: str | bytes) -> str:
    """The one line that a file is refused with."""
    path = tmp_path / "offload.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(tgo.SettingsError) as caught:
        read_settings(path)
    message = str(caught.value)
    assert message.isprintable(), "one line, whatever the file holds"
    assert "accepted keys are" in message
    assert len(message.removeprefix(f"settings file {path}: ")) < 270
    return message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("budget: 12GiB\nbugdet: 1\n", "line 2: unknown key 'bugdet'"),
        ("budget: 12GiB\n\nbudget: 1\n", "line 3: the key 'budget' comes twice, first in line 1"),
        ("machine:\n  name: a\n  link: 3\n", "line 3: unknown key 'link' of machine; accepted keys are name, h2d"),
        ("machine: {name: a}\n", "line 1: machine: key .* is missing; accepted keys are name, h2d"),
        ("machine: rtx9999\n", "line 1: unknown machine 'rtx9999'; known are"),
        ("strategy: fastest\n", "line 1: unknown strategy 'fastest'; there are"),
        ("strategy: layerwise\noptions:\n  prefetch: 1\n  depth: 2\n", "line 4: strategy 'layerwise' has no option"),
        ("strategy: layerwise\noptions:\n  prefetch: [1]\n", "line 3: option 'prefetch' is a single value, not a list"),
        ("options: 3\n", "line 1: options is a mapping of the strategy's options, not 3"),
        ("budget: true\n", "line 1: budget is an amount of memory, as 12GiB, not True"),
        ("budget: 12 apples\n", "line 1: cannot read the budget '12 apples'"),
        ("budget: -3\n", "line 1: budget -3 must be more than zero"),
        ("margin: much\n", "line 1: margin .much. is no amount"),
        ("blocks: layers.*\n", "line 1: blocks is a list of name patterns"),
        ("blocks:\n- a\n- 7\n", "line 3: a pattern of blocks is a text, not 7"),
        ("blocks:\n  []\n", "line 1: blocks is a list of at least one name pattern"),
        ("entry: 'a b'\n", "line 1: entry is the name of a method"),
        ("entry: class\n", "line 1: entry is the name of a method, as decode, not 'class'"),
        ("entry: __init__\n", "line 1: entry is the name of a method, as decode, not '__init__'"),
        ("entry: ''\n", "line 1: entry is the name of a method, as decode, not ''"),
        ("entry: &x decode\n", "line 1: the anchor &x is refused"),
        ("budget: *x\n", "line 1: the alias \\*x is refused"),
        ("budget: !!float 12\n", "line 1: the tag 'tag:yaml.org,2002:float' is refused"),
        ("budget: 1\n---\nbudget: 2\n", "line 2: a second document begins"),
        ("<<: {budget: 1}\n", "line 1: unknown key '<<'"),
        ("? [budget]\n: 1\n", "line 1: a key is a single word"),
        ("- budget\n", "line 1: the file must be a mapping of keys to values, not a list"),
        ("", "line 1: the file holds nothing"),
        ("budget: [1\nstrategy: x\n", "line 2: not YAML: expected ',' or ']', but got ':'"),
        ("budget: 1\nentry: a\x00b\n", "line 2: the character '.x00' has no place"),
        (b"budget: 1\nentry: \xff\n", "line 2: this is not UTF-8 text"),
        ("options:\n  a: [[[[1]]]]\n", "line 2: more than 4 mappings and lists inside one another"),
        (f"budget: 1\nentry: {'x' * 300}\n", "line 2: a value of 300 characters"),
        ("budget: 1\n" + "# filler\n" * LARGEST_FILE, "line 7282: the file is larger than 64 KiB"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_line(tmp_path, content, says):
    with pytest.raises(tgo.SettingsError, match=says):
        raise tgo.SettingsError(refused(tmp_path, content))


@pytest.mark.parametrize(
    ("strategy", "option", "says"),
    [
        ("layerwise", "prefetch: two", "'prefetch' of layerwise is a whole number from 0 on, not 'two'"),
        ("layerwise", "prefetch: 1.5", "'prefetch' of layerwise is a whole number from 0 on, not 1.5"),
        ("layerwise", "prefetch: true", "'prefetch' of layerwise is a whole number from 0 on, not True"),
        ("layerwise", "prefetch: null", "'prefetch' of layerwise is a whole number from 0 on, not None"),
        ("layerwise", "prefetch: -1", "'prefetch' of layerwise is a whole number from 0 on, not -1"),
        ("layerwise", "ratio: yes", "'ratio' of layerwise is a number from 0 to 1, not 'yes'"),
        ("layerwise", "ratio: '0.3'", "'ratio' of layerwise is a number from 0 to 1, not '0.3'"),
        ("layerwise", "ratio: 1.01", "'ratio' of layerwise is a number from 0 to 1, not 1.01"),
        ("layerwise", "residents: 3", "'residents' of layerwise is 'leading' or 'spread', not 3"),
        ("layerwise", "residents: Spread", "'residents' of layerwise is 'leading' or 'spread', not 'Spread'"),
        ("model", "writeback: 1", "'writeback' of model is true or false, not 1"),
    ],
)
def test_an_option_of_the_wrong_type_is_refused_with_its_line_and_what_is_accepted(tmp_path, strategy, option, says):
    assert f"line 4: option {says}; " in refused(tmp_path, f"strategy: {strategy}\noptions:\n  # mine\n  {option}\n")
    component = f"components:\n  vae:\n    strategy: {strategy}\n    options:\n      {option}\n"
    assert f"line 5: option {says}; " in refused(tmp_path, component)


def test_every_option_of_every_strategy_is_checked_by_its_annotation(tmp_path):
    """Also those of strategies that are still to come; and by a planner, before it touches the model."""
    checked = 0
    for name, options in OPTIONS.items():
        for option in options:
            refusal = f"option '{option}' of {name} is "
            assert f"line 3: {refusal}" in refused(tmp_path, f"strategy: {name}\noptions:\n  {option}: so so\n")
            wrong: dict[str, Any] = {option: "so so"}
            with pytest.raises(tgo.SettingsError, match=refusal):
                tgo.Planner(torch.nn.Linear(2, 2), 1, strategy=name, **wrong)
            checked += 1
    assert checked >= 4


RATES = "".join(f"  {key}: 1e9\n" for key in OF_MACHINE[1:])
MACHINE = f"machine:\n  name: mine\n{RATES}"
TOP, IN_MACHINE, IN_COMPONENT = (", ".join(keys) for keys in (ACCEPTED, OF_MACHINE, OF_COMPONENT))
IN_OPTIONS = ", ".join(f"{', '.join(options)} (of {name})" for name, options in OPTIONS.items() if options)


@pytest.mark.parametrize(
    ("content", "line", "accepted"),
    [
        (MACHINE.replace("latency_seconds: 1e9", "latency_seconds: -1"), 5, IN_MACHINE),
        (MACHINE.replace("compute_flops: 1e9", "compute_flops: fast"), 6, IN_MACHINE),
        (MACHINE.replace("compute_flops: 1e9", "compute_flops: [1]"), 6, IN_MACHINE),
        (MACHINE.replace("name: mine", "name: 7"), 2, IN_MACHINE),
        (f"machine:\n{RATES}  name: 7\n", 8, IN_MACHINE),
        (f"budget: 1\nmachine:\n{RATES}", 2, IN_MACHINE),
        (f"{MACHINE}  speed: 1\n", 9, IN_MACHINE),
        (f"{MACHINE}  name: yours\n", 9, IN_MACHINE),
        (f"{MACHINE.replace('mine', '&x mine')}", 2, IN_MACHINE),
        (f"{MACHINE}  : }}\n", 9, IN_MACHINE),
        (f"{MACHINE}bugdet: 1\n", 9, TOP),
        ("machine:\n- rtx4090\n", 1, TOP),
        ("options:\n  prefetch: 1\nstrategy: keep\n", 2, IN_OPTIONS),
        ("strategy: layerwise\noptions:\n  ratio: 0\n  ratio: 1\n", 4, IN_OPTIONS),
        ("strategy: layerwise\noptions:\n  ratio:\n  - 1\n", 3, IN_OPTIONS),
        ("options:\n- prefetch\n", 1, TOP),
        ("components:\n  vae:\n    strategy: keep\n    budget: 1\n", 4, IN_COMPONENT),
        ("components:\n  vae:\n    strategy: best\n", 3, IN_COMPONENT),
        ("components:\n  vae:\n    entry: decode\n    entry: decode\n", 4, IN_COMPONENT),
        ("components:\n  vae: 3\n", 2, IN_COMPONENT),
        ("components:\n  vae:\n    options:\n      a: &x 1\n", 4, IN_OPTIONS),
        ("components: 3\n", 1, TOP),
    ],
)
def test_a_complaint_has_its_own_line_and_the_keys_that_are_accepted_there(tmp_path, content, line, accepted):
    message = refused(tmp_path, content)
    assert f": line {line}: " in message
    assert message.endswith(f"; accepted keys are {accepted}")


@pytest.mark.parametrize(
    "content",
    [
        "budget: {digits}",
        "budget: {text}",
        "budget: '{digits}GiB'",
        "margin: {digits}",
        "margin: {text}",
        "machine: {text}",
        "machine: {digits}",
        "strategy: {text}",
        "strategy: {digits}",
        "strategy: layerwise\noptions: {{prefetch: {text}}}",
        "strategy: layerwise\noptions: {{prefetch: -{digits}}}",
        "strategy: layerwise\noptions: {{residents: {text}}}",
        "options: {{{text}: 1}}",
        "options: {digits}",
        "blocks: {text}",
        "blocks: [{digits}]",
        "entry: '{text} {text}'",
        "entry: {digits}",
        "{text}: 1",
        "components: {{{text}: 1}}",
        "components: {{{text}: {{{text}: 1}}}}",
        MACHINE.replace("name: mine", "name: {text}").replace("seconds: 1e9", "seconds: -{digits}"),
        MACHINE.replace("name: mine", "name: {digits}"),
        MACHINE.replace("flops: 1e9", "flops: {text}"),
    ],
)
def test_what_is_long_is_not_quoted_whole(tmp_path, content):
    """Each value is of a length that is still read."""
    message = refused(tmp_path, content.format(digits="9" * 99, text="x" * 99))
    assert "9" * 40 not in message
    assert "x" * 40 not in message


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("  vae: {budget: 1}", r"line 6: unknown key 'budget' of component 'vae'"),
        ("  vae: 3", r"line 6: component 'vae' is a mapping"),
        ("  vae: {options: {prefetsh: 1}}", r"line 6: .*prefetsh"),
        ("  transformer: {}", r"line 6: .*transformer"),
    ],
)
def test_a_component_that_makes_no_sense_is_refused_with_its_line(line, names, tmp_path):
    path = tmp_path / "offload.yaml"
    path.write_text("\n".join([*COMPONENTS.splitlines()[1:6], line]))
    with pytest.raises(tgo.SettingsError, match=names):
        read_settings(path)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing.yaml", ".", "pipe"):
        with pytest.raises(tgo.SettingsError, match="there is no such file"):
            read_settings(tmp_path / name)
