"""Realistic inputs for the architectures that people offload, made from a model's configuration and a few sizes.

An `Example` has two functions: the usual sizes of a model, and the inputs of one call at given sizes. To add an
architecture, write both and list them at the end of this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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

PROMPT = 512  # tokens


@dataclass(frozen=True)
class Scale:
    """What one latent stands for: so many pixels in height and in width, and so many frames of a video.

    >>> Scale().grid(1024, 512), Scale().video(81, 480, 832)
    ((128, 64), (21, 60, 104))
    """

    pixels: int = 8
    frames: int = 4

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The latents of a picture: rows and columns."""
        return height // self.pixels, width // self.pixels

    def video(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The latents of a video: frames, rows and columns."""
        return 1 + (frames - 1) // self.frames, *self.grid(height, width)


@dataclass(frozen=True)
class Example:
    """How to call an architecture: `usual` gives its usual sizes, `inputs` gives the arguments for some sizes.

    `scale` reads a model's configuration; `entry` is the method that is called.
    """

    inputs: Callable[..., Inputs]
    usual: Callable[[Any, Scale], Sizes]
    scale: Callable[[Any], Scale] = lambda _: Scale()
    entry: str = "forward"


@dataclass(frozen=True)
class ExampleCall:
    """One call of a model: the method, its arguments, and their sizes."""

    entry: str
    inputs: Inputs
    sizes: Sizes

    @property
    def described(self) -> str:
        """The sizes in words, after the method if that is not the forward."""
        sizes = ", ".join(f"{name} {size}" for name, size in self.sizes.items())
        return sizes if self.entry == "forward" else f"{self.entry}: {sizes}"


@dataclass(frozen=True)
class Maker:
    """Makes tensors on the device of a model, in the dtype that it computes in."""

    device: torch.device
    dtype: torch.dtype
    scale: Scale = Scale()

    def noise(self, *shape: int) -> Tensor:
        """Random values, for latents or embeddings."""
        return torch.randn(shape, device=self.device).to(self.dtype)

    def ones(self, *shape: int) -> Tensor:
        """Ones, for tokens or time steps."""
        return torch.ones(shape, device=self.device, dtype=torch.long)


def example_call(model: nn.Module, asked: Sizes, make: Maker, scale: Scale | None = None) -> ExampleCall | None:
    """A call of a model at the sizes `asked`, else at the usual ones. None if the architecture is unknown.

    `scale` is that of the VAE that the model works with, if there is one.
    """
    example, name = _example_for(model), type(model).__name__
    if example is None:
        if asked:
            raise SettingsError(f"--{next(iter(asked))}: the inputs of {name} are not known here; give module:factory")
        return None
    scale = scale or example.scale(model.config)
    usual = example.usual(model.config, scale)
    check_sizes(name, asked, usual)
    sizes = {**usual, **asked}
    return ExampleCall(example.entry, example.inputs(model.config, replace(make, scale=scale), **sizes), sizes)


def usual_sizes(model: nn.Module, scale: Scale) -> Sizes:
    """The sizes of a call of a model, if nobody asks for others; none if the architecture is unknown."""
    example = _example_for(model)
    return {} if example is None else example.usual(model.config, scale)


def scale_of(model: nn.Module) -> Scale:
    """What a latent of a model stands for."""
    example = _example_for(model)
    return Scale() if example is None else example.scale(model.config)


def check_sizes(name: str, asked: Sizes, usual: Sizes) -> None:
    """Refuse a size that a model or a pipeline of this name does not take."""
    for size in asked:
        if size not in usual:
            takes = " ".join(f"--{name}" for name in usual)
            raise SettingsError(f"--{size} is not a size of {name}; it takes {takes}")


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
    rows, columns = make.scale.grid(height, width)
    image = (rows // 2) * (columns // 2)
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
    rows, columns = (length // 2 for length in make.scale.grid(height, width))
    return {
        "hidden_states": make.noise(batch, rows * columns, config.in_channels),
        "encoder_hidden_states": make.noise(batch, tokens, config.joint_attention_dim),
        "timestep": make.noise(batch),
        "img_shapes": [(1, rows, columns)] * batch,
    }


def _sd3(config: Any, make: Maker, *, batch: int, height: int, width: int, tokens: int) -> Inputs:
    return {
        "hidden_states": make.noise(batch, config.in_channels, *make.scale.grid(height, width)),
        "encoder_hidden_states": make.noise(batch, tokens, config.joint_attention_dim),
        "pooled_projections": make.noise(batch, config.pooled_projection_dim),
        "timestep": make.noise(batch),
    }


def _wan(config: Any, make: Maker, *, batch: int, frames: int, height: int, width: int, tokens: int) -> Inputs:
    """Latents of a video; also the first picture, if the model takes one."""
    video = make.scale.video(frames, height, width)
    start = {"encoder_hidden_states_image": make.noise(batch, 257, config.image_dim)} if config.image_dim else {}
    return start | {
        "hidden_states": make.noise(batch, config.in_channels, *video),
        "timestep": make.ones(batch),
        "encoder_hidden_states": make.noise(batch, tokens, config.text_dim),
    }


def _ltx(config: Any, make: Maker, *, batch: int, frames: int, height: int, width: int, tokens: int) -> Inputs:
    """A token for each latent, and the shape of the video."""
    count, rows, columns = make.scale.video(frames, height, width)
    return {
        "hidden_states": make.noise(batch, count * rows * columns, config.in_channels),
        "encoder_hidden_states": make.noise(batch, tokens, config.caption_channels),
        "timestep": make.ones(batch),
        "encoder_attention_mask": make.ones(batch, tokens),
        "num_frames": count,
        "height": rows,
        "width": columns,
    }


def _cogvideox(config: Any, make: Maker, *, batch: int, frames: int, height: int, width: int, tokens: int) -> Inputs:
    """Latents of a video, the frames before the channels; also the angles of the positions, if the model rotates."""
    count, rows, columns = make.scale.video(frames, height, width)
    together = config.patch_size_t or 1
    patches = math.ceil(count / together), rows // config.patch_size, columns // config.patch_size
    inputs = {
        "hidden_states": make.noise(batch, patches[0] * together, config.in_channels, rows, columns),
        "encoder_hidden_states": make.noise(batch, tokens, config.text_embed_dim),
        "timestep": make.ones(batch),
    }
    if not config.use_rotary_positional_embeddings:
        return inputs
    angles = make.noise(math.prod(patches), config.attention_head_dim)
    return inputs | {"image_rotary_emb": (angles, angles)}


def _unet(config: Any, make: Maker, *, batch: int, height: int, width: int, tokens: int) -> Inputs:
    """Latents and a prompt; also the size of the picture, if the model takes it, as SDXL does."""
    inputs = {
        "sample": make.noise(batch, config.in_channels, *make.scale.grid(height, width)),
        "timestep": make.ones(batch),
        "encoder_hidden_states": make.noise(batch, tokens, config.cross_attention_dim),
    }
    if config.addition_embed_type != "text_time":
        return inputs
    numbers = 6  # the original size, the crop and the target size
    pooled = config.projection_class_embeddings_input_dim - numbers * config.addition_time_embed_dim
    size = {"text_embeds": make.noise(batch, pooled), "time_ids": make.noise(batch, numbers)}
    return inputs | {"added_cond_kwargs": size}


# Decoders of diffusers: a VAE gives pictures for latents


def _picture_latents(config: Any, make: Maker, *, batch: int, height: int, width: int) -> Inputs:
    return {"z": make.noise(batch, config.latent_channels, *make.scale.grid(height, width))}


def _video_latents(config: Any, make: Maker, *, batch: int, frames: int, height: int, width: int) -> Inputs:
    """Latents of a video; also a time step, if the decoder takes one."""
    channels = config.z_dim if "z_dim" in config else config.latent_channels
    time = {"temb": make.noise(batch)} if config.get("timestep_conditioning") else {}
    return {"z": make.noise(batch, channels, *make.scale.video(frames, height, width))} | time


def _scale_of_blocks(config: Any) -> Scale:
    """Each block but the last halves the picture."""
    return Scale(2 ** (len(config.block_out_channels) - 1), config.get("temporal_compression_ratio", Scale().frames))


def _scale_of_wan(config: Any) -> Scale:
    return Scale(config.get("scale_factor_spatial", 8), config.get("scale_factor_temporal", 4))


def _scale_of_ltx(config: Any) -> Scale:
    """Patches are taken first; then some of the blocks halve the picture and the number of frames."""
    halves = 2 ** sum(config.spatio_temporal_scaling)
    return Scale(config.patch_size * halves, config.patch_size_t * halves)


# Models of transformers


def _text(config: Any, make: Maker, *, batch: int, tokens: int) -> Inputs:
    """A prompt; a model with encoder and decoder gets it for both."""
    ids = make.ones(batch, tokens)
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})


def _text_to_encode(_: Any, make: Maker, *, batch: int, tokens: int) -> Inputs:
    return {"input_ids": make.ones(batch, tokens)}


def _picture(config: Any, make: Maker, *, batch: int, height: int, width: int) -> Inputs:
    return {"pixel_values": make.noise(batch, config.num_channels, height, width)}


# Usual sizes


def _prompt_of(config: Any, _: Scale) -> Sizes:
    """A prompt of the usual length, or shorter if the model cannot read that many tokens."""
    return {"batch": 1, "tokens": min(PROMPT, getattr(config, "max_position_embeddings", None) or PROMPT)}


def _picture_of(config: Any, _: Scale) -> Sizes:
    """The size of picture that the model was trained for."""
    side = config.image_size
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return {"batch": 1, "height": height, "width": width}


def _latents_of(config: Any, scale: Scale) -> Sizes:
    """The size that a UNet was trained for; a batch of two, for classifier-free guidance."""
    return {"batch": 2, **_square(scale, config.sample_size), "tokens": CLIP_TOKENS}


def _latents_of_sd3(config: Any, scale: Scale) -> Sizes:
    """A batch of two, for classifier-free guidance; tokens from CLIP, and 256 from T5."""
    return {"batch": 2, **_square(scale, config.sample_size), "tokens": CLIP_TOKENS + 256}


def _packed_latents_of(_: Any, scale: Scale) -> Sizes:
    return {"batch": 1, **_square(scale, 128), "tokens": PROMPT}


def _latents_of_cogvideox(config: Any, scale: Scale) -> Sizes:
    """The video that the model was trained for; a batch of two, for classifier-free guidance."""
    height, width = config.sample_height * scale.pixels, config.sample_width * scale.pixels
    tokens = config.max_text_seq_length
    return {"batch": 2, "frames": config.sample_frames, "height": height, "width": width, "tokens": tokens}


def _picture_of_vae(config: Any, _: Scale) -> Sizes:
    return {"batch": 1, "height": config.sample_size, "width": config.sample_size}


def _square(scale: Scale, latents: int) -> Sizes:
    return dict.fromkeys(("height", "width"), scale.pixels * latents)


CLIP_TOKENS = 77  # CLIP reads so many, whatever the prompt
_WAN_VIDEO = {"frames": 81, "height": 480, "width": 832}  # five seconds at 480p
_LTX_VIDEO = {"frames": 161, "height": 512, "width": 704}
_COGVIDEOX_VIDEO = {"frames": 49, "height": 480, "width": 720}

_BY_NAME: Mapping[str, Example] = {
    "FluxTransformer2DModel": Example(_flux, _packed_latents_of),
    "QwenImageTransformer2DModel": Example(_qwen_image, _packed_latents_of),
    "SD3Transformer2DModel": Example(_sd3, _latents_of_sd3),
    "WanTransformer3DModel": Example(_wan, lambda *_: {"batch": 1, **_WAN_VIDEO, "tokens": PROMPT}),
    # A batch of two, for classifier-free guidance.
    "LTXVideoTransformer3DModel": Example(
        _ltx, lambda *_: {"batch": 2, **_LTX_VIDEO, "tokens": 128}, lambda _: Scale(32, 8)
    ),
    "CogVideoXTransformer3DModel": Example(_cogvideox, _latents_of_cogvideox),
    "UNet2DConditionModel": Example(_unet, _latents_of),
    "UMT5EncoderModel": Example(_text_to_encode, _prompt_of),  # its configuration says that there is a decoder
    "AutoencoderKL": Example(_picture_latents, _picture_of_vae, _scale_of_blocks, "decode"),
    "AutoencoderKLWan": Example(_video_latents, lambda *_: {"batch": 1, **_WAN_VIDEO}, _scale_of_wan, "decode"),
    "AutoencoderKLLTXVideo": Example(_video_latents, lambda *_: {"batch": 1, **_LTX_VIDEO}, _scale_of_ltx, "decode"),
    "AutoencoderKLCogVideoX": Example(
        _video_latents, lambda *_: {"batch": 1, **_COGVIDEOX_VIDEO}, _scale_of_blocks, "decode"
    ),
}
# For models of transformers that are not listed above.
_BY_MAIN_INPUT: Mapping[str, Example] = {
    "input_ids": Example(_text, _prompt_of),
    "pixel_values": Example(_picture, _picture_of),
}
