"""Repeated regions of a graph, found by structure: runs of ops that follow each other with equal signatures and equal wiring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .outline import Region


@dataclass(frozen=True, slots=True)
class Node:
    """What region finding sees of an op: a signature, operands and results by tensor name."""

    name: str
    signature: str
    operands: tuple[str, ...]
    results: tuple[str, ...]


def find_regions(nodes: Sequence[Node], parameters: Sequence[str]) -> tuple[Region, ...]:
    """Cut `nodes` (in order) into regions; `parameters` are tensors that belong to the region of their first use.

    Instances of one region own parameters at the same places: where layers share theirs, the first one is a region of its own.
    """
    spans = _spans(nodes, 0, len(nodes), frozenset(parameters))
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


def _spans(nodes: Sequence[Node], low: int, high: int, parameters: frozenset[str]) -> list[tuple[int, int, int]]:
    """(start, period, count) covering [low, high) in order; count 1 where nothing repeats."""
    if low >= high:
        return []
    best = _best_repeat(nodes, low, high, parameters)
    if best is None:
        return [(low, high - low, 1)]
    start, period, count = best
    before = _spans(nodes, low, start, parameters)
    after = _spans(nodes, start + period * count, high, parameters)
    return [*before, (start, period, count), *after]


MIN_REPEAT_OPS = 6
"""Shorter repeats (a few casts in a row) are not layers and would only cut the graph into crumbs."""


def _best_repeat(nodes: Sequence[Node], low: int, high: int, parameters: frozenset[str]) -> tuple[int, int, int] | None:
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
                candidates.append((-count * period, period, low + i + 1, count))
            run = 0
    for _, period, start, count in sorted(candidates):
        found = _wired(nodes, start, period, count, parameters)
        if found is not None:
            return found
    return None


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
