"""Options of a unit with experts in closed form: split over a part of the data axis."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from shardwright.planner import rule_experts
from shardwright.planner.bench import Bench
from shardwright.planner.costs import Costs, Shape
from shardwright.planner.front import Design
from shardwright.planner.memory import Setting
from shardwright.planner.numbers import Numbers
from shardwright.planner.outline import Outline, Region
from shardwright.planner.part import chain
from shardwright.planner.placement import R
from shardwright.planner.plan import MeshAxis
from shardwright.planner.precision import RECIPES
from shardwright.planner.prices import Prices
from shardwright.planner.stored import Data
from shardwright.planner.unitexperts import RECEIVED, expert_sizes, spread
from solver_outlines import FakePrices, transformer
from test_experts import EXPERTS, HIDDEN, INNER, TOKENS, TOP_K
from test_experts import outline as mixture
from unitoptions import CLUSTER, HOST, NAMED, by_label, storing


def unit(ways: int = 1, choice: str = "R", again: bool = False) -> tuple[Bench, Numbers]:
    outline = replace(mixture(), regions=(Region("r0", (("moe",),), (("up", "down"),)),), trains=True)
    part = chain(outline).at(0, 1)
    costs = Costs(Prices(CLUSTER, "float32"), Shape((MeshAxis("tp", ways, "model", ""),)))
    bench = Bench(part, costs, Setting(RECIPES["fp32"].precision(), "adamw"), {"R": {"x": (R,), "scale": (R,)}})
    found = bench.measure(Design("R", "R", (choice,), frozenset({"moe"} if again else ()), frozenset()))
    assert found is not None
    return bench, found


STACKS = EXPERTS * 3 * HIDDEN * INNER


def test_weights_of_experts_are_known() -> None:
    _, found = unit()
    assert [(w.elements, w.expert) for w in found.weights] == [(STACKS, True)]
    (one,) = found.experts
    assert (one.local, one.slots, one.rows, one.token_bytes) == (EXPERTS, TOKENS * TOP_K, TOKENS * TOP_K, 4 * HIDDEN)
    assert (one.forward, one.backward) == (found.compute_forward, found.compute_backward)
    assert one.gates == 4 * TOKENS * TOP_K * 2 * INNER


def test_other_weights_are_not() -> None:
    part = chain(transformer()).at(1, 1)
    costs = Costs(FakePrices(), Shape((MeshAxis("tp", 1, "model", ""),)))
    layout = {name: (R,) for name in (*part.entry, *part.exit)}
    bench = Bench(part, costs, Setting(RECIPES["fp32"].precision(), "adamw"), {"R": layout})
    found = bench.measure(Design("R", "R", ("R",) * len(part.outline.ops), frozenset(), frozenset()))
    assert found is not None
    assert found.weights
    assert not any(w.expert for w in found.weights)
    assert found.experts == ()


def test_forward_memory_counts_what_lives_inside() -> None:
    bench, found = unit()
    inside = rule_experts.scratch_bytes(bench.part.outline.ops[0], bench.tensors, ("R",), (1,), False)
    assert found.experts[0].scratch[0] == inside == 4 * TOKENS * TOP_K * 4 * (HIDDEN + INNER)
    assert found.work + found.saved >= inside
    assert found.peak >= found.saved + found.experts[0].scratch[1]


@pytest.mark.parametrize(("ways", "choice"), [(1, "R"), (2, "t"), (2, "e"), (2, "f")])
@pytest.mark.parametrize("again", [False, True])
def test_experts_over_a_part_of_the_data_axis(ways: int, choice: str, again: bool) -> None:
    """Two all-to-alls each way of rho x tokens x top_k x hidden bytes per rank, and twice more where the op runs again."""
    _, plain = unit(ways, choice, again)
    ep, calls = 4, []

    def exchange(full_bytes: float) -> float:
        calls.append(full_bytes)
        return full_bytes * 1e-9

    found = spread(plain, ep, 8, exchange, True)
    assert found is not None
    local = EXPERTS // (ways if choice == "e" else 1)
    load = rule_experts.imbalance(local / ep, EXPERTS)
    slower = load / rule_experts.imbalance(local, EXPERTS) - 1
    slots = TOKENS * TOP_K / (ways if choice in ("t", "e") else 1)
    rows = math.ceil(slots * load)
    size = rows * HIDDEN * 4
    assert calls == [size * ep, 8.0 * EXPERTS * ep]
    (one,) = plain.experts
    there, back = (2 * calls[0] + calls[1]) * 1e-9, 2 * calls[0] * 1e-9
    assert found.forward - plain.forward == pytest.approx(slower * one.forward + there)
    assert found.backward - plain.backward == pytest.approx(slower * one.backward + back)
    assert found.again - plain.again == pytest.approx((slower * one.forward + there) if again else 0.0)
    talks = [n.forward + n.backward - n.compute_forward - n.compute_backward for n in (found, plain)]
    assert talks[0] - talks[1] == pytest.approx(there + back)
    (one,) = plain.experts
    kept = size + (rows / one.rows - 1) * one.gates
    if choice != "e":
        assert found.saved - plain.saved == pytest.approx(0.0 if again else kept)
        more = RECEIVED * size + (rows / one.rows - 1) * one.scratch[1]
        assert found.peak - plain.peak == pytest.approx(kept + more)
    assert found.weights == plain.weights


def test_experts_that_do_not_divide() -> None:
    _, plain = unit()
    assert spread(plain, 3, 6, float, True) is None
    assert spread(unit(4, "e")[1], 4, 8, float, True) is None  # two a rank
    assert spread(plain, 1, 8, float, True) is plain
    made = Data(6, 1, 1, 1, 1, experts=3, expert_stride=1)
    assert storing("fp32").options(0, [(NAMED, plain)], made, (0,)) == []


@pytest.mark.parametrize(
    ("level", "bytes_"), [(0, 16 / 4), (1, 4 / 4 + 4 / 4 + 12 / 8), (2, 4 / 4 + 16 / 8), (3, 16 / 8)]
)
def test_experts_have_their_own_data_axis(level: int, bytes_: float) -> None:
    """8 ranks, experts over 4: a quarter of the weights, shared by two."""
    _, plain = unit()
    axis = Data(8, 1, 1, 4, 2, experts=4, expert_stride=1)
    (option,) = storing("fp32").options(0, [(NAMED, plain)], axis, (level,))
    assert option.static + option.gradient == pytest.approx(bytes_ * STACKS)
    assert option.memory["gathered"] == (2 * 4 * STACKS / 4 if level == 3 else 0.0)


def test_reductions_of_experts_skip_the_expert_axis() -> None:
    prices = FakePrices()
    _, plain = unit()
    (option,) = storing("fp32", prices=prices).options(0, [(NAMED, plain)], Data(8, 2, 2, 4, 2, 4, 2), (0,))
    update = prices.optimizer_seconds(STACKS / 4, "adamw", RECIPES["fp32"].precision())
    assert option.finish == pytest.approx(prices.collective("all_reduce", STACKS, 8, 2).seconds + update)
    whole = storing("fp32", prices=prices).options(0, [(NAMED, plain)], Data(8, 2, 2, 4, 2, 8, 2), (0,))
    assert whole[0].finish == pytest.approx(update / 2)  # each expert on one rank: nothing to reduce


def test_optimizer_of_experts_goes_to_the_host() -> None:
    _, plain = unit()
    axis = Data(8, 1, 1, 4, 2, experts=4, expert_stride=1)
    found = by_label(storing("fp32", host=HOST).options(0, [(replace(NAMED, policy=""), plain)], axis, (1,)))
    (away,) = (o for (_, label), o in found.items() if label)
    assert away.host == pytest.approx((8 + 4 + 4) * STACKS / 4 / 2)


def test_sizes_of_an_expert_axis() -> None:
    assert expert_sizes(mixture(), 64) == (2, 4, 8)
    assert expert_sizes(mixture(), 12) == (2, 4)
    assert expert_sizes(transformer(), 64) == ()


def test_two_kinds_of_experts_share_the_axis() -> None:
    one = mixture()
    op = one.ops[0]
    stack = {n: replace(one.tensors[n], name=f"{n}2", storage=f"{n}2", dims=((6,), *one.tensors[n].dims[1:]))
             for n in ("up", "down")}  # fmt: skip
    factors = tuple(replace(f, size=6) if f.name == "e" else f for f in op.factors)
    uses = tuple(replace(u, tensor=f"{u.tensor}2") if u.tensor in stack else u for u in op.operands)
    both = Outline(
        {**one.tensors, **{t.name: t for t in stack.values()}},
        (op, replace(op, name="moe2", operands=uses, factors=factors)), (), one.parameters, one.inputs, "", (), 4, TOKENS, "1",
    )  # fmt: skip
    assert expert_sizes(both, 24) == (2,)
