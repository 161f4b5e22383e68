"""Where a chain of units is cut into a fork, two branches and their join, for the schedule `branches`.

    rank 0   fork (units before p)      branch (p to q)
    rank 1                              branch (q to r)      join (units from r on)

The units of both branches follow each other in the chain, and those from q to r read nothing that is made from p to q. What they
read of the fork is sent to rank 1, what the first branch leaves to the join is sent after it:

    forward of one microbatch = fork + max(max(first branch, sends) + sends, sends + second branch) + join

A plan with these cuts needs no runtime of its own: stages wait for what they read, wherever it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from .branches import reads
from .part import Chain

WORTH = 1 / 16
"""Share of a model's FLOPs that the lesser branch has where the schedule is searched without a pin."""

Cuts = tuple[int, int, int, int, int]
"""Positions of the stages: 0, p, q, r and the number of units."""


@dataclass(frozen=True)
class Forked:
    """The units of a chain and what they read of each other."""

    chain: Chain

    @cached_property
    def readers(self) -> Mapping[str, tuple[int, tuple[int, ...]]]:
        """Tensors that other units read (but what those make again): the unit that makes each, and those."""
        outline = self.chain.outline
        where = self._where
        makers = {use.tensor: op.name for op in outline.ops for use in op.results}
        kept = reads(outline)
        found: dict[str, tuple[int, set[int]]] = {}
        for op in outline.ops:
            for use in op.operands:
                maker = makers.get(use.tensor, "")
                if op.name in kept and maker in kept and where[maker] != where[op.name]:
                    found.setdefault(use.tensor, (where[maker], set()))[1].add(where[op.name])
        return {name: (maker, tuple(sorted(users))) for name, (maker, users) in found.items()}

    @cached_property
    def _where(self) -> Mapping[str, int]:
        """The unit of each op."""
        regions = self.chain.outline.regions
        return {name: u for u, (r, k) in enumerate(self.chain.units) for name in regions[r].instances[k]}

    @cached_property
    def _read(self) -> tuple[tuple[int, ...], ...]:
        """By unit, those that it reads from, ascending."""
        found: list[set[int]] = [set() for _ in self.chain.units]
        for maker, users in self.readers.values():
            for user in users:
                found[user].add(maker)
        return tuple(tuple(sorted(mine)) for mine in found)

    @cached_property
    def _flops(self) -> tuple[float, ...]:
        found = [0.0] * len(self.chain)
        for op in self.chain.outline.ops:
            found[self._where[op.name]] += op.flops + op.backward_flops
        return tuple(found)

    @cached_property
    def possible(self) -> tuple[tuple[int, int, int], ...]:
        """Every (p, q, r) such that units [p, q) and [q, r) need nothing of each other, the first branch as long as it may be."""
        count, found = len(self.chain), []
        for q in range(2, count - 1):
            p = 1
            for r in range(q + 1, count):
                p = max([p, *(u + 1 for u in self._read[r - 1] if u < q)])
                if p >= q:
                    break
                found.append((p, q, r))
        return tuple(found)

    @cached_property
    def worth(self) -> bool:
        """Whether two branches have enough to do."""
        before = list(accumulate(self._flops, initial=0.0))
        least = WORTH * before[-1]
        return any(min(before[q] - before[p], before[r] - before[q]) > least for p, q, r in self.possible)

    def sent(self, cuts: Sequence[int], source: int) -> tuple[str, ...]:
        """What stage `source`, the fork or the first branch, hands on to the other rank; once for every stage that reads it."""
        names = []
        for name, (maker, users) in self.readers.items():
            if cuts[source] <= maker < cuts[source + 1]:
                names += [name] * len({u >= cuts[3] for u in users if u >= cuts[2]})
        return tuple(names)

    def cuts(self, seconds: Sequence[float], send: Callable[[Sequence[str]], float]) -> Cuts | None:
        """The cuts of the shortest step by the seconds of the units and of sends (of tensors by name); None where none is."""
        before, count = list(accumulate(seconds, initial=0.0)), len(self.chain)

        def busy(p: int, q: int, r: int) -> float:
            return before[p] + max(before[q] - before[p], before[r] - before[q]) + before[count] - before[r]

        def step(p: int, q: int, r: int) -> float:
            every = 0, p, q, r, count
            entry, leave = send(self.sent(every, 0)), send(self.sent(every, 1))
            one, two = max(before[q] - before[p], entry) + leave, entry + before[r] - before[q]
            return before[p] + max(one, two) + before[count] - before[r]

        best: tuple[float, Cuts] | None = None
        for p, q, r in sorted(self.possible, key=lambda at: (busy(*at), at)):
            if best is not None and busy(p, q, r) >= best[0]:
                break
            found = step(p, q, r)
            if best is None or found < best[0]:
                best = found, (0, p, q, r, count)
        return None if best is None else best[1]

    def wrong(self, cuts: Sequence[int]) -> str:
        """Why stages with these cuts are no fork with two branches, "" where they are."""
        for name, (maker, users) in self.readers.items():
            if cuts[1] <= maker < cuts[2] and any(cuts[2] <= u < cuts[3] for u in users):
                return f"stage 2 reads {name}, which stage 1 makes; schedule branches runs the two at once"
        return ""
