"""How far predictions for published runs (published.py) are from what was measured, by set.

Errors are |predicted / measured - 1| of the step time. "scaled" is after one factor per (source, device, stack), the median of
measured / predicted, as a user calibrates it. Inside ablation groups, rows of one model and length are ranked by tokens a second
and device (rows that state what no pin can say are left out, equal configurations are one row): Spearman's rank correlation, and
the top-1 regret (what the best predicted row loses against the best measured one).
A single-knob pair is two rows of a group that differ in one setting (devices left over go to dp); its sign is right where the
faster one was predicted faster; pairs measured less than 3 % apart are left out.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from published import Priced

EFFECT = 0.03
"""Pairs measured nearer than this are ties."""

LEAST_RANKED = 3
"""Rows that a group needs for a ranking."""


def tables(priced: Sequence[Priced]) -> dict[str, Any]:
    """Everything the script prints, by set and for all sets: plain values."""
    groups: dict[str, list[Priced]] = defaultdict(list)
    for one in priced:
        groups[one.set].append(one)
    found = {name: _figures(rows) for name, rows in groups.items()}
    grade_a = [p for p in priced if p.run.reliability == "A"]
    return {
        "sets": {**found, "all of reliability A": _figures(grade_a), "all": _figures(priced)},
        "refused": Counter(f"{p.set}: {p.error}" for p in priced if p.status == "refused"),
    }


def _figures(rows: Sequence[Priced]) -> dict[str, Any]:
    timed = [p for p in rows if p.status == "priced" and p.run.measured_seconds and p.run.sound]
    ratios = [p.predicted_seconds / p.run.measured_seconds for p in timed]
    scaled = [r for _, r in _calibrated(timed)]
    inside = [p.low_seconds <= p.run.measured_seconds <= p.high_seconds for p in timed]
    return {
        "rows": len(rows),
        "timed": len(timed),
        "median ratio": _median(ratios),
        "median error": _median([abs(r - 1) for r in ratios]),
        "90th percentile": _percentile([abs(r - 1) for r in ratios], 0.9),
        "scaled median error": _median([abs(r - 1) for r in scaled]),
        "coverage": sum(inside) / len(inside) if inside else None,
        **_ranking(timed),
        **_signs(timed),
        **_memory(rows),
        **_labels(rows),
    }


def _calibrated(timed: Sequence[Priced]) -> list[tuple[Priced, float]]:
    """Ratios after one factor per (source, device, stack)."""
    groups: dict[tuple[str, ...], list[Priced]] = defaultdict(list)
    for p in timed:
        groups[p.run.stack].append(p)
    found = []
    for members in groups.values():
        factor = statistics.median(p.run.measured_seconds / p.predicted_seconds for p in members)
        found += [(p, factor * p.predicted_seconds / p.run.measured_seconds) for p in members]
    return found


def _rate(p: Priced, seconds: float) -> float:
    """Tokens a second and device."""
    return p.run.batch * p.run.seq / seconds / p.run.devices


def _ablations(timed: Iterable[Priced]) -> list[list[Priced]]:
    """Rows of one group, model and length, by group, as far as pins express them; equal configurations are one, at their median."""
    found: dict[tuple[str, str], dict[tuple[Any, ...], list[Priced]]] = defaultdict(lambda: defaultdict(list))
    for p in timed:
        if not p.run.chosen:
            for name in p.run.groups:
                found[name, p.run.model][*p.run.case, p.run.pins].append(p)
    return [[_median_run(alike) for alike in group.values()] for group in found.values()]


def _median_run(alike: Sequence[Priced]) -> Priced:
    return sorted(alike, key=lambda p: p.run.measured_seconds)[(len(alike) - 1) // 2]


def _ranking(timed: Sequence[Priced]) -> dict[str, Any]:
    ranks, regrets, sizes = [], [], []
    for rows in _ablations(timed):
        truth = [_rate(p, p.run.measured_seconds) for p in rows]
        if len(rows) < LEAST_RANKED or max(truth) < (1 + EFFECT) * min(truth):
            continue
        told = [_rate(p, p.predicted_seconds) for p in rows]
        best = max(range(len(rows)), key=lambda i: told[i])
        ranks.append(spearman(told, truth))
        regrets.append(1 - truth[best] / max(truth))
        sizes.append(len(rows))
    total = sum(sizes)
    return {
        "groups": len(sizes),
        "spearman": sum(r * n for r, n in zip(ranks, sizes, strict=True)) / total if total else None,
        "median spearman": _median(ranks),
        "mean regret": sum(regrets) / len(regrets) if regrets else None,
        "median regret": _median(regrets),
    }


def _signs(timed: Sequence[Priced]) -> dict[str, Any]:
    pairs = right = 0
    seen: set[tuple[str, str]] = set()
    for rows in _ablations(timed):
        for a, b in itertools.combinations(rows, 2):
            if (a.id, b.id) in seen or not _one_knob(a.run.knobs, b.run.knobs):
                continue
            seen.add((a.id, b.id))
            truth = _rate(a, a.run.measured_seconds) / _rate(b, b.run.measured_seconds)
            if max(truth, 1 / truth) < 1 + EFFECT:
                continue
            told = _rate(a, a.predicted_seconds) / _rate(b, b.predicted_seconds)
            pairs += 1
            right += (told > 1) == (truth > 1)
    return {"pairs": pairs, "right sign": right / pairs if pairs else None}


def _one_knob(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    keys = {k for k in {*a, *b} if a.get(k) != b.get(k)}
    return len(keys) == 1 or (len(keys) == 2 and "dp" in keys)


def _memory(rows: Sequence[Priced]) -> dict[str, Any]:
    told = [p for p in rows if p.status == "priced" and p.told_bytes and p.run.measured_bytes and p.run.sound]
    ratios = [p.told_bytes / p.run.measured_bytes for p in told]
    return {
        "memory rows": len(told),
        "median memory ratio": _median(ratios),
        "median memory error": _median([abs(r - 1) for r in ratios]),
        "worst memory error": max((abs(r - 1) for r in ratios), default=None),
    }


def _labels(rows: Sequence[Priced]) -> dict[str, Any]:
    """Confusion of out-of-memory labels: sets that have any failed row, since elsewhere nobody tried what does not fit."""
    failing = {p.set for p in rows if p.run.out_of_memory}
    told = [p for p in rows if p.status == "priced" and p.set in failing and p.run.sound]
    count = Counter((not p.fits, p.run.out_of_memory) for p in told)
    return {
        "labels": len(told),
        "out of memory, told so": count[True, True],
        "out of memory, not told": count[False, True],
        "ran, told so": count[False, False],
        "ran, told not": count[True, False],
        "label accuracy": (count[True, True] + count[False, False]) / len(told) if told else None,
    }


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation with ties at their mean rank; 0 where one side does not vary."""
    x, y = _ranks(a), _ranks(b)
    mean = (len(x) + 1) / 2
    top = sum((i - mean) * (j - mean) for i, j in zip(x, y, strict=True))
    under = (sum((i - mean) ** 2 for i in x) * sum((j - mean) ** 2 for j in y)) ** 0.5
    return float(top / under) if under else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda i: values[i])
    found = [0.0] * len(values)
    for _, same in itertools.groupby(enumerate(order, start=1), key=lambda item: values[item[1]]):
        tied = list(same)
        for _, index in tied:
            found[index] = sum(place for place, _ in tied) / len(tied)
    return found


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _percentile(values: Sequence[float], share: float) -> float | None:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


_PERCENT: Callable[[float], str] = "{:.1%}".format
COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("timed", "timed", str),
    ("ratio", "median ratio", "{:.3f}".format),
    ("median", "median error", _PERCENT),
    ("90 %", "90th percentile", _PERCENT),
    ("scaled", "scaled median error", _PERCENT),
    ("in 90 %", "coverage", _PERCENT),
    ("groups", "groups", str),
    ("spearman", "spearman", "{:.3f}".format),
    ("regret", "mean regret", _PERCENT),
    ("pairs", "pairs", str),
    ("sign", "right sign", _PERCENT),
    ("memory", "memory rows", str),
    ("error", "median memory error", _PERCENT),
    ("labels", "labels", str),
    ("right", "label accuracy", _PERCENT),
)


def show(found: Mapping[str, Any]) -> None:
    """Print the tables."""
    print(f"{'set':22}" + "".join(f"{title:>9}" for title, _, _ in COLUMNS))
    for name, figures in found["sets"].items():
        cells = ["" if figures[key] is None else write(figures[key]) for _, key, write in COLUMNS]
        print(f"{name:22}" + "".join(f"{cell:>9}" for cell in cells))
    whole = found["sets"]["all"]
    if whole["labels"]:
        print(
            f"\nout of memory: {whole['out of memory, told so']} told so, {whole['out of memory, not told']} not; "
            f"ran: {whole['ran, told so']} told so, {whole['ran, told not']} said not to fit"
        )
    for text, count in found["refused"].items():
        print(f"refused {count:>4}  {text}")
