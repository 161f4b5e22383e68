"""Objectives beside throughput: the plan that needs the least memory, and whether anything fits at all."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import PinError
from .appraise import appraise, behind
from .arcs import Line
from .cluster import Cluster, has_host, unlike
from .costs import PriceBook
from .joint import Found, Solved
from .options import Option
from .outline import Outline
from .plan import Plan, ShapeRecord
from .screen import Screen
from .shapes import Arrangement
from .spell import plan_of
from .stageproblem import Held, StageSolution
from .unlike import pool_limits
from .workbench import Workbench

if TYPE_CHECKING:
    from .solve import Request

Cut = tuple[Arrangement, tuple[int, ...], tuple[Option, ...], int]
"""A shape, its cuts, the option of every unit, and the peak bytes of that plan."""


def least_memory(outline: Outline, cluster: Cluster, prices: PriceBook, request: Request) -> Plan | None:
    """The plan that needs the least memory among those looked at: the smallest microbatch, every unit in its smallest option.

    Its peak is that of a real plan; a mixture of options may need a little less. None where no shape can run at all.
    """
    from .solve import make_bench

    bench, shapes = make_bench(
        outline, cluster, prices, replace(request, memory_limit_bytes=2**62), tiers=has_host(cluster)
    )
    best: Cut | None = None
    for found in _smallest(bench, shapes):
        if best is None or found[3] < best[3]:
            best = found
    if best is None:
        return None
    shape, cuts, options, _ = best
    figures = appraise(bench, shape, cuts, options)
    held = tuple(
        Held(s.start, s.end, tuple(range(s.start, s.end)), options[s.start].entry, options[s.end - 1].exit, s.forward, s.backward,
             s.weight, s.finish)
        for s in figures.stages
    )  # fmt: skip
    solution = StageSolution(held, figures.step_seconds, 0.0, options)
    record = ShapeRecord(shape.mesh(), shape.microbatches, "solved", None, figures.step_seconds, figures.peak_bytes)
    alone = Found(None, [record], 0.0)
    return plan_of(bench, alone, Solved(shape, solution), replace(request, objective="memory"), outline)


def fits(outline: Outline, cluster: Cluster, prices: PriceBook, request: Request) -> bool:
    """Whether some plan keeps the request's memory limit."""
    from .solve import make_bench

    bench, shapes = make_bench(
        outline, cluster, prices, replace(request, memory_limit_bytes=2**62), tiers=has_host(cluster)
    )
    limits = pool_limits(cluster, request.memory_limit_bytes) if unlike(cluster) else ()
    for shape, cuts, options, peak in _smallest(bench, shapes):
        if not limits and peak <= request.memory_limit_bytes:
            return True
        if limits:
            stages = appraise(bench, shape, cuts, options).stages
            if all(stage.peak_bytes <= limits[shape.pools[stage.rank]] for stage in stages):
                return True
    return False


def limited(bench: Workbench, limit: int) -> Workbench:
    """A workbench under another memory limit; prices and options, which no limit changes, are shared."""
    made = copy.copy(bench)
    made.task, made.screen = replace(bench.task, limit_bytes=limit), Screen(bench.screen.held)
    return made


def least_peak(bench: Workbench, shapes: Sequence[Arrangement]) -> int | None:
    """The peak of the plan of least memory among those looked at; None where no shape can run."""
    return min((peak for _, _, _, peak in _smallest(bench, shapes)), default=None)


def _smallest(bench: Workbench, shapes: Sequence[Arrangement]) -> Iterator[Cut]:
    """Per mesh the plan of least memory, with the smallest microbatch and the plainest schedule."""
    plain: dict[tuple[int, ...], Arrangement] = {}
    for shape in shapes:
        key = (shape.pp, shape.dp, shape.ep, shape.cp, shape.tp)
        known = plain.get(key)
        if known is None or (shape.micro_batch, shape.chunks, shape.schedule != "1f1b") < (
            known.micro_batch, known.chunks, known.schedule != "1f1b",
        ):  # fmt: skip
            plain[key] = shape
    for shape in plain.values():
        try:
            options = [_options(bench, shape, p) for p in shape.pool_order or (0,)]
        except PinError:
            continue
        here = [[[o for o in found if not (o.host or o.host_saved or o.disk)] for found in mine] for mine in options]
        for offered in (options, here):
            if all(all(mine) for mine in offered):
                cuts, picked = _least(bench, shape, offered)
                if housed(bench, shape, cuts, picked):
                    yield shape, cuts, picked, appraise(bench, shape, cuts, picked).peak_bytes
                    break


def _options(bench: Workbench, shape: Arrangement, pool: int) -> list[list[Option]]:
    """Every option of every region on a pool (on the only one where all devices are equal)."""
    mine = bench.on(shape, shape.pools.index(pool)) if shape.pools else bench
    return [mine.options(r, shape) for r in range(len(bench.chain.parts))]


def _least(
    bench: Workbench, shape: Arrangement, options: Sequence[Sequence[Sequence[Option]]]
) -> tuple[tuple[int, ...], tuple[Option, ...]]:
    """Cuts and the option of every unit, each the smallest of those offered (by pool in the order of the pipeline)."""
    alive = min(shape.microbatches, shape.pp)
    small = []
    for offered in options:
        least = [min(found, key=lambda o: (_held(o, alive) + o.work, o.seconds)) for found in offered]
        small.append(_matched(least, offered, alive))
    if len({(o.entry, o.exit) for mine in small for o in mine}) > 1 and len(small) > 1:
        small = _one_layout(small, options, alive)
    line = Line.of(bench.regions, [[(_held(o, alive), 0.0)] for o in small[0]])
    if not shape.pools:
        return _cuts(line, shape.pp * shape.chunks), tuple(small[0][r] for r in bench.regions)
    rooms = [bench.on(shape, rank).task.cluster.device.memory_bytes for rank in bench.ready(shape).placement]
    cuts = _cuts_by_room(line, rooms)
    places = [shape.pool_order.index(shape.pools[rank]) for rank in bench.ready(shape).placement]
    picked = tuple(small[places[s]][bench.regions[u]] for s in range(len(rooms)) for u in range(cuts[s], cuts[s + 1]))
    return cuts, picked


def _one_layout(
    small: list[list[Option]], options: Sequence[Sequence[Sequence[Option]]], alive: int
) -> list[list[Option]]:
    """The smallest options of every pool with one layout in all of them, where there is one."""
    for layout in ("S", "R"):
        same = [[[o for o in found if (o.entry, o.exit) == (layout, layout)] for found in mine] for mine in options]
        if all(all(mine) for mine in same):
            return [
                [min(found, key=lambda o: (_held(o, alive) + o.work, o.seconds)) for found in mine] for mine in same
            ]
    return small


def _cuts_by_room(line: Line, rooms: Sequence[float]) -> tuple[int, ...]:
    """Every stage as large a share of the bytes as its devices have of the memory, and a unit at the least."""
    cuts, total, taken = [0], sum(rooms), 0.0
    for s, room in enumerate(rooms[:-1], 1):
        taken += room
        wanted = line.before[-1] * taken / total
        low, high = cuts[-1] + 1, len(line) - (len(rooms) - s)
        cuts.append(min(range(low, high + 1), key=lambda k: (abs(line.before[k] - wanted), k)))
    return (*cuts, len(line))


def housed(bench: Workbench, shape: Arrangement, cuts: Sequence[int], options: Sequence[Option]) -> bool:
    """Whether every rank's share of host memory and disk holds what lies there."""
    shares = [bench.on(shape, rank).memory(shape) for rank in range(shape.pp)]
    found = zip(behind(bench, shape, cuts, options), shares, strict=True)
    return all(host <= share.host_bytes and disk <= share.disk_bytes for (host, disk), share in found)


def _held(option: Option, alive: int) -> float:
    return option.static + option.gradient + alive * option.saved + 1.0


def _matched(small: Sequence[Option], options: Sequence[Sequence[Option]], alive: int) -> list[Option]:
    """The smallest options with one layout throughout, so that nothing need change between units."""
    layouts = {(o.entry, o.exit) for o in small}
    if len(layouts) == 1:
        return list(small)
    for layout in ("S", "R"):
        same = [[o for o in found if (o.entry, o.exit) == (layout, layout)] for found in options]
        if all(same):
            return [min(found, key=lambda o: (_held(o, alive) + o.work, o.seconds)) for found in same]
    return list(small)


def _cuts(line: Line, stages: int) -> tuple[int, ...]:
    """A division with the least bytes in its fullest stage."""
    most = line.bottleneck(stages)
    here: dict[int, tuple[int, ...]] = {0: (0,)}
    for mine in line.arcs(stages, most * (1 + 1e-9)):
        there: dict[int, tuple[int, ...]] = {}
        for i, j in mine:
            if i in here and j not in there:
                there[j] = (*here[i], j)
        here = there
    return here.get(len(line)) or tuple(round(k * len(line) / stages) for k in range(stages + 1))
