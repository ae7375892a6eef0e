"""Models of real shape, small in bytes, with the inputs of a forward. Nothing is downloaded.

A model of size 1 takes a few hundred MB in bfloat16, and has as many blocks as the real one: Flux.1, Wan2.1 14B, SDXL,
Llama 3 8B. The size scales the widths and the number of tokens, as it does between the models of a family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model, the inputs of its first step, and what libraries must be told about it."""

    name: str
    model: nn.Module
    inputs: Inputs
    block_classes: tuple[str, ...]
    denoises: str | None  # the input that a step changes: a latent. None: every step is the same

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, in order. None is inside of another."""
        return [module for module in self.model.modules() if type(module).__name__ in self.block_classes]

    @property
    def nbytes(self) -> int:
        """The bytes of all weights."""
        return nbytes(self.model)

    def step(self, forward: Callable[..., Any], inputs: Inputs) -> tuple[Tensor, Inputs]:
        """Run a step: its output, and the inputs of the next one."""
        output = forward(**inputs)[0]
        key = self.denoises
        return output, inputs if key is None else {**inputs, key: inputs[key] - 0.1 * output}


@dataclass(frozen=True)
class Chain:
    """A model cut by hand into modules that run one after another, and how its inputs begin the chain."""

    modules: Sequence[nn.Module]
    begin: Callable[[Inputs], tuple[Any, ...]]


def nbytes(module: nn.Module) -> int:
    """The bytes of a module's weights."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def on(device: str, inputs: Inputs) -> Inputs:
    """The inputs on a device."""

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return on(device, value)
        return value.to(device) if isinstance(value, Tensor) else value

    return {name: moved(value) for name, value in inputs.items()}


def build(name: str, size: float = 1.0, depth: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Build a model with the same random weights and inputs each time. `depth` scales the number of blocks."""
    torch.manual_seed(0)
    case = MODELS[name](size, depth, dtype)
    case.model.to(dtype).eval().requires_grad_(False)
    return case


def _scaled(number: float, factor: float, least: int = 1) -> int:
    return max(least, round(number * factor))


def _flux(size: float, depth: float, dtype: torch.dtype) -> Case:
    from diffusers import FluxTransformer2DModel

    heads, side, text = _scaled(6, size**0.5), _scaled(16, size**0.5, 4), _scaled(64, size, 4)
    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=_scaled(19, depth),
        num_single_layers=_scaled(38, depth),
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=512,
        pooled_projection_dim=256,
        guidance_embeds=True,
        axes_dims_rope=(8, 28, 28),
    )
    places = torch.arange(side * side)
    inputs = dict(
        hidden_states=torch.randn(1, side * side, 64).to(dtype),
        encoder_hidden_states=torch.randn(1, text, 512).to(dtype),
        pooled_projections=torch.randn(1, 256).to(dtype),
        timestep=torch.tensor([0.5]).to(dtype),
        guidance=torch.tensor([3.5]).to(dtype),
        img_ids=torch.stack((0 * places, places // side, places % side), 1).to(dtype),
        txt_ids=torch.zeros(text, 3).to(dtype),
        return_dict=False,
    )
    classes = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    return Case("flux", model, inputs, classes, "hidden_states")


def _wan(size: float, depth: float, dtype: torch.dtype) -> Case:
    from diffusers import WanTransformer3DModel

    heads, side, text = _scaled(8, size**0.5), 2 * _scaled(8, size**0.5, 2), _scaled(64, size, 4)
    model = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=64,
        ffn_dim=heads * 64 * 27 // 10,
        num_layers=_scaled(40, depth),
        text_dim=512,
    )
    inputs = dict(
        hidden_states=torch.randn(1, 16, 5, side, side).to(dtype),
        timestep=torch.tensor([500]),
        encoder_hidden_states=torch.randn(1, text, 512).to(dtype),
        return_dict=False,
    )
    return Case("wan", model, inputs, ("WanTransformerBlock",), "hidden_states")


def _sdxl(size: float, depth: float, dtype: torch.dtype) -> Case:
    from diffusers import UNet2DConditionModel

    heads, side = _scaled(3, size**0.5), 4 * _scaled(8, size**0.5, 2)
    model = UNet2DConditionModel(
        sample_size=side,
        block_out_channels=(32 * heads, 64 * heads, 128 * heads),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, _scaled(2, depth), _scaled(10, depth)),
        attention_head_dim=(heads, 2 * heads, 4 * heads),
        cross_attention_dim=512,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + 320,
        use_linear_projection=True,
    )
    inputs = dict(
        sample=torch.randn(2, 4, side, side).to(dtype),
        timestep=torch.tensor(500.0).to(dtype),
        encoder_hidden_states=torch.randn(2, 77, 512).to(dtype),
        added_cond_kwargs=dict(text_embeds=torch.randn(2, 320).to(dtype), time_ids=torch.zeros(2, 6).to(dtype)),
        return_dict=False,
    )
    return Case("sdxl", model, inputs, ("BasicTransformerBlock", "ResnetBlock2D"), "sample")


def _llama(size: float, depth: float, dtype: torch.dtype) -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    groups = _scaled(3, size**0.5)  # of four heads that share their keys
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=256 * groups,
        intermediate_size=896 * groups,
        num_hidden_layers=_scaled(32, depth),
        num_attention_heads=4 * groups,
        num_key_value_heads=groups,
    )
    model = LlamaForCausalLM(config)
    tokens = torch.randint(8192, (1, _scaled(256, size, 8)))
    inputs = dict(input_ids=tokens, use_cache=False, return_dict=False)
    return Case("llama", model, inputs, ("LlamaDecoderLayer",), None)


MODELS: dict[str, Callable[[float, float, torch.dtype], Case]] = {
    "flux": _flux,
    "wan": _wan,
    "sdxl": _sdxl,
    "llama": _llama,
}


# Chains
#
# What a user has to write for a library that takes a list of modules instead of a model. Each module gives what the
# next one takes.


class Link(nn.Module):
    """A part of a model, with a function that runs it."""

    def __init__(self, run: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *state: Any) -> Any:
        """Run the part."""
        return self.run(self, *state)


def _flux_chain(model: Any) -> Chain:
    def first(
        own: Any, image: Tensor, text: Tensor, pooled: Tensor, time: Tensor, guidance: Tensor, ids: Tensor
    ) -> Any:
        state = own.time(time * 1000, guidance * 1000, pooled)
        return own.image(image), own.text(text), state, *own.places(ids)

    def block(own: Any, image: Tensor, text: Tensor, state: Tensor, cos: Tensor, sin: Tensor) -> Any:
        text, image = own.block(
            hidden_states=image, encoder_hidden_states=text, temb=state, image_rotary_emb=(cos, sin)
        )
        return image, text, state, cos, sin

    def last(own: Any, image: Tensor, text: Tensor, state: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return own.project(own.norm(image, state))

    parts = dict(image=model.x_embedder, text=model.context_embedder, time=model.time_text_embed)
    blocks = [Link(block, block=each) for each in (*model.transformer_blocks, *model.single_transformer_blocks)]
    ends = Link(first, places=model.pos_embed, **parts), Link(last, norm=model.norm_out, project=model.proj_out)
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance")

    def begin(inputs: Inputs) -> tuple[Any, ...]:
        return (*(inputs[name] for name in names), torch.cat((inputs["txt_ids"], inputs["img_ids"])))

    return Chain((ends[0], *blocks, ends[1]), begin)


def _wan_chain(model: Any) -> Chain:
    grid: list[int] = []

    def first(own: Any, video: Tensor, time: Tensor, text: Tensor) -> Any:
        cos, sin = own.places(video)
        patches = own.patch(video)
        grid[:] = patches.shape[2:]
        state, steps, text, _ = own.condition(time, text, None)
        return patches.flatten(2).transpose(1, 2).contiguous(), text, steps.unflatten(1, (6, -1)), cos, sin, state

    def block(own: Any, video: Tensor, text: Tensor, steps: Tensor, cos: Tensor, sin: Tensor, state: Tensor) -> Any:
        return own.block(video, text, steps, (cos, sin)), text, steps, cos, sin, state

    def last(own: Any, video: Tensor, text: Tensor, steps: Tensor, cos: Tensor, sin: Tensor, state: Tensor) -> Any:
        shift, scale = (own.table + state.unsqueeze(1)).chunk(2, dim=1)
        video = (own.norm(video.float()) * (1 + scale) + shift).type_as(video)
        patch = model.config.patch_size
        pixels = own.project(video).reshape(1, *grid, *patch, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return pixels.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    begins = Link(first, places=model.rope, patch=model.patch_embedding, condition=model.condition_embedder)
    ends = Link(last, norm=model.norm_out, project=model.proj_out, table=model.scale_shift_table)
    blocks = [Link(block, block=each) for each in model.blocks]
    names = ("hidden_states", "timestep", "encoder_hidden_states")
    return Chain((begins, *blocks, ends), lambda inputs: tuple(inputs[name] for name in names))


def _llama_chain(model: Any) -> Chain:
    def first(own: Any, tokens: Tensor) -> Any:
        places = torch.arange(tokens.shape[1], device=tokens.device)[None]
        text = own.embed(tokens)
        return text, *own.places(text, position_ids=places)

    def block(own: Any, text: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return own.block(text, position_embeddings=(cos, sin)), cos, sin

    def last(own: Any, text: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return own.head(own.norm(text))

    inner = model.model
    begins = Link(first, embed=inner.embed_tokens, places=inner.rotary_emb)
    ends = Link(last, norm=inner.norm, head=model.lm_head)
    blocks = [Link(block, block=each) for each in inner.layers]
    return Chain((begins, *blocks, ends), lambda inputs: (inputs["input_ids"],))


CHAINS: dict[str, Callable[[Any], Chain]] = {"flux": _flux_chain, "wan": _wan_chain, "llama": _llama_chain}
