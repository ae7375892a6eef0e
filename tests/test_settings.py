"""The settings file: what it says is what the planner does; whatever else it holds is one line that says where."""

import itertools
import os
import random
import time

import pytest
import torch

import taskgraph_offload as tgo
from planner.settings import ACCEPTED, read_settings
from planner.strict_yaml import LARGEST_FILE

GOOD = """\
# how to run it on the small machine
budget: 800MiB
machine:
  name: mine
  h2d_bytes_per_second: 12e9
  d2h_bytes_per_second: 12000000000
  latency_seconds: 0
  compute_flops: 1e14
  memory_bytes_per_second: 9.5e11
strategy: layerwise
options: {residents: spread, prefetch: 2}
blocks: ["layers.*", head]
entry: forward
margin: 1MiB
"""


def refused(tmp_path, content: str | bytes) -> str:
    """The one line that a file is refused with."""
    path = tmp_path / "offload.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(tgo.SettingsError) as caught:
        read_settings(path)
    message = str(caught.value)
    assert message.isprintable(), "one line, whatever the file holds"
    assert "accepted keys are" in message
    assert len(message) < 600
    return message


def test_every_key_is_read(tmp_path):
    path = tmp_path / "offload.yaml"
    path.write_text(GOOD)
    settings = read_settings(path)
    assert settings.budget == "800MiB"
    assert settings.machine == tgo.Machine("mine", 12e9, 12e9, 0, 1e14, 9.5e11)
    assert (settings.strategy, settings.options) == ("layerwise", {"residents": "spread", "prefetch": 2})
    assert (settings.blocks, settings.entry, settings.margin) == (("layers.*", "head"), "forward", "1MiB")


def test_a_planner_from_settings_plans_what_they_say(tmp_path):
    path = tmp_path / "offload.yaml"
    path.write_text("budget: 60KiB\nmachine: rtx4090\nstrategy: layerwise\noptions:\n  prefetch: 2\nmargin: 0\n")
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8)))
    inputs = (torch.ones(1, 64),)
    plan = tgo.Planner.from_settings(path, model, inputs=inputs).plan()
    same = tgo.Planner(model, "60KiB", inputs=inputs, machine="rtx4090", strategy="layerwise", prefetch=2, margin=0)
    assert plan == same.plan()


def test_a_planner_needs_a_budget(tmp_path):
    path = tmp_path / "offload.yaml"
    path.write_text("machine: rtx4090\n")
    with pytest.raises(tgo.SettingsError, match="budget"):
        tgo.Planner.from_settings(path, torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("budget: 12GiB\nbugdet: 1\n", "line 2: unknown key 'bugdet'"),
        ("budget: 12GiB\n\nbudget: 1\n", "line 3: the key 'budget' comes twice, first in line 1"),
        ("machine:\n  name: a\n  link: 3\n", "line 3: unknown key 'link' of machine; accepted keys are name, h2d"),
        ("machine: {name: a}\n", "line 1: machine: key .* is missing"),
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
        ("entry: 'a b'\n", "line 1: entry is the name of a method"),
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


def test_yaml_reads_words_as_words(tmp_path):
    """YAML 1.1 would read these as true, as 754 seconds and as a day."""
    path = tmp_path / "offload.yaml"
    for word in ("yes", "12:34", "2024-01-01"):
        path.write_text(f"blocks: [{word}]\n")
        assert read_settings(path).blocks == (word,)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing.yaml", ".", "pipe"):
        with pytest.raises(tgo.SettingsError, match="there is no such file"):
            read_settings(tmp_path / name)


LETTERS = "abcdefghijklmnopqrstuvwxyz"
LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise(LETTERS))
BOMBS: dict[str, str | bytes] = {
    "a billion laughs": LAUGHS,
    "an anchor that holds itself": "budget: &a [*a]\n",
    "lists without end": "budget: " + "[" * 60_000,
    "mappings without end": "budget: " + "{a: " * 15_000,
    "mappings without end, by lines": "".join(" " * depth + "a:\n" for depth in range(350)),
    "dashes without end": "- " * 30_000,
    "questions without end": "? " * 30_000,
    "an object": "budget: !!python/object/apply:os.system ['touch /tmp/owned']\n",
    "an object by its long name": "budget: !<tag:yaml.org,2002:python/name:os.system> x\n",
    "a tag of the file's own": "%TAG ! tag:example.com,2000:\n---\nbudget: !x 1\n",
    "a version of the future": "%YAML 9.9\n---\nbudget: 1\n",
    "a merge": "a: &a {budget: 1}\n<<: *a\n",
    "a number without end": "budget: " + "9" * 60_000,
    "a number that is no number": "budget: .nan\n",
    "a number beyond numbers": "budget: 1e99999\n",
    "a text without end": "entry: '" + "x" * 60_000 + "'\n",
    "a folded text without end": "entry: >\n" + "  x\n" * 15_000,
    "a key without end": "k" * 60_000 + ": 1\n",
    "a key that is a mapping": "{a: 1}: 2\n",
    "many keys": "".join(f"k{i}: {i}\n" for i in range(6_000)),
    "the same key, many times": "budget: 1\n" * 6_000,
    "many documents": "---\n" * 15_000,
    "a lot": b"x" * 200_000,
    "zeros": b"\x00" * 60_000,
    "a program": b"\x7fELF\x02\x01\x01" + bytes(range(256)) * 10,
    "another encoding": "budget: 12GiB\n".encode("utf-16"),
    "a mark of byte order": b"\xef\xbb\xbfbudget: x x\n",
    "half a character": b"entry: \xe2\x82",
    "a line break in a key": '"a\\nb": 1\n',
    "colours of a terminal": '"\\e[31mred": 1\n',
    "text from right to left": "\u202ebudget: 1\n",
    "tabs": "machine:\n\tname: a\n",
    "only a comment": "# nothing\n",
    "only spaces": " \n \n",
    "a block that ends early": "machine: {name: a\n",
    "a quote that never ends": 'budget: "12GiB\n',
    "a percent sign": "%\n",
    "an at sign": "budget: @x\n",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_hostile_file_is_refused_in_one_line_and_at_once(tmp_path, name):
    begin = time.perf_counter()
    refused(tmp_path, BOMBS[name])
    assert time.perf_counter() - begin < 1


def test_two_hundred_mutated_files_are_read_or_refused_in_one_line(tmp_path):
    """Only the library's own error escapes, each in well under a second."""
    chance, path, refusals = random.Random(20), tmp_path / "offload.yaml", 0
    for _ in range(200):
        path.write_bytes(mutated(GOOD.encode(), chance))
        begin = time.perf_counter()
        try:
            settings = read_settings(path)
        except tgo.SettingsError as error:
            refusals += 1
            assert str(error).isprintable()
            assert str(path) in str(error)
        else:
            assert {*settings.__dataclass_fields__, "components"} == set(ACCEPTED)
        assert time.perf_counter() - begin < 1
    assert refusals > 100


def mutated(content: bytes, chance: random.Random) -> bytes:
    """The file with one to four pieces dropped, repeated, moved, or overwritten with what YAML makes much of."""
    evil = [
        b"&a ",
        b"*a",
        b"!!str ",
        b"<<: ",
        b"---\n",
        b"{",
        b"[" * 50,
        b"\x00",
        b"\xff",
        b"\n\n",
        b": ",
        b"? ",
        b"'",
        b"9" * 400,
    ]
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(content) + 1)
        stop = min(len(content), start + chance.randint(0, 30))
        piece = content[start:stop]
        content = chance.choice(
            [
                content[:start] + content[stop:],
                content[:stop] + piece + content[stop:],
                content[:start] + content[stop:] + piece,
                content[:start] + chance.choice(evil) + content[start:],
                content[:start] + chance.randbytes(3) + content[stop:],
            ]
        )
    return content


COMPONENTS = """
budget: 30%
strategy: layerwise
options: {prefetch: 2}
components:
  transformer: {options: {prefetch: 3, residents: spread}}
  vae:
    strategy: resident
    entry: decode
"""


def test_a_component_has_what_is_said_for_it_over_what_is_said_for_all(tmp_path):
    path = tmp_path / "offload.yaml"
    path.write_text(COMPONENTS)
    assert read_settings(path).options == {"prefetch": 2}
    assert read_settings(path, "transformer").options == {"prefetch": 3, "residents": "spread"}
    vae = read_settings(path, "vae")
    assert (vae.strategy, vae.options, vae.entry, vae.budget) == ("resident", {}, "decode", "30%")
    with pytest.raises(tgo.SettingsError, match=r"no component 'unet'; there are transformer, vae"):
        read_settings(path, "unet")


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
