"""Real architectures: in small, exactly as they run; at full size, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from taskgraph_offload.planner.capture import capture
from torch import nn

from taskgraph_offload.nouns.trace import INPUT

from .. import models
from ..models import Case
from ..naive_forward import assert_trace_is_what_happens, counted_flops
from ..sweeps import mostly_slow

X = torch.linspace(-1, 1, 3 * 5 * 8).reshape(3, 5, 8)
FULL_SIZE_RUN = """
import resource, sys
import torch
from taskgraph_offload.planner.capture import capture
from tests.models import FULL_SIZE
from tests.naive_forward import counted_flops
model, inputs = FULL_SIZE[sys.argv[1]]()
trace = capture(model, inputs)
kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tensors = {*model.parameters(), *model.buffers()}
import json
from typing import Any
print(json.dumps(dict(
    rss=kib * 1024, source=trace.source, share=trace.coverage().share, bytes=trace.weight_bytes,
    owned=sum(t.nbytes for t in tensors), flops=trace.flops, blocks=[c.block for c in trace.calls if c.block],
    counted=counted_flops(model, inputs) if "no cache" not in sys.argv[1] else None, peak=trace.activation_bytes,
)))
"""


def _blocks_of(prefix: str, count: int) -> list[str]:
    return [f"{prefix}.{index}" for index in range(count)]


BLOCKS = {
    "flux": _blocks_of("transformer_blocks", 19) + _blocks_of("single_transformer_blocks", 38),
    "wan": _blocks_of("blocks", 40),
    "sdxl": _blocks_of("up_blocks.0.attentions.1.transformer_blocks", 10),
    "llama": ["model.embed_tokens", *_blocks_of("model.layers", 80), "lm_head"],
    "llama no cache": ["model.embed_tokens", *_blocks_of("model.layers", 80), "lm_head"],
    "t5": ["encoder.embed_tokens", *_blocks_of("encoder.block", 24)],
}


@pytest.mark.parametrize("name", mostly_slow(BLOCKS, ["t5"]))
def test_a_full_size_model_is_traced_in_little_memory(name: str) -> None:
    root = Path(__file__).parent.parent.parent
    run = subprocess.run(
        [sys.executable, "-c", FULL_SIZE_RUN, name], cwd=root, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    seen = json.loads(run.stdout.splitlines()[-1])
    assert seen["rss"] < 1.5 * 2**30
    assert seen["source"] == "fake"
    assert seen["bytes"] == seen["owned"]
    assert seen["share"] >= 0.99
    assert seen["counted"] in (None, seen["flops"])
    assert [block for block in seen["blocks"] if block in BLOCKS[name]] == BLOCKS[name]
    assert seen["peak"] < 5 * 2**30  # no attention matrix is ever held


class Recurrent(nn.Module):
    """`nn.LSTM` reads its weights from a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(8, 8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.rnn(x)[0])


class Attention(nn.Module):
    """`nn.MultiheadAttention` reads the weight of a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0])


class Inferring(nn.Module):
    """In inference mode, composite operators are seen whole."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    @torch.inference_mode()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = nn.functional.scaled_dot_product_attention(layer(x), x, x)
        return x


def _weight_norm() -> Case:
    normed = [nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)) for _ in range(2)]
    return nn.Sequential(*normed), {"input": X}


def _old_weight_norm() -> Case:
    """Computed in a hook that runs before the forward of the module, and kept as a plain attribute."""
    return nn.Sequential(*[nn.utils.weight_norm(nn.Linear(8, 8)) for _ in range(2)]), {"input": X}


def _batch_norm() -> Case:
    return nn.Sequential(nn.Conv1d(5, 5, 3), nn.BatchNorm1d(5), nn.ReLU(), nn.Conv1d(5, 5, 3)).train(), {"input": X}


SMALL: dict[str, Callable[[], Case]] = {
    "flux": models.flux,
    "sd3": models.sd3,
    "wan": models.wan,
    "sdxl": models.sdxl,
    "llama": lambda: models.llama(cache=True),
    "llama tied": lambda: models.llama(tied=True, cache=True),
    "t5": models.t5,
    "whisper": models.whisper,
    "vit": models.vit,
    "mixtral": models.mixtral,
    "albert": models.albert,
    "lstm": lambda: (Recurrent(), {"x": X}),
    "multi-head attention": lambda: (Attention(), {"x": X}),
    "encoder": lambda: (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2), {"src": X}),
    "weight norm": _weight_norm,
    "old weight norm": _old_weight_norm,
    "batch norm": _batch_norm,
    "inference mode": lambda: (Inferring(), {"x": X}),
    "one layer": lambda: (nn.Linear(8, 8), {"input": X}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SMALL)
def test_a_small_model_is_traced_as_it_runs(name: str) -> None:
    model, inputs = SMALL[name]()
    trace = capture(model, inputs)
    assert trace.flops == counted_flops(model, inputs)
    assert_trace_is_what_happens(model, inputs, trace, peaks=name != "inference mode")  # naively, attention is whole
    assert (
        trace.source == "fake" or name == "mixtral"
    )  # before torch 2.15, its grouped products refuse fakes in float32
    with torch.no_grad():  # and still runs: no fake tensor stayed behind
        model(**inputs)


def test_a_fused_layer_is_one_operator_that_reads_all_its_weights() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    trace = capture(encoder, X)
    assert [len(call.pieces) for call in trace.calls if call.block] == [1, 1]
    assert_trace_is_what_happens(encoder, {"src": X}, trace, peaks=False)  # its kernel has temporaries of its own


def test_a_tied_embedding_is_one_weight_read_by_two_blocks() -> None:
    model, inputs = models.llama(tied=True, cache=True)
    trace = capture(model, inputs)
    tied = trace.weights["model.embed_tokens.weight"]
    assert tied.aliases == ("lm_head.weight",)
    readers = [trace.calls[index].block for index in trace.readers[tied.name]]
    assert readers == ["model.embed_tokens", "lm_head"]
    assert tied.name not in trace.fixed


def test_a_shared_layer_is_called_again_and_again() -> None:
    model, inputs = models.albert()
    layer = "encoder.albert_layer_groups.0"
    calls = [call for call in capture(model, inputs).calls if call.block == layer]
    assert [call.name for call in calls] == [layer, f"{layer}#2", f"{layer}#3", f"{layer}#4"]
    assert len({call.reads for call in calls}) == 1


def test_another_method_can_be_traced() -> None:
    model, inputs = models.vae()
    trace = capture(model, inputs, entry="decode")
    assert trace.entry == "decode"
    assert {call.block.split(".")[0] for call in trace.calls if call.block} == {"post_quant_conv", "decoder"}
    assert_trace_is_what_happens(model, inputs, trace, entry="decode")


def test_a_cache_that_is_handed_in_stays_as_it_is() -> None:
    from transformers import DynamicCache

    model, inputs = models.llama(cache=True)
    cache: Any = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    trace = capture(model, inputs | {"past_key_values": cache})
    assert cache.get_seq_length() == 7
    assert type(cache.layers[0].keys) is torch.Tensor
    held = [a for a in trace.activations if a.producer == INPUT]
    assert sum(a.nbytes for a in held) >= 2 * 3 * cache.layers[0].keys.nbytes
