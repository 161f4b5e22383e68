"""Planning again when another number of ranks runs than a plan was made for: torchrun started fewer, or more.

The model, the batch, the optimizer, the dtypes and the kind of machine stay. Pins stay as far as they can be met: those that say
into how many parts something is divided go first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import msgspec
from torch import nn

from ..errors import ClusterError, Infeasible, LaunchError, PinError
from ..job import Clock, Job
from ..planner.capability import check_pins
from ..planner.cluster import Cluster
from ..planner.fewer import sized
from ..planner.pins import parse_pins
from ..planner.plan import Plan
from ..profiles.devices import parse_cluster
from ..profiles.local import is_local_cpu
from ..profiles.store import default_path

DEGREES = ("dp", "micro_batch", "tp", "cp", "ep", "pp", "vpp", "schedule")
GIVEN_UP = (("dp",), ("dp", "micro_batch"), DEGREES, (*DEGREES, "zero", "sequence_parallel"))
"""Pins that are given up, one set after the other: what one rank alone cannot do goes last."""


def plan_for_world(
    plan: Plan, world: int, model: nn.Module, args: Any, kwargs: Any, loss_fn: Callable[..., Any] | None = None
) -> Plan:
    """The plan of the same model (its parameters may be on meta) and batch for `world` ranks; its last note says what it is.

    Raises LaunchError, naming the reason, where no plan for so many ranks exists.
    """
    cluster = cluster_for_world(Cluster.from_dict(plan.cluster), world)
    problems: list[str] = []
    for pins in _fewer_pins(plan.pins):
        try:
            parsed = parse_pins(pins)
            check_pins(parsed)
            job = Job.create(
                model, args, kwargs, cluster, parsed, plan.precision, plan.source, optimizer=plan.optimizer,
                objective="throughput", loss_fn=loss_fn, store=default_path(), clock=Clock(), runnable=True,
            )  # fmt: skip
            made = job.solve()
        except (PinError, Infeasible) as error:
            problems.append(str(error))
            continue
        dropped = [pin for pin in plan.pins if pin not in pins]
        note = f"made for {world} ranks from a plan for {plan.ranks}" + (
            f", without the pins {' '.join(dropped)}" if dropped else ""
        )
        return msgspec.structs.replace(made, notes=(*made.notes, note))
    raise LaunchError(
        f"no plan for the {world} ranks that run (the given one is for {plan.ranks}): {problems[-1]}; "
        "start another number of ranks"
    )


def cluster_for_world(cluster: Cluster, world: int) -> Cluster:
    """The same kind of machine with `world` devices; raises LaunchError where that is not known.

    This machine is looked up (or measured) again. A preset may grow and shrink; a cluster from a file only shrinks, by whole nodes
    or to a part of one.
    """
    try:
        return replace(_resized(cluster, world), limit_bytes=cluster.limit_bytes)
    except (ClusterError, PinError) as error:
        raise LaunchError(f"{cluster.name} with {world} ranks in place of {cluster.devices}: {error}") from None


def _resized(cluster: Cluster, world: int) -> Cluster:
    if is_local_cpu(cluster):
        return parse_cluster(f"local-cpu:{world}", cache=default_path())
    preset = re.fullmatch(r"(?P<name>[\w.-]+)(?::\d+(?:x\d+)?)?(?P<rate>@.*)?", cluster.spec)
    if preset is None or cluster.spec.endswith(".toml") or cluster.pools:
        return sized(cluster, world)
    if preset["name"] == "local":
        return parse_cluster(f"local:{world}", cache=default_path())
    if world <= cluster.per_node:
        return parse_cluster(f"{preset['name']}:{world}")
    if world % cluster.per_node:
        raise ClusterError(f"not a whole number of nodes of {cluster.per_node}")
    return parse_cluster(f"{preset['name']}:{cluster.per_node}x{world // cluster.per_node}{preset['rate'] or ''}")


def _fewer_pins(pins: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """All pins, then ever fewer; nothing is tried twice."""
    before = None
    for given_up in ((), *GIVEN_UP):
        kept = tuple(pin for pin in pins if re.split("!?=", pin)[0] not in given_up)
        if kept != before:
            yield kept
        before = kept
