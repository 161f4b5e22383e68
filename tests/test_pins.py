"""Pins: every key parses, neutral values pass, others are refused by name, contradictions and what does not divide too."""

from __future__ import annotations

import msgspec
import plans
import pytest
from shardwright.errors import PinError, PlanError
from shardwright.planner.capability import MASK, check_pins, check_plan, executed_pins
from shardwright.planner.pins import KEYS, Pins, parse_pins
from shardwright.planner.schedules import SCHEDULES
from shardwright.planner.shapes import mesh_shapes, microbatch_counts

GOOD = {
    "tp": "2", "dp": "2", "pp": "1", "cp": "1", "ep": "1", "vpp": "1", "zero": "3", "micro_batch": "4", "recompute": "none",
    "sequence_parallel": "on", "schedule": "1f1b", "offload": "none", "dtype": "bf16", "precision": "fp32",
    "optimizer": "adamw", "attention": "flash", "kernels": "eager", "loss": "fused", "tp_overlap": "on",
    "passes": "gelu", "lowering": "torch", "update": "backward",
}  # fmt: skip


def test_every_key_of_the_command_line_parses() -> None:
    assert set(GOOD) == set(KEYS)
    for key, value in GOOD.items():
        assert parse_pins([f"{key}={value}"]).texts == (f"{key}={value}",)


def test_values_are_typed() -> None:
    pins = parse_pins(["tp=4", "zero=1", "sequence_parallel=off", "dtype=fp32", "micro_batch=2", "tp!=8"])
    assert (pins.tp, pins.zero, pins.sequence_parallel, pins.dtype, pins.micro_batch) == (4, 1, False, "fp32", 2)
    assert pins.forbids("tp", 8)
    assert not pins.forbids("tp", 4)


@pytest.mark.parametrize("text", ["attention=math", "kernels=fused", "loss=fused", "tp_overlap=on"])
def test_what_the_runtime_lacks_is_refused_by_name(text: str) -> None:
    with pytest.raises(PinError, match=f"{text} is not supported yet"):
        check_pins(parse_pins([text]))


def test_what_the_runtime_executes_can_be_pinned() -> None:
    check_pins(parse_pins(["pp=1", "cp=1", "ep=1", "vpp=1", "recompute=none", "offload=none", "schedule=1f1b"]))
    check_pins(
        parse_pins(["pp=2", "cp=2", "ep=2", "vpp=2", "recompute=full", "offload=params", "schedule=interleaved"])
    )


def test_what_is_not_executed_is_forbidden_to_a_search() -> None:
    played = {name for one in MASK if one.key == "schedule" for name in one.values}
    pins = executed_pins(parse_pins(["tp=2", "kernels=eager"]))
    assert {name for name in SCHEDULES if pins.forbids("schedule", name)} == SCHEDULES.keys() - played
    assert (pins.tp, pins.kernels, pins.attention, pins.schedule) == (2, "eager", "flash", None)


def with_(**changes: object) -> plans.p.Plan:
    """The hand-made plan with a changed pipeline."""
    return plans.plan(pipeline=msgspec.structs.replace(plans.plan().pipeline, **changes))


def with_regions(**changes: object) -> plans.p.Plan:
    return plans.plan(regions=tuple(msgspec.structs.replace(r, **changes) for r in plans.regions()))


def staged(words: tuple[str, ...], schedule: str) -> plans.p.Plan:
    """The hand-made plan with two stages, each with an offload."""
    pipeline = with_(ranks=2, stages=2, schedule=schedule).pipeline
    return msgspec.structs.replace(with_regions(offload=words), pipeline=pipeline)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (with_(chunks=2), "chunks of stages"),
        (with_(ranks=2, stages=2, schedule="forward"), "without backward passes.* pin schedule to .*1f1b"),
        (plans.plan(pools=(plans.p.PoolPlan("a", "x", 1, 1), plans.p.PoolPlan("b", "y", 1, 1))), "kinds of devices"),
        (staged(("params",), "1f1b"), "offload.*parameters off the device with ZeRO"),
        (staged(("optimizer",), "zb-h1"), "offload.*splits the backward pass"),
        (msgspec.structs.replace(plans.plan(), phase="decode"), "phase of inference"),
    ],
)
def test_a_plan_of_what_the_runtime_lacks_is_refused(plan: plans.p.Plan, says: str) -> None:
    with pytest.raises(PlanError, match=f"the plan uses .*{says}"):
        check_plan(plan)


def test_what_runs_passes() -> None:
    check_plan(plans.plan())
    check_plan(with_regions(recompute=("gelu",)))
    check_plan(with_regions(offload=("optimizer",)))
    check_plan(with_regions(offload=("optimizer/3@disk",)))
    check_plan(with_regions(offload=("activations",), recompute=("gelu",)))
    check_plan(staged(("optimizer", "activations"), "1f1b"))
    check_plan(with_(experts=2))
    check_plan(plans.plan(mesh=(plans.p.MeshAxis("cp", 4, "context", "nvlink"),)))
    for schedule in ("interleaved", "zb-h1", "zbv", "dualpipev"):
        check_plan(with_(ranks=2, stages=4, chunks=2, schedule=schedule))
    check_plan(with_(ranks=4, stages=4, schedule="gpipe"))
    assert {one.key for one in MASK} - {"phase", "pools", "chunks"} < set(KEYS)  # these are no pins


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tpp=2", "did you mean tp"), ("tp", "K=V"), ("tp=", "K=V"), ("tp=two", "number"), ("tp=0", "at least 1"),
        ("zero=4", "0, 1, 2, 3"), ("sequence_parallel=yes", "on or off"), ("dtype=bf17", "bf16"), ("optimizer=muon", "muon"),
        ("nonsense=1", "known:"), ("kernels=quick", "eager, fused"),
    ],
)  # fmt: skip
def test_bad_pins_name_what_was_expected(text: str, says: str) -> None:
    with pytest.raises(PinError, match=says):
        parse_pins([text])


@pytest.mark.parametrize("texts", [["tp=2", "tp=4"], ["zero=3", "zero!=3"], ["dtype=bf16", "dtype=fp32"]])
def test_contradictions_are_named(texts: list[str]) -> None:
    with pytest.raises(PinError, match="contradict"):
        parse_pins(texts)


def test_the_same_pin_twice_is_no_contradiction() -> None:
    assert parse_pins(["tp=2", "tp=2"]).tp == 2


def test_a_forbidden_default_is_named() -> None:
    with pytest.raises(PinError, match="optimizer!=adamw"):
        parse_pins(["optimizer!=adamw"]).check("optimizer", "adamw")


def test_mesh_shapes_are_all_factorisations_or_the_pinned_one() -> None:
    assert mesh_shapes(Pins(), 8, 8) == ((8, 1), (4, 2), (2, 4), (1, 8))
    assert mesh_shapes(parse_pins(["tp=2"]), 8, 8) == ((4, 2),)
    assert mesh_shapes(parse_pins(["dp=2"]), 8, 8) == ((2, 4),)
    assert mesh_shapes(parse_pins(["tp!=8", "dp!=8"]), 8, 8) == ((4, 2), (2, 4))
    assert mesh_shapes(parse_pins(["sequence_parallel=on"]), 4, 8) == ((2, 2), (1, 4))
    assert mesh_shapes(Pins(), 8, 2) == ((2, 4), (1, 8))  # a data axis divides the batch


@pytest.mark.parametrize(
    ("texts", "devices", "batch", "says"),
    [
        (["tp=3"], 4, 8, "tp=3 does not divide"), (["dp=4", "tp=4"], 8, 8, "needs 16 devices"), (["dp=4"], 4, 6, "batch of 6"),
        (["sequence_parallel=on", "tp=1"], 4, 8, "needs a model axis"), (["tp!=1"], 1, 8, "leave no shape"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_named(texts: list[str], devices: int, batch: int, says: str) -> None:
    with pytest.raises(PinError, match=says):
        mesh_shapes(parse_pins(texts), devices, batch)


def test_microbatches() -> None:
    assert microbatch_counts(Pins(), 8, 2, ()) == (1, 2, 4)
    assert microbatch_counts(parse_pins(["micro_batch=1"]), 8, 2, ()) == (4,)
    assert microbatch_counts(parse_pins(["micro_batch!=4"]), 8, 2, ()) == (2, 4)
    assert microbatch_counts(Pins(), 8, 2, ("bn couples samples",)) == (1,)
    with pytest.raises(PinError, match="micro_batch=3"):
        microbatch_counts(parse_pins(["micro_batch=3"]), 8, 2, ())
    with pytest.raises(PinError, match="bn couples samples"):
        microbatch_counts(parse_pins(["micro_batch=1"]), 8, 2, ("bn couples samples",))


def test_plans_with_context_and_expert_axes_are_executed() -> None:
    check_plan(with_(experts=2))
    check_plan(plans.plan(mesh=(plans.p.MeshAxis("cp", 4, "context", "nvlink"),)))
