"""One regression test for each modelling bug found in peers' planners (the survey's list of recurring bugs)."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from attention_outlines import Form, decoder
from oracles.brute import Oracle, Stage, best_plan
from oracles.instances import option, problem
from shardwright.planner.collectives import cluster_seconds
from shardwright.planner.costs import Costs, Shape
from shardwright.planner.front import Design
from shardwright.planner.fronts import Fronts, Named
from shardwright.planner.labels import Bags, MemoryRows
from shardwright.planner.memory import Setting
from shardwright.planner.numbers import Numbers, Weights
from shardwright.planner.options import Option, Storing
from shardwright.planner.part import chain
from shardwright.planner.pins import Pins
from shardwright.planner.placement import R, split
from shardwright.planner.placing import send_seconds
from shardwright.planner.plan import MeshAxis
from shardwright.planner.precision import RECIPES
from shardwright.planner.prices import Prices
from shardwright.planner.program import INFINITE
from shardwright.planner.residual import residual_factors
from shardwright.planner.stages import Memory, Pipeline, StageSolution, StageSolve
from shardwright.planner.stored import Data
from shardwright.profiles.devices import parse_cluster
from solver_outlines import FakePrices, transformer

CLUSTER = parse_cluster("h100-sxm:8x4")
DEVICE = replace(CLUSTER.device, overlap_fraction=0.0)
LONG = Form(layers=3, batch=1, seq=8192, heads=16, width=64, vocab=4096)
NAMED = Named(Design("R", "R", (), frozenset(), frozenset()), "single", "none")
LOOSE = Memory(1e15)


def fronts(form: Form = LONG) -> Fronts:
    outline = decoder(form)
    setting = Setting(RECIPES["fp32"].precision(), "adamw")
    return Fronts(chain(outline), Prices(CLUSTER, "float32"), Pins(), setting, residual_factors(outline))


def storing(prices: FakePrices | Prices | None = None) -> Storing:
    return Storing(prices or FakePrices(), DEVICE, RECIPES["zero"].precision(), "adamw", True, False)


def unit(seconds: float, elements: float, saved: float = 1e8) -> Numbers:
    """A unit that computes for `seconds` forward and twice as long backward."""
    weights = (Weights(elements, elements / 4, True, False, False, True),)
    return Numbers(
        seconds, 2 * seconds, seconds, 0.0, seconds, 2 * seconds, saved, saved, 0.0, weights
    )  # fmt: skip


def levels(numbers: Numbers, microbatches: int, ranks: int = 8) -> list[Option]:
    """The unit at every ZeRO level."""
    return storing().options(0, [(NAMED, numbers)], Data(ranks, 1, 1, microbatches, 1), (0, 1, 2, 3))


def step(o: Option, microbatches: int) -> float:
    return microbatches * o.seconds + o.finish


def alone(options: list[Option], microbatches: int, memory: Memory = LOOSE, units: int = 1) -> StageSolution:
    """Equal units on one rank."""
    mine = problem([0] * units, [options], Pipeline(1, 1, "1f1b", microbatches), memory)
    return StageSolve(mine, gap=1e-9).run()


def picks(found: StageSolution) -> list[int]:
    assert found.stages is not None
    return [p for held in found.stages for p in held.picks]


def test_context_parallelism_divides_cost() -> None:
    """Galvatron: a context axis left the time of a layer as it was."""
    found = fronts()
    whole = storing().options(1, [found.numbers(1, 1, 1)[0]], Data(1, 1, 1, 4, 1), (0,))[0]
    shared = storing().options(1, [found.numbers(1, 1, 1, 4)[0]], Data(1, 1, 1, 4, 1), (0,))[0]
    assert shared.back.compute < 0.35 * whole.back.compute
    assert shared.saved == pytest.approx(whole.saved / 4)
    assert shared.static == whole.static


def test_microbatches_count_where_parameters_are_synchronised() -> None:
    """nnScaler: the sync of a step was priced without the number of microbatches it is spread over."""
    few, many = levels(unit(1e-3, 4e6), 2), levels(unit(1e-3, 4e6), 16)
    assert many[0].finish == few[0].finish, "once a step, however many microbatches"
    assert many[3].seconds == few[3].seconds > many[0].seconds, "every microbatch gathers"
    gathers = [step(o[3], m) - m * 3e-3 - o[3].finish for o, m in ((few, 2), (many, 16))]
    assert gathers[1] == pytest.approx(8 * gathers[0])
    # One choice for few microbatches, another for many: the sync is weighed against the whole step.
    once = option(0, 1.0, 2.0, finish=3.0)
    every = option(0, 1.0, 2.5)
    assert picks(alone([once, every], 2)) == [1]
    assert picks(alone([once, every], 16)) == [0]


ROWS = {
    "activations": ({"saved": 4.0}, Memory(30.0), Memory(10.0)),
    "parameters": ({"static": 6.0}, Memory(30.0), Memory(10.0)),
    "gradients": ({"gradient": 6.0}, Memory(30.0), Memory(10.0)),
    "step": ({"step": 6.0}, Memory(30.0), Memory(10.0)),
    "work": ({"work": 12.0}, Memory(30.0), Memory(10.0)),
    "host": ({"host": 6.0}, Memory(30.0, 30.0), Memory(30.0, 10.0)),
    "host activations": ({"host_saved": 4.0}, Memory(30.0, 30.0), Memory(30.0, 10.0)),
    "disk": ({"disk": 6.0}, Memory(30.0, INFINITE, 30.0), Memory(30.0, INFINITE, 10.0)),
}


@pytest.mark.parametrize("row", list(ROWS))
def test_every_memory_row_is_there_and_binds(row: str) -> None:
    """Alpa has none in its sharding program; easydist's and Colossal's never bind. Each of ours alone decides a plan."""
    held, enough, short = ROWS[row]
    fast, slow = option(0, 1.0, 2.0, **held), option(0, 1.5, 2.5)
    for ranks, microbatches in ((1, 3), (2, 3)):
        mine = problem([0] * 4, [[fast, slow]], Pipeline(ranks, 1, "1f1b", microbatches), enough)
        least = 3.0 * 4 / ranks * microbatches
        plenty = StageSolve(mine, gap=1e-9).run()
        tight = StageSolve(replace(mine, memory=short), gap=1e-9).run()
        assert set(picks(plenty)) == {0}
        assert plenty.step_seconds >= least
        assert 1 in picks(tight)
        assert tight.step_seconds > plenty.step_seconds
        best = best_plan(replace(mine, memory=short))
        assert best is not None
        assert tight.step_seconds == pytest.approx(best.step_seconds, rel=1e-9)


def test_working_memory_is_a_maximum_not_a_sum() -> None:
    """nnScaler: options compared by all their bytes added up, though working memory of units is not held together.

    Beside a unit that works in 10 bytes, a unit that keeps 5 and works in 6 is better than one that keeps 8 and works in 1;
    in total bytes it is worse. Dominance may not drop it.
    """
    first = [option(0, 1.0, 1.0, static=8.0, work=1.0), option(0, 1.0, 1.0, static=5.0, work=6.0)]
    assert first[0].static + first[0].work < first[1].static + first[1].work
    other = [option(1, 1.0, 1.0, static=1.0, work=10.0)]
    for cap, fits in ((16.0, True), (15.0, False)):
        mine = problem([0, 1], [first, other], Pipeline(1, 1, "1f1b", 2), Memory(cap))
        found = StageSolve(mine).run()
        assert (found.stages is not None) == fits
        if fits:
            assert picks(found) == [1, 2]


def test_gathers_are_priced_on_the_whole_tensor() -> None:
    """easydist: an all-gather cost what its shard takes on the wire."""
    tensor = transformer().tensors["x0"]
    axis = Shape((MeshAxis("tp", 4, "model", ""),))
    moved = Costs(FakePrices(), axis).chain(tensor, (split(0),), (R,))
    assert moved is not None
    assert [(c.collective, c.bytes) for c in moved.calls if not c.backward] == [("all_gather", tensor.bytes)]
    level = CLUSTER.levels[0]
    whole = 8e9
    seconds = cluster_seconds(CLUSTER, "all_gather", whole, 1, 8)
    assert seconds >= 7 / 8 * whole / level.bytes_per_second
    # Parameters of 1e6 elements, 2 bytes each, over 8 ranks: all of them are gathered, not an eighth.
    o = levels(unit(1e-3, 1e6), 4)[3]
    gather = FakePrices().collective("all_gather", 2e6, 1, 8).seconds
    assert o.forward - 1e-3 == pytest.approx(gather)


def test_units_are_seconds_and_bytes_throughout() -> None:
    """Galvatron: a factor 1e-7 between milliseconds and bytes. Known amounts of work take what the data sheet says."""
    prices = Prices(CLUSTER, "bfloat16")
    level = CLUSTER.levels[0]
    assert send_seconds(CLUSTER, level.bytes_per_second * level.efficiency, 1, size=2) == pytest.approx(1.0, rel=1e-3)
    outline = transformer(1, 64, 2048, 8192, 64, 128)
    op = outline.by_name["l0.lin_up"]
    sizes = tuple(f.size for f in op.factors)
    forward, backward = prices.op(op, sizes, outline.tensors)
    peak = op.flops / DEVICE.peak("bfloat16")
    assert peak < forward.seconds < 3 * peak
    assert 1.5 * forward.seconds < backward.seconds < 2.5 * forward.seconds
    elements = 1e9
    moved = prices.optimizer_seconds(elements, "adamw", RECIPES["zero"].precision()) * DEVICE.memory_bytes_per_second
    assert 10 * elements < moved < 60 * elements
    assert prices.copy(DEVICE.memory_bytes_per_second / 2).seconds == pytest.approx(1.0, rel=0.5)


def test_the_slowest_stage_may_be_in_the_middle() -> None:
    """Galvatron: the formula of a pipeline looked at its first and last stage only."""
    light, heavy = option(0, 1.0, 2.0), option(1, 4.0, 8.0)
    # Its own microbatches, and the first stage's before and after; GPipe waits for the last stage to turn as well.
    for schedule, around in (("1f1b", 3.0), ("gpipe", 3.0 + 3.0)):
        mine = problem([0, 1, 0], [[light], [heavy]], Pipeline(3, 1, schedule, 8), LOOSE)
        found = StageSolve(mine).run()
        assert found.step_seconds == pytest.approx(8 * 12.0 + around)
        assert found.gap < 1e-9
    # Where the division is free, units move away from it.
    mine = problem([0, 0, 1, 0, 0], [[light], [heavy]], Pipeline(3, 1, "1f1b", 8), LOOSE)
    found = StageSolve(mine).run()
    assert found.stages is not None
    assert [s.end - s.start for s in found.stages] == [2, 1, 2]


def test_backward_is_its_own_number() -> None:
    """AMP, Galvatron: backward taken as twice the forward, so that what is fast in one direction only is not seen."""
    fast_forward, fast_backward = option(0, 1.0, 4.0), option(0, 1.4, 2.5)
    assert picks(alone([fast_forward, fast_backward], 4)) == [1]
    found = fronts()
    none = {n.policy: numbers for n, numbers in found.numbers(1, 1, 1)}
    ratio = none["none"].backward / none["none"].forward
    embedding = found.numbers(0, 1, 1)[0][1]
    assert embedding.backward / embedding.forward != pytest.approx(ratio, rel=0.05)
    # What runs again is a forward of its own, on top, and no more than that.
    assert none["none"].again == 0.0
    assert 0.0 < none["full"].again <= none["full"].compute_forward * (1 + 1e-9)
    assert none["full"].compute_backward == pytest.approx(none["none"].compute_backward)


def test_split_work_has_a_price_and_uneven_parts_too() -> None:
    """Alpa: compute that is split evenly costs nothing in its sharding program, so an uneven split is never worse."""
    outline = transformer(1, 8, 512, 1024, 8, 64)
    op = outline.by_name["l0.lin_up"]
    prices = Prices(CLUSTER, "float32")
    seconds = {}
    for ways in (1, 2, 8, 3):
        run = Costs(prices, Shape((MeshAxis("tp", ways, "model", ""),))).run(op, outline.tensors, ("f",))
        seconds[ways] = run.forward if run is not None else None
    assert seconds[3] is None, "what does not divide is not priced as if it did"
    assert 0.0 < seconds[8] < seconds[2] < seconds[1]
    assert seconds[2] > 0.4 * seconds[1]
    # Units that do not divide over ranks: the rank with one more sets the pace.
    even, uneven = (
        StageSolve(problem([0] * n, [[option(0, 1.0, 2.0)]], Pipeline(2, 1, "1f1b", 32), LOOSE)).run() for n in (6, 7)
    )
    assert uneven.step_seconds - even.step_seconds >= 31 * 3.0


def test_axes_of_the_mesh_are_chosen_together() -> None:
    """easydist, autoparallel: one mesh dimension solved after the other.

    Alone, the design that keeps weights whole is the fastest on the inner mesh, and then every ZeRO level is dear: all of the
    weights are synchronised. Weights split on the model axis are slower by themselves and faster in all.
    """
    microbatches = 2
    whole, parted = unit(1.00e-2, 4e7), unit(1.03e-2, 1e7)
    options = [*levels(whole, microbatches), *levels(parted, microbatches)]
    after = min(step(o, microbatches) for o in options[:4])
    together = min(step(o, microbatches) for o in options)
    found = alone(options, microbatches)
    assert found.step_seconds == pytest.approx(together)
    assert together < 0.9 * after
    assert picks(found)[0] >= 4
    # Pipeline and options: the division that is even by least seconds is not the best one once memory counts.
    units = [option(0, 1.0, 2.0, saved=5.0), option(0, 2.0, 4.0, saved=1.0)]
    mine = problem([0] * 12, [units], Pipeline(2, 1, "1f1b", 8), Memory(45.0))
    free, even = StageSolve(mine, gap=1e-9).run(), Oracle(mine)
    halves = [
        even.seconds((Stage(0, 6, a), Stage(6, 12, b)))
        for a, b in itertools.product(itertools.combinations_with_replacement(units, 6), repeat=2)
        if even.fits((Stage(0, 6, a), Stage(6, 12, b)))
    ]
    assert free.stages is not None
    assert free.step_seconds < 0.95 * min(halves)
    assert free.stages[0].end < 6, "the first rank holds more microbatches, and gets fewer units"


def test_points_no_weighted_sum_finds() -> None:
    """Mist, Unity: the front between time and memory traced by weighted sums, which see its lower hull only."""
    quick, middle, small = (
        option(0, 1.0, 1.0, static=10.0), option(0, 3.0, 3.0, static=7.0), option(0, 4.0, 4.0, static=1.0)
    )  # fmt: skip
    options = [quick, middle, small]
    for price in (k / 50 for k in range(200)):
        values = [o.seconds + price * o.static for o in options]
        assert values[1] > min(values[0], values[2]), "the middle point is above the hull"
    assert picks(alone(options, 1, Memory(8.0))) == [1]
    bags = Bags([options], {}, [[1.0, 1.0, 0.0, 0.0]]).interval(((0, 1),), MemoryRows((1,), 8.5))
    assert len(bags["R", "R"]) == 2
    # Of several units: all mixtures that no other one beats in seconds and bytes, wherever the cap lies.
    sums = {
        (sum(o.seconds for o in c), sum(o.static for o in c))
        for c in itertools.combinations_with_replacement(options, 3)
    }
    for cap in range(3, 31):
        fitting = [seconds for seconds, held in sums if held <= cap]
        assert alone(options, 1, Memory(float(cap)), units=3).step_seconds == pytest.approx(min(fitting))
