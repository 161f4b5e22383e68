"""Objectives beside throughput: least memory, fewest devices, cost, and the frontier (planner/pursue.py)."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import msgspec
import pytest
from attention_outlines import Form, decoder
from shardwright.errors import Infeasible, PinError, UsageError
from shardwright.planner.cluster import Cluster, default_limit_bytes
from shardwright.planner.fewer import device_counts, priced_on, sized
from shardwright.planner.frontier import point_of, ranked
from shardwright.planner.goal import Aim, Point
from shardwright.planner.outline import Outline
from shardwright.planner.pins import parse_pins
from shardwright.planner.plan import Plan, Precision, Source
from shardwright.planner.plancheck import problems
from shardwright.planner.planfile import dump_plan, parse_plan
from shardwright.planner.prices import Prices
from shardwright.planner.pursue import pursue, settled
from shardwright.planner.solve import Request, search_joint, solve_joint
from shardwright.planner.targets import dollars, hourly_price
from shardwright.profiles.devices import parse_cluster
from solver_outlines import transformer

BF16 = Precision("bf16-mixed", "bfloat16", "float32", "float32", "float32")
SMALL = "h100-sxm:4"


@cache
def cluster(spec: str = SMALL) -> Cluster:
    return parse_cluster(spec)


@cache
def model(which: str = "plain") -> Outline:
    if which == "attending":
        return decoder(Form(layers=3, batch=8, seq=512, heads=8, width=64, vocab=1024))
    return transformer(layers=3, batch=8, seq=512, hidden=1024, heads=8, vocab=1024)


def request(outline: Outline, objective: str, *pins: str, limit: int | None = None, spec: str = SMALL) -> Request:
    source = Source("module", "test", outline.batch)
    found = limit if limit is not None else default_limit_bytes(cluster(spec))
    return Request(source, "adamw", BF16, found, parse_pins(pins), objective)


def plan(objective: str, aim: Aim | None = None, *pins: str, which: str = "plain", limit: int | None = None,
         spec: str = SMALL) -> Plan:  # fmt: skip
    asked = request(model(which), objective, *pins, limit=limit, spec=spec)
    return pursue(model(which), cluster(spec), Prices(cluster(spec), "bfloat16"), asked, aim or Aim())


@cache
def fastest(devices: int = 4, which: str = "plain", *pins: str, limit: int | None = None) -> Plan:
    where = sized(cluster(), devices)
    asked = request(model(which), "throughput", *pins, limit=limit)
    return solve_joint(model(which), where, Prices(where, "bfloat16"), asked)


def peak(found: Plan) -> int:
    return found.predicted.peak_bytes_per_device


def check(found: Plan) -> None:
    """What every plan keeps: it goes to a file and back, and fits."""
    assert list(problems(found)) == []
    assert dump_plan(parse_plan(dump_plan(found))) == dump_plan(found)
    assert peak(found) <= found.memory_limit_bytes


# -- memory


@pytest.mark.parametrize(
    ("which", "pins"),
    [
        ("plain", ("tp=2", "offload=none")),
        pytest.param("plain", ("offload=none",), marks=pytest.mark.nightly),
        pytest.param("plain", ("offload=none", "pp=2"), marks=pytest.mark.nightly),
        pytest.param("attending", ("offload=none",), marks=pytest.mark.nightly),
        pytest.param("attending", ("offload=none", "pp=2"), marks=pytest.mark.nightly),
    ],
)
def test_no_faster_plan_needs_less_memory(which: str, pins: tuple[str, ...]) -> None:
    least = plan("memory", None, *pins, which=which)
    check(least)
    assert least.objective == "memory"
    assert least.goal is not None
    assert least.goal.least_bytes is not None
    assert 0 < least.goal.least_bytes <= peak(least)
    top = fastest(4, which, *pins)
    assert peak(least) <= peak(top)
    assert least.goal.least_bytes <= peak(top)
    assert least.predicted.step_seconds >= top.search.bound_seconds
    for share in (0.0, 0.3, 0.7):
        limit = math.ceil(peak(least) + share * (peak(top) - peak(least)))
        between = search_joint(
            model(which), cluster(), Prices(cluster(), "bfloat16"),
            request(model(which), "throughput", *pins, limit=limit),
        )  # fmt: skip
        assert between is not None
        assert least.goal.least_bytes <= peak(between) <= limit
        if share == 0.0:
            assert peak(least) <= peak(between) * 1.02


@pytest.mark.parametrize("which", ["plain", pytest.param("attending", marks=pytest.mark.nightly)])
def test_nothing_fits_below_the_proven_bytes(which: str) -> None:
    least = plan("memory", None, "offload=none", "tp=2", which=which)
    assert least.goal is not None
    assert least.goal.least_bytes is not None
    asked = request(model(which), "throughput", "offload=none", "tp=2", limit=least.goal.least_bytes - 2)
    assert search_joint(model(which), cluster(), Prices(cluster(), "bfloat16"), asked) is None


def test_the_host_makes_it_less_and_a_limit_below_it_is_refused() -> None:
    found = plan("memory", None, "dp=4")
    assert peak(found) <= peak(plan("memory", None, "offload=none", "dp=4"))
    with pytest.raises(Infeasible, match="nothing fits"):
        plan("memory", limit=2**20)


# -- smaller clusters


def test_numbers_of_devices() -> None:
    assert device_counts(cluster("h100-sxm:8")) == (1, 2, 4, 8)
    assert device_counts(cluster("h100-sxm:8x3")) == (1, 2, 4, 8, 16, 24)
    assert device_counts(cluster("h100-sxm:6x1")) == (1, 2, 3, 6)
    found = device_counts(cluster("h100-sxm:8x40"))
    assert found[-1] == 320
    assert [n // 8 for n in found if n >= 8] == [*range(1, 17), 18, 20, 22, 24, 26, 28, 30, 32, 36, 40]


@pytest.mark.parametrize("spec", ["h100-sxm:8x4", "h100-sxm:8x6@1600Gbps", "gb200:4x36", "a100-sxm-80gb:4"])
def test_a_smaller_cluster_is_that_of_its_own_string(spec: str) -> None:
    whole = cluster(spec)
    for devices in device_counts(whole):
        small = sized(whole, devices)
        again = parse_cluster(small.spec)
        assert (small.devices, small.per_node) == (devices, min(devices, whole.per_node))
        assert [(x.name, x.ranks, x.bytes_per_second) for x in small.levels if x.ranks > 1] == [
            (x.name, x.ranks, pytest.approx(x.bytes_per_second)) for x in again.levels if x.ranks > 1
        ]
        if small.host is not None and again.host is not None:
            assert small.host.rank_host_bytes == pytest.approx(again.host.rank_host_bytes, rel=1e-6)
        assert small.route(1, devices).size == devices


@pytest.mark.parametrize("devices", [0, 3, 12, 64])
def test_other_numbers_are_refused(devices: int) -> None:
    with pytest.raises(PinError, match=f"{devices} devices are neither"):
        sized(cluster("h100-sxm:8x4"), devices)


# -- devices


def seconds_by_count() -> dict[int, float]:
    return {n: fastest(n).predicted.step_seconds for n in device_counts(cluster())}


@pytest.mark.parametrize("slack", [0.8, 0.999, 1.0, 1.01, 1.5, 4.0])
def test_the_fewest_devices_meet_the_target_and_fewer_do_not(slack: float) -> None:
    known = seconds_by_count()
    for base in known.values():
        target = base * slack
        meeting = [n for n, seconds in known.items() if seconds <= target]
        if not meeting:
            with pytest.raises(Infeasible, match="no number of devices meets"):
                plan("devices", Aim(target_seconds=target))
            continue
        found = plan("devices", Aim(target_seconds=target))
        check(found)
        assert found.goal is not None
        assert found.cluster["devices"] == min(meeting)
        assert found.predicted.step_seconds <= target
        tried = {t.devices: t for t in found.goal.trials}
        assert list(tried) == [n for n in known if n <= min(meeting)]
        for n, trial in tried.items():
            assert trial.status == ("met" if n == min(meeting) else trial.status)
            assert trial.bound_seconds is not None
            assert trial.bound_seconds <= known[n] * (1 + 1e-9)


def test_a_target_in_tokens_is_the_same_target() -> None:
    seconds = fastest(2).predicted.step_seconds * 1.0001
    one = plan("devices", Aim(target_seconds=seconds))
    two = plan("devices", Aim(target_tokens_per_second=model().tokens / seconds))
    assert one.cluster["devices"] == two.cluster["devices"]
    assert one.goal is not None
    assert two.goal is not None
    assert two.goal.target_seconds == pytest.approx(one.goal.target_seconds)


def test_the_fewest_devices_that_fit() -> None:
    """On devices whose communicators take less than the model gains from a second one."""
    alone = peak(plan("memory", None, "dp=1", "pp=1", "tp=1", "cp=1", "offload=none", spec="l4:1"))
    limit = alone - 2**24
    found = plan("devices", None, "offload=none", spec="l4:4", limit=limit)
    check(found)
    assert found.cluster["devices"] > 1
    assert found.goal is not None
    assert found.goal.trials[0].status == "does not fit"
    assert found.goal.target_seconds is None
    with pytest.raises(Infeasible, match="on none of 1, 2, 4 devices"):
        plan("devices", None, "offload=none", spec="l4:4", limit=2**20)


def test_pins_that_divide_no_number_are_named() -> None:
    with pytest.raises(PinError, match="no number of devices up to 4"):
        plan("devices", None, "tp=3")
    assert plan("devices", None, "tp=2").cluster["devices"] == 2


# -- cost


def test_the_cheapest_number_of_devices() -> None:
    rate = hourly_price(cluster(), Aim())
    known = {n: dollars(n, seconds, rate) for n, seconds in seconds_by_count().items()}
    found = plan("cost")
    check(found)
    assert found.goal is not None
    assert found.goal.dollars_per_step == pytest.approx(min(known.values()))
    assert known[found.cluster["devices"]] == pytest.approx(min(known.values()))
    assert [t.devices for t in found.goal.trials] == list(known)
    assert rate == pytest.approx(55.04 / 8)


def test_the_cheapest_that_meets_a_target() -> None:
    times = seconds_by_count()
    target = min(times.values()) * 1.001
    found = plan("cost", Aim(target_seconds=target, price_per_device_hour=2.0))
    cheapest = min(dollars(n, s, 2.0) for n, s in times.items() if s <= target)
    assert found.goal is not None
    assert found.goal.dollars_per_step == pytest.approx(cheapest)
    assert found.predicted.step_seconds <= target
    assert found.goal.price_per_device_hour == 2.0


def test_a_price_must_be_known() -> None:
    bare = replace(cluster(), host=None)
    with pytest.raises(PinError, match="no list price of h100-sxm is known"):
        hourly_price(bare, Aim())
    assert hourly_price(bare, Aim(price_per_device_hour=3.0)) == 3.0


# -- the frontier


@cache
def with_frontier() -> Plan:
    return plan("throughput", Aim(frontier=True))


def test_no_point_of_the_frontier_beats_another() -> None:
    best = [p for p in with_frontier().frontier if p.status == "best"]
    assert len(best) > 3
    for one in best:
        for other in best:
            if one is not other:
                assert (one.seconds, one.peak_bytes, one.devices) != (other.seconds, other.peak_bytes, other.devices)
                assert not (
                    one.seconds <= other.seconds and one.peak_bytes <= other.peak_bytes and one.devices <= other.devices
                )


def test_the_frontier_holds_the_fastest_plan_and_smaller_clusters() -> None:
    found = with_frontier()
    check(found)
    own = point_of(found)
    whole = [p for p in found.frontier if p.devices == 4]
    assert min(p.seconds for p in whole) == pytest.approx(own.seconds)
    assert {p.devices for p in found.frontier if p.status == "best"} >= {1, 4}
    assert all(p.peak_bytes <= p.limit_bytes for p in found.frontier)
    for point in found.frontier:
        assert math.prod(n for name, n in point.mesh.items() if name != "ep") == point.devices
        if point.status == "runner-up":
            assert any(
                b.seconds <= point.seconds and b.peak_bytes <= point.peak_bytes and b.devices <= point.devices
                for b in found.frontier if b.status == "best"
            )  # fmt: skip
    assert dump_plan(msgspec.structs.replace(found, frontier=())) == dump_plan(plan("throughput"))


def test_parts_of_a_cluster_that_the_pins_do_not_fit_have_no_points() -> None:
    found = plan("throughput", Aim(frontier=True), "dp=4")
    assert {p.devices for p in found.frontier} == {4}
    own = point_of(found)
    assert min(p.seconds for p in found.frontier) == pytest.approx(own.seconds)


def test_points_are_ranked() -> None:
    def point(seconds: float, size: int, devices: int, **mesh: int) -> Point:
        return Point(seconds, size, devices, mesh)

    one, two, three = point(1.0, 9, 4, dp=4), point(2.0, 5, 4, tp=4), point(2.0, 9, 2, dp=2)
    beaten, again, other = point(3.0, 9, 4, dp=4), point(1.0, 9, 4, pp=4), point(2.5, 9, 4, pp=2, dp=2)
    found = ranked([beaten, other, three, two, one, again])
    assert [p.seconds for p in found] == [1.0, 2.0, 2.0, 2.5]
    assert [p.status for p in found] == ["best", "best", "best", "runner-up"]
    assert ranked([one]) == (one,)


# -- what cannot be asked

WRONG: dict[str, tuple[str, Aim, str]] = {
    "objective": ("fame", Aim(), "objective=fame"),
    "phase": ("latency", Aim(phase="dream"), "phase=dream"),
    "phase of throughput": ("throughput", Aim(phase="decode"), "phase=decode needs the objective"),
    "target of throughput": (
        "throughput",
        Aim(target_seconds=1.0),
        "target-seconds needs the objective devices or cost",
    ),
    "target of memory": ("memory", Aim(target_tokens_per_second=1.0), "target-tokens-per-second needs"),
    "two targets": ("devices", Aim(target_seconds=1.0, target_tokens_per_second=1.0), "two ways"),
    "price of devices": ("devices", Aim(price_per_device_hour=1.0), "price-per-device-hour needs the objective cost"),
    "negative": ("devices", Aim(target_seconds=-1.0), "above zero"),
    "not a number": ("cost", Aim(price_per_device_hour=math.nan), "above zero"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_asked_is_named(case: str) -> None:
    objective, aim, named = WRONG[case]
    with pytest.raises(UsageError, match=named) as error:
        plan(objective, aim)
    assert error.value.exit_status == 2


@pytest.mark.parametrize(
    ("objective", "aim"),
    [("latency", Aim()), ("memory", Aim()), ("devices", Aim()), ("throughput", Aim(frontier=True))],
)
def test_plans_for_this_machine_are_the_fastest_ones(objective: str, aim: Aim) -> None:
    with pytest.raises(UsageError, match="named clusters"):
        settled(objective, aim, runnable=True)


def test_latency_decodes_unless_told_otherwise() -> None:
    assert settled("latency", Aim()).phase == "decode"
    assert settled("latency", Aim(phase="prefill")).phase == "prefill"


def test_prices_follow_the_cluster() -> None:
    small = sized(cluster(), 2)
    prices = priced_on(Prices(cluster(), "bfloat16"), small)
    assert isinstance(prices, Prices)
    assert prices.cluster is small


def test_the_page_says_what_was_sought() -> None:
    from shardwright.cli.goals import goal_text, point_rows, trial_rows
    from shardwright.cli.report.build import build
    from shardwright.cli.tables import headline, optimum_text

    few = plan("devices", Aim(target_seconds=fastest(2).predicted.step_seconds * 1.0001))
    assert "fewest devices with a step of at most" in headline(few)["objective"]
    assert len(trial_rows(few)) == len(few.goal.trials)  # type: ignore[union-attr]
    page = build(with_frontier())
    assert "Frontier: time, memory, devices" in page
    assert all(cell in page for row in point_rows(with_frontier()) for cell in row[:4])
    assert goal_text(with_frontier()) == ""
    lean = plan("memory", None, "dp=4", "offload=none")
    assert "no plan of the space needs less than" in goal_text(lean)
    assert "of those that need no more memory" in optimum_text(lean)
