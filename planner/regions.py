"""Regions of a graph, found by structure: runs of ops that follow each other with equal signatures and equal wiring.

What does not repeat (a U-Net, the stem of a ResNet) is cut at its narrow points into pieces of a layer's size, for stages of
a pipeline end where regions do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .outline import Region


@dataclass(frozen=True, slots=True)
class Node:
    """What region finding sees of an op: a signature, operands and results by tensor name, elements of the results (or none)."""

    name: str
    signature: str
    operands: tuple[str, ...]
    results: tuple[str, ...]
    elements: tuple[int, ...] = ()


def find_regions(nodes: Sequence[Node], parameters: Sequence[str], given: Sequence[str] = ()) -> tuple[Region, ...]:
    """Cut `nodes` (in order) into regions; `parameters` are tensors that belong to the region of their first use.

    `given` are buffers and constants: every instance may have its own (running statistics, routing biases). Instances of one
    region own parameters at the same places: where layers share theirs, the first one is a region of its own.
    """
    gaps = _gaps(nodes)
    repeats = _spans(nodes, 0, len(nodes), frozenset((*parameters, *given)), gaps)
    spans = [piece for span in repeats for piece in _pieces(gaps, *span)]
    owned: set[str] = set()
    known = set(parameters)
    regions: list[Region] = []
    for start, period, count in spans:
        instances: list[tuple[str, ...]] = []
        params: list[tuple[str, ...]] = []
        places: tuple[tuple[int, int], ...] | None = None
        for k in range(count):
            ops = nodes[start + k * period : start + (k + 1) * period]
            first = _first_uses(ops, known - owned)
            if places not in (None, tuple(first.values())):
                regions.append(Region(f"r{len(regions)}", tuple(instances), tuple(params)))
                instances, params = [], []
            places = tuple(first.values())
            owned.update(first)
            instances.append(tuple(op.name for op in ops))
            params.append(tuple(first))
        regions.append(Region(f"r{len(regions)}", tuple(instances), tuple(params)))
    return tuple(regions)


def _first_uses(ops: Sequence[Node], wanted: set[str]) -> dict[str, tuple[int, int]]:
    """(op, operand) where each of the `wanted` tensors is used first."""
    found: dict[str, tuple[int, int]] = {}
    for i, op in enumerate(ops):
        for j, tensor in enumerate(op.operands):
            if tensor in wanted:
                found.setdefault(tensor, (i, j))
    return found


@dataclass(frozen=True, slots=True)
class _Gap:
    """The place before an op: tensors and elements made before it and used from it on; whether it is within a chain of ops."""

    tensors: int
    elements: int
    chained: bool

    @property
    def width(self) -> tuple[int, bool]:
        """What makes a gap a worse border than another."""
        return self.tensors, self.chained


def _gaps(nodes: Sequence[Node]) -> list[_Gap]:
    """The gap before each op. Parameters and inputs do not count: they are where they are needed."""
    last: dict[str, int] = {}
    uses: dict[str, int] = {}
    for i, node in enumerate(nodes):
        for tensor in dict.fromkeys(node.operands):
            last[tensor] = i
            uses[tensor] = uses.get(tensor, 0) + 1
    tensors, elements = [0] * (len(nodes) + 1), [0] * (len(nodes) + 1)
    for made, node in enumerate(nodes):
        sizes = node.elements or (1,) * len(node.results)
        for tensor, size in zip(node.results, sizes, strict=True):
            for steps, amount in ((tensors, 1), (elements, size)):
                steps[made + 1] += amount
                steps[last.get(tensor, made) + 1] -= amount
    handed = [True, *(any(uses.get(r, 0) > 1 for r in node.results) for node in nodes)]
    counts = zip(itertools.accumulate(tensors), itertools.accumulate(elements), handed, strict=True)
    return [_Gap(wide, large, not several) for wide, large, several in itertools.islice(counts, len(nodes))]


def _spans(
    nodes: Sequence[Node], low: int, high: int, parameters: frozenset[str], gaps: Sequence[_Gap]
) -> list[tuple[int, int, int]]:
    """(start, period, count) covering [low, high) in order; count 1 where nothing repeats."""
    if low >= high:
        return []
    best = _best_repeat(nodes, low, high, parameters, gaps)
    if best is None:
        return [(low, high - low, 1)]
    start, period, count = best
    before = _spans(nodes, low, start, parameters, gaps)
    after = _spans(nodes, start + period * count, high, parameters, gaps)
    return [*before, (start, period, count), *after]


MIN_REPEAT_OPS = 6
"""Shorter repeats (a few casts in a row) are not layers and would only cut the graph into crumbs."""


def _best_repeat(
    nodes: Sequence[Node], low: int, high: int, parameters: frozenset[str], gaps: Sequence[_Gap]
) -> tuple[int, int, int] | None:
    signatures = [nodes[i].signature for i in range(low, high)]
    candidates: list[tuple[int, int, int, int]] = []
    for period in _periods(signatures):
        run = 0
        for i in range(len(signatures) - period - 1, -2, -1):
            if i >= 0 and signatures[i] == signatures[i + period]:
                run += 1
                continue
            count = run // period + 1
            if count >= 2 and period >= MIN_REPEAT_OPS:
                candidates.append((-count * period, period, low + i + 1, run))
            run = 0
    for _, period, start, run in sorted(candidates):
        found = _longest(nodes, start, period, run, parameters, gaps)
        if found is not None:
            return found
    return None


def _longest(
    nodes: Sequence[Node], start: int, period: int, run: int, parameters: frozenset[str], gaps: Sequence[_Gap]
) -> tuple[int, int, int] | None:
    """The repeat with most instances in a run of equal signatures, of those the one that starts at the narrowest gap.

    A run may start before the first whole layer: the ops before it are often like the end of a layer but wired otherwise
    (the first block of each stage of a ResNet).
    """
    best = _wired(nodes, start, period, run // period + 1, parameters)
    for shift in range(1, period):
        at, count = start + shift, (run - shift) // period + 1
        if count < (2 if best is None else best[2]):
            break
        if best is not None and count == best[2] and gaps[at].width >= gaps[best[0]].width:
            continue
        found = _wired(nodes, at, period, count, parameters)
        if found is not None:
            best = min((r for r in (best, found) if r is not None), key=lambda r: (-r[2], gaps[r[0]].width))
    return best


def _periods(signatures: Sequence[str]) -> list[int]:
    """Distances between consecutive occurrences of the same signature, the only periods a repeat can have."""
    last: dict[str, int] = {}
    found: set[int] = set()
    for i, signature in enumerate(signatures):
        if signature in last:
            found.add(i - last[signature])
        last[signature] = i
    return sorted(p for p in found if p >= MIN_REPEAT_OPS)


def _wired(
    nodes: Sequence[Node], start: int, period: int, count: int, parameters: frozenset[str]
) -> tuple[int, int, int] | None:
    """The longest run of instances whose wiring repeats; None when fewer than two do."""
    position = {r: (i, j) for i in range(start, start + period * count) for j, r in enumerate(nodes[i].results)}
    wiring = [_wiring(nodes, start, period, k, position, parameters) for k in range(count)]
    first = 0
    while first < count - 1:
        last = first + 1
        while last < count and _same(wiring[first], wiring[last]):
            last += 1
        # The first instance takes from outside what later ones take from the instance before; those must agree.
        while last - first >= 2 and any(w != wiring[first + 1] for w in wiring[first + 1 : last]):
            last -= 1
        if last - first >= 2:
            return start + first * period, period, last - first
        first += 1
    return None


def _wiring(
    nodes: Sequence[Node], start: int, period: int, k: int, position: Mapping[str, tuple[int, int]], parameters: frozenset[str],
) -> tuple[tuple[object, ...], ...]:  # fmt: skip
    found: list[tuple[object, ...]] = []
    seen: dict[str, int] = {}
    for i in range(start + k * period, start + (k + 1) * period):
        for tensor in nodes[i].operands:
            if tensor in parameters:
                found.append(("parameter", seen.setdefault(tensor, len(seen))))
            elif tensor in position:
                at, j = position[tensor]
                found.append(("op", (at - start) % period, k - (at - start) // period, j))
            else:
                found.append(("outside", tensor))
    return tuple(found)


def _same(a: tuple[tuple[object, ...], ...], b: tuple[tuple[object, ...], ...]) -> bool:
    """Equal wiring; what comes from an earlier instance may come from outside in the first one."""
    if len(a) != len(b):
        return False
    for left, right in zip(a, b, strict=True):
        if left == right:
            continue
        if right[0] == "op" and right[2] == 1 and (left[0] == "outside" or (left[0] == "op" and left[2] != 0)):
            continue
        return False
    return True


WHOLE_OPS = 40
"""A span of at most this many ops that does not repeat (an embedding, a head) is one region."""
PIECE_OPS, LEAST_OPS, MOST_OPS = 20, 12, 120
"""Ops of a piece of a longer one: wanted (about a block of a convolutional network), at least, at most."""
WIDER = 4.0
"""Cost of every tensor that crosses a cut beyond the fewest nearby: a block of three pieces' length stays whole for it."""
LARGER = 0.25
"""Cost of a cut per doubling of the elements that cross it."""
WITHIN = 0.25
"""Cost of a cut in a chain of ops, where no tensor is handed to several ops as at the end of a block."""


def _pieces(gaps: Sequence[_Gap], start: int, period: int, count: int) -> list[tuple[int, int, int]]:
    """A span as (start, period, count), cut where it is long and does not repeat.

    The cuts are those of least cost, by dynamic programming over their positions: the squared relative difference of each
    piece from `PIECE_OPS`, and what each cut costs (`_cut_costs`).
    """
    if count > 1 or period <= WHOLE_OPS:
        return [(start, period, count)]
    costs = [*_cut_costs(gaps[start : start + period]), 0.0]
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, period + 1):
        lengths = range(LEAST_OPS, min(end, MOST_OPS) + 1)
        reached = [(best[end - n][0] + (n / PIECE_OPS - 1) ** 2, end - n) for n in lengths]
        cost, before = min(reached, default=(math.inf, 0))
        best.append((cost + costs[end], before))
    cuts = [period]
    while cuts[-1]:
        cuts.append(best[cuts[-1]][1])
    cuts.reverse()
    return [(start + a, b - a, 1) for a, b in itertools.pairwise(cuts)]


def _cut_costs(gaps: Sequence[_Gap]) -> list[float]:
    """Cost of a cut at each gap of a span: tensors and elements beyond the least nearby, and its place in a chain.

    The long skips of a U-Net cross all gaps between their ends, so a gap is compared with those within `LEAST_OPS` ops.
    """
    costs = []
    for at, gap in enumerate(gaps):
        near = gaps[max(1, at - LEAST_OPS) : at + LEAST_OPS + 1]
        wider = gap.tensors - min(g.tensors for g in near)
        larger = math.log2(max(gap.elements, 1) / max(min(g.elements for g in near), 1))
        costs.append(WIDER * wider + LARGER * larger + WITHIN * gap.chained)
    return costs
