"""Plans whole requests of full-size pipelines, without one weight: text encoders once, a transformer often, a VAE.

Needs diffusers and transformers for the architectures. The models are built from their configurations on the meta
device, so nothing is downloaded, and no GPU is needed. For each budget the table has the predicted seconds of a request
that follows others, how far that is from the bound that no schedule beats, and what the usual ways take.

    python examples/pipelines.py [--machine rtx4090] [--budgets 8 12 16 24] [--pipelines flux sdxl wan] [--out out]

It also draws the request of Flux.1 within 12 GiB: how T5 comes while the VAE of the request before still computes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import taskgraph_offload as tgo

DRAWN = ("flux", 12.0)
USUAL = {  # what other systems do, as strategies
    "components in turn": ("model", {"writeback": True}),
    "blocks, one ahead": ("layerwise", {}),
    "blocks, one by one": ("sequential", {}),
}

Pipeline = tuple[dict[str, nn.Module], list[tuple[str, int]], dict[str, dict[str, Any]]]


def main() -> None:
    """Plan each pipeline for each budget, and print a line for each."""
    given = arguments()
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    titles = ("bound", "times bound", "streamed", *USUAL)
    print(f"{'pipeline':10}{'budget':>8}{'request':>11}{''.join(f'{title:>20}' for title in titles)}")
    for name in given.pipelines:
        models, program, inputs = PIPELINES[name]()
        trace = tgo.Planner(models, 1.0, inputs=inputs, program=program, machine=given.machine).trace
        for budget in given.budgets:
            try:
                plan = tgo.Planner.for_trace(trace, budget, machine=given.machine).plan()
            except tgo.BudgetError as error:
                print(f"{name:10}{budget:>5g} GiB  needs {error.smallest_bytes / 2**30:.2f} GiB")
                continue
            timeline = plan.predict(requests=2)
            request, bound = timeline.request_seconds, plan.bound.request_seconds
            usual = [_seconds(trace, budget, given.machine, *way) for way in USUAL.values()]
            figures = (f"{bound:.2f} s", f"{request / bound:.3f}", f"{plan.streamed_bytes / 2**30:.0f} GiB", *usual)
            print(f"{name:10}{budget:>5g} GiB{request:>9.2f} s{''.join(f'{figure:>20}' for figure in figures)}")
            if (name, budget) == DRAWN:
                print(plan.explain())
                tgo.viz.save_timeline(out / "flux-request.png", timeline)
                tgo.viz.save_trace(out / "flux-request.json", timeline)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="rtx4090")
    parser.add_argument("--budgets", nargs="+", type=float, default=[8.0, 12.0, 16.0, 24.0], metavar="GIB")
    parser.add_argument("--pipelines", nargs="+", choices=PIPELINES, default=[*PIPELINES])
    parser.add_argument("--out", default="out")
    return parser.parse_args()


def _seconds(trace: tgo.Trace, budget: float, machine: str, strategy: str, options: dict[str, Any]) -> str:
    """What a request takes in a usual way, or that it does not fit."""
    try:
        plan = tgo.Planner.for_trace(trace, budget, strategy=strategy, machine=machine, **options).plan()
    except tgo.BudgetError:
        return "does not fit"
    return f"{plan.predict(requests=2).request_seconds:.2f} s"


def zeros(*shape: int) -> Tensor:
    """A tensor of numbers that has no memory."""
    return torch.zeros(*shape, dtype=torch.bfloat16, device="meta")


def tokens(count: int) -> dict[str, Tensor]:
    """A prompt."""
    return {"input_ids": torch.zeros(1, count, dtype=torch.long, device="meta")}


def empty(make: Callable[[], nn.Module]) -> nn.Module:
    """A model of bfloat16 weights that have no memory."""
    with torch.device("meta"):
        return make().eval().to(torch.bfloat16)


def clip(hidden: int = 768, layers: int = 12, heads: int = 12) -> nn.Module:
    """A text encoder of CLIP."""
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden}
    return empty(lambda: CLIPTextModel(CLIPTextConfig(num_hidden_layers=layers, num_attention_heads=heads, **sizes)))


def vae(channels: int) -> nn.Module:
    """The decoder of Stable Diffusion and Flux."""
    from diffusers import AutoencoderKL

    widths = (128, 256, 512, 512)
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": widths,
        "layers_per_block": 2,
        "latent_channels": channels,
    }
    return empty(lambda: AutoencoderKL(**blocks))


def flux() -> Pipeline:
    """Flux.1-dev, 1024 x 1024, 28 steps."""
    from diffusers import FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    models = {
        "clip": clip(),
        "t5": empty(lambda: T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes))),
        "transformer": empty(lambda: FluxTransformer2DModel(guidance_embeds=True)),
        "vae": vae(16),
    }
    transformer = {
        "hidden_states": zeros(1, 4096, 64),
        "encoder_hidden_states": zeros(1, 512, 4096),
        "pooled_projections": zeros(1, 768),
        "timestep": zeros(1),
        "guidance": zeros(1),
        "img_ids": zeros(4096, 3),
        "txt_ids": zeros(512, 3),
    }
    program = [("clip", 1), ("t5", 1), ("transformer", 28), ("vae.decode", 1)]
    latents = {"z": zeros(1, 16, 128, 128)}
    return models, program, {"clip": tokens(77), "t5": tokens(512), "transformer": transformer, "vae.decode": latents}


def sdxl() -> Pipeline:
    """Stable Diffusion XL, 1024 x 1024, 30 steps with guidance."""
    from diffusers import UNet2DConditionModel

    sizes: dict[str, Any] = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    }
    models = {
        "clip": clip(),
        "clip_g": clip(1280, 32, 20),
        "unet": empty(lambda: UNet2DConditionModel(**sizes)),
        "vae": vae(4),
    }
    unet = {
        "sample": zeros(2, 4, 128, 128),
        "timestep": torch.zeros((), dtype=torch.long, device="meta"),
        "encoder_hidden_states": zeros(2, 77, 2048),
        "added_cond_kwargs": {"text_embeds": zeros(2, 1280), "time_ids": zeros(2, 6)},
    }
    program = [("clip", 2), ("clip_g", 2), ("unet", 30), ("vae.decode", 1)]
    latents = {"z": zeros(1, 4, 128, 128)}
    return models, program, {"clip": tokens(77), "clip_g": tokens(77), "unet": unet, "vae.decode": latents}


def wan() -> Pipeline:
    """Wan2.1 14B, 81 frames of 480 x 832, 50 steps with guidance: two calls each."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384}
    models = {
        "t5": empty(lambda: UMT5EncoderModel(UMT5Config(feed_forward_proj="gated-gelu", **sizes))),
        "transformer": empty(WanTransformer3DModel),
        "vae": empty(AutoencoderKLWan),
    }
    transformer = {
        "hidden_states": zeros(1, 16, 21, 60, 104),
        "timestep": torch.zeros(1, dtype=torch.long, device="meta"),
        "encoder_hidden_states": zeros(1, 512, 4096),
    }
    program = [("t5", 2), ("transformer", 100), ("vae.decode", 1)]
    return (
        models,
        program,
        {"t5": tokens(512), "transformer": transformer, "vae.decode": {"z": zeros(1, 16, 21, 60, 104)}},
    )


PIPELINES: dict[str, Callable[[], Pipeline]] = {"flux": flux, "sdxl": sdxl, "wan": wan}

if __name__ == "__main__":
    main()
