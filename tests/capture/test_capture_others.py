"""What other libraries do to a model: hooks that move weights are refused, everything else is traced as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from taskgraph_offload.planner.capture import capture
from torch import Tensor, nn

import taskgraph_offload as tgo
from taskgraph_offload.errors import SettingsError, TraceError
from taskgraph_offload.nouns.progress import listening

from .. import models
from ..running import assert_equal

X = torch.linspace(-1, 1, 12).reshape(3, 4)
CPU = torch.device("cpu")


def everything_of(model: nn.Module) -> list[Any]:
    """The tensors of a model with their places and versions, and the attributes of its modules."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    facts = [(name, id(t), t.data_ptr(), t.dtype, t.device, t._version) for name, t in tensors]
    return [facts, [(name, sorted(vars(module))) for name, module in model.named_modules()]]


def group_offloaded(**options: Any) -> models.Case:
    from diffusers.hooks.group_offloading import apply_group_offloading

    model, inputs = models.flux()
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **options)
    return model, inputs


@pytest.mark.parametrize(
    "options", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offloading_is_refused_and_the_error_says_how_to_remove_it(options: dict[str, Any]) -> None:
    model, inputs = group_offloaded(**options)
    before = everything_of(model)
    with pytest.raises(SettingsError, match="group offloading hooks of diffusers, which move its weights") as caught:
        tgo.Planner(model, "50%", inputs=inputs).plan()
    assert everything_of(model) == before
    exec(str(caught.value).partition("first:\n")[2].replace("\n    ", "\n").lstrip(), {"model": model})
    assert capture(model, inputs).source == "fake"


def test_layerwise_casting_is_refused() -> None:
    model, inputs = models.flux()
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    before = everything_of(model)
    with pytest.raises(SettingsError, match=r"\.linear_1 has a layerwise casting hook of diffusers.*load the model"):
        capture(model, inputs)
    assert everything_of(model) == before


def test_hooks_of_accelerate_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    vars(model[1])["_hf_hook"] = object()  # the mark that accelerate leaves
    with pytest.raises(
        SettingsError, match=r"Sequential\.1 has offloading hooks of accelerate.*remove_hook_from_module"
    ):
        capture(model, X)
    del model[1]._hf_hook
    assert capture(model, X).source == "fake"


def test_a_step_cache_is_traced_within_its_context_and_goes_on_working() -> None:
    from diffusers import FirstBlockCacheConfig

    model, inputs = models.flux()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(TraceError, match=r"with model\.cache_context\('cond'\)") as caught:
        capture(model, inputs)
    assert "Give inputs" not in str(caught.value)
    with torch.no_grad(), model.cache_context("cond"):
        before = everything_of(model)
        assert len(capture(model, inputs).calls) > 5
        assert everything_of(model) == before
        first, second = model(**inputs)[0], model(**inputs)[0]
    assert_equal(first, second)


def test_a_hook_that_fails_is_named_as_the_cause() -> None:
    from diffusers import PyramidAttentionBroadcastConfig

    """This one asks the pipeline for its timestep, which there is only while the pipeline runs."""
    model, inputs = models.flux()
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: None
    )
    model.enable_cache(config)
    with pytest.raises(TraceError, match="A hook that diffusers put on the model failed") as caught:
        capture(model, inputs)
    assert "Give inputs" not in str(caught.value)


FLEX = """
import warnings
warnings.simplefilter("ignore")
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from taskgraph_offload.planner.capture import capture

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        y = self.up(x).reshape(1, 1, -1, 16)
        return self.down(flex_attention(y, y, y)).sum(1)

def ran(function):
    with torch.no_grad():
        return function(torch.ones(1, 8, 16)).shape

model = Attention()
trace, again = (capture(model, torch.ones(1, 8, 16)) for _ in range(2))
print(trace.source, len(trace.readers), ran(model), again.fingerprint == trace.fingerprint)
"""


def test_flex_attention_is_traced_and_runs_afterwards_too() -> None:
    """In a process of its own: torch remembers for the rest of a process that it refused to compile."""
    root = Path(__file__).parent.parent.parent
    run = subprocess.run([sys.executable, "-c", FLEX], cwd=root, capture_output=True, text=True, check=False)
    assert run.stdout == "fake 4 torch.Size([1, 8, 16]) True\n", run.stderr[-2000:]


def test_compiled_blocks_are_traced_and_stay_compiled() -> None:
    compiled = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    compiled_layer: Any = torch.compile(nn.Linear(4, 4), backend=backend)
    model = nn.Sequential(nn.Linear(4, 4), compiled_layer, nn.Linear(4, 4))
    model[2].compile(backend=backend)
    assert [call.block for call in capture(model, X).calls] == ["0", "1", "2"]
    assert not compiled
    with torch.no_grad():
        model(X)
    assert compiled


def switch() -> models.Case:
    from transformers import SwitchTransformersConfig, SwitchTransformersModel

    """Its router calls `.to()` on its own classifier."""
    sizes: dict[str, Any] = dict(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_heads=2, num_experts=4)
    layers: dict[str, Any] = dict(
        num_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_decoder_layers=2
    )
    tokens = torch.ones(1, 5, dtype=torch.long)
    torch.manual_seed(0)
    model = SwitchTransformersModel(SwitchTransformersConfig(**sizes, **layers)).eval()
    return model, {"input_ids": tokens, "decoder_input_ids": tokens}


def test_a_forward_that_converts_its_own_modules_is_traced_the_first_time() -> None:
    model, inputs = switch()
    before = everything_of(model)
    trace = capture(model, inputs)
    assert trace.source == "real"
    assert set(trace.readers) == set(trace.weights)
    assert everything_of(model) == before


@pytest.mark.parametrize("looks", [False, True])
def test_a_conversion_is_no_weight_and_is_undone(looks: bool) -> None:
    class Converts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.layer.register_buffer("table", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            self.layer = self.layer.to(torch.float64)
            y = self.layer(x.double()) + self.layer.table
            return y * 2 if looks and y.sum().item() > 1e9 else y

    model = Converts()
    before = everything_of(model)
    trace = capture(model, X)
    assert trace.source == ("real" if looks else "fake")
    assert set(trace.readers) == {"layer.weight", "layer.bias", "layer.table"}
    assert not any(call.writes for call in trace.calls)
    assert everything_of(model) == before


def test_tracing_reports_progress_up_to_the_last_module() -> None:
    heard: list[tuple[str, int, int]] = []
    with listening(lambda *report: heard.append(report)):
        capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), X)
    assert heard == [("modules traced", done, 3) for done in (1, 2, 3, 3)]
