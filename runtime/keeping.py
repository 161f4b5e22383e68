"""Where the built-in loop goes on from and what it saves (`shardwright run --resume`, `--save`, `--every`)."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .module import ParallelModule
from .ranks import from_first
from .state import latest, load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class Goal:
    """What a run was asked for: to time so many `steps`, the last of which is step `until`. It is saved with its checkpoints."""

    steps: int
    until: int

    @classmethod
    def of(cls, extra: Any) -> Goal | None:
        """The goal in a checkpoint; None where a script saved it."""
        known = isinstance(extra, dict) and extra.keys() == {"steps", "until"}
        return cls(**extra) if known and all(type(n) is int for n in extra.values()) else None

    @classmethod
    def after(cls, begun: Goal | None, steps: int, at: int, warmup: int) -> Goal:
        """The goal of a run at step `at` that is asked for `steps`: the one `begun` where that asked for as many and lies ahead."""
        whole = cls(steps, at + warmup + steps)
        unfinished = begun is not None and begun.steps == steps and at < begun.until <= whole.until
        return begun if begun is not None and unfinished else whole


@dataclass
class Keeping:
    """Counts the steps of a run; saves between steps, never inside one that is timed or measured.

    `every`: steps between checkpoints, 0 for one at the end. `resume` may be without a checkpoint only where it is also `save`:
    a run that is started again by the same command begins there the first time. A run that ended before its goal is brought to it
    by the same command, whoever starts that again: torchrun after a fault, a scheduler, a person.
    """

    pm: ParallelModule
    optimizer: torch.optim.Optimizer
    save: Path | None = None
    every: int = 0
    resume: Path | None = None
    goal: Goal | None = None
    steps: int = 0
    saved: int | None = None
    resumed: str | None = None

    @classmethod
    def begin(
        cls, pm: ParallelModule, optimizer: torch.optim.Optimizer, options: Namespace, warmup: int
    ) -> Keeping:  # fmt: skip
        """After going on from a checkpoint where the options ask for it; the loop makes `warmup` steps before those it times."""
        made = cls(pm, optimizer, options.save, options.every, options.resume)
        begun = made._restore()
        made.goal = Goal.after(begun, options.steps, made.steps, warmup)
        return made

    def left(self, warmup: int) -> int:
        """Steps to time, at least one: what is left of the goal after `warmup` more."""
        assert self.goal is not None
        return max(1, self.goal.until - self.steps - warmup)

    def _restore(self) -> Goal | None:
        """Load the newest checkpoint; the goal of the run that saved it."""
        if self.resume is None or (self.resume == self.save and not from_first(latest(self.resume) is not None)):
            return None
        found = load_checkpoint(self.resume, self.pm, self.optimizer)
        self.steps, self.resumed = found.step, str(found.path)
        self.saved = found.step if self.resume == self.save else None
        if found.data_position != found.step:
            raise CheckpointError(
                f"{found.path}: data_position: expected {found.step}, the step, found {found.data_position!r}: "
                "a script's own, which alone can go on"
            )
        return Goal.of(found.extra)

    def between_steps(self) -> None:
        """Save if a multiple of `every` was reached since the last save."""
        if self.save is not None and self.every and self.steps // self.every > (self.saved or 0) // self.every:
            self._save(self.save)

    def at_end(self) -> None:
        """Save the last step."""
        if self.save is not None and self.saved != self.steps:
            self._save(self.save)

    def _save(self, folder: Path) -> None:
        extra = None if self.goal is None else vars(self.goal)
        save_checkpoint(folder, self.pm, self.optimizer, step=self.steps, data_position=self.steps, extra=extra)
        self.saved = self.steps
