"""Which optional passes run on a captured graph: those a plan lists, those a pin names, or those that pay.

passes=auto      every EXACT pass that pays by price (passes/gain.py), or lowers the peak for nothing (passes/roomier.py);
                 `passes!=NAME` leaves one out
passes=none      none
passes=a,b       these, whether they pay or not
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import PinError, PlanError
from ..planner.pins import Pins
from ..planner.plan import PassPlan, Plan
from ..planner.prices import Prices
from .base import Record
from .capture import Captured
from .fuse import PASSES
from .gain import Paying
from .observe import Observer
from .rewrite import rewritten
from .roomier import Roomier


@dataclass(frozen=True)
class Choice:
    """Names of passes, in any order. With `prices` one that does not pay is left out, or with `forced` only priced."""

    names: tuple[str, ...] = ()
    prices: Prices | None = None
    forced: bool = False


NONE = Choice()


def asked(pins: Pins, prices: Prices) -> Choice:
    """What the pins say; raises PinError for a pass that does not exist."""
    text = pins.passes or DEFAULT
    left_out = {str(value) for key, value in pins.forbidden if key == "passes"}
    names = () if text == "none" else exact() if text == "auto" else tuple(text.split(","))
    for name in (*names, *left_out):
        if name not in PASSES:
            close = difflib.get_close_matches(name, PASSES, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(PASSES)}"
            raise PinError(f"passes={name}: there is no pass of this name; {hint}")
    return Choice(tuple(n for n in names if n not in left_out), prices, forced=text not in ("auto", "none"))


def exact() -> tuple[str, ...]:
    """The passes that leave the function what it is: those that nobody has to ask for."""
    return tuple(name for name, step in PASSES.items() if step.semantics == "EXACT")


def semantics(plan: Plan) -> str:
    """The class of a plan with the passes that it lists: theirs, where it is EXACT otherwise."""
    classes = [plan.semantics, *(PASSES[one.name].semantics for one in plan.passes)]
    return next((c for c in classes if c != "EXACT"), "EXACT")


DEFAULT = "auto"
"""Without a pin."""


def listed(plan: Plan, *, outputs: bool = False) -> Choice:
    """The passes that a plan lists; with `outputs` those that leave all outputs of the graph.

    Raises PlanError for a pass that does not exist.
    """
    for i, one in enumerate(plan.passes):
        if one.name not in PASSES:
            raise PlanError(f"passes[{i}].name: there is no pass {one.name!r}; known: {', '.join(PASSES)}")
    return Choice(tuple(one.name for one in plan.passes if not (outputs and PASSES[one.name].drops_outputs)))


def run(captured: Captured, choice: Choice, observer: Observer | None = None) -> Captured:
    """The graph after the chosen passes; raises PinError where a forced pass finds nothing to rewrite."""
    if not choice.names:
        return captured
    weigh = None
    if choice.prices is not None:
        paying = Paying(choice.prices, keep=choice.forced, observer=observer or Observer())
        weigh = Roomier(paying, slower=0.0)
    found = rewritten(captured, [PASSES[name] for name in PASSES if name in choice.names], weigh=weigh)
    if choice.forced:
        idle = [r.name for r in _own(found) if r.verdict is None]
        if idle:
            raise PinError(f"passes={idle[0]}: it finds nothing to rewrite in this model; leave it out")
    return found


def chosen(captured: Captured) -> tuple[PassPlan, ...]:
    """What stayed of the passes that were weighed, with what each gains."""
    return tuple(
        PassPlan(r.name, r.verdict.seconds or 0.0, r.verdict.saved_bytes or 0.0)
        for r in _own(captured)
        if r.verdict is not None and r.verdict.stays
    )


def _own(captured: Captured) -> Iterable[Record]:
    return [r for r in captured.records if r.name in PASSES]
