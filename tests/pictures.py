"""Finds texts and bars in a picture, and checks that no text covers another."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def bars(figure: Figure, gid: str) -> PolyCollection:
    (found,) = (part for part in figure.findobj(PolyCollection) if part.get_gid() == gid)
    return found


def assert_legible(figure: Figure) -> None:
    """Assert that every text is on the page, and that none covers another."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    unseen = set(ticks_out_of_view(figure))
    shown = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in unseen]
    boxes = {text: text.get_window_extent(canvas.get_renderer()) for text in shown}
    for text, box in boxes.items():
        assert min(box.x0, box.y0) >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text
    for (one, a), (other, b) in combinations(boxes.items(), 2):
        assert a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0, f"{one} covers {other}"


def ticks_out_of_view(figure: Figure) -> Iterator[Text]:
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            yield from (tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high)


def widths(axes: Axes, place: int) -> list[float]:
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    return [bar.get_width() for bar in bars if abs(bar.get_y() + bar.get_height() / 2 - place) < 0.01]
