"""Which buffers are alive when, where steps run in order: what a step makes lives until the last step that reads it.

During a step live what was made before and is still needed, what it makes, and what it holds `inside`. Kept buffers live on to
the end. Buffers that no step makes (inputs, parameters) are their owner's and count nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """One op: buffers it reads and makes (name, bytes), and bytes that live inside it alone."""

    name: str
    reads: tuple[str, ...]
    makes: tuple[tuple[str, int], ...]
    inside: int = 0


@dataclass(frozen=True, slots=True)
class Interval:
    """A buffer that lives from step `first` to step `last`, both included."""

    name: str
    first: int
    last: int
    bytes: int

    def meets(self, other: Interval) -> bool:
        """Whether both are alive at once."""
        return self.first <= other.last and other.first <= self.last


def lifetimes(steps: Sequence[Step], kept: Collection[str] = ()) -> tuple[Interval, ...]:
    """Every buffer that a step makes, in order."""
    last = {name: i for i, step in enumerate(steps) for name in (*(n for n, _ in step.makes), *step.reads)}
    end = len(steps) - 1
    return tuple(
        Interval(name, i, end if name in kept else last[name], size)
        for i, step in enumerate(steps) for name, size in step.makes
    )  # fmt: skip


def curve(steps: Sequence[Step], kept: Collection[str] = ()) -> list[int]:
    """Bytes alive during each step."""
    change = [0] * (len(steps) + 1)
    for interval in lifetimes(steps, kept):
        change[interval.first] += interval.bytes
        change[interval.last + 1] -= interval.bytes
    found, alive = [], 0
    for i, step in enumerate(steps):
        alive += change[i]
        found.append(alive + step.inside)
    return found


def peak(steps: Sequence[Step], kept: Collection[str] = ()) -> int:
    """The most bytes alive during any step."""
    return max(curve(steps, kept), default=0)


def floor(steps: Sequence[Step], kept: Collection[str] = ()) -> int:
    """Bytes that are alive at once in any order: all that is kept, or what one step reads, makes and holds inside."""
    size = {name: b for step in steps for name, b in step.makes}
    widest = max(
        (sum(size.get(n, 0) for n in {*step.reads, *(m for m, _ in step.makes)}) + step.inside for step in steps),
        default=0,
    )
    return max(widest, sum(size.get(name, 0) for name in kept))
