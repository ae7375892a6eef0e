"""Shows the results of races: tables of text, and a picture. Races nothing."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from taskgraph_offload.viz.page import (
    BLUE,
    FAINT,
    INK,
    SKY,
    SMALL_POINTS,
    TEXT_POINTS,
    TITLE_POINTS,
    WAIT,
    Page,
    bytes_unit,
    save_figure,
    seconds_unit,
    text_points,
)

from taskgraph_offload.nouns.budget import readable

Facts = dict[str, Any]
OVER: Final = 1.01  # a peak that is over the budget by more than 1% does not count as a result
OURS: Final = ("ours", "ours-calibrated")


@dataclass(frozen=True)
class Row:
    """One racer in one case: medians over its turns."""

    name: str
    runs: tuple[Facts, ...]
    budget: int

    def median(self, key: str) -> float:
        """The median of a figure; 0 if a real card does not count it."""
        return float(statistics.median(run.get(key) or 0 for run in self.runs))

    def counted(self, key: str, show: Callable[[float], str]) -> str:
        """Such a figure as a text; nothing if the card does not count it."""
        return show(self.median(key)) if key in self.runs[0] else ""

    @property
    def spread(self) -> float:
        """The longest step less the shortest one, over the turns."""
        steps = [run["step"] for run in self.runs]
        return float(max(steps) - min(steps))

    @property
    def peak(self) -> int:
        """The highest peak of all turns."""
        return max(run["peak"] for run in self.runs)

    @property
    def fits(self) -> bool:
        """Whether the peak met the budget. The resident model need not."""
        return self.peak <= OVER * self.budget

    @property
    def predicted(self) -> float | None:
        """The step that was predicted, where there is a plan."""
        return self.median("predicted") or None


@dataclass(frozen=True)
class Case:
    """One model with one budget on one card: who ran, fastest first, and who failed."""

    facts: Facts
    rows: tuple[Row, ...]
    failed: dict[str, str]

    @staticmethod
    def of(facts: Facts) -> Case:
        """Put the turns of each racer together."""
        rows, failed = [], {}
        for name, runs in facts["runs"].items():
            if good := tuple(run for run in runs if "error" not in run):
                rows.append(Row(name, good, facts["budget"]))
            elif runs:
                failed[name] = runs[0]["error"]
        return Case(facts, tuple(sorted(rows, key=lambda row: row.median("step"))), failed)

    @property
    def title(self) -> str:
        """The model, the budget and the balance."""
        of, link = readable(self.facts["weights"]), self.facts["balance"]
        budget = f"{readable(self.facts['budget'])} ({self.facts['share']:.0%} of the weights)"
        kind = f"simulated, torch {self.facts['torch']}" if self.facts["rates"] else self.facts["card"]
        return f"{self.facts['model']}, {of}, in {budget}; the link takes {link:.2g} of the compute time ({kind})"

    @property
    def floor(self) -> float:
        """What no racer beats: the resident step or our bound."""
        bounds = [row.median("bound") for row in self.rows if row.name in OURS]
        return float(max(self.facts["step"], *bounds, 0))

    def verdict(self) -> list[str]:
        """Where this library is not first, or more than 5% above the floor."""
        said = []
        rivals = [row for row in self.rows if row.fits and row.name not in (*OURS, "resident")]
        for ours in (row for row in self.rows if row.name in OURS):
            if not ours.fits:
                said.append(f"{ours.name}: the peak is {ours.peak / ours.budget - 1:.1%} over the budget")
            if ours.median("step") > 1.05 * self.floor:
                said.append(f"{ours.name}: {ours.median('step') / self.floor - 1:.1%} above the floor")
            for rival in rivals:
                for what in ("step", "request"):
                    behind = ours.median(what) / rival.median(what) - 1
                    if ours.median(what) - rival.median(what) > max(ours.spread, rival.spread, 1e-3 * self.floor):
                        said.append(f"{ours.name}: {what} {behind:.1%} behind {rival.name}")
        return said


# Text

_COLUMNS: Final[dict[str, Callable[[Row, Case], str]]] = {
    "step": lambda row, case: f"{row.median('step'):.3f} s",
    "/ floor": lambda row, case: f"{row.median('step') / case.floor:.3f}",
    "+-": lambda row, case: f"{row.spread / case.floor:.3f}" if len(row.runs) > 1 else "",
    "predicted": lambda row, case: f"{row.predicted / row.median('step') - 1:+.1%}" if row.predicted else "",
    "set up": lambda row, case: f"{row.median('setup'):.1f} s",
    "request": lambda row, case: f"{row.median('request'):.2f} s",
    "peak": lambda row, case: readable(row.peak),
    "reserved": lambda row, case: readable(row.median("reserved")),
    "host": lambda row, case: readable(row.median("host")),
    "to device": lambda row, case: row.counted("h2d_bytes", readable),
    "back": lambda row, case: row.counted("d2h_bytes", readable),
    "pageable": lambda row, case: row.counted("pageable_bytes", readable),
    "blocked": lambda row, case: row.counted("host_wait_seconds", "{:.2f} s".format),
    "call": lambda row, case: f"{row.median('call'):.2f} s",
}
_NOTES: Final = """\
step: of the second request, the median of all turns; +-: the slowest turn less the fastest one, over the floor
floor: the resident step, or the bound of this library's plan if that is longer
predicted: the predicted step over the measured one; set up: until the first step can begin, with planning
request: the first steps from cold, after the set-up, until the last output is there
peak: of allocated memory, from the set-up on; host: memory of the host, weights included
to device, back, pageable: bytes a step over the link
call: the host's time in a forward; blocked: the part of it in which it waited for the device"""


def tables(results: Facts) -> str:
    """All tables: a case each, then the outputs, then who is missing."""
    texts = [_table(Case.of(facts)) for facts in results["cases"]]
    texts.append(_NOTES)
    texts += [_checks(results["checks"])] if results["checks"] else []
    texts += [f"{racer}: not installed: pip install {' '.join(names)}" for racer, names in results["missing"].items()]
    texts.append(", ".join(f"{name} {number}" for name, number in results["versions"].items()))
    return "\n\n".join(texts)


def _table(case: Case) -> str:
    lines = [["", *_COLUMNS]]
    lines += [[row.name, *(show(row, case) for show in _COLUMNS.values())] for row in case.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    for place, row in enumerate(case.rows, 1):
        texts[place] += "" if row.fits or row.name == "resident" else "  over the budget"
    texts += [f"{name}: failed: {error}" for name, error in case.failed.items()]
    return "\n".join([case.title, *texts, *(f"! {line}" for line in case.verdict())])


def _checks(checks: Sequence[Facts]) -> str:
    """Whose outputs are those of the resident model, bit for bit."""
    lines = []
    for model in dict.fromkeys(check["model"] for check in checks):
        found = [check for check in checks if check["model"] == model]
        same = [check["racer"] for check in found if check.get("equal")]
        others = [
            f"{check['racer']}: "
            + (f"failed: {check['error']}" if "error" in check else f"{check['difference']:.2g} off")
            for check in found
            if not check.get("equal")
        ]
        lines.append("\n  ".join([f"{model}: outputs equal, bit for bit: {', '.join(same)}", *others]))
    return "\n".join(lines)


# The picture, in inches. A row for each racer of a case:
#
#   flux, 334 MiB, in 210 MiB ...                                                                TITLE
#               step       / floor   first request     device memory      host       over the link   HEADS
#   ours        [     |]     1.00    [   ][     ]      [     ] :  |       [   ]      [     ]          ROW each
#   ...
#               0  1  2              0  1  2  3        0 100  200                                     SCALE
WIDTHS: Final = (2.6, 2.2, 2.2, 1.5, 1.5, 1.5)
CELL: Final = 0.55
BETWEEN: Final = 0.3
EDGE: Final = 0.25
TITLE: Final = 0.42
HEADS: Final = 0.26
ROW: Final = 0.24
SCALE: Final = 0.5
LEGEND: Final = 0.3
BAR: Final = 0.66
EMPTY: Final[dict[str, Any]] = {"facecolor": "none", "edgecolor": FAINT, "linewidth": 0.9, "linestyle": (0, (3, 2))}


def draw(results: Facts, path: str | os.PathLike[str]) -> None:
    """Draw all cases, one below the other; PNG or SVG, by the suffix."""
    cases = [Case.of(facts) for facts in results["cases"]]
    left = EDGE + 0.15 + max(text_points(row.name, TEXT_POINTS) for case in cases for row in case.rows) / 72
    width = left + sum(WIDTHS) + CELL + BETWEEN * (len(WIDTHS) - 1) + EDGE
    heights = [TITLE + HEADS + ROW * len(case.rows) + SCALE for case in cases]
    page = Page(width, sum(heights) + LEGEND)
    top = page.height
    for case, height in zip(cases, heights, strict=True):
        _draw_case(page, case, left, top)
        top -= height
    _draw_legend(page, left)
    save_figure(page.figure, path)


def _draw_case(page: Page, case: Case, left: float, top: float) -> None:
    page.write(left, top - 0.28, case.title, size=TITLE_POINTS, weight="bold")
    height = ROW * len(case.rows)
    foot = top - TITLE - HEADS - height
    for number, (head, fill) in enumerate(_PANELS.items()):
        axes = page.axes(left, foot, WIDTHS[number], height)
        axes.set_ylim(len(case.rows) - 0.5, -0.5)
        names = [row.name for row in case.rows] if number == 0 else []
        axes.set_yticks(range(len(names)), names, fontsize=TEXT_POINTS, parse_math=False)
        fill(axes, case)
        page.write(left, foot + height + 0.07, head, weight="bold")
        left += WIDTHS[number] + BETWEEN
        if number == 0:
            _write_ratios(page, case, left - BETWEEN + CELL - 0.05, foot + height)
            left += CELL


def _write_ratios(page: Page, case: Case, right: float, top: float) -> None:
    page.write(right, top + 0.07, "/ floor", weight="bold", align="right")
    for place, row in enumerate(case.rows):
        ratio = f"{row.median('step') / case.floor:.2f}"
        colour = INK if row.fits or row.name == "resident" else FAINT
        page.write(right, top - ROW * (place + 0.5) - 0.035, ratio, size=TEXT_POINTS, align="right", colour=colour)


def _draw_steps(axes: Axes, case: Case) -> None:
    compute = case.facts["step"]
    steps = [row.median("step") for row in case.rows]
    divisor, unit = seconds_unit(max(steps))
    for place, (row, step) in enumerate(zip(case.rows, steps, strict=True)):
        axes.barh(place, min(step, compute) / divisor, BAR, color=BLUE)
        axes.barh(place, max(0.0, step - compute) / divisor, BAR, left=compute / divisor, color=WAIT)
        if row.predicted is not None:
            axes.plot(row.predicted / divisor, place, "D", color=INK, markersize=5, markeredgecolor="white")
    _finish(axes, max(steps) / divisor, unit, case.floor / divisor)


def _draw_requests(axes: Axes, case: Case) -> None:
    both = [(row.median("setup"), row.median("request")) for row in case.rows]
    divisor, unit = seconds_unit(max(map(sum, both)))
    for place, (setup, request) in enumerate(both):
        axes.barh(place, setup / divisor, BAR, color=SKY)
        axes.barh(place, request / divisor, BAR, left=setup / divisor, color=BLUE)
    _finish(axes, max(map(sum, both)) / divisor, unit)


def _draw_device(axes: Axes, case: Case) -> None:
    longest = max(row.median("reserved") for row in case.rows)
    divisor, unit = bytes_unit(longest)
    for place, row in enumerate(case.rows):
        axes.barh(place, row.peak / divisor, BAR, color=SKY)
        axes.barh(place, row.median("reserved") / divisor, BAR, **EMPTY)
    _finish(axes, longest / divisor, unit, case.facts["budget"] / divisor)


def _draw_host(axes: Axes, case: Case) -> None:
    _draw_bytes(axes, [(row.median("host"), 0.0) for row in case.rows])


def _draw_link(axes: Axes, case: Case) -> None:
    moved = [row.median("h2d_bytes") + row.median("d2h_bytes") for row in case.rows]
    slow = [row.median("pageable_bytes") for row in case.rows]
    _draw_bytes(axes, [(total - part, part) for total, part in zip(moved, slow, strict=True)])


def _draw_bytes(axes: Axes, bars: Sequence[tuple[float, float]]) -> None:
    longest = max(max(map(sum, bars)), 1.0)
    divisor, unit = bytes_unit(longest)
    for place, (plain, slow) in enumerate(bars):
        axes.barh(place, plain / divisor, BAR, color=SKY)
        axes.barh(place, slow / divisor, BAR, left=plain / divisor, color=WAIT)
    _finish(axes, longest / divisor, unit)


def _draw_calls(axes: Axes, case: Case) -> None:
    calls = [(row.median("call"), min(row.median("call"), row.median("host_wait_seconds"))) for row in case.rows]
    longest = max(call for call, _ in calls)
    divisor, unit = seconds_unit(longest)
    for place, (call, blocked) in enumerate(calls):
        axes.barh(place, (call - blocked) / divisor, BAR, color=BLUE)
        axes.barh(place, blocked / divisor, BAR, left=(call - blocked) / divisor, color=WAIT)
    _finish(axes, longest / divisor, unit)


_PANELS: Final[dict[str, Callable[[Axes, Case], None]]] = {
    "step": _draw_steps,
    "first request": _draw_requests,
    "device memory": _draw_device,
    "host memory": _draw_host,
    "over the link, a step": _draw_link,
    "the host's call": _draw_calls,
}


def _finish(axes: Axes, longest: float, unit: str, line: float | None = None) -> None:
    """Set the scale, name its unit, and draw a line across all rows."""
    axes.set_xlim(0, 1.04 * max(longest, line or 0))
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel(unit, fontsize=SMALL_POINTS, color=INK, loc="right")
    if line is not None:
        axes.axvline(line, color=INK, linewidth=0.9, linestyle=(0, (5, 2)))


def _draw_legend(page: Page, left: float) -> None:
    meanings = ((BLUE, "compute, or the host's work"), (WAIT, "waits; pageable copies"), (SKY, "set-up; bytes"))
    for colour, meaning in meanings:
        page.fill(left, 0.14, 0.3, 0.11, colour)
        left += 0.66 + page.write(left + 0.36, 0.15, meaning)
    lines = (
        "\N{BLACK DIAMOND} predicted    lines: the floor, the budget    dashed boxes: reserved    grey: over the budget"
    )
    page.write(left, 0.15, lines)
