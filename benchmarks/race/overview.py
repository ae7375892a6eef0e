"""All races at a glance: for each library its best way in each case, as a table of Markdown and as a picture."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any, Final

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from taskgraph_offload.viz.page import (
    BLUE,
    CURVES,
    GRID,
    SMALL_POINTS,
    TITLE_POINTS,
    WAIT,
    Page,
    save_figure,
)

from .report import Case, Row

Facts = dict[str, Any]
FIRST: Final = 4  # steps of the first request
LIBRARIES: Final[dict[str, tuple[str, ...]]] = {  # and how the names of its racers begin
    "ours, calibrated": ("ours-calibrated",),
    "ours": ("ours",),
    "diffusers": ("diffusers-", "group-"),
    "RamTorch": ("ramtorch-",),
    "mmgp": ("mmgp",),
    "accelerate": ("accelerate-",),
}
COLOURS: Final = dict(zip(LIBRARIES, (BLUE, BLUE, CURVES[1], CURVES[2], CURVES[3], WAIT), strict=True))


@dataclass(frozen=True)
class Best:
    """The fastest way of a library to stay within the budget of a case."""

    row: Row
    case: Case

    @property
    def ratio(self) -> float:
        """Its step over the floor."""
        return self.row.median("step") / self.case.floor


def best_of(case: Case, library: str) -> Best | None:
    """The fastest racer of a library that met the budget."""
    if library == "ours":
        rows = [row for row in case.rows if row.name == "ours"]
    else:
        rows = [row for row in case.rows if row.name.startswith(LIBRARIES[library])]
    return next((Best(row, case) for row in rows if row.fits), None)


def overview(results: Facts) -> str:
    """Two tables of Markdown: a row for each case, and a row for each library."""
    cases = [Case.of(facts) for facts in results["cases"]]
    return "\n\n".join((_of_cases(cases), _of_libraries(cases)))


def _of_cases(cases: Sequence[Case]) -> str:
    lines = [["model", "link / compute", "memory", *LIBRARIES], ["---"] * (3 + len(LIBRARIES))]
    for case in cases:
        found = [best_of(case, library) for library in LIBRARIES]
        facts = case.facts
        steps = [f"{best.ratio:.3f}" if best else "-" for best in found]
        lines.append([facts["model"], f"{facts['balance']:.2g}", f"{facts['share']:.0%}", *steps])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _of_libraries(cases: Sequence[Case]) -> str:
    heads = ["", "step / floor: median", "worst", "first request / floor: median", "set-up: median", "reserved: median"]
    lines = [heads, ["---"] * len(heads)]
    for library in LIBRARIES:
        found = [best for case in cases if (best := best_of(case, library)) is not None]
        if found:
            steps = [best.ratio for best in found]
            requests = [best.row.median("request") / FIRST / best.case.floor for best in found]
            setup = statistics.median(best.row.median("setup") for best in found)
            reserved = statistics.median(best.row.median("reserved") / best.case.facts["weights"] for best in found)
            lines.append(
                [
                    f"{library} ({len(found)} of {len(cases)} cases)",
                    f"{statistics.median(steps):.3f}",
                    f"{max(steps):.3f}",
                    f"{statistics.median(requests):.3f}",
                    f"{setup:.1f} s",
                    f"{reserved:.0%} of the weights",
                ]
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# The picture, in inches: a row of panels for each model, a column for each balance; budgets to the right, steps up.
LEFT: Final = 0.95
RIGHT: Final = 1.35
PANEL: Final = (2.5, 1.45)
BETWEEN: Final = (0.3, 0.42)
TOP: Final = 0.75
FOOT: Final = 0.5
HIGHEST: Final = 4.0
TICKS: Final = (1.0, 1.2, 1.5, 2.0, 3.0, 4.0)


def draw_overview(results: Facts, path: str | os.PathLike[str]) -> None:
    """Draw the steps of all libraries in all cases; PNG or SVG, by the suffix."""
    cases = [Case.of(facts) for facts in results["cases"]]
    models = list(dict.fromkeys(case.facts["model"] for case in cases))
    balances = sorted({round(case.facts["balance"], 2) for case in cases})
    width = LEFT + len(balances) * (PANEL[0] + BETWEEN[0]) - BETWEEN[0] + RIGHT
    page = Page(width, TOP + len(models) * (PANEL[1] + BETWEEN[1]) - BETWEEN[1] + FOOT)
    kind = "simulated" if cases[0].facts["rates"] else cases[0].facts["card"]
    page.write(0.2, page.height - 0.27, f"Step over the floor ({kind})", size=TITLE_POINTS, weight="bold")
    for column, balance in enumerate(balances):
        left = LEFT + column * (PANEL[0] + BETWEEN[0])
        page.write(left, page.height - 0.6, f"the link takes {balance:g} of the compute time", weight="bold")
        for row, model in enumerate(models):
            foot = page.height - TOP - (row + 1) * PANEL[1] - row * BETWEEN[1]
            here = [c for c in cases if c.facts["model"] == model and round(c.facts["balance"], 2) == balance]
            if here:
                _draw_panel(page, here, left, foot, named=column == len(balances) - 1)
            if column == 0:
                page.write(0.2, foot + PANEL[1] / 2, model, weight="bold")
    page.write(LEFT, 0.12, "memory, as a share of the weights; activations on top")
    save_figure(page.figure, path)


def _draw_panel(page: Page, cases: Sequence[Case], left: float, foot: float, named: bool) -> None:
    axes = page.axes(left, foot, *PANEL)
    shares = [case.facts["share"] for case in cases]
    axes.set_yscale("log")
    axes.set_ylim(0.97, HIGHEST * 1.05)
    axes.set_xlim(min(shares) - 0.06, max(shares) + 0.06)
    axes.xaxis.set_major_locator(FixedLocator(shares))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    axes.yaxis.set_major_locator(FixedLocator(list(TICKS)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    ends: list[tuple[float, str]] = []
    for library in reversed(LIBRARIES):
        found = [(case.facts["share"], best.ratio) for case in cases if (best := best_of(case, library)) is not None]
        if found:
            ours, dashes = library.startswith("ours"), (0, (2, 1.5)) if library == "ours" else "-"
            axes.plot(
                *zip(*found, strict=True),
                color=COLOURS[library],
                linewidth=2.0 if ours else 1.2,
                linestyle=dashes,
                marker="o",
                markersize=4 if ours else 3,
                clip_on=False,
            )
            ends.append((found[-1][1], library))
    if named:
        _write_names(page, ends, left + PANEL[0] + 0.08, foot)


def _write_names(page: Page, ends: Sequence[tuple[float, str]], left: float, foot: float) -> None:
    """The names at the right ends of their lines, moved apart where they would meet."""
    lowest, line = foot - 0.05, 1.35 * SMALL_POINTS / 72
    for ratio, library in sorted(ends):
        wanted = foot + PANEL[1] * _height(ratio) - 0.03
        lowest = max(wanted, lowest)
        page.write(left, lowest, library, colour=COLOURS[library])
        lowest += line


def _height(ratio: float) -> float:
    return log(ratio / 0.97) / log(HIGHEST * 1.05 / 0.97)
