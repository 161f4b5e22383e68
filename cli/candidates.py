"""The record of a search as rows of text: the best shapes, what came close, and how many more there are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..planner.cluster import Cluster, pool_names
from ..planner.plan import Plan, ShapeRecord
from .figures import bytes_text, seconds_text

MOST_ROWS = 12
MOST_SOLVED = 8
"""Rows of a short table, and how many of them are solved shapes where others were cut."""

_COLUMNS = ("mesh", "schedule", "microbatches", "bound", "step", "peak", "outcome")
_PLURAL = {"does not fit": "do not fit"}
NUMBERS = frozenset(("microbatches", "bound", "step", "peak"))
"""Columns that hold numbers."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Columns in use, a row of cells per shape, the rows that a short table leaves out, and a line that counts those."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    rest: tuple[tuple[str, ...], ...] = ()
    more: str = ""


def searched(plan: Plan) -> Candidates:
    """The shapes of the search, best first, the plan's own called "chosen"; those without figures share a line per mesh."""
    solved = sorted((r for r in plan.search.shapes if r.step_seconds is not None), key=lambda r: r.step_seconds or 0.0)
    open_ = sorted((r for r in plan.search.shapes if r.step_seconds is None), key=_bound)
    ordered = [*solved, *open_]
    picked = _picked(len(solved), len(open_))
    shown = [r for i, r in enumerate(ordered) if i in picked]
    rest = [r for i, r in enumerate(ordered) if i not in picked]
    columns = _used(ordered)
    return Candidates(columns, _rows(plan, shown, columns), _rows(plan, rest, columns), _more(rest))


def candidates(plan: Plan, records: Sequence[ShapeRecord]) -> Candidates:
    """Shapes of a list as they come."""
    columns = _used(records)
    return Candidates(columns, _rows(plan, records, columns))


def _bound(record: ShapeRecord) -> float:
    return record.bound_seconds if record.bound_seconds is not None else math.inf


def _picked(solved: int, others: int) -> set[int]:
    """Which rows of the ordered list a short table shows: the first of both kinds."""
    first = min(solved, max(MOST_SOLVED, MOST_ROWS - others))
    return {*range(first), *range(solved, solved + min(others, MOST_ROWS - first))}


def _more(rest: Sequence[ShapeRecord]) -> str:
    """ "41 more shapes: 7 solved, 34 cut"."""
    if not rest:
        return ""
    counted = Counter(r.status for r in rest)
    by_status = ", ".join(
        f"{count} {_PLURAL.get(status, status) if count > 1 else status}" for status, count in counted.items()
    )
    return f"{len(rest)} more {'shape' if len(rest) == 1 else 'shapes'}: {by_status}"


def _used(records: Sequence[ShapeRecord]) -> tuple[str, ...]:
    drop = set()
    if all(r.schedule == "none" for r in records):
        drop.add("schedule")
    if all(r.peak_bytes is None for r in records):
        drop.add("peak")
    return tuple(name for name in _COLUMNS if name not in drop)


def _rows(plan: Plan, records: Sequence[ShapeRecord], columns: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    rows: list[dict[str, str]] = []
    bare: dict[tuple[str, ...], dict[str, str]] = {}
    for record in records:
        cells = _cells(record)
        if any(cells[name] for name in ("bound", "step", "peak")):
            rows.append(cells | {"outcome": "chosen"} if is_own(plan, record) else cells)
            continue
        key = tuple(cells[name] for name in ("mesh", "schedule", "outcome"))
        if key in bare:
            bare[key]["microbatches"] += f", {cells['microbatches']}"
        else:
            bare[key] = cells
    return tuple(tuple(cells[name] for name in columns) for cells in [*rows, *bare.values()])


def is_own(plan: Plan, record: ShapeRecord) -> bool:
    """Whether a shape of the search is the one the plan was made of."""
    pipeline = plan.pipeline
    sizes = {"pp": pipeline.ranks, "ep": pipeline.experts} | {axis.name: axis.size for axis in plan.mesh}
    same = {k: v for k, v in sizes.items() if v > 1} == {k: v for k, v in record.mesh.items() if v > 1}
    size = record.micro_batch in (0, pipeline.micro_batch)
    kind = pipeline.ranks == 1 or (record.schedule, record.chunks) == (pipeline.schedule, pipeline.chunks)
    found = record.step_seconds is not None and record.microbatches == pipeline.microbatches
    return same and size and kind and found and record.pools == _pool_order(plan) and not plan.edited


def _pool_order(plan: Plan) -> tuple[int, ...]:
    if not plan.pools:
        return ()
    names = pool_names(Cluster.from_dict(plan.cluster))
    return tuple(names.index(pool.name) for pool in plan.pools)


def _pools(record: ShapeRecord) -> str:
    """ " (pools 2 1)": the order in which the pipeline meets pools of unlike devices."""
    return f" (pools {' '.join(str(p + 1) for p in record.pools)})" if record.pools else ""


def _cells(record: ShapeRecord) -> dict[str, str]:
    """A candidate as text: "4 of 16" are four microbatches of 16 samples, "zbv x 2" two chunks a rank."""
    count = str(record.microbatches)
    return {
        "mesh": " ".join(f"{name}={size}" for name, size in record.mesh.items()) + _pools(record),
        "schedule": "" if record.schedule == "none" else _schedule(record.schedule, record.chunks),
        "microbatches": f"{count} of {record.micro_batch}" if record.micro_batch else count,
        "bound": seconds_text(record.bound_seconds) if record.bound_seconds is not None else "",
        "step": seconds_text(record.step_seconds) if record.step_seconds is not None else "",
        "peak": bytes_text(record.peak_bytes) if record.peak_bytes is not None else "",
        "outcome": f"{record.status}: {record.reason}" if record.reason else record.status,
    }


def _schedule(name: str, chunks: int) -> str:
    return f"{name} x {chunks}" if chunks > 1 else name
