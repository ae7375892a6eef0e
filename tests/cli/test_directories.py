"""Directories that diffusers and transformers saved, without weights: what a request runs, and what is refused."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskgraph_offload as tgo

pytest.importorskip("diffusers")
from taskgraph_offload.cli.pipelines import Asked, from_pipeline

from .. import pipelines
from .pages import facts

PROGRAMS = {
    "flux": {"text_encoder": 1, "text_encoder_2": 1, "transformer": 28, "vae.decode": 1},
    "sd3": {"text_encoder": 2, "text_encoder_2": 2, "text_encoder_3": 2, "transformer": 28, "vae.decode": 1},
    "sd": {"text_encoder": 2, "unet": 50, "vae.decode": 1},
    "sdxl": {"text_encoder": 1, "text_encoder_2": 1, "unet": 50, "vae.decode": 1},
    "wan": {"text_encoder": 2, "transformer": 100, "vae.decode": 1},
    "ltx": {"text_encoder": 2, "transformer": 50, "vae.decode": 1},
    "cogvideox": {"text_encoder": 2, "transformer": 50, "vae.decode": 1},
}


def stable_diffusion() -> Any:
    """The first Stable Diffusion, small: one text encoder, and a UNet without the size of the picture."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    xl = pipelines.PIPELINES["sdxl"].make()
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    pipe: Any = StableDiffusionPipeline(
        vae=xl.vae,
        text_encoder=xl.text_encoder,
        tokenizer=xl.tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


SMALL = {**pipelines.PIPELINES, "sd": pipelines.Small(stable_diffusion, pipelines.PIPELINES["sdxl"].requests)}
QUICK = ("flux", "sdxl")
ALL = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PROGRAMS]
BUDGET = ("--budget", "150%", "--machine", "rtx4090")


def without_weights(directory: Path) -> Path:
    """The directory after its files of weights are deleted."""
    weights = [path for path in directory.rglob("*") if path.suffix in (".safetensors", ".bin")]
    assert weights
    for path in weights:
        path.unlink()
    return directory


def saved(pipe: Any, directory: Path) -> Path:
    """A pipeline as diffusers saves it, but without weights."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizers = {part: PreTrainedTokenizerFast(tokenizer_object=words) for part in pipe.components if "token" in part}
    pipe.register_modules(**tokenizers)
    pipe.save_pretrained(directory)
    return without_weights(directory)


@pytest.fixture(scope="module")
def directory_of(tmp_path_factory) -> Callable[[str], Path]:
    """The directory of a small pipeline."""
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = saved(SMALL[name].make(), tmp_path_factory.mktemp(name) / name)
        return made[name]

    return find


@pytest.fixture
def flux(directory_of, tmp_path) -> Path:
    """The directory of a small Flux, which a test may damage."""
    directory = tmp_path / "FLUX.1-small"
    for path in directory_of("flux").rglob("*.json"):
        place = directory / path.relative_to(directory_of("flux"))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    return directory


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# Pipelines


@pytest.mark.parametrize("name", ALL)
def test_a_pipeline_is_planned_from_its_directory_without_weights(ask, directory_of, name):
    said = facts(ask("plan", directory_of(name), *BUDGET))
    kind = json.loads((directory_of(name) / "model_index.json").read_text())["_class_name"]
    assert said["plan"] == f"{kind}, auto, on rtx4090"
    assert said["inputs"].startswith("of a request: ")
    assert " predicted" in said["request"]
    assert "step" not in said
    for phase, times in PROGRAMS[name].items():
        often = "once" if times == 1 else f"{times} times"
        assert said[phase].startswith(f"{often}, weights ")
        assert not said[phase].startswith(f"{often}, weights 0 B")


class Recorded:
    """The calls of a pipeline's models: the phase, and the shapes of the tensors by the names of the arguments."""

    def __init__(self, pipe: Any) -> None:
        self.calls: list[str] = []
        self.shapes: dict[str, dict[str, torch.Size]] = {}
        for part, model in pipe.components.items():
            if isinstance(model, nn.Module):
                entry = "decode" if part == "vae" else "forward"
                setattr(model, entry, self._recording(part if part != "vae" else "vae.decode", getattr(model, entry)))

    def _recording(self, phase: str, call: Any) -> Any:
        def recording(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(phase)
            given = inspect.signature(call).bind(*args, **kwargs).arguments
            self.shapes[phase] = shapes(given)
            return call(*args, **kwargs)

        return recording


def shapes(arguments: dict[str, Any]) -> dict[str, torch.Size]:
    """The shapes of tensors; a time step may have a batch or not."""
    return {name: value.shape for name, value in arguments.items() if isinstance(value, Tensor) and name != "timestep"}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("number", [0, 2])
def test_a_request_is_what_the_pipeline_itself_runs(directory_of, name, number):
    small = SMALL[name]
    pipe, request = small.make(), small.requests[number]
    recorded = Recorded(pipe)
    small.output(pipe, number)
    tokens = {"tokens": request["max_sequence_length"]} if "max_sequence_length" in request else {}
    frames = {"frames": request["num_frames"]} if "num_frames" in request else {}
    batch = 1 if isinstance(request["prompt"], str) else len(request["prompt"])
    sizes = {"batch": batch, "height": request["height"], "width": request["width"], **tokens, **frames}
    planned = from_pipeline(directory_of(name), Asked(sizes, steps=request["num_inference_steps"]))
    assert [(phase, len(list(run))) for phase, run in groupby(recorded.calls)] == planned.program
    for phase, inputs in planned.inputs.items():
        ours, theirs = shapes(dict(inputs)), recorded.shapes[phase]
        assert ours == {argument: theirs[argument] for argument in ours}


def test_sizes_and_steps_of_a_request_can_be_changed(ask, flux):
    usual = json.loads(ask("plan", flux, *BUDGET, "--json"))
    other = json.loads(ask("plan", flux, *BUDGET, "--json", "--steps", 4, "--height", 64, "--tokens", 32))
    assert usual["inputs"] == "of a request: batch 1, height 256, width 256, tokens 512, steps 28, bfloat16"
    assert other["inputs"] == "of a request: batch 1, height 64, width 256, tokens 32, steps 4, bfloat16"
    assert other["program"][2] == {"model": "transformer", "times": 4}
    assert other["predicted"]["step_seconds"] < usual["predicted"]["step_seconds"] / 6


def test_models_can_be_left_out_of_a_request(ask, refused, flux):
    said = facts(ask("plan", flux, *BUDGET, "--exclude", "text_encoder_2", "vae"))
    assert "text_encoder" in said
    assert "text_encoder_2" not in said
    assert "vae.decode" not in said
    assert "the models of this pipeline are text_encoder, text_encoder_2, transformer, vae" in refused(
        "plan", flux, *BUDGET, "--exclude", "unet"
    )
    assert "a request needs its transformer or unet" in refused("plan", flux, *BUDGET, "--exclude", "transformer")


def test_all_weights_have_the_dtype_that_was_asked_for(ask, flux):
    edit(flux / "text_encoder" / "config.json", dtype="float16", torch_dtype="float16")
    half = json.loads(ask("plan", flux, *BUDGET, "--json"))
    whole = json.loads(ask("plan", flux, *BUDGET, "--json", "--dtype", "float32"))
    assert whole["weight_bytes"] == pytest.approx(2 * half["weight_bytes"], rel=1e-3), "there are a few whole numbers"


def test_two_transformers_share_the_steps_as_the_scheduler_says(directory_of, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = pipelines.PIPELINES["wan"].make()
    pipe.register_modules(transformer_2=pipelines.PIPELINES["wan"].make().transformer)
    pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.register_to_config(boundary_ratio=0.875)
    directory = saved(pipe, tmp_path / "wan2.2")
    planned = from_pipeline(directory, Asked({"frames": 5, "height": 32, "width": 32}, steps=10))
    # The time of step i is 3s / (1 + 2s) with s = 1 - i / 9: 1, 0.96, 0.913, 0.857, ... so three steps are above 0.875.
    assert planned.program == [("text_encoder", 2), ("transformer", 6), ("transformer_2", 14), ("vae.decode", 1)]


@pytest.mark.parametrize("width", [40, 80])
def test_the_page_fits_the_terminal(ask, monkeypatch, flux, width):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = ask("plan", flux, *BUDGET, "--steps", 2).splitlines()
    assert max(map(len, lines)) <= width


# The other commands


def test_the_other_commands_speak_of_requests(ask, flux, tmp_path):
    files = ("--save", tmp_path / "plan.yaml", "--timeline", tmp_path / "plan.svg", "--trace", tmp_path / "plan.json")
    ask("plan", flux, *BUDGET, "--steps", 3, *files)
    assert "request" in facts(ask("show", tmp_path / "plan.yaml"))
    assert tgo.Plan.load(tmp_path / "plan.yaml").trace.model == "FluxPipeline"
    grid = ask("show", tmp_path / "plan.yaml", "--grid")
    assert grid.count("transformer.transformer_blocks.0") >= 3
    picture = ("--picture", tmp_path / "table.svg")
    comparison = ask("compare", flux, *BUDGET, "--steps", 3, "--strategies", "keep", "sequential", *picture)
    assert "per request: no schedule is faster" in comparison
    assert "first request" in comparison
    assert "step" not in comparison.replace("steps 3", "")
    assert "request time" in (tmp_path / "table.svg").read_text()
    sweep = ask("sweep", flux, "--machine", "rtx4090", "--steps", 3, "--points", 2, "--strategies", "keep", *picture)
    assert "FluxPipeline" in sweep
    assert "request time against memory" in (tmp_path / "table.svg").read_text()


def test_run_is_for_one_model(refused, ask, flux):
    line = refused("run", flux, "--budget", "50%", "--machine", "cpu", "--device", "cpu")
    assert line.endswith(f"`run` runs one model; give one of its models, as in {flux}/transformer")
    out = ask("run", flux / "text_encoder", "--budget", "150%", "--machine", "cpu", "--device", "cpu", "--steps", 2)
    assert "measured" in out


# One model


def test_a_component_of_a_pipeline_is_one_model(ask, directory_of):
    decoder = json.loads(ask("plan", directory_of("flux") / "vae", *BUDGET, "--json", "--height", 64))
    assert (decoder["model"], decoder["inputs"]) == ("AutoencoderKL", "decode: batch 1, height 64, width 32")
    said = facts(ask("plan", directory_of("flux") / "text_encoder_2", *BUDGET))
    assert said["plan"].startswith("T5EncoderModel")
    assert "step" in said


def test_a_language_model_reads_a_prompt(ask, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)).save_pretrained(tmp_path)
    plan = json.loads(ask("plan", without_weights(tmp_path), *BUDGET, "--json"))
    assert (plan["model"], plan["inputs"]) == ("LlamaForCausalLM", "batch 1, tokens 512")


# Refusals


def no_index(directory: Path) -> None:
    (directory / "model_index.json").unlink()


def written(path: str, text: str) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / path).write_text(text)

    return write


def index(**fields: Any) -> Callable[[Path], None]:
    return lambda directory: edit(directory / "model_index.json", **fields)


def config(part: str, **fields: Any) -> Callable[[Path], None]:
    return lambda directory: edit(directory / part / "config.json", **fields)


DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "neither": (no_index, "this directory has neither model_index.json (a diffusers pipeline) nor config.json"),
    "broken index": (written("model_index.json", "{"), "model_index.json is not JSON"),
    "broken config": (written("vae/config.json", "[]"), "must be a JSON object"),
    "unknown pipeline": (index(_class_name="OtherPipeline"), "what a request of 'OtherPipeline' runs is not known"),
    "no pipeline": (index(_class_name=None), "what a request of 'None' runs is not known"),
    "another library": (index(vae=["os", "system"]), "only diffusers and transformers are used here"),
    "own module": (index(vae=["bait", "Vae"]), "leave it out: --exclude vae"),
    "unknown class": (index(vae=["diffusers", "AutoencoderXYZ"]), "vae: diffusers"),
    "no model": (index(vae=["diffusers", "FluxPipeline"]), "has no model 'FluxPipeline'"),
    "another part": (index(controlnet=["diffusers", "FluxControlNetModel"]), "leave it out: --exclude controlnet"),
    "another encoder": (index(text_encoder=["transformers", "BertModel"]), "leave it out: --exclude text_encoder"),
    "another denoiser": (index(transformer=["diffusers", "PixArtTransformer2DModel"]), "inputs of a PixArtT"),
    "missing folder": (
        lambda d: (d / "vae" / "config.json").unlink(),
        "model_index.json names vae, but there is no vae/config.json",
    ),
    "quantized": (config("transformer", quantization_config={"bits": 4}), "quantized weights cannot be planned"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_directory_that_is_not_understood_is_refused_by_name(refused, flux, monkeypatch, name):
    (flux / "bait.py").write_text("raise SystemExit('code of the directory has run')")
    monkeypatch.chdir(flux)
    damage, reason = DAMAGED[name]
    damage(flux)
    line = refused("plan", flux, *BUDGET)
    assert reason in line
    assert str(flux) in line
    assert "bait" not in sys.modules


def test_options_that_do_not_fit_are_refused(refused, flux, directory_of, tmp_path):
    assert "--frames is not a size of FluxPipeline; it takes" in refused("plan", flux, *BUDGET, "--frames", 5)
    assert "--tokens is not a size of StableDiffusionXLPipeline" in refused(
        "plan", directory_of("sdxl"), *BUDGET, "--tokens", 5
    )
    for option in (("--steps", 4), ("--exclude", "vae")):
        line = refused("plan", flux / "transformer", *BUDGET, *option, code=2)
        assert f"{option[0]} is for the directory of a pipeline" in line
    (tmp_path / "offload.yaml").write_text("blocks: [blocks.*]\n")
    line = refused("plan", flux, *BUDGET, "--settings", tmp_path / "offload.yaml")
    assert "blocks and entry are for one model" in line
    config = flux / "transformer" / "config.json"
    assert f"{config} is a file; give the directory that it is in" in refused("plan", config, *BUDGET)
    assert "there is no model and no directory './missing'" in refused("plan", "./missing", *BUDGET)
