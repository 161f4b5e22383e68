"""Every pass on one model: time, nodes, what it gains by price, and whether outputs and gradients stay what they were.

What is verified is a capture in float64 (checked.py), of models small enough to be run twice for every pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from ..errors import UsageError
from ..planner.prices import Prices
from ..planner.waterline import Waterline, waterline
from .base import Program, Record
from .capture import Captured, capture
from .checked import Verifying
from .choose import exact
from .cleanup import cleanup_passes, first_passes
from .fuse import PASSES
from .gain import Paying, as_priced
from .prepare import cast_inputs, in_dtype, other_dtypes
from .printing import listing
from .rewrite import rewritten
from .skeleton import skeleton, to_meta
from .summarize import summarize

MOST_ELEMENTS = 1 << 28
"""Elements of the values of one graph up to which it is run to be verified: 2 GiB in float64."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Review:
    """Records of the cleanup passes, those of the optional passes with their verdicts by price, what was found when the ones
    that stay were verified (by name: "" equal, else what changed; empty where nothing was run), and asked-for listings.

    `waterlines` are those before and after the optional passes that stay, where they were asked for.
    """

    cleanup: tuple[Record, ...]
    optional: tuple[Record, ...]
    verified: dict[str, str]
    unverified: str = ""
    listing: str = ""
    waterlines: tuple[Waterline, Waterline] | None = None


def known_passes() -> tuple[str, ...]:
    """Names of all passes in the order in which they run."""
    return tuple(dict.fromkeys(step.name for step in (*first_passes(), *cleanup_passes(), *PASSES.values())))


def review(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    prices: Prices,
    *,
    print_after: str | None = None,
    waterlines: bool = False,
    say: Say = lambda _: None,
) -> Review:
    """Run every pass on a capture of `model`; the gains are those under `prices`.

    `print_after` names the pass whose graph is listed. Raises UsageError for a pass that does not exist, CaptureError.
    """
    if print_after is not None and print_after not in known_passes():
        raise UsageError(f"there is no pass {print_after!r}; known: {', '.join(known_passes())}")
    seen: dict[str, str] = {}

    def after(name: str, program: Program) -> None:
        if name == print_after:
            seen[name] = listing(program.graph)

    say("capture")
    first = capture(model, args, kwargs, after=after)
    say("passes")
    second = rewritten(first, [PASSES[name] for name in exact()], weigh=Paying(prices), after=after)
    optional = second.records[len(first.records) :]
    stay = [r.name for r in optional if r.verdict is not None and r.verdict.stays]
    verified, reason = _verified(model, args, kwargs, stay, first, say)
    lines = (waterline_of(first, prices), waterline_of(second, prices)) if waterlines else None
    return Review(first.records, optional, verified, reason, seen.get(print_after or "", ""), lines)


def waterline_of(captured: Captured, prices: Prices) -> Waterline:
    """The waterline of a captured graph, whole on one device."""
    return waterline(*as_priced(summarize(captured).outline, prices))


def _verified(
    model: nn.Module, args: Any, kwargs: Any, names: list[str], known: Captured, say: Say
) -> tuple[dict[str, str], str]:  # fmt: skip
    """What verification found by pass; or why it was not done."""
    elements = sum(_elements(node) for node in known.graph.graph.nodes)
    if elements > MOST_ELEMENTS:
        return (
            {},
            f"{elements:.3g} elements in its graph, {MOST_ELEMENTS:.3g} are run here: give a smaller --batch or --seq",
        )
    if not names:
        return {}, ""
    say("verify")
    args, kwargs = to_meta(cast_inputs((args, kwargs), other_dtypes(model, "float64"), "float64"))
    captured = capture(in_dtype(skeleton(model), "float64"), args, kwargs, lift_float64=True)
    weigh = Verifying(captured.constants)
    found = rewritten(captured, [PASSES[name] for name in PASSES if name in names], weigh=weigh)
    own = found.records[len(captured.records) :]
    return {r.name: r.verdict.why for r in own if r.verdict is not None}, ""


def _elements(node: fx.Node) -> int:
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    return sum(int(v.numel()) for v in values if hasattr(v, "numel"))
