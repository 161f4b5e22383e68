"""The order of steps that needs the least memory: which of the steps that may come next comes next.

A beam search over sets of steps that have run, each with the most bytes that were alive on the way. A step that leaves no more
alive than there was, and needs no more on the way than was needed before, is taken at once: what it frees it frees whenever it
runs, and the later steps see no more alive (the bytes alive are a supermodular function of what has run), so that nothing is lost.
Minimising the peak is NP-hard in general (Sethi 1975, "Complete Register Allocation Problems"); Ahn et al. 2020, "Ordering Chaos",
search the same states by dynamic programming.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from .liveness import Step

EFFORT = 30_000
"""States looked at, about: a beam is as wide as this allows, between 2 and 64."""


@dataclass(frozen=True, slots=True)
class _State:
    """What has run (a bit set), bytes alive now and at most, and how it came to that."""

    done: int
    alive: int
    peak: int
    ready: tuple[int, ...]
    step: int
    before: _State | None = field(default=None, repr=False)


class Ordering:
    """The steps of a graph, what each must come after (names), and the buffers that live on to the end."""

    def __init__(self, steps: Sequence[Step], after: Mapping[str, Collection[str]], kept: Collection[str] = ()) -> None:
        self.steps = list(steps)
        place = {step.name: i for i, step in enumerate(steps)}
        self.needs = [sum(1 << place[name] for name in set(after.get(step.name, ()))) for step in steps]
        self.follow: list[list[int]] = [[] for _ in steps]
        for i, step in enumerate(steps):
            for name in set(after.get(step.name, ())):
                self.follow[place[name]].append(i)
        readers: dict[str, int] = {}
        for i, step in enumerate(steps):
            for name in step.reads:
                readers[name] = readers.get(name, 0) | 1 << i
        size = {name: b for step in steps for name, b in step.makes}
        mine = {name: 1 << i for i, step in enumerate(steps) for name, _ in step.makes}
        # Per step, of the buffers that may end with it: their bytes and everyone who must have run for that.
        self.ends = [
            [(size[n], readers.get(n, 0) | mine[n]) for n in dict.fromkeys((*step.reads, *(m for m, _ in step.makes)))
             if n in size and n not in kept]
            for step in steps
        ]  # fmt: skip
        self.made = [sum(b for _, b in step.makes) for step in steps]

    def best(self) -> tuple[list[str], int]:
        """Names in the order found, and its peak."""
        width = min(max(EFFORT // max(len(self.steps), 1), 2), 64)
        start = tuple(i for i, needs in enumerate(self.needs) if not needs)
        beam = [self._settled(_State(0, 0, 0, start, -1))]
        while any(state.ready for state in beam):
            found: dict[int, _State] = {}
            for state in beam:
                for i in state.ready:
                    after = self._settled(self._run(state, i))
                    known = found.get(after.done)
                    if known is None or after.peak < known.peak:
                        found[after.done] = after
            ended = [state for state in beam if not state.ready]
            ranked = sorted([*found.values(), *ended], key=lambda s: (s.peak, s.alive, -s.done.bit_count(), s.done))
            beam = ranked[:width]
        last = min(beam, key=lambda s: s.peak)
        return self._path(last), last.peak

    def _run(self, state: _State, i: int) -> _State:
        done = state.done | 1 << i
        alive = state.alive + self.made[i]
        peak = max(state.peak, alive + self.steps[i].inside)
        alive -= sum(size for size, all_ in self.ends[i] if all_ & ~done == 0)
        ready = [r for r in state.ready if r != i]
        ready += [j for j in self.follow[i] if self.needs[j] & ~done == 0]
        return _State(done, alive, peak, tuple(ready), i, state)

    def _settled(self, state: _State) -> _State:
        """After every step that costs nothing."""
        while True:
            for i in state.ready:
                after = self._run(state, i)
                if after.alive <= state.alive and after.peak == state.peak:
                    state = after
                    break
            else:
                return state

    def _path(self, state: _State | None) -> list[str]:
        found = []
        while state is not None and state.step >= 0:
            found.append(self.steps[state.step].name)
            state = state.before
        return found[::-1]
