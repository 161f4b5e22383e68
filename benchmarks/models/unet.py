"""A diffusion U-Net: convolutions with group norm, attention at low resolutions, skip connections, no two levels alike.

shardwright plan benchmarks/models/unet.py:unet --cluster h100-sxm:8x2 --batch 64
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (192, 320, 512, 768, 1024)
"""Channels by level; each level halves the resolution."""
IMAGE = 64
CHANNELS = 4
GROUPS = 32


class ResBlock(nn.Module):
    """Two convolutions with the time embedding added between them, and a skip."""

    def __init__(self, channels: int, out: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, channels), nn.GroupNorm(GROUPS, out)
        self.conv1, self.conv2 = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.time = nn.Linear(embedding, out)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(batch, channels, height, width) and (batch, embedding) -> (batch, out, height, width)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = hidden + self.time(time)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(hidden)))


class Attention(nn.Module):
    """Self-attention over the pixels, 64 channels a head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = channels // 64
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.query, self.key, self.value, self.out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape as `x`."""
        batch, channels, height, width = x.shape
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        split = (batch, height * width, self.heads, channels // self.heads)
        query, key, value = (f(pixels).view(split).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(pixels.shape)
        return x + self.out(mixed).transpose(1, 2).reshape(x.shape)


class Stage(nn.Module):
    """One step of a level: a ResBlock, with attention after it or not."""

    def __init__(self, channels: int, out: int, embedding: int, attend: bool) -> None:
        super().__init__()
        self.block = ResBlock(channels, out, embedding)
        self.attention = Attention(out) if attend else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, out, height, width)."""
        return self.attention(self.block(x, time))


class UNet(nn.Module):
    """Predicts the noise in an image; `forward` returns the mean squared error, as the training of diffusion models does."""

    def __init__(
        self, widths: Sequence[int] = WIDTHS, channels: int = CHANNELS, depth: int = 2, attend: int = 2
    ) -> None:
        """`depth` stages a level; the last `attend` levels, of the lowest resolution, have attention."""
        super().__init__()
        embedding, top = 4 * widths[0], len(widths) - 1
        self.width = widths[0]
        self.embed = nn.Sequential(nn.Linear(widths[0], embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.enter = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        kept, current = [widths[0]], widths[0]
        for level, width in enumerate(widths):
            for _ in range(depth):
                self.down.append(Stage(current, width, embedding, level > top - attend))
                current = width
                kept.append(current)
            if level < top:
                self.shrink.append(nn.Conv2d(current, current, 3, stride=2, padding=1))
                kept.append(current)
        self.middle = Stage(current, current, embedding, True)
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(depth + 1):
                self.up.append(Stage(current + kept.pop(), width, embedding, level > top - attend))
                current = width
            if level:
                self.grow.append(nn.Conv2d(current, current, 3, padding=1))
        self.depth = depth
        self.leave = nn.Sequential(nn.GroupNorm(GROUPS, current), nn.SiLU(), nn.Conv2d(current, channels, 3, padding=1))

    def forward(self, image: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """(batch, channels, size, size), (batch,), (batch, channels, size, size) -> scalar loss."""
        time = self.embed(_sinusoids(step, self.width))
        x = self.enter(image)
        kept = [x]
        for index, stage in enumerate(self.down):
            x = stage(x, time)
            kept.append(x)
            if (index + 1) % self.depth == 0 and index + 1 < len(self.down):
                x = self.shrink[index // self.depth](x)
                kept.append(x)
        x = self.middle(x, time)
        for index, stage in enumerate(self.up):
            x = stage(torch.cat([x, kept.pop()], dim=1), time)
            if (index + 1) % (self.depth + 1) == 0 and index + 1 < len(self.up):
                x = self.grow[index // (self.depth + 1)](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return F.mse_loss(self.leave(x), noise)


def _sinusoids(step: Tensor, width: int) -> Tensor:
    """(batch,) -> (batch, width): sines and cosines of the step at geometric frequencies."""
    rates = torch.exp(torch.arange(width // 2, device=step.device) * (-math.log(10000.0) / (width // 2)))
    angles = step[:, None] * rates[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(step.dtype)


def unet(batch: int) -> tuple[nn.Module, dict[str, Any]]:
    """The model and example inputs: images, diffusion steps and the noise to predict."""
    image, noise = torch.randn(batch, CHANNELS, IMAGE, IMAGE), torch.randn(batch, CHANNELS, IMAGE, IMAGE)
    return UNet(), {"image": image, "step": torch.rand(batch) * 1000, "noise": noise}
