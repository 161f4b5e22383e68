"""Convolutional networks that the passes are tried on: random layers, and small networks of known kinds, with their inputs."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def settle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Float64, in eval mode, with statistics and scales that are not those of a fresh model."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, NORMS):
            if module.track_running_stats:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
            for value in module.parameters():
                nn.init.normal_(value)
    return model.double().eval()


class Draw(random.Random):
    """Random layers."""

    def conv(self, dims: int, inner: int, out: int, taps: int | None = None, **given: Any) -> nn.Module:
        """A convolution with random stride, padding, dilation, groups and bias where they are not given."""
        taps = taps or self.randint(1, 3)
        groups = self.choice([g for g in (1, 2, 4) if inner % g == 0 and out % g == 0])
        drawn = {
            "groups": groups,
            "bias": self.random() < 0.5,
            "dilation": self.randint(1, 2),
            "padding": self.choice([taps // 2 + 1, taps, "same" if taps % 2 else "valid"]),
        }
        return CONVS[dims - 1](inner, out, taps, **drawn | given)

    def transposed(self, dims: int, inner: int, out: int) -> nn.Module:
        groups = self.choice([g for g in (1, 2) if inner % g == 0 and out % g == 0])
        stride = self.randint(1, 2)
        return TRANSPOSED[dims - 1](
            inner, out, 2, stride, output_padding=stride - 1, groups=groups, bias=self.random() < 0.5,
            dilation=self.randint(1, 2) if stride == 1 else 2,
        )  # fmt: skip

    def norm(self, dims: int, channels: int) -> nn.Module:
        return NORMS[dims - 1](channels, eps=self.choice([1e-5, 1e-3]), affine=self.random() < 0.7)

    def freeze(self, model: nn.Module, share: float = 0.2) -> None:
        for value in model.parameters():
            value.requires_grad_(self.random() >= share)


class Loss(nn.Module):
    """A body, a classifier over its channels, and the loss."""

    def __init__(self, body: nn.Module, channels: int, classes: int = 5) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(channels, classes)

    def forward(self, x, labels):
        return F.cross_entropy(self.head(self.body(x).flatten(2).mean(-1)), labels)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and labels."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype), torch.arange(shape[0]) % 5


class Normed(nn.Sequential):
    def __init__(self, inner: int, out: int, taps: Any, relu: bool = True, **given: Any) -> None:
        conv = nn.Conv2d(inner, out, taps, bias=False, **given)
        super().__init__(conv, nn.BatchNorm2d(out), *([nn.ReLU()] if relu else []))


class Residual(nn.Module):
    """The bottleneck of ResNet (He et al. 2015, figure 5)."""

    def __init__(self, inner: int, out: int, stride: int) -> None:
        super().__init__()
        width = out // 2
        self.way = nn.Sequential(
            Normed(inner, width, 1),
            Normed(width, width, 3, stride=stride, padding=1),
            Normed(width, out, 1, relu=False),
        )
        same = inner == out and stride == 1
        self.short = nn.Identity() if same else Normed(inner, out, 1, relu=False, stride=stride)

    def forward(self, x):
        return F.relu(self.way(x) + self.short(x))


class RepBlock(nn.Module):
    """The training block of RepVGG (Ding et al. 2021, figure 4): 3 x 3, 1 x 1 and identity, each with its norm."""

    def __init__(self, inner: int, out: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.large = Normed(inner, out, 3, relu=False, stride=stride, padding=1, groups=groups)
        self.small = Normed(inner, out, 1, relu=False, stride=stride, groups=groups)
        self.same = nn.BatchNorm2d(out) if inner == out and stride == 1 else None

    def forward(self, x):
        y = self.large(x) + self.small(x)
        return F.relu(y if self.same is None else y + self.same(x))


class Dilated(nn.Module):
    """The dilated block of UniRepLKNet (Ding et al. 2023, figure 3): depthwise, one large kernel and dilated small ones."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        shapes = ((7, 1), (5, 1), (3, 2), (3, 3))
        self.ways = nn.ModuleList(
            Normed(channels, channels, k, relu=False, padding=d * (k - 1) // 2, dilation=d, groups=channels)
            for k, d in shapes
        )

    def forward(self, x):
        return x + F.relu(sum(way(x) for way in self.ways[1:]) + self.ways[0](x))


class Inception(nn.Module):
    """Inception-A (Szegedy et al. 2015, figure 5): 1 x 1 convolutions of one input, larger kernels behind them."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.one = Normed(inner, width, 1)
        self.five = nn.Sequential(Normed(inner, width, 1), Normed(width, width, 5, padding=2))
        self.three = nn.Sequential(Normed(inner, width, 1), Normed(width, width, 3, padding=1))
        self.pool = Normed(inner, width, 1)

    def forward(self, x):
        ways = self.one(x), self.five(x), self.three(x), self.pool(F.avg_pool2d(x, 3, 1, 1))
        return torch.cat(ways, 1)


def resnet() -> nn.Module:
    stem = Normed(3, 8, 3, padding=1)
    return Loss(nn.Sequential(stem, Residual(8, 16, 1), Residual(16, 16, 1), Residual(16, 32, 2)), 32)


def repvgg() -> nn.Module:
    return Loss(nn.Sequential(RepBlock(3, 8, 2), RepBlock(8, 8), RepBlock(8, 8, groups=2), RepBlock(8, 16, 2)), 16)


def unirep() -> nn.Module:
    return Loss(nn.Sequential(Normed(3, 8, 3, padding=1), Dilated(8), Dilated(8)), 8)


def inception() -> nn.Module:
    return Loss(nn.Sequential(Normed(3, 8, 3, padding=1), Inception(8, 4), Inception(16, 4)), 16)


NETS = {"resnet": resnet, "repvgg": repvgg, "unirep": unirep, "inception": inception}
