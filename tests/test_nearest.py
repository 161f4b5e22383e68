"""Seconds between measured shapes: exact where measured, monotone, better than one rate, and less sure further away."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shardwright.planner.cluster import Cluster, Device, Level
from shardwright.planner.fit import Sample, fitted
from shardwright.planner.nearest import GROWTH, Measured, sizes_of
from shardwright.planner.outline import Factor, Op, Tensor, Use
from shardwright.planner.prices import OpRow, Prices, Rate
from shardwright.planner.work import OpKey, Work, work_of

OVERHEAD = 5e-6
DEVICE = Device("toy", 2**34, {"float32": 1e11}, 2e10, OVERHEAD, kind="cpu")
CLUSTER = Cluster("toy", DEVICE, 2, 2, (Level("link", 2, 1e9, 1e-6),))


def make(
    target: str, kind: str, sizes: dict[str, int], operands: list[str], result: str
) -> tuple[Op, dict[str, Tensor]]:
    """An op whose dims are letters, merged ones in brackets ("(bs)d"); every letter is a factor."""
    letters, tensors = list(sizes), dict[str, Tensor]()

    def use(name: str, text: str) -> Use:
        groups: list[tuple[int, ...]] = []
        for at, part in enumerate(text.replace(")", "(").split("(")):
            found = [tuple(letters.index(c) for c in part)] if at % 2 else [(letters.index(c),) for c in part]
            groups += [group for group in found if group]
        dims = tuple(tuple(sizes[letters[f]] for f in group) for group in groups)
        tensors[name] = Tensor(name, dims, "float32", "activation", True, name)
        return Use(name, tuple(groups))

    uses = tuple(use(f"x{i}", text) for i, text in enumerate(operands))
    work = 2.0 * math.prod(sizes.values()) if kind == "matmul" else 0.0
    factors = tuple(Factor(c, n) for c, n in sizes.items())
    return Op("op", target, kind, uses, (use("y", result),), factors, (), work, 2 * work, ()), tensors


GELU = make("aten.gelu", "elementwise", {"m": 2**20}, ["m"], "m")
LINEAR = make("aten.linear", "matmul", {"m": 4096, "n": 4096, "k": 4096}, ["mk", "nk"], "mn")
Curve = Callable[[tuple[float, ...]], float]


def work(made: tuple[Op, dict[str, Tensor]]) -> Work:
    return work_of(*made, "float32", "")


def rows(of: Work, curve: Curve, shapes: Iterable[tuple[float, ...]], spread: float = 0.01) -> dict[OpKey, OpRow]:
    return {of.key(sizes): OpRow(curve(sizes), 2 * curve(sizes), spread) for sizes in shapes}


def gelu_curve(sizes: tuple[float, ...]) -> float:
    """Out of a cache the same bytes take up to three times as long: no single rate describes it."""
    moved = 8 * sizes[0]
    return OVERHEAD + moved / 3e10 * (1 + 2 / (1 + (2**20 / moved) ** 2))


def linear_curve(sizes: tuple[float, ...]) -> float:
    m, n, k = sizes
    return OVERHEAD + 2 * m * n * k / 1e11 * (1 + 64 / m + 64 / n + 64 / k)


MEASURED = [(float(2**i),) for i in (10, 13, 16, 19, 20)]


def test_exact_where_measured() -> None:
    one = work(GELU)
    measured = Measured.of(rows(one, gelu_curve, MEASURED))
    for sizes in MEASURED:
        found = measured.near(one, sizes, OVERHEAD)
        assert found is not None
        assert found.forward == pytest.approx(gelu_curve(sizes))
        assert found.backward == pytest.approx(2 * gelu_curve(sizes))
        assert found.error == pytest.approx(0.01)


def test_monotone_and_close_between_and_beyond() -> None:
    one = work(GELU)
    measured = Measured.of(rows(one, gelu_curve, MEASURED))
    last = 0.0
    for exponent in range(80, 221):
        sizes = (2 ** (exponent / 10),)
        found = measured.near(one, sizes, OVERHEAD)
        assert found is not None
        assert found.forward > last
        last = found.forward
        assert abs(found.forward / gelu_curve(sizes) - 1) < 0.35
        assert found.backward > found.forward


def test_the_error_grows_with_the_distance() -> None:
    one = work(GELU)
    measured = Measured.of(rows(one, gelu_curve, MEASURED))

    def error(exponent: float) -> float:
        found = measured.near(one, (2**exponent,), OVERHEAD)
        assert found is not None
        return found.error

    beyond = [error(20 + 0.5 * i) for i in range(8)]
    assert beyond == sorted(beyond)
    assert beyond[-1] > 3 * beyond[1] > 3 * 0.01
    inside = [error(16 + 0.25 * i) for i in range(13)]
    assert max(inside) == pytest.approx(inside[6])  # half way
    assert inside[0] == inside[-1] == pytest.approx(0.01)


def test_one_row_is_scaled_and_its_fixed_cost_stays() -> None:
    one = work(GELU)
    measured = Measured.of(rows(one, lambda s: OVERHEAD + s[0] * 1e-9, [(2.0**16,)]))
    small, large = measured.near(one, (2.0**10,), OVERHEAD), measured.near(one, (2.0**18,), OVERHEAD)
    assert small is not None
    assert large is not None
    assert small.forward == pytest.approx(OVERHEAD + 2**10 * 1e-9)
    assert large.forward == pytest.approx(OVERHEAD + 2**18 * 1e-9)
    assert large.error == pytest.approx(math.hypot(0.01, 2 * GROWTH))


def test_other_shapes_of_a_matmul() -> None:
    one = work(LINEAR)
    sides = (256.0, 1024.0, 4096.0)
    measured = Measured.of(rows(one, linear_curve, itertools.product(sides, sides, sides)))
    for sizes in itertools.product((512.0, 2048.0), (256.0, 2048.0), (1024.0, 3000.0)):
        found = measured.near(one, sizes, OVERHEAD)
        assert found is not None
        off = abs(found.forward / linear_curve(sizes) - 1)
        assert off < 0.12
        assert off < 2 * found.error


@pytest.mark.parametrize("other", ["target", "arguments", "dtype", "gradient", "dims"])
def test_rows_of_other_ops_say_nothing(other: str) -> None:
    one = work(GELU)
    key = one.key((1024.0,))
    ((shape, dtype, grad),) = key.operands
    changed = {
        "target": OpKey("aten.silu", key.operands), "arguments": OpKey(key.target, key.operands, '["tanh"]'),
        "dtype": OpKey(key.target, ((shape, "bfloat16", grad),)), "gradient": OpKey(key.target, ((shape, dtype, not grad),)),
        "dims": OpKey(key.target, (((*shape, 1), dtype, grad),)),
    }[other]  # fmt: skip
    assert Measured.of({changed: OpRow(1e-3, 2e-3, 0.0)}).near(one, (2048.0,), OVERHEAD) is None


def test_sizes_from_shapes() -> None:
    made = make("aten.linear", "matmul", {"b": 8, "s": 128, "n": 64, "k": 32}, ["(bs)k", "nk"], "(bs)n")
    one = work(made)
    key = OpKey("aten.linear", (((256, 32), "float32", True), ((16, 32), "float32", True)))
    found = sizes_of(one, key)
    assert found is not None
    assert found[0] * found[1] == 256
    assert found[2:] == (16, 32)
    assert one.amounts(found)[0] == 2 * 256 * 16 * 32
    twice = OpKey("aten.linear", (((256, 32), "float32", True), ((16, 33), "float32", True)))
    assert sizes_of(one, twice) is None  # k would be 32 and 33
    known = make("aten.mul", "elementwise", {"b": 8, "s": 128}, ["(bs)", "bs"], "bs")
    assert sizes_of(work(known), OpKey("aten.mul", (((64,), "float32", True), ((4, 16), "float32", True)))) == (4, 16)


def prices(
    made: tuple[Op, dict[str, Tensor]], found: dict[OpKey, OpRow], shapes: Iterable[tuple[float, ...]]
) -> Prices:
    """Prices with these rows and the rates fitted to them."""
    op, tensors = made
    picked = [Sample(op, tuple(map(int, sizes)), 1.0) for sizes in shapes]
    return fitted(Prices(CLUSTER, "float32"), found, picked, tensors)


@pytest.mark.parametrize(("made", "curve"), [(GELU, gelu_curve), (LINEAR, linear_curve)])
def test_prices_are_no_worse_than_fitted_rates(made: tuple[Op, dict[str, Tensor]], curve: Curve) -> None:
    one, count = work(made), len(made[0].factors)
    shapes = list(itertools.product((128.0, 512.0, 4096.0), repeat=count))
    found = prices(made, rows(one, curve, shapes), shapes)
    alone = prices(made, {}, shapes)
    alone = Prices(CLUSTER, "float32", rates=found.rates)
    mine, fit = [], []
    for sizes in itertools.product((200.0, 1024.0, 3000.0), repeat=count):
        mine.append(abs(found.op(made[0], sizes, made[1])[0].seconds / curve(sizes) - 1))
        fit.append(abs(alone.op(made[0], sizes, made[1])[0].seconds / curve(sizes) - 1))
    assert max(mine) <= max(fit)
    assert sum(mine) < 0.6 * sum(fit)


def test_a_rate_that_is_surer_is_kept() -> None:
    one, op, tensors = work(GELU), *GELU
    known = rows(one, gelu_curve, [(2.0**10,)])
    sure = Prices(CLUSTER, "float32", ops=known, rates={"aten.gelu": Rate(1e9, 1e9, OVERHEAD, 0.05)})
    far, near = (2.0**20,), (1100.0,)
    assert sure.op(op, far, tensors)[0].seconds == pytest.approx(OVERHEAD + 8 * far[0] / 1e9)
    assert sure.op(op, near, tensors)[0].seconds == pytest.approx(gelu_curve(near), rel=0.01)
    assert sure.op(op, near, tensors)[0].source == "modelled"
    assert 0.01 < sure.op(op, near, tensors)[0].error < 0.05
    bare = Prices(CLUSTER, "float32", ops=known)
    assert bare.op(op, far, tensors)[0].source == "datasheet"
    assert bare.op(op, (2048.0,), tensors)[0].source == "modelled"
    assert bare.op(op, (1024.0,), tensors)[0].source == "measured"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 64), st.floats(1e-6, 1e-2)), min_size=1, max_size=6), st.integers(1, 4096))
def test_any_rows_give_finite_seconds_and_errors(found: list[tuple[int, float]], size: int) -> None:
    one = work(GELU)
    known = {one.key((float(64 * n),)): OpRow(seconds, 2 * seconds, 0.02) for n, seconds in found}
    near = Measured.of(known).near(one, (float(size),), OVERHEAD)
    assert near is not None
    assert 0 < near.forward < math.inf
    assert 0 < near.backward < math.inf
    assert near.error >= 0.02
