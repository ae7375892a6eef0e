"""The public names and their signatures, as the design promises them to those who build on this."""

import inspect

import pytest

import taskgraph_offload as tgo

SIGNATURES = {
    "Planner": "model budget_gb * inputs entry strategy machine blocks program **options",
    "Planner.for_program": "traces program budget_gb * strategy machine **options",
    "Planner.for_trace": "trace budget_gb * strategy machine **options",
    "Planner.plan": "self",
    "Planner.calibrate": "self timeline",
    "Trace.from_units": "units",
    "Plan.verify": "self",
    "Plan.explain": "self",
    "Plan.save": "self path",
    "Plan.load": "path model",
    "Executor": "model plan * device link_bytes_per_second lazy preload",
    "Executor.attach": "self",
    "Executor.detach": "self",
    "Executor.pause": "self",
    "Executor.resume": "self",
    "Executor.timeline": "self",
    "Machine": "name h2d_bytes_per_second d2h_bytes_per_second latency_seconds compute_flops memory_bytes_per_second"
    " library_bytes",
    "Machine.preset": "name",
    "Machine.measure": "device",
    "Bound": "step_seconds cold_seconds block_step_seconds block_cold_seconds",
    "viz.save_timeline": "path *timelines",
    "viz.save_trace": "path *timelines",
}
ATTRIBUTES = {
    "Plan": "strategy budget_bytes arena_bytes peak_bytes residents seats tasks graph predict bound",
    "Planner": "trace plan compare sweep",
    "Timeline": "source spans memory step_seconds cold_seconds stall_seconds overlap",
    "Comparison": "rows table save",
    "Sweep": "rows table save",
    "viz": "save_timeline save_comparison save_sweep save_trace",
}


def find(path: str) -> object:
    found: object = tgo
    for name in path.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures_are_as_promised(path):
    words, starred = [], False
    for parameter in inspect.signature(find(path)).parameters.values():  # type: ignore[arg-type]
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            words.append("*")
        starred = starred or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        marks: dict[object, str] = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        words.append(marks.get(parameter.kind, "") + parameter.name)
    assert " ".join(words) == SIGNATURES[path]


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, names in ATTRIBUTES.items() for name in names.split()]
)
def test_attributes_are_as_promised(path, name):
    noun = find(path)
    fields = getattr(noun, "__dataclass_fields__", {})
    assert hasattr(noun, name) or name in fields


def test_stats_count_what_is_promised():
    from taskgraph_offload.runtime.measured import Stats

    promised = {"h2d_bytes", "d2h_bytes", "copies", "demand_loads", "divergences", "peak_bytes"}
    assert promised <= set(Stats.__dataclass_fields__)


def test_errors_are_one_family():
    for name in ("BudgetError", "TraceError", "PlanError", "SettingsError", "ExecutionError"):
        assert issubclass(getattr(tgo, name), tgo.OffloadError)
