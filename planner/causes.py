"""Seconds by what takes them: of an option, of the passes of a stage, of a whole step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .options import Option

Change = Mapping[tuple[str, str], tuple[float, float]]
"""Seconds forward and backward of a change of layout between units, by (exit, entry)."""


class Causes(NamedTuple):
    """Seconds by cause; communication and copies as far as computing waits for them."""

    compute: float = 0.0
    activation_communication: float = 0.0
    parameter_communication: float = 0.0
    recompute: float = 0.0
    offload: float = 0.0
    optimizer: float = 0.0

    @property
    def seconds(self) -> float:
        """All of them."""
        return math.fsum(self)

    def times(self, factor: float) -> Causes:
        """Each as often as `factor` says."""
        return Causes(*(factor * seconds for seconds in self))

    def apart(self, compute: float) -> tuple[Causes, Causes]:
        """Without `compute` of its computing, and that."""
        return self._replace(compute=self.compute - compute), Causes(compute)


def added(parts: Iterable[Causes]) -> Causes:
    """The sum, cause by cause."""
    return Causes(*map(math.fsum, zip(*parts, strict=True)))


@dataclass(frozen=True, slots=True)
class StageCauses:
    """What one microbatch of a virtual stage takes forward and backward, and what its end of a step takes.

    `weight` are seconds of the backward pass that a W action runs where it is split.
    """

    forward: Causes
    backward: Causes
    weight: float
    finish: Causes

    def of_step(self, microbatches: int) -> Causes:
        """The whole step."""
        return added((self.forward.times(microbatches), self.backward.times(microbatches), self.finish))


def stage_causes(options: Sequence[Option], change: Change) -> StageCauses:
    """Of units one after the other, changes of layout between them included; adds up to `options.end_to_end`."""
    turns = [change[one.exit, two.entry] for one, two in pairwise(options) if one.exit != two.entry]
    ahead, back = ([Causes(activation_communication=turn[way]) for turn in turns] for way in (0, 1))
    return StageCauses(
        added([*(o.ahead for o in options), *ahead]),
        added([*(o.back for o in options), *back]),
        math.fsum(o.weight for o in options),
        added([o.ends for o in options]),
    )
