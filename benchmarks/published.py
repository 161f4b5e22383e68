"""Predictions against published training runs: step time, memory, ranking of configurations, out-of-memory labels.

    python benchmarks/published.py --runs runs.jsonl [--sets a,b] [--most N] [--rows out.jsonl] [--json]

Every usable row (published_runs.py) is priced as pins; a row that ran is planned within the memory limit where it fits and
without one where our memory model says it does not. `--most N` takes at most N rows of a set, evenly spread. The tables are
published_errors.py's; `--rows` keeps what was priced, one JSON object a line, and is continued where it exists.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from published_errors import show, tables
from published_runs import Run, add_arguments, by_set, read_runs, spread
from run_jobs import Jobs, one_thread
from run_layouts import lay
from shardwright.errors import ShardwrightError


@dataclass(frozen=True)
class Priced:
    """One row and what was predicted for it. `status` is "priced" or "refused" (then `error` says why).

    `fits` is our memory model's answer; seconds are a step's, bytes a device's. `told_bytes` is what the row's
    memory metric should read (run_layouts.py), `peak_bytes` everything on the device.
    """

    id: str
    set: str
    status: str
    run: Run
    predicted_seconds: float = 0.0
    low_seconds: float = 0.0
    high_seconds: float = 0.0
    fits: bool = True
    peak_bytes: int = 0
    limit_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    error: str = ""
    told_bytes: int = 0


def price(run: Run, jobs: Jobs) -> Priced:
    """Plan one row under its own pins."""
    try:
        laid = lay(jobs.job(run), run)
    except (ShardwrightError, ValueError) as error:
        return Priced(run.id, run.set, "refused", run, error=str(error).splitlines()[0])
    found, told = laid.predicted, laid.bytes.get(run.metric, 0.0)
    return Priced(
        run.id, run.set, "priced", run, found.step_seconds, found.step_seconds_low, found.step_seconds_high, laid.fits,
        found.peak_bytes_per_device, laid.limit_bytes, dict(found.seconds), dict(found.memory), told_bytes=round(told),
    )  # fmt: skip


def chosen(runs: Sequence[Run], most: int | None) -> list[Run]:
    """At most `most` rows of each set at even distances, in an order that keeps models together."""
    kept = [run for rows in by_set(runs).values() for run in spread(rows, most)]
    return sorted(kept, key=lambda run: (run.model, run.precision))


def read_priced(path: Path, runs: Iterable[Run]) -> list[Priced]:
    """What an earlier run left in `path`, for rows that still read the same."""
    known = {run.id: run for run in runs}
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        data = json.loads(line)
        run = known.get(data["id"])
        if run is not None and json.loads(json.dumps(asdict(run))) == data.pop("run"):
            found.append(Priced(run=run, **data))
    return found


def priced_all(runs: Sequence[Run], kept: Path | None) -> list[Priced]:
    """Price rows in order, telling how far it is on stderr; what `kept` holds is not priced again."""
    found = read_priced(kept, runs) if kept is not None else []
    done = {p.id for p in found}
    jobs, start = Jobs(), time.perf_counter()
    todo = [run for run in runs if run.id not in done]
    for number, run in enumerate(todo, start=1):
        found.append(price(run, jobs))
        if kept is not None:
            with kept.open("a") as file:
                file.write(json.dumps(asdict(found[-1])) + "\n")
        if number % 20 == 0 or number == len(todo):
            print(f"{number}/{len(todo)} rows, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return found


def main() -> None:
    """Price, and print the tables."""
    parser = argparse.ArgumentParser(description="Predictions against published training runs.")
    add_arguments(parser)
    parser.add_argument("--most", type=int, metavar="N", help="at most N rows of a set")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="keep priced rows here, and go on from what it holds")
    given = parser.parse_args()
    one_thread()
    runs = read_runs(given.runs, [s for s in given.sets.split(",") if s])
    wanted = chosen([run for run in runs if run.complete], given.most)
    found = tables(priced_all(wanted, given.rows))
    if given.json:
        print(json.dumps({"unusable": sum(not run.complete for run in runs), **found}, indent=1))
    else:
        show(found)


if __name__ == "__main__":
    main()
