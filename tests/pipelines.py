"""Whole pipelines of diffusers with small random components, and requests for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from transformers import (
    BatchEncoding,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = 1000  # of every tokenizer


class Tokenizer:
    """Makes numbers of texts, as many as are wanted."""

    def __init__(self, length: int) -> None:
        self.model_max_length = length
        self.added_tokens_encoder: dict[str, int] = {}

    def __call__(self, texts: str | list[str], max_length: int | None = None, **_: Any) -> BatchEncoding:
        """Tokens that depend on the text."""
        texts = [texts] if isinstance(texts, str) else texts
        length = min(max_length or self.model_max_length, self.model_max_length)
        seeds = [torch.Generator().manual_seed(sum(map(ord, text))) for text in texts]
        tokens = torch.stack([torch.randint(3, WORDS, (length,), generator=seed) for seed in seeds])
        return BatchEncoding({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return text.split()

    def batch_decode(self, *_: Any) -> list[str]:
        """No text."""
        return [""]


@dataclass(frozen=True)
class Small:
    """A small pipeline, and the requests that are made of it one after another: their arguments."""

    make: Callable[[], Any]
    requests: tuple[dict[str, Any], ...]

    def output(self, pipe: Any, number: int) -> Tensor:
        """What a request gives."""
        seed = torch.Generator().manual_seed(number)
        found: Tensor = pipe(**self.requests[number], generator=seed, output_type="pt")[0]
        return found


def _clip(kind: type[Any], width: int = 32, blocks: int = 4) -> Any:
    config = CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=4,
        num_hidden_layers=blocks,
        vocab_size=WORDS,
        projection_dim=width,
        hidden_act="gelu",
    )
    return kind(config)


def _t5() -> Any:
    return T5EncoderModel(T5Config(d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=5, vocab_size=WORDS))


def _vae(channels: int = 4, **options: Any) -> Any:
    return AutoencoderKL(
        sample_size=32,
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **options,
    )


def _flux() -> Any:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=4,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=_clip(CLIPTextModel),
        tokenizer=Tokenizer(77),
        text_encoder_2=_t5(),
        tokenizer_2=Tokenizer(64),
        transformer=transformer,
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=1.5),
    )


def _sd3() -> Any:
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=5,
        attention_head_dim=16,
        num_attention_heads=4,
        caption_projection_dim=64,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        out_channels=4,
    )
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=_clip(CLIPTextModelWithProjection),
        tokenizer=Tokenizer(77),
        text_encoder_2=_clip(CLIPTextModelWithProjection),
        tokenizer_2=Tokenizer(77),
        text_encoder_3=T5EncoderModel(
            T5Config(d_model=64, d_ff=64, d_kv=8, num_heads=4, num_layers=4, vocab_size=WORDS)
        ),
        tokenizer_3=Tokenizer(64),
        transformer=transformer,
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=1.5),
    )


def _sdxl() -> Any:
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(32, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        cross_attention_dim=64,
        norm_num_groups=8,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip(CLIPTextModel),
        text_encoder_2=_clip(CLIPTextModelWithProjection),
        tokenizer=Tokenizer(77),
        tokenizer_2=Tokenizer(77),
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def _wan() -> Any:
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=48,
        num_layers=6,
        rope_max_seq_len=64,
    )
    config = UMT5Config(d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=4, vocab_size=WORDS)
    return WanPipeline(
        tokenizer=Tokenizer(64),
        text_encoder=UMT5EncoderModel(config),
        vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=transformer,
    )


def _ltx() -> Any:
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=5,
        caption_channels=32,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
    )
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=_t5(),
        tokenizer=Tokenizer(64),
        transformer=transformer,
    )


def _cogvideox() -> Any:
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=5,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
    )
    vae = AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return CogVideoXPipeline(
        tokenizer=Tokenizer(16),
        text_encoder=_t5(),
        vae=vae,
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(),
    )


def _made(build: Callable[[], Any]) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        pipe = build()
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def _requests(frames: bool, guidance: float, **options: Any) -> tuple[dict[str, Any], ...]:
    """Requests with other prompts, steps, sizes and batches. The last one is the first one again."""
    first = dict(prompt="a cat", num_inference_steps=3, height=32, width=32, guidance_scale=guidance, **options)
    if frames:
        first |= dict(num_frames=9)
    wider = {**first, "prompt": "a dog on a hill", "num_inference_steps": 4, "height": 64}
    more = {**first, "prompt": ["a bird", "a fish"], "num_inference_steps": 2}
    return first, wider, more, first


PIPELINES = {
    "flux": Small(_made(_flux), _requests(False, 3.5, max_sequence_length=48)),
    "sd3": Small(_made(_sd3), _requests(False, 5.0, max_sequence_length=48)),
    "sdxl": Small(_made(_sdxl), _requests(False, 5.0)),
    "wan": Small(_made(_wan), _requests(True, 5.0, max_sequence_length=32)),
    "ltx": Small(_made(_ltx), _requests(True, 3.0, max_sequence_length=32)),
    "cogvideox": Small(_made(_cogvideox), _requests(True, 6.0, max_sequence_length=16)),
}
