"""Where the built-in loop goes on from and what it saves (`shardwright run --resume`, `--save`, `--every`)."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .module import ParallelModule
from .ranks import from_first
from .state import latest, load_checkpoint, save_checkpoint


@dataclass
class Keeping:
    """Counts the steps of a run; saves between steps, never inside one that is timed or measured.

    `every`: steps between checkpoints, 0 for one at the end. `resume` may be without a checkpoint only where it is also `save`:
    a run that is started again by the same command begins there the first time.
    """

    pm: ParallelModule
    optimizer: torch.optim.Optimizer
    save: Path | None = None
    every: int = 0
    resume: Path | None = None
    steps: int = 0
    saved: int | None = None
    resumed: str | None = None

    @classmethod
    def begin(
        cls, pm: ParallelModule, optimizer: torch.optim.Optimizer, options: Namespace, data: Iterator[Any]
    ) -> Keeping:
        """For a loop that takes its batches from `data`, after going on from a checkpoint where the options ask for it."""
        made = cls(pm, optimizer, options.save, options.every, options.resume)
        made._restore(data)
        return made

    def _restore(self, data: Iterator[Any]) -> None:
        """Load the newest checkpoint and take the batches off `data` that were trained on before it."""
        if self.resume is None or (self.resume == self.save and not from_first(latest(self.resume) is not None)):
            return
        found = load_checkpoint(self.resume, self.pm, self.optimizer)
        self.steps, self.resumed = found.step, str(found.path)
        self.saved = found.step if self.resume == self.save else None
        for _ in range(int(found.data_position or 0)):
            next(data)

    def between_steps(self) -> None:
        """Save if a multiple of `every` was reached since the last save."""
        if self.save is not None and self.every and self.steps // self.every > (self.saved or 0) // self.every:
            self._save(self.save)

    def at_end(self) -> None:
        """Save the last step."""
        if self.save is not None and self.saved != self.steps:
            self._save(self.save)

    def _save(self, folder: Path) -> None:
        save_checkpoint(folder, self.pm, self.optimizer, step=self.steps, data_position=self.steps)
        self.saved = self.steps
