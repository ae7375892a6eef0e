"""The results of a comparison of strategies and of a sweep over budgets: rows of plain values, a table, a picture.

Nouns only: `taskgraph_offload.planner.compare` fills them, `taskgraph_offload.viz` draws them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .budget import readable, readable_seconds
from .timeline import ROUNDING

Row = Mapping[str, Any]

ABSENT = "-"
NEARLY_BEST = 1.05  # times the fastest step: the longest step that counts as nearly as fast


@dataclass(frozen=True)
class Comparison:
    """Strategies side by side under one budget. A row with an `error` has no times; it has `smallest_bytes`.

    >>> import taskgraph_offload as tgo
    >>> trace = tgo.Trace.from_units([{"name": n, "seconds": 1e-3, "tensors": [2**20]} for n in "abcd"])
    >>> comparison = tgo.Planner.for_trace(trace, "3MiB", strategy="keep", machine="cpu").compare(["keep", "resident"])
    >>> [(row["strategy"], row["error"] is None) for row in comparison.rows]
    [('keep', True), ('resident', False)]
    """

    rows: Sequence[Row]
    cycle: str = "step"  # what the times are of: a step of a model, or a request

    def table(self) -> str:
        """The rows as aligned text, which is a Markdown table too."""
        seconds = clock(row["cold_seconds"] for row in self.rows)
        columns: dict[str, Callable[[Row], str]] = {
            "strategy": lambda row: str(row["strategy"]),
            f"measured {self.cycle}": lambda row: seconds(row["measured_step_seconds"]),
            self.cycle: lambda row: seconds(row["step_seconds"]),
            "/ bound": _to_bound,
            "compute": lambda row: seconds(row["compute_seconds"]),
            "waits": lambda row: seconds(row["stall_seconds"]),
            "overlap": lambda row: ABSENT if row["overlap"] is None else f"{row['overlap']:.0%}",
            f"cold {self.cycle}": lambda row: seconds(row["cold_seconds"]),
            "streamed": lambda row: _bytes(row["streamed_bytes"]),
            "peak": lambda row: _bytes(row["peak_bytes"]),
            "needs": _needs,
        }
        cells = {head: [show(row) for row in self.rows] for head, show in columns.items()}
        optional = (f"measured {self.cycle}", "needs")
        told = {head: cells[head] for head in columns if head not in optional or set(cells[head]) - {ABSENT}}
        return _table(list(told), list(zip(*told.values(), strict=True)))

    def notes(self) -> list[str]:
        """Sentences that belong beside measured steps: the rates, and why a step is below the bound, where one is.

        For the rates a row may have `measured_compute_seconds` (of a step), `link_bytes_per_second` and
        `measured_link_bytes_per_second`.

        >>> row = {"strategy": "auto", "bound_seconds": 0.2, "compute_seconds": 0.2, "measured_step_seconds": 0.19}
        >>> for note in Comparison([row]).notes():
        ...     print(note)
        predicted rates: compute 200.00 ms a step
        measured less than the bound: auto. The machine was faster than the rates that the bound was computed from.
        """
        measured = [row for row in self.rows if row["measured_step_seconds"] is not None]
        below = [
            row["strategy"] for row in measured if row["measured_step_seconds"] < row["bound_seconds"] * (1 - ROUNDING)
        ]
        rates = [f"{source} rates: {text}" for source, text in _rates(measured).items() if text]
        if not below:
            return rates
        reason = "The machine was faster than the rates that the bound was computed from."
        return [*rates, f"measured less than the bound: {', '.join(below)}. {reason}"]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Draw it; PNG or SVG, by the suffix."""
        import taskgraph_offload

        taskgraph_offload.viz.save_comparison(path, self)


@dataclass(frozen=True)
class Sweep:
    """Strategies over budgets: a row for each pair, with `step_seconds` None where the budget is too small."""

    rows: Sequence[Row]
    cycle: str = "step"  # what the times are of: a step of a model, or a request

    @property
    def strategies(self) -> tuple[str, ...]:
        """The strategies, in the order of the rows."""
        return tuple(dict.fromkeys(row["strategy"] for row in self.rows))

    def knee(self, strategy: str) -> Row | None:
        """The smallest budget within 5% of the strategy's fastest step: more memory buys nearly nothing.

        >>> steps = {1: None, 2: 2.0, 3: 1.0, 4: 1.0}
        >>> rows = [{"strategy": "auto", "budget_bytes": nbytes, "step_seconds": s} for nbytes, s in steps.items()]
        >>> Sweep(rows).knee("auto")["budget_bytes"]
        3
        """
        steps = [row for row in self.rows if row["strategy"] == strategy and row["step_seconds"] is not None]
        fastest = min((row["step_seconds"] for row in steps), default=0.0)
        enough = [row for row in steps if row["step_seconds"] <= NEARLY_BEST * fastest]
        return min(enough, key=lambda row: int(row["budget_bytes"]), default=None)

    def table(self) -> str:
        """Budgets down, strategies across, the bound at the end; a star at each knee."""
        seconds = clock(row["step_seconds"] for row in self.rows)
        knees = [self.knee(name) for name in self.strategies]
        cells = {
            (row["budget_bytes"], row["strategy"]): seconds(row["step_seconds"]) + (" *" if row in knees else "  ")
            for row in self.rows
        }
        bounds = {row["budget_bytes"]: seconds(row["bound_seconds"]) for row in self.rows}
        lines = [
            [_bytes(budget), *(cells.get((budget, name), ABSENT) for name in self.strategies), bounds[budget]]
            for budget in sorted(bounds)
        ]
        return _table(["budget", *self.strategies, "bound"], lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Draw it; PNG or SVG, by the suffix."""
        import taskgraph_offload

        taskgraph_offload.viz.save_sweep(path, self)


def clock(values: Iterable[float | None]) -> Callable[[float | None], str]:
    """Give a function that prints seconds, in the one unit that suits the largest value of a column."""
    in_seconds = max((value for value in values if value is not None), default=0.0) >= 1

    def show(value: float | None) -> str:
        if value is None or not math.isfinite(value):
            return ABSENT
        return f"{value:.3f} s" if in_seconds else f"{value * 1e3:.2f} ms"

    return show


def _bytes(value: int | None) -> str:
    return ABSENT if value is None else readable(value)


def _to_bound(row: Row) -> str:
    step = row["step_seconds"] if row["measured_step_seconds"] is None else row["measured_step_seconds"]
    return ABSENT if step is None or not row["bound_seconds"] else f"{step / row['bound_seconds']:.2f}"


def _needs(row: Row) -> str:
    return _bytes(row["smallest_bytes"]) if row["smallest_bytes"] is not None else row["error"] or ABSENT


def _rates(rows: Sequence[Row]) -> dict[str, str]:
    """The predicted and the measured rates of some rows, as far as the rows have them."""

    def span(key: str, show: Callable[[float], str]) -> str:
        values = [row[key] for row in rows if row.get(key) is not None]
        return " to ".join(dict.fromkeys(map(show, (min(values), max(values))))) if values else ""

    told = {}
    for source, prefix in (("predicted", ""), ("measured", "measured_")):
        compute = span(f"{prefix}compute_seconds", readable_seconds)
        link = span(f"{prefix}link_bytes_per_second", lambda rate: f"{rate / 1e9:.2f} GB/s")
        told[source] = ", ".join([f"compute {compute} a step"] * bool(compute) + [f"link {link}"] * bool(link))
    return told


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Align columns: the first one to the left, the others to the right.

    >>> print(_table(["name", "step"], [["a", "1 s"]]))
    | name | step |
    |:-----|-----:|
    | a    |  1 s |
    """
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    rule = [":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])]
    rows = [
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
        for line in (heads, *lines)
    ]
    return "\n".join([rows[0], "|" + "|".join(rule) + "|", *rows[1:]])
