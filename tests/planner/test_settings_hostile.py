"""Settings files that mean harm, or were mangled: read or refused in one line, each without much work."""

import itertools
import random

import pytest
from taskgraph_offload.planner.settings import ACCEPTED, read_settings

import taskgraph_offload as tgo

from ..effort import calls_of
from .test_settings import GOOD
from .test_settings_refuses import refused

MOST_CALLS = 1_000_000
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
def test_a_hostile_file_is_refused_in_one_line_and_without_much_work(tmp_path, name):
    assert calls_of(lambda: refused(tmp_path, BOMBS[name]), most=MOST_CALLS) > 0


def test_two_hundred_mutated_files_are_read_or_refused_in_one_line(tmp_path):
    """Only the library's own error escapes, each without much work."""
    chance, path, refusals = random.Random(20), tmp_path / "offload.yaml", list[bool]()
    for _ in range(200):
        path.write_bytes(mutated(GOOD.encode(), chance))
        calls_of(lambda: refusals.append(read_or_refused(path)), most=MOST_CALLS)
    assert sum(refusals) > 100


def read_or_refused(path):
    """Whether a file was refused, as it should be if it cannot be read."""
    try:
        settings = read_settings(path)
    except tgo.SettingsError as error:
        assert str(error).isprintable()
        assert str(path) in str(error)
        return True
    assert {*settings.__dataclass_fields__, "components"} == set(ACCEPTED)
    return False


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
