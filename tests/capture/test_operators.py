"""What an operator is said to read, write, compute and move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from taskgraph_offload.planner.capture.recorder import FLOP_FORMULAS, effect_of
from torch import Tensor

aten = torch.ops.aten
A, B = torch.zeros(2, 3), torch.zeros(3, 4)
QUERIES, KEYS = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 3, 8)  # four heads, and two
TABLE, ROWS = torch.zeros(1000, 3), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("func", "args", "reads", "writes", "flops", "moved_bytes"),
    [
        (aten.mm.default, (A, B), [A, B], [], 2 * 2 * 3 * 4, 4 * (6 + 12 + 8)),
        (aten.relu.default, (A,), [A], [], 0, 4 * (6 + 6)),
        (aten.relu.default, (A[:1, :1].expand(2, 3),), [A], [], 0, 4 * (6 + 6)),  # of an expansion, its storage at most
        (aten.t.default, (A,), [], [], 0, 0),
        (aten._unsafe_view.default, (A, [3, 2]), [], [], 0, 0),
        (aten.empty_like.default, (A,), [], [], 0, 0),
        (aten.zeros_like.default, (A,), [], [], 0, 4 * 6),
        (aten.embedding.default, (TABLE, ROWS), [TABLE, ROWS], [], 0, 2 * 4 * 6 + 8 * 2),  # two rows, not the table
        (aten.copy_.default, (A, A.clone()), [None], [A], 0, 4 * (6 + 6)),
        (aten.add_.Tensor, (A, 1), [A], [A], 0, 4 * (6 + 6)),
    ],
)
def test_an_effect_is_what_the_operator_does(
    func: Any, args: Any, reads: Any, writes: Any, flops: int, moved_bytes: int
) -> None:
    effect = effect_of(func, args, {}, func(*args))
    assert (effect.flops, effect.moved_bytes) == (flops, moved_bytes)
    assert [_same(*pair) for pair in zip(effect.reads, reads, strict=True)] == [True] * len(reads)
    assert [_same(*pair) for pair in zip(effect.writes, writes, strict=True)] == [True] * len(writes)


def _same(tensor: Tensor, expected: Tensor | None) -> bool:
    return expected is None or tensor.data_ptr() == expected.data_ptr()


def test_an_output_argument_is_written_and_not_read() -> None:
    out = torch.zeros(2, 4)
    effect = effect_of(aten.mm.out, (A, B), {"out": out}, aten.mm.out(A, B, out=out))
    assert [tensor.data_ptr() for tensor in effect.writes] == [out.data_ptr()]
    assert [tensor.data_ptr() for tensor in effect.reads] == [A.data_ptr(), B.data_ptr()]


@pytest.mark.parametrize(("training", "written"), [(True, 2), (False, 0)])
def test_a_batch_norm_changes_its_statistics_only_in_training(training: bool, written: int) -> None:
    weight, bias, mean, variance = (torch.ones(3) for _ in range(4))
    args = (torch.rand(4, 3), weight, bias, mean, variance, training, 0.1, 1e-5)
    effect = effect_of(aten.native_batch_norm.default, args, {}, aten.native_batch_norm.default(*args))
    assert len(effect.writes) == written
    assert len(effect.reads) == 5


def test_attention_counts_every_head_of_queries() -> None:
    """Also where there are fewer heads of keys and values."""
    attention, out = aten._scaled_dot_product_flash_attention.default, torch.zeros_like(QUERIES)
    assert effect_of(attention, (QUERIES, KEYS, KEYS), {}, out).flops == 4 * 2 * 4 * 5 * 3 * 8


def test_an_operator_whose_formula_fails_only_moves_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> int:
        raise AssertionError("shapes are incompatible")

    monkeypatch.setitem(FLOP_FORMULAS, aten.mm, fails)
    effect = effect_of(aten.mm.default, (A, B), {}, aten.mm.default(A, B))
    assert (effect.flops, effect.moved_bytes) == (0, 4 * (6 + 12 + 8))
