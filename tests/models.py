"""Models for tests: real architectures at their public sizes on the meta device, and the same in small.

Each factory returns the model and the keyword inputs of one realistic forward. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

torch.set_num_threads(1)  # models this small are slower with several threads

Case = tuple[Any, dict[str, Any]]


def _build(make: Callable[[], Any], device: str, dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make().eval()
    finally:
        torch.set_default_dtype(before)


def flux(device: str = "cpu", full: bool = False) -> Case:
    """Flux.1-dev: 1024 x 1024, so 4096 image tokens and 512 text tokens."""
    from diffusers import FluxTransformer2DModel

    sizes: dict[str, Any] = dict(num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24)
    small: dict[str, Any] = dict(
        num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2, axes_dims_rope=(4, 6, 6)
    )
    widths: dict[str, Any] = dict(in_channels=64, joint_attention_dim=4096, pooled_projection_dim=768)
    small |= dict(in_channels=8, joint_attention_dim=24, pooled_projection_dim=12)
    dtype, image, text = (torch.bfloat16, 4096, 512) if full else (torch.float32, 16, 6)
    config: dict[str, Any] = sizes | widths if full else small
    model = _build(lambda: FluxTransformer2DModel(guidance_embeds=True, **config), device, dtype)
    return model, dict(
        hidden_states=torch.zeros(1, image, config["in_channels"], dtype=dtype, device=device),
        encoder_hidden_states=torch.zeros(1, text, config["joint_attention_dim"], dtype=dtype, device=device),
        pooled_projections=torch.zeros(1, config["pooled_projection_dim"], dtype=dtype, device=device),
        timestep=torch.ones(1, dtype=dtype, device=device),
        guidance=torch.ones(1, dtype=dtype, device=device),
        img_ids=torch.zeros(image, 3, dtype=dtype, device=device),
        txt_ids=torch.zeros(text, 3, dtype=dtype, device=device),
    )


def wan(device: str = "cpu", full: bool = False) -> Case:
    """Wan2.1-14B: 480p, 81 frames, so 21 x 60 x 104 latents and 32,760 tokens."""
    from diffusers import WanTransformer3DModel

    small: dict[str, Any] = dict(num_attention_heads=2, attention_head_dim=12, text_dim=16, ffn_dim=32, num_layers=3)
    dtype, frames, height, width, text = (torch.bfloat16, 21, 60, 104, 512) if full else (torch.float32, 2, 4, 4, 6)
    config: dict[str, Any] = {} if full else small | dict(in_channels=4, out_channels=4, freq_dim=16)
    model = _build(lambda: WanTransformer3DModel(**config), device, dtype)
    channels, text_dim = config.get("in_channels", 16), config.get("text_dim", 4096)
    return model, dict(
        hidden_states=torch.zeros(1, channels, frames, height, width, dtype=dtype, device=device),
        timestep=torch.ones(1, dtype=torch.long, device=device),
        encoder_hidden_states=torch.zeros(1, text, text_dim, dtype=dtype, device=device),
    )


def sdxl(device: str = "cpu", full: bool = False) -> Case:
    """SDXL's UNet: 1024 x 1024, so 128 x 128 latents, with both halves of classifier-free guidance."""
    from diffusers import UNet2DConditionModel

    public: dict[str, Any] = dict(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
        sample_size=128,
    )
    small: dict[str, Any] = dict(
        block_out_channels=(8, 16, 16), attention_head_dim=(1, 2, 2), transformer_layers_per_block=(1, 1, 2)
    )
    small |= dict(cross_attention_dim=12, projection_class_embeddings_input_dim=32, addition_time_embed_dim=4)
    small |= dict(norm_num_groups=4, sample_size=8)
    config = public if full else public | small
    dtype = torch.bfloat16 if full else torch.float32
    model = _build(lambda: UNet2DConditionModel(**config), device, dtype)
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    side, batch = config["sample_size"], 2
    return model, dict(
        sample=torch.zeros(batch, 4, side, side, dtype=dtype, device=device),
        timestep=torch.ones(batch, dtype=torch.long, device=device),
        encoder_hidden_states=torch.zeros(batch, 77, config["cross_attention_dim"], dtype=dtype, device=device),
        added_cond_kwargs=dict(
            text_embeds=torch.zeros(batch, pooled, dtype=dtype, device=device),
            time_ids=torch.zeros(batch, 6, dtype=dtype, device=device),
        ),
    )


def llama(device: str = "cpu", full: bool = False, tied: bool = False, cache: bool = False) -> Case:
    """Llama 3 70B: a prefill of 512 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    public: dict[str, Any] = dict(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    small: dict[str, Any] = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    config = LlamaConfig(**(public if full else small | dict(num_key_value_heads=2)), tie_word_embeddings=tied)
    model = _build(lambda: LlamaForCausalLM(config), device, torch.bfloat16 if full else torch.float32)
    tokens = torch.ones(1, 512 if full else 7, dtype=torch.long, device=device)
    return model, dict(input_ids=tokens, use_cache=cache)


def t5(device: str = "cpu", full: bool = False) -> Case:
    """T5 v1.1 XXL's encoder, as Flux and Wan's relatives use it: 512 tokens."""
    from transformers import T5Config, T5EncoderModel

    public: dict[str, Any] = dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    small: dict[str, Any] = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4)
    config = T5Config(**(public if full else small), feed_forward_proj="gated-gelu")
    model = _build(lambda: T5EncoderModel(config), device, torch.bfloat16 if full else torch.float32)
    return model, dict(input_ids=torch.ones(1, 512 if full else 7, dtype=torch.long, device=device))


FULL_SIZE: dict[str, Callable[[], Case]] = {
    "flux": lambda: flux("meta", full=True),
    "wan": lambda: wan("meta", full=True),
    "sdxl": lambda: sdxl("meta", full=True),
    "llama": lambda: llama("meta", full=True, cache=True),
    "llama no cache": lambda: llama("meta", full=True),
    "t5": lambda: t5("meta", full=True),
}


def sd3() -> Case:
    from diffusers import SD3Transformer2DModel

    sizes: dict[str, Any] = dict(
        sample_size=8, num_layers=3, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12
    )
    widths: dict[str, Any] = dict(
        caption_projection_dim=16, pooled_projection_dim=10, in_channels=4, out_channels=4, pos_embed_max_size=8
    )
    model = _build(lambda: SD3Transformer2DModel(**sizes, **widths), "cpu", torch.float32)
    return model, dict(
        hidden_states=torch.zeros(1, 4, 8, 8),
        encoder_hidden_states=torch.zeros(1, 5, 12),
        pooled_projections=torch.zeros(1, 10),
        timestep=torch.ones(1),
    )


def whisper() -> Case:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes: dict[str, Any] = dict(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2
    )
    widths: dict[str, Any] = dict(
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=64, num_mel_bins=8, max_source_positions=12
    )
    tokens: dict[str, Any] = dict(
        max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1
    )
    model = _build(
        lambda: WhisperForConditionalGeneration(WhisperConfig(**sizes, **widths, **tokens)), "cpu", torch.float32
    )
    return model, dict(input_features=torch.zeros(1, 8, 24), decoder_input_ids=torch.ones(1, 4, dtype=torch.long))


def vit() -> Case:
    from transformers import ViTConfig, ViTModel

    sizes: dict[str, Any] = dict(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    return _build(lambda: ViTModel(ViTConfig(**sizes)), "cpu", torch.float32), dict(
        pixel_values=torch.zeros(1, 3, 8, 8)
    )


def mixtral() -> Case:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    config = MixtralConfig(**sizes, vocab_size=64, num_local_experts=4, num_experts_per_tok=2)
    model = _build(lambda: MixtralForCausalLM(config), "cpu", torch.float32)
    return model, dict(input_ids=torch.arange(6).reshape(1, 6), use_cache=True)


def albert() -> Case:
    from transformers import AlbertConfig, AlbertModel

    sizes: dict[str, Any] = dict(
        vocab_size=64, embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=32
    )
    config = AlbertConfig(**sizes, num_hidden_layers=4, num_hidden_groups=1)
    return _build(lambda: AlbertModel(config), "cpu", torch.float32), dict(input_ids=torch.ones(1, 5, dtype=torch.long))


def vae() -> Case:
    from diffusers import AutoencoderKL

    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    sizes: dict[str, Any] = dict(
        block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, sample_size=16, layers_per_block=1
    )
    return _build(lambda: AutoencoderKL(**blocks, **sizes), "cpu", torch.float32), dict(z=torch.zeros(1, 4, 8, 8))


class Block(nn.Module):
    """Two layers and a residual. `oddities` adds unusual things that real models do."""

    def __init__(
        self, width: int, hidden: int, dtype: torch.dtype = torch.float32, oddities: frozenset[str] = frozenset()
    ) -> None:
        super().__init__()
        self.oddities, self.dtype = oddities, dtype
        self.up, self.down = nn.Linear(width, hidden, dtype=dtype), nn.Linear(hidden, width, bias=False, dtype=dtype)
        self.gain = nn.Parameter(torch.tensor(0.5, dtype=dtype))  # no dimensions
        self.nothing = nn.Parameter(torch.zeros(0, 3, dtype=dtype))  # no bytes
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(self.dtype)
        y = F.linear(y, self.up.weight.T[:].T, self.up.bias) if "functional" in self.oddities else self.up(y)
        if "counts" in self.oddities:
            self.calls.add_(1)
        if "raw" in self.oddities:
            y = y * self.gain
        if "empty" in self.oddities:
            y = torch.cat([y.reshape(-1), self.nothing.reshape(-1)]).reshape(y.shape)
        return x + self.down(torch.relu(y)).to(x.dtype)


class Net(nn.Module):
    """Blocks in a list, called in `order`. `scaled`: a raw parameter is read between them. `skip`: a long skip."""

    def __init__(self, blocks: Sequence[nn.Module], order: Sequence[int], scaled: bool = False, skip: bool = False):
        super().__init__()
        self.blocks, self.order, self.scaled, self.skip = nn.ModuleList(blocks), list(order), scaled, skip
        self.scale = nn.Parameter(torch.full((4,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for index in self.order:
            x = self.blocks[index](x * self.scale if self.scaled else x)
        return x + first if self.skip else x
