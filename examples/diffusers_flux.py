"""Run Flux's transformer for a few denoising steps with only part of its weights on the device.

Without --path, the weights are small and random, and the result is compared with the plain model's.

    python examples/diffusers_flux.py [--path folder] [--budget 50%] [--steps 4]
"""

from __future__ import annotations

import argparse
import sys

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

import taskgraph_offload as tgo


def main() -> int:
    """Denoise plainly, then under a plan; 1 if the latents differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="a folder with a Flux pipeline, its transformer in the folder of that name")
    parser.add_argument("--budget", default="50%", help="memory: 50%% of the weights, 12GiB, ...")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps")
    given = parser.parse_args()

    model = FluxTransformer2DModel.from_pretrained(given.path, subfolder="transformer") if given.path else small_flux()
    model.eval().requires_grad_(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = {name: tensor.to(device) for name, tensor in first_inputs(model).items()}
    expected = None if given.path else denoise(model.to(device), inputs, given.steps)
    with tgo.offload(model, given.budget, inputs=inputs) as run:
        print(run.plan.explain())
        latents = denoise(model, inputs, given.steps)
        print(run.stats)
    if expected is not None and not torch.equal(latents, expected):
        print("the latents differ from the plain model's")
        return 1
    print("latents    ", tuple(latents.shape), "bit-identical to the plain model's" if expected is not None else "")
    return 0


@torch.inference_mode()
def denoise(model: FluxTransformer2DModel, inputs: dict[str, torch.Tensor], steps: int) -> torch.Tensor:
    """The denoising loop of a pipeline, without text encoders and decoder."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    latents = inputs["hidden_states"]
    scheduler.set_timesteps(steps, device=latents.device)
    for time in scheduler.timesteps:
        given = {**inputs, "hidden_states": latents, "timestep": time.reshape(1) / 1000}
        latents = scheduler.step(model(**given).sample, time, latents).prev_sample
    return latents


def small_flux() -> FluxTransformer2DModel:
    """Flux's architecture with few and narrow layers, and random weights."""
    torch.manual_seed(0)
    layers = dict(num_layers=3, num_single_layers=4, attention_head_dim=32, num_attention_heads=4)
    widths = dict(in_channels=16, joint_attention_dim=64, pooled_projection_dim=32, axes_dims_rope=(8, 12, 12))
    return FluxTransformer2DModel(**layers, **widths, guidance_embeds=True)


def first_inputs(
    model: FluxTransformer2DModel, image_tokens: int = 64, text_tokens: int = 16
) -> dict[str, torch.Tensor]:
    """Random latents and a random prompt."""
    config, dtype = model.config, model.dtype
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, image_tokens, config.in_channels, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(1, text_tokens, config.joint_attention_dim, generator=generator).to(dtype),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=generator).to(dtype),
        "timestep": torch.ones(1, dtype=dtype),
        "guidance": torch.full((1,), 3.5, dtype=dtype),
        "img_ids": torch.zeros(image_tokens, 3, dtype=dtype),
        "txt_ids": torch.zeros(text_tokens, 3, dtype=dtype),
    }


if __name__ == "__main__":
    sys.exit(main())
