"""Options of a unit in closed form: ZeRO levels, and what lies behind the device."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from shardwright.errors import PinError
from shardwright.planner.away import HERE, SUBGROUP, Away, Case, offers, offload_classes
from shardwright.planner.cluster import Host
from shardwright.planner.hostupdate import MOST_SUBGROUPS, SLOTS, UpdateRates, best_stride, update_rates
from shardwright.planner.numbers import Weights
from shardwright.planner.offload import ON_HOST, Offload, duplex_bytes_per_second, held_bytes, lane_seconds
from shardwright.planner.offload import Traffic as Copied
from shardwright.planner.options import PASSING, Storing
from shardwright.planner.overlap import Overlap
from shardwright.planner.pins import Pins
from shardwright.planner.precision import RECIPES, state_bytes
from shardwright.planner.prices import Prices
from shardwright.planner.stored import Stored
from solver_outlines import FakePrices
from unitoptions import CLUSTER, DEVICE, ELEMENTS, HOST, NAMED, SAVED, by_label, data, numbers, storing

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
    found = kept(store, 3, Away("host", gradients=True, parameters="host"))
    assert found["static"] == 0.0
    assert found["host"] == pytest.approx((2 + 2 + 12) * ELEMENTS / 8)
    assert found["gathered"] == 2 * 2 * ELEMENTS
    alone = kept(store, 0, Away(parameters="host"), ranks=1)
    assert (alone["static"], alone["host"]) == (12 * ELEMENTS, 2 * ELEMENTS)
    assert alone["gathered"] == 4 * ELEMENTS
    cast = kept(storing("fsdp-fp32"), 3, Away(parameters="host"))
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
    assert away.ahead.offload == pytest.approx(max(0.0, copy - seconds))
    assert away.back.offload == pytest.approx(max(0.0, copy - 2 * seconds))
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
    assert away.ends.optimizer == pytest.approx(rate * ELEMENTS / 8)
    assert away.finish - plain.finish == pytest.approx(
        away.ends.optimizer - plain.ends.optimizer + 2 * ELEMENTS / 8 / 20e9 + 1e-5
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
    assert disk.ends.optimizer == pytest.approx(_stride(HOST, tier="disk")[1] * ELEMENTS / 8)
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
    assert list(offers(HOST, alone, plain[3])) == [HERE, Away(parameters="host")]
    still = Case(3, 8, 1, False, True, False, "none")  # inference
    assert list(offers(HOST, Pins(), still)) == [HERE, Away(parameters="host"), Away(parameters="disk")]
    assert list(offers(replace(HOST, disk_bytes=0), Pins(), still)) == [HERE, Away(parameters="host")]
    assert list(offers(None, Pins(), plain[3])) == [HERE]
