"""Whole pipelines in one line: requests with other prompts, sizes, steps and batches, and no sample inputs."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import nn

import taskgraph_offload as tgo

from ..running import DEVICE, assert_within_budget, plainly

pytest.importorskip("diffusers")
from .. import pipelines

SHARES = ("25%", "40%", "75%")
QUICK = {("flux", "40%"), ("wan", "25%"), ("sdxl", "75%")}
CASES = [
    pytest.param(name, share, marks=() if (name, share) in QUICK else pytest.mark.slow)
    for name in pipelines.PIPELINES
    for share in SHARES
]


@pytest.mark.parametrize(("name", "share"), CASES)
def test_a_pipeline_gives_the_same_in_one_line(name: str, share: str) -> None:
    small = pipelines.PIPELINES[name]
    pipe, requests, before = small.make(), range(len(small.requests)), 0
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(plainly(part))
        wanted = [small.output(pipe, number) for number in requests]
    found = [list(part.parameters()) for part in parts]
    with tgo.offload(pipe, share, device=DEVICE) as run:
        for number in requests:
            before = run.stats.demand_loads
            assert torch.equal(small.output(pipe, number), wanted[number]), number
        assert run.stats.demand_loads == before, "the last request is like the first one"
        assert_within_budget(run)
        assert {component for component, _, _ in run.program} == set(run.plans)
    for part, parameters in zip(parts, found, strict=True):
        assert all(now is then for now, then in zip(part.parameters(), parameters, strict=True))
