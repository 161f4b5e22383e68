"""Models of `file.py:function` for tests of the command line: one that works, and several ways not to."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Toy(nn.Module):
    """Two layers and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.down(torch.relu(self.up(x))), target)


class Branching(nn.Module):
    """Looks at its data twice: two problems of one capture."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            x = x + x.numpy().sum()
        return self.layer(x).sum()


def build(batch: int) -> Any:
    """A model and its inputs."""
    return Toy(), {"x": torch.randn(batch, 16), "target": torch.randint(0, 8, (batch,))}


def branching(batch: int) -> Any:
    """A model that cannot be captured."""
    return Branching(), {"x": torch.randn(batch, 16)}


def raising(batch: int) -> Any:
    """A function that fails."""
    raise RuntimeError("no such luck")


def returning_a_number(batch: int) -> Any:
    """A function that returns something else."""
    return 3
