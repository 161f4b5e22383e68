"""The question that a plan answers, asked again with something changed: pins, batch, sequence, memory, devices, a link's speed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from .errors import PinError, UsageError
from .job import Clock, Job, Say
from .planner.cluster import Cluster
from .planner.fewer import sized
from .planner.goal import Aim
from .planner.pins import Pins, parse_pins
from .planner.plan import Plan, Precision, Source
from .planner.precision import choose_precision, inference_precision
from .profiles.devices import parse_bytes, parse_cluster

if TYPE_CHECKING:
    from .passes.models import Loaded

FIXED = ("throughput", "latency", "memory")
"""Objectives that are asked again as they are; the others came with a target that a plan does not keep."""


@dataclass(frozen=True)
class Question:
    """What is changed beside pins: source, cluster."""

    source: Source
    cluster: Cluster


def _number(key: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise UsageError(f"{key}={text}: expected a number of at least 1")
    return int(text)


def _batch(question: Question, text: str) -> Question:
    return replace(question, source=msgspec.structs.replace(question.source, batch=_number("batch", text)))


def _seq(question: Question, text: str) -> Question:
    if question.source.seq is None:
        raise UsageError(f"seq={text}: the plan's model has no sequence length")
    return replace(question, source=msgspec.structs.replace(question.source, seq=_number("seq", text)))


def _memory(question: Question, text: str) -> Question:
    return replace(question, cluster=replace(question.cluster, limit_bytes=parse_bytes(text)))


def _devices(question: Question, text: str) -> Question:
    return replace(question, cluster=with_devices(question.cluster, _number("devices", text)))


def _link(question: Question, text: str) -> Question:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)x?", text)
    if found is None or float(found[1]) <= 0 or question.cluster.pools:
        raise UsageError(
            f"link={text}: expected a factor on the outermost link, such as 2 or 0.5, of a cluster of one kind"
        )
    *inner, outer = question.cluster.levels
    faster = replace(outer, bytes_per_second=outer.bytes_per_second * float(found[1]))
    return replace(question, cluster=replace(question.cluster, levels=(*inner, faster), spec=""))


CHANGES: Mapping[str, Callable[[Question, str], Question]] = {
    "devices": _devices, "batch": _batch, "seq": _seq, "memory": _memory, "link": _link,
}  # fmt: skip
"""What can be changed beside pins: devices, global batch, sequence length, bytes per device, a factor on the outermost link."""


def check_change(key: str, value: str) -> None:
    """Raise PinError for what is neither a key of `CHANGES` nor a pin that can be read."""
    if key not in CHANGES:
        parse_pins([f"{key}={value}"])


def with_devices(cluster: Cluster, devices: int) -> Cluster:
    """The same cluster with so many devices: a divisor of a node, or whole nodes.

    Raises PinError for another number, UsageError where more are asked of a cluster that is no preset.
    """
    if devices <= cluster.devices:
        return sized(cluster, devices)
    match = re.fullmatch(r"([\w.-]+):(\d+)(?:x\d+)?(@.*)?", cluster.spec)
    if match is None or cluster.pools or cluster.spec.startswith("local"):
        raise UsageError(
            f"devices={devices}: {cluster.name} has {cluster.devices}; describe one with more and plan for that"
        )
    node = int(match[2])
    if devices % node:
        raise PinError(f"{devices} devices are no whole nodes of {node}")
    grown = parse_cluster(f"{match[1]}:{node}x{devices // node}{match[3] or ''}")
    return replace(grown, limit_bytes=cluster.limit_bytes)


def asked_again(
    plan: Plan, changes: Mapping[str, str], *, store: Path | None = None, say: Say | None = None
) -> Plan:  # fmt: skip
    """The plan for the same model, pins, precision and objective with `changes`: keys of `CHANGES`, or pins.

    A pin takes the place of the plan's own of that key. Raises UsageError for a plan whose model or objective cannot be had again,
    PinError for what is no pin, Infeasible where nothing fits.
    """
    if plan.objective not in FIXED:
        raise UsageError(
            f"a plan for the objective {plan.objective} does not say its target; ask `plan` with --objective {plan.objective}"
        )
    question = Question(plan.source, Cluster.from_dict(plan.cluster))
    pinned = list(plan.pins)
    for key, value in changes.items():
        if key in CHANGES:
            question = CHANGES[key](question, value)
        else:
            bare = key.removesuffix("!")
            pinned = [p for p in pinned if re.split("!?=", p)[0] != bare] + [f"{key}={value}"]
    pins, clock = parse_pins(pinned), Clock(say)
    with clock.phase("load"):
        loaded = _loaded(question.source)
    job = Job.create(
        loaded.model, loaded.args, loaded.kwargs, question.cluster, pins, _precision(plan, pins, changes, question.cluster),
        question.source,
        optimizer=plan.optimizer, objective=plan.objective, loss_fn=None, store=store, clock=clock,
        runnable=question.cluster.spec.startswith("local"), aim=Aim(phase=plan.phase),
    )  # fmt: skip
    return job.solve()


def _precision(plan: Plan, pins: Pins, changes: Mapping[str, str], cluster: Cluster) -> Precision:
    """The plan's own, unless a change is about it."""
    if not changes.keys() & {"precision", "dtype"}:
        return plan.precision
    chosen = choose_precision(cluster.device, recipe=pins.precision, dtype=pins.dtype)
    return inference_precision(chosen, pins.precision) if plan.phase else chosen


def _loaded(source: Source) -> Loaded:
    from .passes.models import rebuild

    return rebuild(source, device="meta")
