"""Fit the few physical parameters of price_parameters.py to published runs, and say how well they hold for unseen sources.

    python benchmarks/fit_prices.py --runs runs.jsonl [--most 12] [--rounds 2] [--leave-out a,b] [--json]

Sound rows of reliability A or B with a measured step, at most `--most` of a set, are planned under their own pins again and
again with figures changed (Gauss-Newton on logarithms, finite differences, Huber weights, every source weighted alike, priors
towards what profiles/data holds). The table gives each factor with its standard deviation; what it multiplies is in
price_parameters.py. The last table leaves each source out of the fit in turn (linearised about the result) and reports its
rows: that is the error to expect of a source nobody has fitted.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from price_parameters import PARAMETERS, Parameter, adjusted
from published import chosen
from published_runs import Run, add_arguments, read_runs
from run_jobs import UNBOUNDED, Jobs, one_thread, solve
from shardwright.errors import Infeasible, ShardwrightError
from shardwright.job import Job
from shardwright.planner.prices import Prices

NOISE = 0.08
"""Standard deviation of a row's logarithm around the best model that can be had: repeatability, and what rows leave out."""
HUBER = 1.5
"""Residuals beyond so many deviations count linearly."""
STEP = 0.1
"""Change of a logarithm for finite differences."""
MOST_STEP = 0.7
"""The longest step of a logarithm in a round."""

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """A run with its job."""

    run: Run
    job: Job
    told: float = 0.0

    def seconds(self, factors: Mapping[str, float]) -> float:
        """The predicted step under changed figures."""
        cluster = adjusted(self.job.cluster, factors)
        job = replace(self.job, cluster=cluster, prices=Prices(cluster, self.job.prices.compute))
        try:
            return solve(job, self.run.pins).predicted.step_seconds
        except Infeasible:
            return solve(job, self.run.pins, UNBOUNDED).predicted.step_seconds


def load_cases(runs: Sequence[Run]) -> list[Case]:
    """Capture every model; rows that cannot be planned are left out."""
    jobs, found = Jobs(), []
    for number, run in enumerate(runs, start=1):
        try:
            case = Case(run, jobs.job(run))
            case = replace(case, told=case.seconds({}))
        except (ShardwrightError, ValueError) as error:
            print(f"left out {run.id}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        found.append(case)
        if number % 20 == 0:
            print(f"{number}/{len(runs)} rows ready", file=sys.stderr)
    return found


class Fit:
    """Residuals and their derivatives at a point, and the steps they give."""

    def __init__(self, cases: Sequence[Case], parameters: Sequence[Parameter]) -> None:
        self.cases, self.parameters = cases, parameters
        self.at = np.zeros(len(parameters))
        self.truth = np.array([math.log(case.run.measured_seconds) for case in cases])
        self.sources = [case.run.set for case in cases]
        count = Counter(self.sources)
        usual = len(cases) / len(count)
        self.weight = np.array([min(2.0, math.sqrt(usual / count[s])) for s in self.sources]) / NOISE
        self.told = np.array([math.log(case.told) for case in cases])
        self.slope: NDArray[np.float64] = np.zeros((len(cases), len(parameters)))

    def predict(self, at: Vector, only: Sequence[int] | None = None) -> Vector:
        """Logarithms of predicted seconds, of all cases or some."""
        factors = {p.name: math.exp(x) for p, x in zip(self.parameters, at, strict=True)}
        chosen = range(len(self.cases)) if only is None else only
        return np.array([math.log(self.cases[i].seconds(factors)) for i in chosen])

    def differentiate(self) -> None:
        """Finite differences about the point, each parameter on the cases it concerns."""
        start = time.perf_counter()
        for k, parameter in enumerate(self.parameters):
            concerned = [i for i, case in enumerate(self.cases) if parameter.concerns(case.job.cluster)]
            moved = self.at.copy()
            moved[k] += STEP
            self.slope[:, k] = 0.0
            self.slope[concerned, k] = (self.predict(moved, concerned) - self.told[concerned]) / STEP
            print(f"{parameter.name}: {len(concerned)} rows, {time.perf_counter() - start:.0f} s", file=sys.stderr)

    def step(self, left_out: str = "") -> tuple[Vector, Vector]:
        """The step to the best point as the slopes tell it, and the standard deviations there; without one source."""
        mine = np.array([source != left_out for source in self.sources])
        prior = np.array([1.0 / p.spread for p in self.parameters])
        change = np.zeros(len(self.parameters))
        inverse = np.zeros((len(prior), len(prior)))
        for _ in range(20):  # reweighted for outliers
            residual = (self.told + self.slope @ change - self.truth) * self.weight
            robust = np.sqrt(np.minimum(1.0, HUBER / np.maximum(np.abs(residual) / self.weight / NOISE, 1e-9)))
            rows = (self.slope * (self.weight * robust)[:, None])[mine]
            wanted = ((self.truth - self.told) * self.weight * robust)[mine]
            matrix = rows.T @ rows + np.diag(prior**2)
            change = np.linalg.solve(matrix, rows.T @ wanted - prior**2 * self.at)
            inverse = np.linalg.inv(matrix)
        return np.clip(change, -MOST_STEP, MOST_STEP), np.sqrt(np.diag(inverse))

    def advance(self) -> None:
        """One round."""
        self.differentiate()
        self.at = self.at + self.step()[0]
        self.told = self.predict(self.at)
        error = np.abs(np.exp(self.told - self.truth) - 1)
        print(f"median error {np.median(error):.1%}, 90th percentile {np.quantile(error, 0.9):.1%}", file=sys.stderr)

    def left_out(self) -> dict[str, Vector]:
        """Logarithms of predicted over measured of every source, by the fit without it."""
        found = {}
        for source in dict.fromkeys(self.sources):
            mine = [i for i, s in enumerate(self.sources) if s == source]
            change, _ = self.step(source)
            found[source] = (self.told + self.slope @ change - self.truth)[mine]
        return found


def report(fit: Fit) -> dict[str, object]:
    """Factors with deviations, and errors by source with that source left out."""
    _, deviation = fit.step()
    outside = fit.left_out()
    everything = np.concatenate(list(outside.values()))
    errors = {name: np.abs(np.exp(r) - 1) for name, r in {**outside, "all": everything}.items()}
    return {
        "factors": {
            p.name: (math.exp(x), float(d), p.spread) for p, x, d in zip(fit.parameters, fit.at, deviation, strict=True)
        },
        "left out": {
            name: {"rows": len(e), "median": float(np.median(e)), "90th percentile": float(np.quantile(e, 0.9))}
            for name, e in errors.items()
        },
        "ratio quantiles": [float(np.exp(-np.quantile(everything, q))) for q in (0.95, 0.05)],
        "in the fit": statistics.median(abs(math.exp(r) - 1) for r in fit.told - fit.truth),
    }


def main() -> None:
    """Fit and print."""
    parser = argparse.ArgumentParser(description="Fit physical parameters to published runs.")
    add_arguments(parser)
    parser.add_argument("--most", type=int, default=12, metavar="N", help="at most N rows of a set [default: 12]")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="Gauss-Newton rounds [default: 2]")
    parser.add_argument("--leave-out", default="", metavar="A,B", help="sets that take no part")
    parser.add_argument("--state", type=Path, metavar="FILE", help="write slopes and residuals here (JSON)")
    given = parser.parse_args()
    one_thread()
    without = set(given.leave_out.split(","))
    runs = [
        r for r in read_runs(given.runs, [s for s in given.sets.split(",") if s])
        if r.usable and r.sound and r.measured_seconds and r.reliability in ("A", "B") and r.set not in without
    ]  # fmt: skip
    fit = Fit(load_cases(chosen(runs, given.most)), PARAMETERS)
    for _ in range(given.rounds):
        fit.advance()
        print(json.dumps(report(fit)["factors"]), file=sys.stderr)
    found = report(fit)
    if given.state:
        state = {
            "rows": [c.run.id for c in fit.cases], "sets": fit.sources, "parameters": [p.name for p in fit.parameters],
            "slope": fit.slope.tolist(), "residual": (fit.told - fit.truth).tolist(), "at": fit.at.tolist(),
        }  # fmt: skip
        given.state.write_text(json.dumps(state))
    print(json.dumps(found, indent=1) if given.json else _text(found))


def _text(found: dict[str, object]) -> str:
    factors, outside = found["factors"], found["left out"]
    assert isinstance(factors, dict)
    assert isinstance(outside, dict)
    lines = [f"{'parameter':28}{'factor':>9}{'deviation':>11}{'prior':>8}"]
    lines += [f"{name:28}{x:9.3f}{d:11.3f}{prior:8.2f}" for name, (x, d, prior) in factors.items()]
    lines += ["", f"{'left out of the fit':28}{'rows':>9}{'median':>11}{'90 %':>8}"]
    lines += [f"{n:28}{e['rows']:9}{e['median']:11.1%}{e['90th percentile']:8.1%}" for n, e in outside.items()]
    low, high = found["ratio quantiles"]  # type: ignore[misc]
    lines.append(f"\nmeasured / predicted of left-out rows: 5th percentile {low:.3f}, 95th {high:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
