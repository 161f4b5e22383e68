"""Two towers that meet: models of a fork, branches and a join."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOWERS = {"towers": {}, "towers-tied": {"tied": True}, "towers-apart": {"stem": False}}
"""Variants of `Towers` by name."""


def first(outputs: tuple[Tensor, Tensor]) -> Tensor:
    """The loss among what the model returns."""
    return outputs[0]


class Block(nn.Module):
    """A residual block of two products."""

    def __init__(self, width: int, up: nn.Linear | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = up if up is not None else nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Towers(nn.Module):
    """A stem read by two towers of several blocks, or an input for each; their features are joined, and both have a loss.

    With `tied` the first blocks of both share a projection.
    """

    def __init__(self, stem: bool = True, tied: bool = False, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Linear(12, width) if stem else None
        self.into = nn.ModuleList([nn.Linear(width if stem else 12, width) for _ in range(2)])
        shared = nn.Linear(width, 2 * width) if tied else None
        self.left = nn.ModuleList([Block(width, shared if i == 0 else None) for i in range(3)])
        self.right = nn.ModuleList([Block(width, shared if i == 0 else None) for i in range(4)])
        self.join = nn.Bilinear(width, width, 5)

    def forward(self, x: Tensor, other: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        x, other = (torch.tanh(self.stem(x)),) * 2 if self.stem is not None else (x, other)
        left = torch.relu(self.into[0](x))
        for block in self.left:
            left = block(left)
        right = torch.sigmoid(self.into[1](other))
        for block in self.right:
            right = block(right)
        joined = self.join(left, right)
        return F.mse_loss(joined, target) + 0.1 * left.pow(2).mean() + 0.2 * right.abs().mean(), joined
