"""Plans that were changed by hand: held against their model, priced again, and checked against their memory limit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import PlanError
from ..planner.plan import Plan
from ..planner.planfile import digest

if TYPE_CHECKING:
    from ..job import Say
    from ..planner.cluster import Cluster
    from ..planner.outline import Outline
    from ..planner.prices import Prices
    from .tables import Teller


def is_stale(plan: Plan) -> bool:
    """Whether the figures of a loaded plan are older than its decisions: it was edited since it was priced."""
    return plan.edited and plan.digest != digest(plan)


def priced_again(plan: Plan, path: Path, tell: Teller) -> Plan:
    """The plan of file `path` as it is when nobody edited it, else with new figures and no certificate.

    Raises PlanError or PlanMismatch for an edit that is not legal, Infeasible for one that breaks the memory limit. A plan
    made from a live module cannot be rebuilt here: it is checked where it is applied.
    """
    if not is_stale(plan) or plan.source.kind == "module":
        return plan
    from ..planner.planmatch import check_results
    from ..planner.repricing import reprice

    tell.note(f"{path} was edited: pricing it again")
    outline, cluster, prices = captured(plan, tell)
    try:
        fresh = reprice(plan, outline, cluster, prices)
        check_results(plan, outline)
        return fresh
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def captured(plan: Plan, say: Say) -> tuple[Outline, Cluster, Prices]:
    """The model of a plan captured anew from its source, the plan's cluster, and the prices of the one on the other.

    Raises PlanMismatch or UsageError where the source is not there as it was."""
    from ..passes.choose import listed
    from ..passes.measure import measured_prices
    from ..passes.models import rebuild
    from ..passes.prepare import prepare, prepare_phase
    from ..planner.cluster import Cluster
    from ..planner.lowerings import under
    from ..profiles.store import default_path

    say("capture")
    loaded = rebuild(plan.source, device="meta")
    given = (loaded.model, loaded.args, loaded.kwargs, plan.precision.compute)
    choice = listed(plan)
    summary = prepare_phase(*given, plan.phase, choice=choice) if plan.phase else prepare(*given, choice=choice)
    say("prices")
    cluster = Cluster.from_dict(plan.cluster)
    prices = measured_prices(summary, cluster, plan.precision.compute, store=default_path())
    return summary.outline, cluster, under(prices, plan.lowerings)
