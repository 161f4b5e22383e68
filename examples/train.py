"""An ordinary training loop with one line added.

python examples/train.py                                       one process
torchrun --standalone --nproc-per-node 2 examples/train.py     two, planned for this machine
"""

from __future__ import annotations

import argparse

import shardwright
import torch
from torch import nn
from torch.nn import functional


class Classifier(nn.Module):
    """A small network; any module that `torch.export` captures will do."""

    def __init__(self, width: int = 256, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, classes)
        )

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss."""
        return functional.cross_entropy(self.layers(x), target)


def main() -> None:
    """Train for some steps and print the loss."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--plan", help="a plan file to use instead of planning here")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = Classifier()
    batch = {"x": torch.randn(32, 64), "target": torch.randint(0, 10, (32,))}

    model = shardwright.auto_parallelize(model, batch, plan=options.plan)  # the added line

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(options.steps):
        loss = model(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step == options.steps - 1:
            print(f"step {step:3d}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
