"""Options of a unit in closed form: ZeRO levels, what lies behind the device, and experts split over the data axis."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from shardwright.errors import PinError
from shardwright.planner import rule_experts
from shardwright.planner.away import HERE, SUBGROUP, Away, Case, offers, offload_classes
from shardwright.planner.bench import Bench
from shardwright.planner.cluster import Host
from shardwright.planner.costs import Costs, Shape
from shardwright.planner.front import Design
from shardwright.planner.fronts import Named
from shardwright.planner.hostupdate import MOST_SUBGROUPS, SLOTS, UpdateRates, best_stride, update_rates
from shardwright.planner.memory import Setting
from shardwright.planner.numbers import Numbers, Weights
from shardwright.planner.offload import ON_HOST, Offload, duplex_bytes_per_second, held_bytes, lane_seconds
from shardwright.planner.offload import Traffic as Copied
from shardwright.planner.options import PASSING, Option, Storing
from shardwright.planner.outline import Outline, Region
from shardwright.planner.overlap import Overlap
from shardwright.planner.part import chain
from shardwright.planner.pins import Pins
from shardwright.planner.placement import R
from shardwright.planner.plan import MeshAxis
from shardwright.planner.precision import RECIPES, state_bytes
from shardwright.planner.prices import Prices
from shardwright.planner.stored import Data, Stored
from shardwright.planner.unitexperts import RECEIVED, expert_sizes, spread
from shardwright.profiles.devices import parse_cluster
from solver_outlines import FakePrices, transformer
from test_experts import EXPERTS, HIDDEN, INNER, TOKENS, TOP_K
from test_experts import outline as mixture

CLUSTER = parse_cluster("a100-sxm-80gb:8x8")
DEVICE = replace(CLUSTER.device, overlap_fraction=0.0)
HOST = Host(4, int(512e9), 20e9, 400e9, 1e-9, copy_latency_seconds=1e-5, disk_bytes=int(4e12),
            disk_read_bytes_per_second=8e9, disk_write_bytes_per_second=4e9)  # fmt: skip
NAMED = Named(Design("R", "R", (), frozenset(), frozenset()), "single", "none")
ELEMENTS, SAVED = 4e7, 3e8


def storing(recipe: str = "zero", **more) -> Storing:
    prices = more.pop("prices", Prices(CLUSTER, "bfloat16"))
    return Storing(prices, DEVICE, RECIPES[recipe].precision(), "adamw", True, False, **more)


def numbers(seconds: float = 1.0, elements: float = ELEMENTS, **more) -> Numbers:
    """A unit that computes for `seconds` forward and twice as long backward."""
    figures = {"saved": SAVED, "peak": SAVED + 1e7, "work": 2e7, "again": 0.0} | more
    parts = {"compute": 3 * seconds, "activation_communication": 0.0, "recompute": 0.0}
    return Numbers(
        seconds, 2 * seconds, seconds, figures["again"], seconds, 2 * seconds, figures["saved"], figures["peak"],
        figures["work"], (Weights(elements, elements / 4, True, False, False, True),), parts,
    )  # fmt: skip


def data(ranks: int = 8, microbatches: int = 4, stages: int = 2) -> Data:
    return Data(ranks, 1, 1, microbatches, stages)


def by_label(found: list[Option]) -> dict[tuple[int, str], Option]:
    made = {(o.zero, o.offload): o for o in found}
    assert len(made) == len(found)
    return made


# -- ZeRO


@pytest.mark.parametrize(("level", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_memory_table(level: int, gigabytes: float) -> None:
    """ZeRO (Rajbhandari et al. 2020), figure 1: 7.5 B parameters on 64 devices, mixed-precision Adam."""
    (found,) = storing().options(0, [(NAMED, numbers(elements=7.5e9))], data(64), (level,))
    assert (found.static + found.gradient) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_collectives_of_every_level() -> None:
    """Full tensors: all-reduce; reduce-scatter and all-gather; the first every microbatch; two gathers and a scatter."""
    prices, width = FakePrices(), 2
    whole = {n: prices.collective(n, ELEMENTS * width, 1, 8).seconds
             for n in ("all_reduce", "all_gather", "reduce_scatter")}  # fmt: skip
    step = [prices.optimizer_seconds(ELEMENTS / share, "adamw", RECIPES["zero"].precision()) for share in (1, 8)]
    found = {o.zero: o for o in storing(prices=prices).options(0, [(NAMED, numbers())], data(), (0, 1, 2, 3))}
    gather, scatter = whole["all_gather"], whole["reduce_scatter"]
    assert [found[z].forward - 1 for z in range(4)] == pytest.approx([0, 0, 0, gather])
    assert [found[z].backward - 2 for z in range(4)] == pytest.approx([0, 0, scatter, gather + scatter])
    assert [found[z].finish for z in range(4)] == pytest.approx(
        [whole["all_reduce"] + step[0], gather + scatter + step[1], gather + step[1], step[1]]
    )
    one = {o.zero: o for o in storing(prices=prices).options(0, [(NAMED, numbers())], data(1), (0,))}
    assert one[0].finish == pytest.approx(step[0])
    assert {o.offload for o in found.values()} == {""}


def test_collectives_hide_under_their_unit() -> None:
    prices = FakePrices()
    device = replace(DEVICE, overlap_fraction=0.5, overlap_slowdown=1.1)
    made = replace(storing(prices=prices), device=device).options(0, [(NAMED, numbers())], data(), (3,))
    gather = prices.collective("all_gather", ELEMENTS * 2, 1, 8).seconds
    assert made[0].forward == pytest.approx(1 + Overlap.of(device).exposed(1.0, gather))
    assert made[0].forward < 1 + gather


# -- what lies behind the device


@pytest.mark.parametrize("recipe", ["megatron", "zero", "fsdp-fp32", "fp32", "pure-bf16"])
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_bytes_behind_the_device(recipe: str, level: int) -> None:
    """As planner/offload.py has them for model states; a compute copy counts as the parameters of levels 1 and 2."""
    store, state = storing(recipe), state_bytes(RECIPES[recipe].precision(), "adamw")
    share = 8 if level else 1
    plain = kept(store, level)
    away = kept(store, level, Away("host"))
    expected = held_bytes(ELEMENTS, state, Offload(optimizer=ON_HOST), zero=level, shards=8)
    assert away["host"] == pytest.approx(expected.host + state.gradient * ELEMENTS / share)
    if state.copy or level in (0, 3):
        assert away["static"] + away["gradient"] == pytest.approx(expected.device)
    assert plain["static"] - away["static"] == pytest.approx(_leaves(recipe, level) * ELEMENTS / share)
    disk = kept(store, level, Away("disk", gradients=True))
    assert disk["disk"] == pytest.approx(expected.host)
    assert disk["host"] == pytest.approx(state.gradient * ELEMENTS / share)
    assert (disk["gradient"], disk["static"], disk["step"]) == (0.0, away["static"], 0.0)


def kept(store: Storing, level: int, away: Away = HERE, ranks: int = 8) -> dict[str, float]:
    """Bytes of one parameter."""
    weights = (Weights(ELEMENTS, ELEMENTS, True, False, False, True),)
    return store.keeping.memory(Stored(weights, data(ranks), True), level, away)


def _leaves(recipe: str, level: int) -> float:
    """Bytes per element that leave: states with a master copy; without one, moments and what the device need not keep."""
    state = state_bytes(RECIPES[recipe].precision(), "adamw")
    if state.master:
        return state.master + state.moments
    stays = {0: 0 if state.copy else state.parameter, 1: 0, 2: 0, 3: state.copy or state.parameter}[level]
    return state.moments + state.parameter - stays


def test_parameters_on_the_host() -> None:
    store = storing()
    found = kept(store, 3, Away("host", gradients=True, parameters=True))
    assert found["static"] == 0.0
    assert found["host"] == pytest.approx((2 + 2 + 12) * ELEMENTS / 8)
    assert found["gathered"] == 2 * 2 * ELEMENTS
    alone = kept(store, 0, Away(parameters=True), ranks=1)
    assert (alone["static"], alone["host"]) == (12 * ELEMENTS, 2 * ELEMENTS)
    assert alone["gathered"] == 4 * ELEMENTS
    cast = kept(storing("fsdp-fp32"), 3, Away(parameters=True))
    assert cast["host"] == pytest.approx((4 + 2) * ELEMENTS / 8)  # and the copy that is sent


@pytest.mark.parametrize("seconds", [1.0, 1e-3])
def test_activations_hide_under_their_unit(seconds: float) -> None:
    """3e8 bytes at 20e9 bytes a second take 15 ms one way."""
    found = by_label(storing(host=HOST).options(0, [(NAMED, numbers(seconds))], data(), (0,)))
    plain, away = found[0, ""], found[0, "activations"]
    copy = SAVED / 20e9 + 1e-5
    assert away.forward - plain.forward == pytest.approx(max(0.0, copy - seconds))
    assert away.backward - plain.backward == pytest.approx(max(0.0, copy - 2 * seconds))
    assert (away.saved, away.host_saved, plain.saved, plain.host_saved) == (0.0, SAVED, SAVED, 0.0)
    assert away.work == plain.work + PASSING * SAVED
    assert away.parts.get("offload", 0.0) == pytest.approx(
        4 * max(0.0, copy - seconds) + 4 * max(0.0, copy - 2 * seconds)
    )
    assert (away.static, away.finish) == (plain.static, plain.finish)


def test_run_again_the_window_is_longer() -> None:
    found = [by_label(storing(host=HOST).options(0, [(replace(NAMED, policy="full"), numbers(1e-3, again=again))], data(), (0,)))
             for again in (0.0, 5e-3)]  # fmt: skip
    stuck = [f[0, "activations"].backward - f[0, ""].backward for f in found]
    assert stuck[0] - stuck[1] == pytest.approx(5e-3)


def test_copies_both_ways_share_the_link() -> None:
    """Parameters come while activations go (forward), parameters and activations come while gradients go (backward)."""
    host = replace(HOST, duplex_fraction=0.8)
    found = by_label(storing(host=host).options(0, [(NAMED, numbers(0.0))], data(), (3,)))
    away, plain = found[3, _label(host, True, "gradients+params+activations")], found[3, ""]
    rate = duplex_bytes_per_second(host)
    fetch = 2 * ELEMENTS / 8
    assert rate == 16e9
    assert away.forward - plain.forward == pytest.approx(max(fetch, SAVED) / rate + 2e-5)
    assert away.backward - plain.backward == pytest.approx((fetch + SAVED) / rate + 3e-5)
    expected = lane_seconds(host, Copied(fetch + SAVED, 2 * ELEMENTS / 8, copies=3)).window
    assert away.backward - plain.backward == pytest.approx(expected)


def test_gradients_leave_as_they_are_made_or_once() -> None:
    found = by_label(storing(host=HOST).options(0, [(NAMED, numbers(0.0))], data(), (2,)))
    plain = found[2, ""]
    often, once = (found[2, _label(HOST, False, words)] for words in ("gradients", ""))
    size = 2 * ELEMENTS / 8  # bfloat16, its shard
    copy, adding = size / 20e9 + 1e-5, 3 * size / 100e9
    assert often.backward - plain.backward == pytest.approx(max(copy, adding))
    assert once.backward == plain.backward
    assert once.finish - often.finish == pytest.approx(copy)
    assert (plain.gradient, once.gradient, often.gradient) == (size, size, 0.0)
    single = storing(host=HOST).options(0, [(NAMED, numbers(0.0))], data(microbatches=1), (0, 1, 2, 3))
    assert all("gradients" in o.offload for o in single if "optimizer" in o.offload)


# -- the optimizer of the host


def rates(host: Host, recipe: str = "zero", tier: str = "host") -> UpdateRates:
    return update_rates(Prices(replace(CLUSTER, host=host), "bfloat16"), RECIPES[recipe].precision(), "adamw", tier)


def _stride(host: Host, params: bool = False, tier: str = "host") -> tuple[float, float]:
    found = rates(host, tier=tier)
    found = replace(found, parameters_in=0.0) if params else found
    stride, seconds = best_stride(MOST_SUBGROUPS * SUBGROUP, found, SUBGROUP)
    return stride, seconds / MOST_SUBGROUPS / SUBGROUP


def _label(host: Host, params: bool, words: str) -> str:
    stride = _stride(host, params)[0]
    return "+".join(w for w in ("optimizer" if math.isinf(stride) else f"optimizer/{stride:g}", words) if w)


@pytest.mark.parametrize("per_element", [1e-12, 4e-10, 1e-9, 1e-7])
def test_the_update_takes_the_best_stride(per_element: float) -> None:
    """From all on the CPU over interleaved to all streamed through the GPU, as the CPU gets slower."""
    host = replace(HOST, host_update_seconds_per_element=per_element)
    stride, rate = _stride(host)
    found = by_label(storing(host=host).options(0, [(NAMED, numbers(0.0))], data(), (1,)))
    away, plain = found[1, _label(host, False, "")], found[1, ""]
    assert away.parts["optimizer"] == pytest.approx(rate * ELEMENTS / 8)
    assert away.finish - plain.finish == pytest.approx(
        away.parts["optimizer"] - plain.parts["optimizer"] + 2 * ELEMENTS / 8 / 20e9 + 1e-5
    )
    assert away.step == 0.0
    slots = 0.0 if math.isinf(stride) else SLOTS * 12 * min(SUBGROUP, ELEMENTS / 8)
    assert away.work == max(plain.work, slots)
    if per_element == 1e-12:
        assert math.isinf(stride)
    elif per_element == 1e-7:
        assert stride == 1


def test_strides_fall_with_the_speed_of_the_cpu() -> None:
    found = [_stride(replace(HOST, host_update_seconds_per_element=s)) for s in (1e-12, 3e-10, 5e-10, 1e-9, 1e-7)]
    strides = [stride for stride, _ in found]
    assert strides == sorted(strides, reverse=True)
    assert any(1 < s < math.inf for s in strides)
    assert [seconds for _, seconds in found] == sorted(seconds for _, seconds in found)


def test_disk_is_slower_and_leaves_the_host_free() -> None:
    found = by_label(storing(host=HOST).options(0, [(NAMED, numbers())], data(), (3,)))
    disk = next(o for (_, label), o in found.items() if label.endswith("@disk+gradients"))
    near = next(o for (_, label), o in found.items() if "@" not in label and label.endswith("gradients"))
    assert disk.disk == pytest.approx(12 * ELEMENTS / 8)
    assert near.disk == 0.0
    assert near.host - disk.host == disk.disk
    assert disk.finish > near.finish
    assert disk.parts["optimizer"] == pytest.approx(_stride(HOST, tier="disk")[1] * ELEMENTS / 8)
    without = storing(host=replace(HOST, disk_bytes=0)).options(0, [(NAMED, numbers())], data(), (0, 1, 2, 3))
    assert not any("@disk" in o.offload for o in without)


def test_prices_without_a_cluster_are_refused() -> None:
    with pytest.raises(TypeError, match="FakePrices"):
        storing(prices=FakePrices(), host=HOST).options(0, [(NAMED, numbers())], data(), (0,))


# -- what is offered


def labels(pins: Pins = Pins(), levels: tuple[int, ...] = (0, 1, 2, 3), **more) -> list[str]:  # noqa: B008
    named = replace(NAMED, policy=more.pop("policy", "none"))
    return [o.offload for o in storing(host=HOST, pins=pins).options(0, [(named, numbers(**more))], data(), levels)]


def test_pins_choose_classes() -> None:
    assert set(labels(Pins(offload="none"))) == {""}
    for name in ("optimizer", "params", "activations"):
        found = labels(Pins(offload=name))
        assert found
        assert all(name in offload_classes(label) for label in found)
        assert not any(name in offload_classes(x) for x in labels(Pins(forbidden=(("offload", name),))))
    assert "" not in labels(Pins(forbidden=(("offload", "none"),)))
    only = Pins(offload="optimizer", forbidden=(("offload", "activations"), ("offload", "params")))
    assert all(offload_classes(label) == {"optimizer"} for label in labels(only))
    assert "activations" not in "".join(labels(policy="selective"))
    assert all("activations" in label for label in labels(Pins(offload="activations"), policy="selective"))
    assert len(labels(Pins(offload="params"), levels=(1,))) > 0


def test_a_unit_without_the_class_stays() -> None:
    assert labels(Pins(offload="activations"), (0,), saved=0.0, policy="full")[0] == ""
    assert labels(Pins(offload="params"), (0,), elements=0.0)[0] == ""


def test_an_offload_needs_a_host() -> None:
    with pytest.raises(PinError, match=r"offload=params.*\[host\]"):
        storing(pins=Pins(offload="params")).options(0, [(NAMED, numbers())], data(), (0,))
    assert len(storing(pins=Pins(offload="none")).options(0, [(NAMED, numbers())], data(), (0,))) == 1


def test_few_are_offered() -> None:
    plain = [Case(level, 8, 4, True, True, True, "") for level in range(4)]
    assert [len(list(offers(HOST, Pins(), case))) for case in plain] == [2, 2, 2, 3]
    assert [len(list(offers(HOST, Pins(), replace(case, policy="full")))) for case in plain] == [4, 4, 6, 10]
    alone = Pins(forbidden=(("offload", "optimizer"),))
    assert list(offers(HOST, alone, plain[3])) == [HERE, Away(parameters=True)]
    still = Case(3, 8, 1, False, True, False, "none")  # inference
    assert list(offers(HOST, Pins(), still)) == [HERE, Away(parameters=True)]
    assert list(offers(None, Pins(), plain[3])) == [HERE]


# -- experts


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
    assert found.parts["activation_communication"] - plain.parts["activation_communication"] == pytest.approx(
        there + back
    )
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
