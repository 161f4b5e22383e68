"""What a little more is worth: the question of a plan asked again with more memory, a faster link, one more node."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...again import asked_again
from ...errors import ShardwrightError
from ...planner.cluster import Cluster
from ...planner.plan import Plan
from ..figures import change_text, seconds_text

if TYPE_CHECKING:
    from ...job import Say

GIB = 2**30


def changes(plan: Plan) -> list[tuple[str, dict[str, str]]]:
    """(name, what is changed): 1 GiB more and less per device, twice and half the outermost link, one more node."""
    cluster, limit = Cluster.from_dict(plan.cluster), plan.memory_limit_bytes
    found = [("1 GiB more a device", {"memory": str(limit + GIB)})]
    if limit > GIB:
        found.append(("1 GiB less a device", {"memory": str(limit - GIB)}))
    if cluster.levels and not cluster.pools:
        found += [("twice the outermost link", {"link": "2"}), ("half the outermost link", {"link": "0.5"})]
    if cluster.devices >= cluster.per_node:
        found.append(("one more node", {"devices": str(cluster.devices + cluster.per_node)}))
    return found


def worth(plan: Plan, say: Say, store: Path | None = None) -> dict[str, Any]:
    """The chart of what each change is worth: relative change of throughput, and the step it comes to or why there is none."""
    rows: list[list[Any]] = []
    before = plan.source.batch / plan.predicted.step_seconds
    for name, change in changes(plan):
        say(f"what is worth: {name}")
        try:
            fresh = asked_again(plan, change, store=store)
        except ShardwrightError as error:
            rows.append([name, None, str(error).splitlines()[0]])
            continue
        gain = fresh.source.batch / fresh.predicted.step_seconds / before - 1
        told = f"{change_text(gain)} samples a second, step {seconds_text(fresh.predicted.step_seconds)}"
        rows.append([name, round(100 * gain, 3), told])
    return {"rows": rows}
