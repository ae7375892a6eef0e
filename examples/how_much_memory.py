"""Says how much memory Flux.1-dev needs, and how much slower it is with less. Needs no GPU and no weights.

The model is built on the meta device from its public configuration, so that it takes no memory and no download.

    python examples/how_much_memory.py [--machine rtx4090] [--out out]
"""

from __future__ import annotations

import argparse

import torch
from diffusers import FluxTransformer2DModel

import taskgraph_offload as tgo


def main() -> None:
    """Sweep budgets for Flux.1-dev at 1024 x 1024."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="rtx4090", help="a preset: rtx3060, rtx4090, rtx5090, a100, h100, h200")
    parser.add_argument("--steps", type=int, default=8, help="budgets to try")
    parser.add_argument("--out", default="out", help="folder for the picture")
    given = parser.parse_args()

    model, inputs = flux()
    planner = tgo.Planner(model, "50%", inputs=inputs, machine=given.machine)
    sweep = planner.sweep(given.steps, ["auto", ("layerwise", {"residents": "spread"}), "layerwise", "sequential"])
    print(sweep.table())
    sweep.save(f"{given.out}/how_much_memory.png")
    knee = sweep.knee("auto")
    if knee is not None:
        print(
            f"\n{knee['budget_bytes'] / 2**30:.1f} GiB are enough: "
            f"{knee['step_seconds']:.3f} s a step, within 5% of the best"
        )


def flux() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Flux.1-dev's transformer, and the inputs of one step at 1024 x 1024."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
        inputs = {
            "hidden_states": torch.empty(1, 4096, 64),
            "encoder_hidden_states": torch.empty(1, 512, 4096),
            "pooled_projections": torch.empty(1, 768),
            "timestep": torch.empty(1),
            "guidance": torch.empty(1),
            "img_ids": torch.empty(4096, 3),
            "txt_ids": torch.empty(512, 3),
        }
    torch.set_default_dtype(torch.float32)
    return model.eval(), inputs


if __name__ == "__main__":
    main()
