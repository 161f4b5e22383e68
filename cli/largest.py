"""`shardwright simulate PLAN --largest KEY`: the largest size with which the plan's question still has an answer.

A size has an answer where some plan fits. That what fits at one size fits at every smaller one is taken for granted (a plan of the
larger holds more of everything), so sizes between those tried are not asked; every size named as fitting was planned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CaptureError, UsageError

if TYPE_CHECKING:
    from ..planner.plan import Plan

FINE = 16
"""The answer is exact up to this part of it: sizes between are multiples of the power of two next below that."""
MOST_DOUBLINGS = 20

Row = dict[str, Any]


def answer_largest(plan: Plan, path: Path, key: str, as_json: bool) -> None:
    """Print the sizes that were tried, and the largest that fits."""
    from ..garbage import held_back, leave_unswept
    from .simulate import sweep_table
    from .tables import print_json, progress, show

    changes, start = growing(plan, key)
    leave_unswept()
    with held_back(), progress() as tell:

        def tried(size: int) -> Row:
            tell(f"{key}={size}")
            return {"size": size} | _asked(plan, changes(size), beyond=size > start)

        rows = sorted(search(start, tried), key=lambda row: row["size"])
    fits = [row for row in rows if "why" not in row]
    found = {"plan": str(path), "key": key, "largest": fits[-1]["size"] if fits else None, "points": rows}
    if as_json:
        print_json(found)
        return
    show(sweep_table(rows), "", sentence(key, rows))


def growing(plan: Plan, key: str) -> tuple[Callable[[int], dict[str, str]], int]:
    """What changes with a size of `key`, and the plan's own size. Raises UsageError where the plan's model has no such size."""
    if key == "seq":
        if plan.source.seq is None:
            raise UsageError("--largest seq: the plan's model has no sequence length")
        return lambda size: {"seq": str(size)}, plan.source.seq
    own = plan.pipeline.micro_batch
    times = plan.source.batch // own  # data-parallel ranks x microbatches stay
    return lambda size: {"batch": str(size * times), "micro_batch": str(size)}, own


def search(start: int, tried: Callable[[int], Row]) -> list[Row]:
    """Every size tried, from `start` on: doubled until one has a "why" that it does not fit, then halved between."""
    rows: list[Row] = []
    low, high, size = 0, 0, start
    while not high and len(rows) <= MOST_DOUBLINGS:
        rows.append(tried(size))
        low, high = (low, size) if "why" in rows[-1] else (size, 0)
        size *= 2
    while high - low > (grain := _grain(low)):
        size = max(low + grain, (low + high) // 2 // grain * grain)
        rows.append(tried(size))
        low, high = (low, size) if "why" in rows[-1] else (size, high)
    return rows


def _grain(low: int) -> int:
    """The difference below which sizes near `low` are not told apart."""
    return 1 << max(0, (low // FINE).bit_length() - 1)


def _asked(plan: Plan, changes: Mapping[str, str], *, beyond: bool) -> Row:
    """The plan with `changes` in figures, or why there is none; `beyond` its own size a model may refuse."""
    from .simulate import point

    try:
        return point(plan, changes)
    except (UsageError, CaptureError) as error:
        if not beyond:
            raise
        return {"changes": dict(changes), "why": str(error).splitlines()[0]}


def sentence(key: str, rows: Sequence[Row]) -> str:
    """The answer."""
    from .figures import bytes_text

    fits, fails = [r for r in rows if "why" not in r], [r for r in rows if "why" in r]
    if not fits:
        return f"No {key} has a plan."
    best = fits[-1]
    used = f"{bytes_text(best['peak_bytes_per_device'])} of {bytes_text(best['memory_limit_bytes'])} per device"
    told = f"Largest {key} that fits: {best['size']} ({used})"
    return f"{told}; {fails[0]['size']} does not." if fails else f"{told}; nothing larger was tried."
