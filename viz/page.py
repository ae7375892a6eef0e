"""How every picture looks: colours, text, units, a page measured in inches, and how it becomes a file.

Knows nothing of timelines or strategies.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path

from taskgraph_offload.errors import SettingsError
from taskgraph_offload.nouns.names import printable, spoken

# Colours

# Okabe and Ito's colours: people with any kind of colour vision can tell them apart. Greys are for frames.
INK: Final = "#222222"
FAINT: Final = "#767676"
GRID: Final = "#dddddd"
BLUE: Final = "#0072b2"
SKY: Final = "#86c5ea"
WAIT: Final = "#d55e00"
PALE_WAIT: Final = "#fbdcc8"
PALE_BLUE: Final = "#cfe6f4"
CURVES: Final = (BLUE, "#e69f00", "#009e73", "#cc79a7", "#56b4e9", WAIT, "#8c6d31", "#6a3d9a")


def curve_colours(count: int) -> list[str]:
    """A colour for each of `count` curves, no two the same: eight colours first, then the same eight darker.

    >>> len(set(curve_colours(20)))
    20
    """
    rounds = -(-count // len(CURVES))
    return [_darker(CURVES[i % len(CURVES)], i // len(CURVES) / rounds) for i in range(count)]


def _darker(colour: str, share: float) -> str:
    red, green, blue = (part * (1 - share) for part in to_rgb(colour))
    return to_hex((red, green, blue))


def block_of(call: str) -> str:
    """The block of a call. Repeated calls of a block, parts of it and the code after it share its colour.

    >>> {block_of(call) for call in ("blocks.3", "blocks.3#2", "blocks.3/1", "blocks.3:after")}
    {'blocks.3'}
    """
    return re.sub(r"(#\d+|/\d+|:after)*$", "", call)


def block_colours(calls: Iterable[str]) -> dict[str, str]:
    """A colour for each block, by its place in the model: dark at the start, light at the end.

    Every second one is paler, so that neighbours differ where there are many.

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


# Text

TITLE_POINTS: Final = 11.0
TEXT_POINTS: Final = 8.5
SMALL_POINTS: Final = 7.0
PLAIN: Final[dict[str, Any]] = {"fontsize": SMALL_POINTS, "parse_math": False}  # a block's name is not a formula
TIMES: Final = "\N{MULTIPLICATION SIGN}"
WEIGHTS: Final = ("normal", "bold")
BOX: Final = "\N{WHITE SQUARE}"


def legible(text: str) -> str:
    r"""A text that a picture can show: names in words, and a box for each character that the fonts lack.

    >>> legible("\u65e5\u672c 3\x07")
    '□□ 3\\x07'
    """
    return "".join(char if char.isascii() or _has_glyph(char) else BOX for char in printable(spoken(text)))


def _has_glyph(char: str) -> bool:
    """Whether some font of the family has this character in both weights."""
    families = FontProperties().get_family()
    fonts = [
        [get_font(findfont(FontProperties(family=name, weight=weight))) for name in families] for weight in WEIGHTS
    ]
    return all(any(font.get_char_index(ord(char)) for font in choice) for choice in fonts)


@lru_cache(maxsize=8192)
def text_points(text: str, points: float, weight: str = "normal") -> float:
    """The width of a text of some size, both in points; 3% more, since pixels are rounded up.

    >>> 20 < text_points("blocks.3", 7) < 50
    True
    """
    font = FontProperties(size=points, weight=weight)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, False)
    return 1.03 * float(width)


# Units

BYTES_UNITS: Final = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def seconds_unit(largest: float) -> tuple[float, str]:
    """The unit for an axis of seconds up to `largest`: what to divide by, and its name.

    >>> seconds_unit(0.25)
    (0.001, 'ms')
    """
    return (1.0, "s") if largest >= 2 else (1e-3, "ms") if largest >= 2e-3 else (1e-6, "us")


def seconds_text(largest: float) -> Callable[[float | None], str]:
    """A function that prints seconds in the unit that suits `largest`; None becomes an empty text.

    >>> seconds_text(1.2)(0.25), seconds_text(0.25)(None)
    ('250.0 ms', '')
    """
    divisor, unit = seconds_unit(largest)
    digits = 3 if unit == "s" else 1
    return lambda value: "" if value is None else f"{value / divisor:.{digits}f} {unit}"


def bytes_unit(largest: float) -> tuple[int, str]:
    """The unit for an axis of bytes up to `largest`: what to divide by, and its name.

    >>> bytes_unit(3 * 2**30)
    (1073741824, 'GiB')
    """
    return next((unit for unit in BYTES_UNITS if largest >= unit[0]), BYTES_UNITS[-1])


# The page


class Page:
    """A white page, measured in inches from its lower left corner, so that nothing is placed over anything else."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), facecolor="white")

    def write(
        self,
        x: float,
        y: float,
        text: str,
        size: float = SMALL_POINTS,
        weight: Literal["normal", "bold"] = "normal",
        align: Literal["left", "right"] = "left",
        colour: str = INK,
    ) -> float:
        """Write a line and return its width."""
        text = legible(text)
        look = {**PLAIN, "fontsize": size, "fontweight": weight, "ha": align, "color": colour}
        self.figure.text(x / self.width, y / self.height, text, **look)
        return text_points(text, size, weight) / 72

    def fill(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """Fill a rectangle."""
        corner, size = (x / self.width, y / self.height), (width / self.width, height / self.height)
        self.figure.add_artist(Rectangle(corner, *size, facecolor=colour, linewidth=0))

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes with grey lines on the left and below, and nothing on the other sides."""
        place = (x / self.width, y / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(place)
        axes.tick_params(labelsize=SMALL_POINTS, colors=INK, length=2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        return axes


# The file

PICTURES: Final = (".png", ".svg")
DOTS_PER_INCH: Final = 160
SALT: Final = "taskgraph-offload"  # for the names of an SVG's parts: without a salt they are random


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG or SVG, by the suffix. The same figure gives the same file."""
    kind = suffix_of(path, PICTURES).removeprefix(".")
    without_date = {"Date": None} if kind == "svg" else {}
    with rc_context({"svg.hashsalt": SALT}):
        write(path, lambda half: figure.savefig(half, format=kind, dpi=DOTS_PER_INCH, metadata=without_date))


def suffix_of(path: str | os.PathLike[str], accepted: Collection[str]) -> str:
    """The suffix of a path, or `SettingsError` if it is not an accepted one.

    >>> suffix_of("out/Timeline.PNG", PICTURES)
    '.png'
    """
    suffix = Path(path).suffix.lower()
    if suffix not in accepted:
        raise SettingsError(f"cannot write {os.fspath(path)!r}: the name must end in {' or '.join(accepted)}")
    return suffix


def write(path: str | os.PathLike[str], fill: Callable[[Path], object]) -> None:
    """Let `fill` write a hidden file in the same folder, then rename it: nobody ever reads half a file."""
    target = Path(path)
    if target.is_dir():
        raise SettingsError(f"cannot write {os.fspath(path)!r}: it is a folder; name a file in it")
    half = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fill(half)
        half.replace(target)
    except OSError as error:
        raise SettingsError(f"cannot write {os.fspath(path)!r}: {error.strerror or error}") from error
    finally:
        if half.exists():
            half.unlink()
