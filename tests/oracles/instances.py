"""Random stage problems small enough for exhaustive search: every figure of an option is drawn on its own."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from shardwright.planner.arcs import Line
from shardwright.planner.front import Design
from shardwright.planner.labels import Layouts
from shardwright.planner.options import Option
from shardwright.planner.program import INFINITE
from shardwright.planner.schedules import fault
from shardwright.planner.stages import Memory, Pipeline, StageProblem

SINGLE = ("gpipe", "1f1b", "zb-h1")
"""Schedules of one chunk a rank."""

SEVERAL = (("interleaved", 2), ("zb-h1", 2), ("zbv", 2), ("dualpipev", 2))
"""Schedules with several chunks a rank, and how many."""


def option(
    region: int, forward: float, backward: float, *, weight: float = 0.0, finish: float = 0.0, static: float = 0.0,
    gradient: float = 0.0, saved: float = 0.0, work: float = 0.0, step: float = 0.0, host: float = 0.0,
    host_saved: float = 0.0, disk: float = 0.0, entry: str = "R", leave: str = "R",
) -> Option:  # fmt: skip
    """An option from its figures alone."""
    design = Design(entry, leave, (), frozenset(), frozenset())
    return Option(
        region, design, "", "", 0, entry, leave, forward, backward, weight, finish, static, gradient, saved, work, step,
        host, host_saved, disk,
    )  # fmt: skip


def problem(
    regions: Sequence[int], options: Sequence[Sequence[Option]], pipeline: Pipeline, memory: Memory, *,
    change: dict[Layouts, tuple[float, float]] | None = None,
    sends: dict[tuple[int, str], tuple[float, float]] | None = None, training: bool = True,
) -> StageProblem:  # fmt: skip
    """A stage problem; `sends` by position and layout, nothing where not said."""
    known = sends or {}
    line = Line.of(regions, [[(o.forward, o.backward) for o in group] for group in options])
    return StageProblem(
        line, options, change or {}, pipeline, memory, lambda at, layout: known.get((at, layout), (0.0, 0.0)),
        training=training, exact=True,
    )  # fmt: skip


def random_problem(seed: int, most: int = 5) -> StageProblem:
    """2 to `most` units of 1 to 3 regions with 1 to 4 options, any schedule, caps from loose to impossible."""
    rng = random.Random(seed)
    pipeline = _pipeline(rng)
    training = pipeline.chunks > 1 or rng.random() < 0.93
    count = rng.randint(max(pipeline.stages, 2, most - 3), most)
    kinds = rng.randint(1, 3)
    regions = [rng.randrange(kinds) for _ in range(count)]
    if rng.random() < 0.3:
        regions.sort()
    layouts = rng.choice((("R",), ("R", "S"), ("R", "S")))
    style = rng.choice(("free", "traded", "traded", "ties"))
    options = [_options(rng, r, layouts, style, training) for r in range(kinds)]
    change = _change(rng, training) if len(layouts) > 1 else {}
    sends = {
        (at, layout): (_send(rng), _send(rng) if training else 0.0) for at in range(1, count) for layout in layouts
    }
    memory = _memory(rng, regions, options, pipeline)
    return problem(regions, options, pipeline, memory, change=change, sends=sends, training=training)


def _pipeline(rng: random.Random) -> Pipeline:
    while True:
        if rng.random() < 0.3:
            name, chunks = rng.choice(SEVERAL)
            found = Pipeline(2, chunks, name, rng.randint(1, 6))
        else:
            found = Pipeline(rng.choice((1, 2, 2, 3, 3)), 1, rng.choice(SINGLE), rng.randint(1, 6))
        if not fault(found.schedule, found.ranks, found.chunks, found.microbatches):
            return found


def _options(rng: random.Random, region: int, layouts: Sequence[str], style: str, training: bool) -> list[Option]:
    found = []
    scale = rng.choice((0.3, 1.0, 1.0, 3.0))
    pairs = list(itertools.product(layouts, layouts))
    for index in range(rng.randint(1, 4)):
        # A fast option holds much where seconds are traded for bytes; small whole numbers make ties.
        trade = rng.random() if style == "traded" else 0.5
        draw = (lambda low, high: float(rng.randint(1, 4))) if style == "ties" else rng.uniform
        seconds = scale * (0.6 + trade)
        forward = seconds * draw(0.5, 1.5)
        backward = seconds * draw(0.5, 3.0) if training else 0.0
        entry, leave = rng.choice(pairs) if index or rng.random() < 0.3 else pairs[0]
        found.append(
            option(
                region, forward, backward, weight=backward * rng.choice((0.0, 0.3, 0.5, 1.0, rng.random())),
                finish=rng.choice((0.0, scale * rng.random(), 3 * scale * rng.random())),
                static=_bytes(rng, 20 * (1.6 - trade)), gradient=_bytes(rng, 6), saved=_bytes(rng, 16 * (1.6 - trade)),
                work=_bytes(rng, 25), step=_bytes(rng, 15), host=_bytes(rng, 10) if rng.random() < 0.4 else 0.0,
                host_saved=_bytes(rng, 6) if rng.random() < 0.3 else 0.0, disk=_bytes(rng, 6) if rng.random() < 0.2 else 0.0,
                entry=entry, leave=leave,
            )
        )  # fmt: skip
    return found


def _bytes(rng: random.Random, most: float) -> float:
    """Whole bytes, so that sums are exact in any order."""
    return float(rng.randint(0, round(most)))


def _send(rng: random.Random) -> float:
    return rng.choice((0.0, 0.3 * rng.random(), 2.0 * rng.random()))


def _change(rng: random.Random, training: bool) -> dict[Layouts, tuple[float, float]]:
    back = 1.0 if training else 0.0
    costs = {("R", "S"): (0.0, back * rng.random()), ("S", "R"): (rng.random(), 0.0)}
    if rng.random() < 0.2:
        del costs[rng.choice(list(costs))]
    return costs


def _memory(
    rng: random.Random, regions: Sequence[int], options: Sequence[Sequence[Option]], pipeline: Pipeline
) -> Memory:
    """Caps between what the frugal options of an even share hold and what the greedy ones do."""
    live = min(pipeline.microbatches, pipeline.stages)

    def held(o: Option) -> float:
        return o.static + o.gradient + live * o.saved + o.work

    least = sum(min(held(o) for o in options[r]) for r in regions) / pipeline.ranks
    most = sum(max(held(o) for o in options[r]) for r in regions) / pipeline.ranks
    cap = float(round(max(least + rng.choice((-0.1, 0.1, 0.2, 0.4, 0.6, 1.0, 2.0, 4.0)) * (most - least + 5.0), 1.0)))
    whole = sum(max(o.host + live * o.host_saved for o in options[r]) for r in regions)
    host = float(round(rng.choice((0.3, 0.6, 1.0)) * whole)) if rng.random() < 0.4 else INFINITE
    disk = float(rng.randint(0, 10)) if rng.random() < 0.2 else INFINITE
    return Memory(cap, host, disk)
