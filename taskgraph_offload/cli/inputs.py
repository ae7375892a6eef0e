"""Realistic inputs for the architectures that people offload, made from a model's configuration and a few sizes.

An `Example` has two functions: the usual sizes of a model, and the inputs of one forward at given sizes. To add an
architecture, write both and list them at the end of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import SettingsError

Inputs: TypeAlias = dict[str, Any]
Sizes: TypeAlias = Mapping[str, int]

SIZES = {
    "batch": "number of pictures, videos or prompts",
    "height": "of the picture in pixels",
    "width": "of the picture in pixels",
    "frames": "number of pictures in the video",
    "tokens": "length of the prompt",
}

PIXELS = 8  # one latent of the image and video models below stands for 8 x 8 pixels
FRAMES = 4  # one latent of a video stands for so many frames
PROMPT = 512  # tokens


@dataclass(frozen=True)
class Example:
    """How to call an architecture: `usual` gives its usual sizes, `inputs` gives the arguments for some sizes."""

    inputs: Callable[..., Inputs]
    usual: Callable[[Any], Sizes]


@dataclass(frozen=True)
class Maker:
    """Makes tensors on the device of a model, in the dtype that it computes in."""

    device: torch.device
    dtype: torch.dtype

    def noise(self, *shape: int) -> Tensor:
        """Random values, for latents or embeddings."""
        return torch.randn(shape, device=self.device).to(self.dtype)

    def ones(self, *shape: int) -> Tensor:
        """Ones, for tokens or time steps."""
        return torch.ones(shape, device=self.device, dtype=torch.long)


def example_inputs(model: nn.Module, asked: Sizes, make: Maker) -> tuple[Inputs, Sizes] | None:
    """The inputs of one forward, and their sizes: `asked`, or the usual ones. None if the architecture is unknown."""
    example, name = _example_for(model), type(model).__name__
    if example is None:
        if asked:
            raise SettingsError(f"--{next(iter(asked))}: the inputs of {name} are not known here; give module:factory")
        return None
    usual = example.usual(model.config)
    for size in asked:
        if size not in usual:
            takes = " ".join(f"--{name}" for name in usual)
            raise SettingsError(f"--{size} is not a size of {name}; it takes {takes}")
    sizes = {**usual, **asked}
    return example.inputs(model.config, make, **sizes), sizes


def _example_for(model: nn.Module) -> Example | None:
    """Look up the name of the architecture; for models of transformers, the name of their main input."""
    if known := _BY_NAME.get(type(model).__name__):
        return known
    config = getattr(model, "config", None)
    sees_and_reads = hasattr(config, "text_config") or hasattr(config, "vision_config")
    return None if sees_and_reads else _BY_MAIN_INPUT.get(getattr(model, "main_input_name", ""))


# Image and video models of diffusers


def _flux(config: Any, make: Maker, *, batch: int, height: int, width: int, tokens: int) -> Inputs:
    """Packed latents: one token is a patch of 2 x 2 latents."""
    image = (height // PIXELS // 2) * (width // PIXELS // 2)
    guidance = {"guidance": make.noise(batch)} if config.guidance_embeds else {}
    return guidance | {
        "hidden_states": make.noise(batch, image, config.in_channels),
        "encoder_hidden_states": make.noise(batch, tokens, config.joint_attention_dim),
        "pooled_projections": make.noise(batch, config.pooled_projection_dim),
        "timestep": make.noise(batch),
        "img_ids": make.noise(image, 3),
        "txt_ids": make.noise(tokens, 3),
    }


def _qwen_image(config: Any, make: Maker, *, batch: int, height: int, width: int, tokens: int) -> Inputs:
    """Packed latents, as for Flux, and their shape."""
    rows, columns = height // PIXELS // 2, width // PIXELS // 2
    return {
        "hidden_states": make.noise(batch, rows * columns, config.in_channels),
        "encoder_hidden_states": make.noise(batch, tokens, config.joint_attention_dim),
        "timestep": make.noise(batch),
        "img_shapes": [(1, rows, columns)] * batch,
    }


def _sd3(config: Any, make: Maker, *, batch: int, height: int, width: int, tokens: int) -> Inputs:
    return {
        "hidden_states": make.noise(batch, config.in_channels, height // PIXELS, width // PIXELS),
        "encoder_hidden_states": make.noise(batch, tokens, config.joint_attention_dim),
        "pooled_projections": make.noise(batch, config.pooled_projection_dim),
        "timestep": make.noise(batch),
    }


def _wan(config: Any, make: Maker, *, batch: int, frames: int, height: int, width: int, tokens: int) -> Inputs:
    """Latents of a video; also the first picture, if the model takes one."""
    video = (1 + (frames - 1) // FRAMES, height // PIXELS, width // PIXELS)
    start = {"encoder_hidden_states_image": make.noise(batch, 257, config.image_dim)} if config.image_dim else {}
    return start | {
        "hidden_states": make.noise(batch, config.in_channels, *video),
        "timestep": make.ones(batch),
        "encoder_hidden_states": make.noise(batch, tokens, config.text_dim),
    }


def _unet(config: Any, make: Maker, *, batch: int, height: int, width: int, tokens: int) -> Inputs:
    """Latents and a prompt; also the size of the picture, if the model takes it, as SDXL does."""
    inputs = {
        "sample": make.noise(batch, config.in_channels, height // PIXELS, width // PIXELS),
        "timestep": make.ones(batch),
        "encoder_hidden_states": make.noise(batch, tokens, config.cross_attention_dim),
    }
    if config.addition_embed_type != "text_time":
        return inputs
    numbers = 6  # the original size, the crop and the target size
    pooled = config.projection_class_embeddings_input_dim - numbers * config.addition_time_embed_dim
    size = {"text_embeds": make.noise(batch, pooled), "time_ids": make.noise(batch, numbers)}
    return inputs | {"added_cond_kwargs": size}


# Models of transformers


def _text(config: Any, make: Maker, *, batch: int, tokens: int) -> Inputs:
    """A prompt; a model with encoder and decoder gets it for both."""
    ids = make.ones(batch, tokens)
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})


def _picture(config: Any, make: Maker, *, batch: int, height: int, width: int) -> Inputs:
    return {"pixel_values": make.noise(batch, config.num_channels, height, width)}


def _prompt_of(config: Any) -> Sizes:
    """A prompt of the usual length, or shorter if the model cannot read that many tokens."""
    return {"batch": 1, "tokens": min(PROMPT, getattr(config, "max_position_embeddings", None) or PROMPT)}


def _picture_of(config: Any) -> Sizes:
    """The size of picture that the model was trained for."""
    side = config.image_size
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return {"batch": 1, "height": height, "width": width}


def _latents_of(config: Any) -> Sizes:
    """The size that a UNet was trained for; a batch of two, for classifier-free guidance."""
    side = PIXELS * config.sample_size
    return {"batch": 2, "height": side, "width": side, "tokens": 77}


_SQUARE = {"height": 1024, "width": 1024}
_VIDEO = {"frames": 81, "height": 480, "width": 832}  # five seconds at 480p

_BY_NAME: Mapping[str, Example] = {
    "FluxTransformer2DModel": Example(_flux, lambda _: {"batch": 1, **_SQUARE, "tokens": PROMPT}),
    "QwenImageTransformer2DModel": Example(_qwen_image, lambda _: {"batch": 1, **_SQUARE, "tokens": PROMPT}),
    # A batch of two, for classifier-free guidance; 77 tokens from CLIP and 256 from T5.
    "SD3Transformer2DModel": Example(_sd3, lambda _: {"batch": 2, **_SQUARE, "tokens": 333}),
    "WanTransformer3DModel": Example(_wan, lambda _: {"batch": 1, **_VIDEO, "tokens": PROMPT}),
    "UNet2DConditionModel": Example(_unet, _latents_of),
}
_BY_MAIN_INPUT: Mapping[str, Example] = {
    "input_ids": Example(_text, _prompt_of),
    "pixel_values": Example(_picture, _picture_of),
}
