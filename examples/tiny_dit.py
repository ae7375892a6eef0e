"""The model of the examples: a small diffusion transformer in plain torch, with about 200 MB of random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Attention and a feed-forward. The time step scales and shifts the input of both."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 4 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor, time: Tensor) -> Tensor:
        """One layer of the transformer."""
        scale, shift, more_scale, more_shift = self.modulation(functional.silu(time)).unsqueeze(1).chunk(4, dim=-1)
        tokens = tokens + self.attend(functional.layer_norm(tokens, tokens.shape[-1:]) * (1 + scale) + shift)
        normed = functional.layer_norm(tokens, tokens.shape[-1:]) * (1 + more_scale) + more_shift
        return tokens + self.down(functional.gelu(self.up(normed)))

    def attend(self, tokens: Tensor) -> Tensor:
        """Attention of every token to every other one."""
        batch, count, width = tokens.shape
        split = self.qkv(tokens).view(batch, count, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(batch, count, width))


class TinyDiT(nn.Module):
    """Predicts the noise in a grid of latents."""

    def __init__(self, width: int = 512, layers: int = 12, heads: int = 8, channels: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, width)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, channels)

    def forward(self, latents: Tensor, step: Tensor) -> Tensor:
        """Latents of (batch, tokens, channels) and a time step for each of the batch."""
        waves = step[:, None] * torch.exp(torch.linspace(0, -6, 32, device=step.device, dtype=step.dtype))
        time = self.time(torch.cat([waves.sin(), waves.cos()], dim=-1))
        tokens = self.embed(latents)
        for block in self.blocks:
            tokens = block(tokens, time)
        return self.head(tokens)


def make(device: str = "cpu", **sizes: int) -> tuple[TinyDiT, tuple[Tensor, Tensor]]:
    """The model, with the same weights each time, and the inputs of one step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TinyDiT(**sizes).eval().requires_grad_(False).to(device)
        latents = torch.randn(1, 256, 16).to(device)
    return model, (latents, torch.tensor([0.5], device=device))
