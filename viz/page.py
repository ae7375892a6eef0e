"""A figure measured in inches from its lower left corner, so that what is beside what can be decided in advance."""

from __future__ import annotations

from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from . import style


class Page:
    """A white page. Texts are plain: no name of a block is ever read as a formula, or breaks the file."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), facecolor="white")

    def write(
        self,
        x: float,
        y: float,
        text: str,
        size: float = style.SMALL_POINTS,
        weight: Literal["normal", "bold"] = "normal",
        align: Literal["left", "right"] = "left",
    ) -> float:
        """Write a line; gives how wide it is."""
        text = style.legible(text)
        look = {**style.PLAIN, "fontsize": size, "fontweight": weight, "ha": align, "color": style.INK}
        self.figure.text(x / self.width, y / self.height, text, **look)
        return style.text_points(text, size, weight) / 72

    def fill(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """Fill a rectangle."""
        corner, size = (x / self.width, y / self.height), (width / self.width, height / self.height)
        self.figure.add_artist(Rectangle(corner, *size, facecolor=colour, linewidth=0))

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes with two quiet spines, and no more ink than needed."""
        place = (x / self.width, y / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(place)
        axes.tick_params(labelsize=style.SMALL_POINTS, colors=style.INK, length=2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(style.FAINT)
        return axes
