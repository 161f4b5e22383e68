"""The joint search under limits that nothing fits: what it names instead suffices."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from jointplans import (
    ask,
    check,
    cluster,
    plan_with,
    small,
)
from shardwright.errors import Infeasible
from shardwright.planner.objectives import least_memory
from shardwright.planner.prices import Prices
from shardwright.planner.rebatch import rebatch
from shardwright.planner.repricing import reprice
from shardwright.planner.solve import solve
from shardwright.profiles.devices import parse_bytes


def test_the_memory_that_is_named_suffices() -> None:
    with pytest.raises(Infeasible, match="nothing fits in") as error:
        plan_with(small(), limit=2**20, spec="h100-sxm:2")
    named = [re.search(r"devices with (\d+[MG]iB)", text) for text in error.value.nearest]
    limit = next(parse_bytes(found[1]) for found in named if found)
    check(plan_with(small(), limit=limit, spec="h100-sxm:2"), small())


def test_the_memory_that_is_named_suffices_beside_a_small_host() -> None:
    found = cluster("h100-sxm:2")
    assert found.host is not None
    found = replace(found, host=replace(found.host, host_bytes=2**21))
    request, prices = ask(small(), spec="h100-sxm:2", limit=2**20), Prices(found, "bfloat16")
    with pytest.raises(Infeasible) as error:
        solve(small(), found, prices, request)
    named = [re.search(r"devices with (\d+[MG]iB)", text) for text in error.value.nearest]
    limit = next(parse_bytes(size[1]) for size in named if size)
    check(solve(small(), found, prices, replace(request, memory_limit_bytes=limit)), small())


def test_an_edit_that_overfills_the_host_is_refused() -> None:
    plan, found = plan_with(small(), "offload=optimizer", spec="h100-sxm:2"), cluster("h100-sxm:2")
    assert found.host is not None
    tiny = replace(found, host=replace(found.host, host_bytes=2**10))
    with pytest.raises(Infeasible, match="host memory"):
        reprice(plan, small(), tiny, Prices(tiny, "bfloat16"))


def test_the_pins_and_batch_that_are_named_are_in_the_way() -> None:
    spec, pins = "h100-sxm:2", ("zero=0", "dp=2", "micro_batch=2", "recompute=none", "offload=none")
    prices = Prices(cluster(spec), "bfloat16")
    least = least_memory(small(), cluster(spec), prices, ask(small(), *pins[1:], spec=spec))
    assert least is not None
    limit = least.predicted.peak_bytes_per_device
    with pytest.raises(Infeasible) as error:
        plan_with(small(), *pins, limit=limit, spec=spec)
    without = [text.removeprefix("without --pin ") for text in error.value.nearest if text.startswith("without")]
    assert "zero=0" in without
    for pin in without:
        check(plan_with(small(), *(p for p in pins if p != pin), limit=limit, spec=spec), small())
    for text in error.value.nearest:
        if text.startswith("--batch"):
            fewer = rebatch(small(), int(text.split()[1]))
            check(plan_with(fewer, *pins, limit=limit, spec=spec), fewer)
