"""How every picture looks: colours, sizes of text, units. Draws nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Final

from matplotlib import colormaps
from matplotlib.colors import to_hex, to_rgb
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.textpath import text_to_path

from taskgraph_offload.nouns.names import printable, spoken

# Okabe and Ito's colours, which people with any kind of colour vision can tell apart; greys for what only frames.
INK: Final = "#222222"
FAINT: Final = "#767676"
GRID: Final = "#dddddd"
BLUE: Final = "#0072b2"
SKY: Final = "#86c5ea"
WAIT: Final = "#d55e00"
PALE_WAIT: Final = "#fbdcc8"
PALE_BLUE: Final = "#cfe6f4"
CURVES: Final = (BLUE, "#e69f00", "#009e73", "#cc79a7", "#56b4e9", WAIT, "#8c6d31", FAINT)
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "h")

TITLE_POINTS: Final = 11.0
TEXT_POINTS: Final = 8.5
SMALL_POINTS: Final = 7.0
PLAIN: Final[dict[str, Any]] = {"fontsize": SMALL_POINTS, "parse_math": False}  # a name of a block is no formula
TIMES: Final = "\N{MULTIPLICATION SIGN}"
WEIGHTS: Final = ("normal", "bold")
BOX: Final = "\N{WHITE SQUARE}"

BYTES_UNITS: Final = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def block_of(call: str) -> str:
    """The block that a call belongs to: its first call, its second one, a part of it, the glue behind it look alike.

    >>> {block_of(call) for call in ("blocks.3", "blocks.3#2", "blocks.3/1", "blocks.3:after")}
    {'blocks.3'}
    """
    return re.sub(r"(#\d+|/\d+|:after)*$", "", call)


def block_colours(calls: Iterable[str]) -> dict[str, str]:
    """A colour for each block, by its place in the model: dark at the start, light at the end.

    Every second one is paler, so that neighbours can be told apart where there are many.

    >>> list(block_colours(["a", "b", "a#2"]))
    ['a', 'b']
    """
    blocks = list(dict.fromkeys(map(block_of, calls)))
    ramp, last = colormaps["viridis"], max(1, len(blocks) - 1)
    return {block: _paler(ramp(0.1 + 0.86 * i / last), 0.35 * (i % 2)) for i, block in enumerate(blocks)}


def _paler(colour: tuple[float, float, float, float], share: float) -> str:
    red, green, blue = (part + (1 - part) * share for part in colour[:3])
    return to_hex((red, green, blue))


def text_colour(background: str) -> str:
    """Black or white, whichever reads better on a colour.

    >>> text_colour("#000000"), text_colour("#ffffff")
    ('white', '#222222')
    """
    red, green, blue = to_rgb(background)
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def legible(text: str) -> str:
    r"""A text as a picture can show it: in people's words, and with a box for each character that the fonts lack.

    >>> legible("\u65e5\u672c 3\x07")
    '□□ 3\\x07'
    """
    return "".join(char if char.isascii() or _has_glyph(char) else BOX for char in printable(spoken(text)))


def _has_glyph(char: str) -> bool:
    """Whether a character can be drawn in both weights; where several fonts are set, by any of them."""
    families = FontProperties().get_family()
    fonts = [
        [get_font(findfont(FontProperties(family=name, weight=weight))) for name in families] for weight in WEIGHTS
    ]
    return all(any(font.get_char_index(ord(char)) for font in choice) for choice in fonts)


@lru_cache(maxsize=8192)
def text_points(text: str, points: float, weight: str = "normal") -> float:
    """How wide a text is when set in a size, both in points; a little more, since pixels round up.

    >>> 20 < text_points("blocks.3", 7) < 50
    True
    """
    font = FontProperties(size=points, weight=weight)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, False)
    return 1.03 * float(width)


def seconds_unit(largest: float) -> tuple[float, str]:
    """The unit for an axis of seconds up to the largest: what to divide by, and its name.

    >>> seconds_unit(0.25)
    (0.001, 'ms')
    """
    return (1.0, "s") if largest >= 2 else (1e-3, "ms") if largest >= 2e-3 else (1e-6, "us")


def seconds_text(largest: float) -> Callable[[float | None], str]:
    """Prints seconds in the unit that suits the largest of them; nothing for nothing.

    >>> seconds_text(1.2)(0.25), seconds_text(0.25)(None)
    ('250.0 ms', '')
    """
    divisor, unit = seconds_unit(largest)
    digits = 3 if unit == "s" else 1
    return lambda value: "" if value is None else f"{value / divisor:.{digits}f} {unit}"


def bytes_unit(largest: float) -> tuple[int, str]:
    """The unit for an axis of bytes up to the largest: what to divide by, and its name.

    >>> bytes_unit(3 * 2**30)
    (1073741824, 'GiB')
    """
    return next((unit for unit in BYTES_UNITS if largest >= unit[0]), BYTES_UNITS[-1])
