"""Free plans against the configurations that experts ran: the same model, cluster, batch and prices.

    python benchmarks/expert_configs.py --runs runs.jsonl [--sets a,b] [--limit N] [--most-rows N] [--json]

For every usable published run (published_runs.py) its own configuration is priced as pins, and the free plan is made once per
(model, cluster, batch, precision). A free plan should take no longer than any pinned one, beyond the gap it proved. Everything
runs in one process; `--limit N` takes N questions, spread over the sets.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any

from published_runs import Run, add_arguments, read_runs, spread
from run_jobs import UNBOUNDED, Jobs, one_thread, solve
from shardwright.errors import Infeasible, ShardwrightError
from shardwright.job import Job

SLACK = 1e-9
"""Relative difference below which two predicted times are equal."""


@dataclass(frozen=True)
class Case:
    """One question: all published answers to it. `rows` have equal model, cluster, batch, precision and software; pins differ."""

    set: str
    rows: tuple[Run, ...]


@dataclass(frozen=True)
class Pinned:
    """One published configuration, priced. `status` is "priced", "over memory", "refused" or "no free plan".

    `ratio` is free seconds / pinned seconds; `error` the message where it has no price, or fits only without a limit: then
    `pinned_seconds` are those of its best plan of any size, and nothing is compared.
    """

    id: str
    set: str
    pins: tuple[str, ...]
    status: str
    pinned_seconds: float = 0.0
    free_seconds: float = 0.0
    gap: float = 0.0
    peak_bytes: int = 0
    measured_seconds: float = 0.0
    error: str = ""

    @property
    def ratio(self) -> float:
        """Free seconds over pinned seconds."""
        return self.free_seconds / self.pinned_seconds

    @property
    def within(self) -> bool:
        """Whether the free plan is no slower, beyond its own proven gap."""
        return self.free_seconds <= self.pinned_seconds * (1 + self.gap + SLACK)


def cases(runs: Iterable[Run], most_rows: int | None = None) -> list[Case]:
    """Usable runs by question, with equal pins named once, at most `most_rows` evenly spread ones each."""
    found: dict[tuple[Any, ...], dict[tuple[str, ...], Run]] = {}
    for run in runs:
        if run.usable:
            found.setdefault(run.case, {}).setdefault(run.pins, run)
    grouped = [list(rows.values()) for rows in found.values()]
    return [Case(rows[0].set, tuple(spread(rows, most_rows))) for rows in grouped]


def pick(found: Sequence[Case], limit: int | None) -> list[Case]:
    """At most `limit` cases: sets in turn, each set's at even distances; those of one model follow each other."""
    sets: dict[str, list[Case]] = {}
    for case in found:
        sets.setdefault(case.set, []).append(case)
    if limit is not None and limit < len(found):
        counts = Counter(_turns(sets, limit))
        found = [c for name in counts for c in spread(sets[name], counts[name])]
    return sorted(found, key=lambda c: c.rows[0].model)


def _turns(sets: Mapping[str, Sequence[Case]], limit: int) -> list[str]:
    """The set of each of `limit` cases, taken in turn while a set has cases left."""
    columns = [[name] * len(found) for name, found in sets.items()]
    return [name for row in zip_longest(*columns) for name in row if name is not None][:limit]


def priced(case: Case, jobs: Jobs) -> list[Pinned]:
    """Every configuration of a case, and the free plan where any of them has a price."""
    try:
        job = jobs.job(case.rows[0])
    except (ShardwrightError, ValueError) as error:
        return [_failed(run, "refused", error) for run in case.rows]
    plans, failed = [], []
    for run in case.rows:
        try:
            plans.append((run, solve(job, run.pins).predicted))
        except Infeasible as error:
            failed.append(_over(run, job, error))
        except ShardwrightError as error:
            failed.append(_failed(run, "refused", error))
    if not plans:
        return failed
    try:
        free = solve(job, case.rows[0].given)
    except ShardwrightError as error:
        return [*failed, *(_failed(run, "no free plan", error) for run, _ in plans)]
    return failed + [
        Pinned(
            run.id, run.set, run.pins, "priced", found.step_seconds, free.predicted.step_seconds, free.search.gap,
            found.peak_bytes_per_device, run.measured_seconds,
        )
        for run, found in plans
    ]  # fmt: skip


def _over(run: Run, job: Job, error: Infeasible) -> Pinned:
    """A configuration that our memory model refuses, priced as if it fitted: it may well be faster than what does."""
    try:
        found = solve(job, run.pins, UNBOUNDED).predicted
    except ShardwrightError as other:
        return _failed(run, "refused", other)
    return replace(
        _failed(run, "over memory", error), pinned_seconds=found.step_seconds, peak_bytes=found.peak_bytes_per_device
    )


def _failed(run: Run, status: str, error: Exception) -> Pinned:
    return Pinned(run.id, run.set, run.pins, status, measured_seconds=run.measured_seconds, error=str(error))


def summary(found: Sequence[Pinned]) -> dict[str, float]:
    """Counts by status, how many free plans are no slower, the worst ratio and the median gain (pinned / free - 1)."""
    count = Counter(p.status for p in found)
    done = [p for p in found if p.status == "priced"]
    return {
        "pinned": len(found),
        "priced": len(done),
        "within": sum(p.within for p in done),
        "over memory": count["over memory"],
        "refused": count["refused"] + count["no free plan"],
        "worst ratio": max((p.ratio for p in done), default=0.0),
        "median gain": statistics.median(1 / p.ratio - 1 for p in done) if done else 0.0,
        "worst gap": max((p.gap for p in done), default=0.0),
    }


def by_set(found: Sequence[Pinned]) -> dict[str, list[Pinned]]:
    """By set, and all of them."""
    names = dict.fromkeys(p.set for p in found)
    return {**{n: [p for p in found if p.set == n] for n in names}, "all": list(found)}


def show(found: Sequence[Pinned]) -> None:
    """Print the table by set, then every free plan that is slower, and why configurations have no price."""
    columns = ("pinned", "priced", "within", "over memory", "refused", "worst ratio", "median gain", "worst gap")
    print(f"{'set':18}" + "".join(f"{c:>13}" for c in columns))
    for name, group in by_set(found).items():
        figures = summary(group)
        print(
            f"{name:18}" + "".join(f"{figures[c]:>13}" for c in columns[:5])
            + f"{figures['worst ratio']:>13.4f}{figures['median gain']:>12.1%} {figures['worst gap']:>12.3%}"
        )  # fmt: skip
    for p in found:
        if p.status == "priced" and not p.within:
            print(f"SLOWER {p.ratio:.4f} (gap {p.gap:.3%})  {p.id}  {' '.join(p.pins)}")
    errors: dict[tuple[str, str, str], list[Pinned]] = {}
    for p in found:
        if p.error:
            errors.setdefault((p.set, p.status, re.sub(r"\d+(\.\d+)?", "#", p.error.splitlines()[0])), []).append(p)
    if errors:
        print("\nnot priced (rows of like messages, and the first of them):")
    for (name, status, _), group in sorted(errors.items()):
        print(f"  {name:18}{status:13}{len(group):>5}  {group[0].id}: {group[0].error.splitlines()[0]}")


def main() -> None:
    """Price, and print by set. Exits with 1 where a free plan is slower or a configuration was refused."""
    parser = argparse.ArgumentParser(description="Free plans against published configurations given as pins.")
    add_arguments(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="at most N questions, spread over the sets")
    parser.add_argument("--most-rows", type=int, metavar="N", help="at most N configurations a question")
    parser.add_argument("--memory-limit", metavar="SIZE", help="per device, for pinned and free plans alike")
    given = parser.parse_args()
    one_thread()
    runs = read_runs(given.runs, [s for s in given.sets.split(",") if s])
    todo = pick(cases(runs, given.most_rows), given.limit)
    jobs, found, start = Jobs(given.memory_limit), [], time.perf_counter()
    for number, case in enumerate(todo, start=1):
        found += priced(case, jobs)
        print(f"{number}/{len(todo)} {time.perf_counter() - start:.0f} s {case.set} {case.rows[0].id}", file=sys.stderr)
    if given.json:
        print(
            json.dumps({"sets": {n: summary(g) for n, g in by_set(found).items()}, "rows": [asdict(p) for p in found]})
        )
    else:
        show(found)
        seconds = {name: round(value, 1) for name, value in jobs.clock.seconds.items()}
        print(f"\n{len(todo)} questions, {jobs.captures} captures, seconds by phase: {seconds}")
    if any(p.status in ("refused", "no free plan") or (p.status == "priced" and not p.within) for p in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
