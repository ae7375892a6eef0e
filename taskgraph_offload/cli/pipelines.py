"""From the directory of a diffusers pipeline to its models without weights, and to what a request runs of them.

    model_index.json     the class of the pipeline, and the class of each component
    transformer/         one folder for each component, with its config.json
    vae/ ...

To add a pipeline, list it in `RECIPES`; its models need inputs in `inputs`. This module instantiates no pipeline, reads
no weights, and refuses by name what it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from ..errors import SettingsError, shown
from .inputs import (
    CLIP_TOKENS,
    ExampleCall,
    Inputs,
    Maker,
    Scale,
    Sizes,
    check_sizes,
    example_call,
    scale_of,
    usual_sizes,
)
from .models import DTYPES, library, model_of, read_json

INDEX = "model_index.json"
NO_MODELS = ("scheduler", "tokenizer", "feature_extractor", "image_processor")  # how the names of such parts begin
DENOISERS = ("transformer", "unet")
CLIP_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
T5_ENCODERS = ("T5EncoderModel", "UMT5EncoderModel")

Index: TypeAlias = Mapping[str, Any]
Phases: TypeAlias = list[tuple[str, int]]


@dataclass(frozen=True)
class Recipe:
    """What a request of a pipeline runs, as the pipeline itself does it if only a prompt is given.

    Text encoders read each of the `prompts`: with guidance, an empty one too. A step calls the denoiser so many times:
    some pipelines guide with one call of twice the batch, others with two calls. Of the tokens that the denoiser reads,
    `clip_tokens` come from CLIP and the others from T5.
    """

    steps: int
    prompts: int = 2
    calls_in_a_step: int = 1
    clip_tokens: int = 0


RECIPES: Mapping[str, Recipe] = {
    "CogVideoXPipeline": Recipe(50),
    "FluxPipeline": Recipe(28, prompts=1),
    "LTXPipeline": Recipe(50),
    "StableDiffusion3Pipeline": Recipe(28, clip_tokens=CLIP_TOKENS),
    "StableDiffusionPipeline": Recipe(50, clip_tokens=CLIP_TOKENS),
    "StableDiffusionXLPipeline": Recipe(50, clip_tokens=CLIP_TOKENS),
    "WanPipeline": Recipe(50, calls_in_a_step=2),
}


@dataclass(frozen=True)
class Asked:
    """What a person asks of a request: sizes, steps, the dtype of all weights, and models to leave out."""

    sizes: Sizes
    steps: int | None = None
    dtype: str | None = None
    excluded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pipeline:
    """The models of a pipeline on the meta device, the phases of a request, and the inputs of each phase."""

    name: str
    models: Mapping[str, nn.Module]
    program: Phases
    inputs: Mapping[str, Inputs]
    note: str

    def described(self, source: str) -> str:
        """In words: the request that is planned."""
        return self.note


def is_pipeline(directory: Path) -> bool:
    """Whether a directory is one of a diffusers pipeline."""
    return (directory / INDEX).exists()


def from_pipeline(directory: Path, asked: Asked) -> Pipeline:
    """The pipeline of a directory, with the inputs of one request."""
    index = read_json(str(directory / INDEX))
    name = str(index.get("_class_name"))
    try:
        return _pipeline(directory, name, index, asked)
    except SettingsError as error:
        raise SettingsError(f"{directory}: {error}") from None


def _pipeline(directory: Path, name: str, index: Index, asked: Asked) -> Pipeline:
    recipe = _recipe_for(name, index)
    classes = _model_classes(index, asked.excluded)
    denoiser = _denoiser_of(classes)
    dtype = asked.dtype or DTYPES[0]
    models = {part: _part(directory, part, *named, getattr(torch, dtype)) for part, named in classes.items()}
    scale = scale_of(models["vae"] if "vae" in models else models[denoiser])
    usual = _usual_sizes(models[denoiser], scale, recipe)
    check_sizes(name, asked.sizes, usual)
    sizes, steps = {**usual, **asked.sizes}, asked.steps or recipe.steps
    make = Maker(torch.device("meta"), getattr(torch, dtype))
    parts = [*_encoding(models, _prompts(index, recipe)), *_denoising(directory, index, models, steps, recipe)]
    parts += [("vae", 1)] * ("vae" in models)
    calls = {part: _call(part, models[part], sizes, make, scale, recipe) for part, _ in parts}
    phases = {part: part if call.entry == "forward" else f"{part}.{call.entry}" for part, call in calls.items()}
    told = ", ".join(f"{size} {value}" for size, value in (*sizes.items(), ("steps", steps)))
    return Pipeline(
        name=name,
        models=models,
        program=[(phases[part], times) for part, times in parts],
        inputs={phases[part]: call.inputs for part, call in calls.items()},
        note=f"of a request: {told}, {dtype}",
    )


# What is in the directory


def _recipe_for(name: str, index: Index) -> Recipe:
    if name not in RECIPES:
        raise SettingsError(
            f"what a request of {shown(name)} runs is not known here; known are {', '.join(RECIPES)}; for another "
            "pipeline plan one model, as in DIR/transformer"
        )
    if index.get("expand_timesteps"):
        raise SettingsError(f"{name} with expand_timesteps is not known here; plan one model, as in DIR/transformer")
    return RECIPES[name]


def _model_classes(index: Index, excluded: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """For each model of the pipeline, in the order in which a request runs them: its library and its class."""
    rows = {part: row for part, row in index.items() if isinstance(row, list) and any(row)}
    models = {part: row for part, row in rows.items() if not part.startswith(NO_MODELS)}
    for part in excluded:
        if part not in models:
            raise SettingsError(f"--exclude {part}: the models of this pipeline are {', '.join(models)}")
    kept = sorted(models.keys() - set(excluded))  # by name, text encoders come first and the VAE last
    return {part: _checked_class(part, models[part]) for part in kept}


def _checked_class(part: str, row: list[Any]) -> tuple[str, str]:
    """The library and the class of a model, if it is known what a request does with it."""
    leave_out = f"leave it out: --exclude {part}"
    if not part.startswith(("text_encoder", *DENOISERS)) and part != "vae":
        raise SettingsError(f"what {part} does in a request is not known here; {leave_out}")
    match row:
        case ("diffusers" | "transformers" as of, str() as kind):
            if part.startswith("text_encoder") and kind not in CLIP_ENCODERS + T5_ENCODERS:
                raise SettingsError(f"how {part}, a {kind}, is called is not known here; {leave_out}")
            return of, kind
    raise SettingsError(f"{part} is {shown(row)}; only diffusers and transformers are used here; {leave_out}")


def _denoiser_of(classes: Mapping[str, Any]) -> str:
    for part in DENOISERS:
        if part in classes:
            return part
    raise SettingsError("a request needs its transformer or unet; plan another model alone, as in DIR/text_encoder")


def _part(directory: Path, part: str, of: str, kind: str, dtype: torch.dtype) -> nn.Module:
    """A component on the meta device, of the class that the index names."""
    path = directory / part / "config.json"
    if not path.is_file():
        raise SettingsError(f"{INDEX} names {part}, but there is no {part}/config.json; complete the directory")
    fields = read_json(str(path))
    named = {"_class_name": kind} if of == "diffusers" else {"architectures": [kind]}
    return model_of(part, fields | named, "meta", dtype)


# What a request runs


def _usual_sizes(denoiser: nn.Module, scale: Scale, recipe: Recipe) -> dict[str, int]:
    """The sizes of a request for one picture or video. `tokens` are those that T5 reads; CLIP has no choice."""
    usual = dict(usual_sizes(denoiser, scale))
    if not usual:
        raise SettingsError(f"the inputs of a {type(denoiser).__name__} are not known here; give module:factory")
    tokens = usual.pop("tokens") - recipe.clip_tokens
    return usual | {"batch": 1} | ({"tokens": tokens} if tokens else {})


def _call(part: str, model: nn.Module, sizes: Sizes, make: Maker, scale: Scale, recipe: Recipe) -> ExampleCall:
    """How a request calls one of its models."""
    kind, usual = type(model).__name__, usual_sizes(model, scale)
    asked = {size: value for size, value in sizes.items() if size in usual}
    if part.startswith("text_encoder"):
        if kind in CLIP_ENCODERS:
            asked.pop("tokens", None)
    elif part != "vae":
        asked["batch"] *= usual["batch"]  # a batch of two is for guidance
        asked["tokens"] = sizes.get("tokens", 0) + recipe.clip_tokens
    call = example_call(model, asked, make, scale)
    if call is None:
        raise SettingsError(f"the inputs of {part}, a {kind}, are not known here; leave it out: --exclude {part}")
    return call


def _prompts(index: Index, recipe: Recipe) -> int:
    """How many prompts are encoded. For SDXL the empty one is zeros, unless its index says otherwise."""
    sdxl = index["_class_name"] == "StableDiffusionXLPipeline"
    return 1 if sdxl and index.get("force_zeros_for_empty_prompt", True) else recipe.prompts


def _encoding(models: Mapping[str, nn.Module], prompts: int) -> Phases:
    """All text encoders read a prompt before they read the next one."""
    encoders = [part for part in models if part.startswith("text_encoder")]
    return [(encoders[0], prompts)] if len(encoders) == 1 else [(part, 1) for part in encoders] * prompts


def _denoising(directory: Path, index: Index, models: Mapping[str, nn.Module], steps: int, recipe: Recipe) -> Phases:
    """The steps of the denoiser; Wan 2.2 has two of them, and the second one takes over at a time of the scheduler."""
    denoisers = [part for part in models if part.startswith(DENOISERS)]
    boundary = index.get("boundary_ratio")
    first = steps if boundary is None else sum(time >= boundary for time in _times(directory, index, steps))
    counts = dict(zip(denoisers, (first, steps - first), strict=False))
    return [(part, times * recipe.calls_in_a_step) for part, times in counts.items() if times]


def _times(directory: Path, index: Index, steps: int) -> Iterator[float]:
    """The times of the steps, from 1 down to 0, as the scheduler of the pipeline chooses them."""
    kind = _scheduler_class(index)
    scheduler = kind.from_config(read_json(str(directory / "scheduler" / "scheduler_config.json")))
    scheduler.set_timesteps(steps)
    for time in scheduler.timesteps.tolist():
        yield time / scheduler.config.num_train_timesteps


def _scheduler_class(index: Index) -> Any:
    diffusers, row = library("diffusers"), index.get("scheduler")
    kind: Any = getattr(diffusers, str(row[-1]), None) if isinstance(row, list) and row else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise SettingsError(f"diffusers {diffusers.__version__} has no scheduler {shown(row)}")
    return kind
