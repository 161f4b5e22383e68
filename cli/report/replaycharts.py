"""What the charts of a replayed step draw (planner/simulate.py): lanes over time and bytes over time, small enough for a page.

Ranks that do the same share rows. Where there are more tasks than a page should hold, neighbours on a lane that do the same
become one block with their count, then the middle of every lane does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ...planner.simulate import Task
from ...planner.spans import SEND, WAITING, Span
from ..figures import bytes_text, percent_text, seconds_text, time_text

MOST_TASKS = 2500
"""Blocks of the timeline."""

MOST_RANKS = 16
"""Pipeline ranks of the timeline; of more, evenly spaced ones are shown with the first and the last."""

MOST_POINTS = 400
"""Moments of a curve of bytes; of more, each keeps the most of its neighbours."""

KINDS: Mapping[str, str] = {
    "F": "forward", "B": "backward", "I": "backward of inputs", "W": "backward of weights", "finish": "end of the step",
    SEND: "handing on", "many": "many, in turn",
}  # fmt: skip
"""What is drawn of an action is called in the legend; the rest by its cause."""

EVERY = "every device"

Chart = dict[str, Any]
Block = tuple[float, float, str, int]
"""(start, end, kind, how many tasks)."""


def timeline_chart(
    tasks: Sequence[Sequence[Task]], seconds: float, alike: int = 1, spans: Sequence[Sequence[Span]] = ()
) -> Chart:
    """Lanes of the ranks of a pipeline over a step of `seconds`; each rank stands for `alike` devices that do the same.

    What `tasks` consist of is drawn where a page can hold it: `spans`, also by rank.
    """
    shown = _spread(len(tasks), MOST_RANKS)
    own = [tasks[rank] for rank in shown]
    groups = _same(own)
    labels = [_label([shown[i] for i in members]) if len(tasks) > 1 else EVERY for members in groups]
    lanes = _drawn([spans[shown[g[0]]] for g in groups], labels) if spans else []
    divided, merged = 0 < _count(lanes) <= MOST_TASKS, False
    if not divided:
        lanes = _drawn([own[g[0]] for g in groups], labels)
        merged = _count(lanes) > MOST_TASKS
    if merged:
        lanes = [(name, joined(blocks)) for name, blocks in lanes]
    if _count(lanes) > MOST_TASKS:
        lanes = [(name, folded(blocks, MOST_TASKS // len(lanes))) for name, blocks in lanes]
    kinds = list(dict.fromkeys(block[2] for _, blocks in lanes for block in blocks))
    waits = []
    for label, members in zip(labels, groups, strict=True):
        busy = sum(t.seconds for t in own[members[0]] if t.lane == "compute")
        waits.append([label, str(alike * len(members)), seconds_text(busy), percent_text(max(0.0, 1 - busy / seconds))])
    return {
        "seconds": seconds,
        "rows": [name for name, _ in lanes],
        "kinds": [KINDS.get(kind) or time_text(kind) for kind in kinds],
        "tasks": [
            [_short(start), _short(end), row, kinds.index(kind), count]
            for row, (_, blocks) in enumerate(lanes)
            for start, end, kind, count in blocks
        ],
        "waits": waits,
        "divided": divided,
        "merged": merged,
        "left": len(tasks) - len(shown),
    }


def _drawn(ranks: Sequence[Sequence[Task | Span]], labels: Sequence[str]) -> list[tuple[str, list[Block]]]:
    """The lanes of ranks, one after the other; waiting is what is left empty."""
    return [
        (lane if label == EVERY else f"{label}, {lane}", [_block(t) for t in own if _lane(t) == lane])
        for own, label in zip(ranks, labels, strict=True)
        for lane in _lanes(own) if lane != WAITING
    ]  # fmt: skip


def _count(lanes: Sequence[tuple[str, list[Block]]]) -> int:
    return sum(len(blocks) for _, blocks in lanes)


def memory_chart(curves: Sequence[Chart], limit: int) -> Chart:
    """Bytes over time: each curve has a `name`, its `seconds`, and `causes` (name, bytes at each of them)."""
    found = []
    for curve in curves:
        at, causes = _thinned(curve["seconds"], curve["causes"])
        total = [sum(values) for values in zip(*causes.values(), strict=True)]
        peak = max(range(len(total)), key=total.__getitem__) if total else 0
        found.append({
            "name": curve["name"], "seconds": [_short(x) for x in at], "peak": at[peak] if at else 0.0,
            "causes": [[name, [round(v) for v in values]] for name, values in causes.items() if any(values)],
            "peakText": f"peak {bytes_text(total[peak])}" if total else "",
        })  # fmt: skip
    return {"curves": found, "limit": limit} if found else {}


def joined(blocks: Sequence[Block]) -> list[Block]:
    """Blocks in order of start, those of one kind that follow each other without a gap as one."""
    found: list[Block] = []
    for start, end, kind, count in sorted(blocks):
        if found and found[-1][2] == kind and start - found[-1][1] <= 1e-9 + 1e-3 * (end - start):
            found[-1] = (found[-1][0], max(end, found[-1][1]), kind, found[-1][3] + count)
        else:
            found.append((start, end, kind, count))
    return found


def folded(blocks: Sequence[Block], most: int) -> list[Block]:
    """At most `most` blocks: the first and the last ones as they are, and one in their middle that counts the others."""
    half = max((most - 1) // 2, 1)
    if len(blocks) <= 2 * half + 1:
        return list(blocks)
    middle = blocks[half : len(blocks) - half]
    count = sum(block[3] for block in middle)
    return [*blocks[:half], (middle[0][0], middle[-1][1], "many", count), *blocks[-half:]]


def _short(seconds: float) -> float:
    """Six digits, so that a page stays small."""
    return float(f"{seconds:.6g}")


def _spread(count: int, most: int) -> list[int]:
    """All of `count`, or `most` of them from first to last."""
    return list(range(count)) if count <= most else sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _same(tasks: Sequence[Sequence[Task]]) -> list[list[int]]:
    """Ranks by what their lanes do when."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for rank, own in enumerate(tasks):
        key = tuple((_lane(t), _kind(t), round(t.start, 9), round(t.end, 9)) for t in own)
        groups.setdefault(key, []).append(rank)
    return list(groups.values())


def _label(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _lanes(own: Sequence[Task | Span]) -> list[str]:
    return sorted({_lane(t) for t in own}, key=lambda lane: (lane != "compute", lane))


def _lane(one: Task | Span) -> str:
    """Where it is drawn: what goes to another rank on the lane of the pipeline, also of a task."""
    return "pp" if one.lane.startswith(f"{SEND} ") else one.lane


def _kind(one: Task | Span) -> str:
    cause = one.cause if isinstance(one, Span) else SEND if _lane(one) == "pp" else one.lane
    if cause != "compute":
        return cause
    return "finish" if one.microbatch < 0 else next(letter for letter in one.name if letter in "FBIW")


def _block(one: Task | Span) -> Block:
    return one.start, one.end, _kind(one), 1


def _thinned(
    seconds: Sequence[float], causes: Mapping[str, Sequence[float]]
) -> tuple[list[float], dict[str, list[float]]]:  # fmt: skip
    """At most `MOST_POINTS` moments: of every group of neighbours the one with most bytes."""
    count = len(seconds)
    if count <= MOST_POINTS:
        return list(seconds), {name: list(values) for name, values in causes.items()}
    total = [sum(values) for values in zip(*causes.values(), strict=True)]
    edges = [round(i * count / MOST_POINTS) for i in range(MOST_POINTS + 1)]
    kept = [max(range(a, b), key=total.__getitem__) for a, b in pairwise(edges)]
    kept[-1] = kept[-1] if total[kept[-1]] == max(total) else count - 1
    return [seconds[i] for i in kept], {name: [values[i] for i in kept] for name, values in causes.items()}
