"""Predictions against published runs: the metrics by hand, the fit on made-up truths, and a few rows priced for real."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))

import fit_prices  # noqa: E402
import price_parameters  # noqa: E402
import published  # noqa: E402
import published_errors  # noqa: E402
from published_runs import Run, read_row, read_runs  # noqa: E402
from shardwright.profiles.devices import parse_cluster  # noqa: E402
from test_benchmarks import row, small  # noqa: E402


def priced(told: float, truth: float, **more: Any) -> published.Priced:
    """A priced row by its predicted and measured seconds."""
    names = ("groups", "knobs", "stack", "out_of_memory", "measured_bytes", "sound", "pins", "lost")
    fields = {k: more.pop(k) for k in names if k in more}
    name = more.pop("id", f"{told}-{truth}")
    run = replace(read_row(row()), id=name, measured_seconds=truth, groups=("g",), reliability="A")
    run = replace(run, **{"knobs": {}, "stack": ("s",), "pins": (name,), "lost": (), **fields})
    return published.Priced(name, more.pop("set", "made"), "priced", run, told, 0.8 * told, 1.25 * told, **more)


def test_errors_by_hand() -> None:
    found = published_errors.tables([priced(1.0, 1.0), priced(1.1, 1.0), priced(0.7, 1.0), priced(2.0, 1.0)])
    figures = found["sets"]["made"]
    assert figures["timed"] == 4
    assert figures["median error"] == pytest.approx(0.2)
    assert figures["90th percentile"] == pytest.approx(1.0)
    assert figures["coverage"] == pytest.approx(2 / 4)  # 0.7 reaches 0.875 and 2.0 begins at 1.6
    assert found["sets"]["all of reliability A"] == found["sets"]["all"]


def test_one_factor_takes_a_constant_error_away() -> None:
    rows = [priced(2.0 * x, x, id=str(x)) for x in (1.0, 2.0, 3.0)]
    figures = published_errors.tables(rows)["sets"]["made"]
    assert figures["median error"] == pytest.approx(1.0)
    assert figures["scaled median error"] == pytest.approx(0.0)
    two = [*rows, *(priced(0.5 * x, x, id=f"b{x}", stack=("other",)) for x in (1.0, 2.0, 3.0))]
    assert published_errors.tables(two)["sets"]["made"]["scaled median error"] == pytest.approx(0.0)


def test_ranking_inside_a_group() -> None:
    right = [priced(x, x, id=str(x)) for x in (1.0, 2.0, 3.0)]
    figures = published_errors.tables(right)["sets"]["made"]
    assert (figures["groups"], figures["spearman"], figures["mean regret"]) == (1, 1.0, 0.0)
    wrong = [priced(told, truth, id=str(told)) for told, truth in ((1.0, 3.0), (2.0, 2.0), (3.0, 1.0))]
    figures = published_errors.tables(wrong)["sets"]["made"]
    assert figures["spearman"] == -1.0
    assert figures["mean regret"] == pytest.approx(1 - 1 / 3)
    ties = [priced(x, 1.0 + x / 1000, id=str(x)) for x in (1.0, 2.0, 3.0)]
    assert published_errors.tables(ties)["sets"]["made"]["groups"] == 0


def test_equal_configurations_are_one_in_a_ranking() -> None:
    same = [priced(1.0, truth, id=str(truth), pins=("tp=2",)) for truth in (1.0, 1.5, 2.0)]
    rows = [*same, priced(2.0, 3.0, id="x"), priced(0.5, 0.5, id="y")]
    figures = published_errors.tables(rows)["sets"]["made"]
    assert (figures["groups"], figures["spearman"], figures["timed"]) == (1, 1.0, 5)
    assert published_errors.tables(rows[:4])["sets"]["made"]["groups"] == 0  # two configurations are no ranking


def test_what_no_pin_can_say_is_not_ranked() -> None:
    rows = [priced(x, x, id=str(x)) for x in (1.0, 2.0, 3.0)]
    odd = priced(9.0, 0.1, id="odd", lost=("schedule ZB-2p: not in the library, the planner chooses one",))
    figures = published_errors.tables([*rows, odd])["sets"]["made"]
    assert (figures["spearman"], figures["mean regret"], figures["timed"]) == (1.0, 0.0, 4)


def test_signs_of_pairs_with_one_knob() -> None:
    def one(told: float, truth: float, **knobs: Any) -> published.Priced:
        return priced(told, truth, id=str(knobs), knobs=knobs)

    rows = [
        one(1.0, 1.0, tp=1, dp=8, micro_batch=1), one(1.5, 1.4, tp=2, dp=4, micro_batch=1),  # right: tp, dp takes the rest
        one(0.9, 1.2, tp=1, dp=8, micro_batch=2),  # wrong against the first
        one(2.0, 1.01, tp=1, dp=8, micro_batch=4),  # no effect in truth against the first
    ]  # fmt: skip
    figures = published_errors.tables(rows)["sets"]["made"]
    # Pairs with an effect: tp (right), micro_batch 1-2 (wrong), micro_batch 2-4 (told slower, was faster: wrong).
    assert figures["pairs"] == 3
    assert figures["right sign"] == pytest.approx(1 / 3)


def test_labels_and_memory() -> None:
    rows = [
        priced(1.0, 0.0, out_of_memory=True, fits=False, id="a"), priced(1.0, 0.0, out_of_memory=True, fits=True, id="b"),
        priced(1.0, 1.0, fits=True, id="c", measured_bytes=2.0e9, told_bytes=1_800_000_000), priced(1.0, 1.0, fits=False, id="d"),
    ]  # fmt: skip
    figures = published_errors.tables(rows)["sets"]["made"]
    keys = ("out of memory, told so", "out of memory, not told", "ran, told so", "ran, told not")
    assert [figures[k] for k in keys] == [1, 1, 1, 1]
    assert figures["label accuracy"] == 0.5
    assert figures["timed"] == 2
    assert figures["memory rows"] == 1


def test_flagged_rows_count_nowhere() -> None:
    figures = published_errors.tables([priced(5.0, 1.0, sound=False), priced(1.0, 1.0)])["sets"]["made"]
    assert (figures["timed"], figures["median error"]) == (1, 0.0)


def test_spearman_with_ties() -> None:
    assert published_errors.spearman([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1.0)
    assert published_errors.spearman([1, 1, 1], [1, 2, 3]) == 0.0


def test_rows_are_priced_kept_and_read_again(tmp_path: Path) -> None:
    runs = [read_row(small()), replace(read_row(small()), id="y", pins=("tp=3",))]
    kept = tmp_path / "rows.jsonl"
    first = published.priced_all(runs, kept)
    assert [p.status for p in first] == ["priced", "refused"]
    assert first[0].low_seconds < first[0].predicted_seconds < first[0].high_seconds
    assert first[0].peak_bytes > 0
    assert first[0].fits
    before = kept.read_bytes()
    again = published.priced_all(runs, kept)
    assert kept.read_bytes() == before
    assert json.dumps([p.predicted_seconds for p in again]) == json.dumps([p.predicted_seconds for p in first])
    changed = [replace(runs[0], batch=64)]
    assert not published.read_priced(kept, changed)


def test_what_does_not_fit_is_priced_and_told() -> None:
    run = read_row(small())
    jobs = published.Jobs(memory_limit="1MiB")
    found = published.price(run, jobs)
    assert (found.status, found.fits) == ("priced", False)
    assert found.peak_bytes > found.limit_bytes


def test_rows_spread_over_a_set() -> None:
    runs = [replace(read_row(row()), id=str(i)) for i in range(10)]
    assert sorted(r.id for r in published.chosen(runs, 3)) == ["0", "3", "6"]
    assert len(published.chosen(runs, None)) == 10


# -- the fit


@dataclass(frozen=True)
class Made:
    """A row whose seconds are a sum of three parts, each with a parameter of its own."""

    run: Any
    parts: tuple[float, float, float]
    told: float

    @property
    def job(self) -> Any:
        return SimpleNamespace(cluster=parse_cluster("a100-sxm-80gb:8"))

    def seconds(self, factors: dict[str, float]) -> float:
        return sum(part / factors.get(name, 1.0) for part, name in zip(self.parts, "abc", strict=True))


def parameters(spread: float = 0.5) -> tuple[price_parameters.Parameter, ...]:
    return tuple(price_parameters.Parameter(name, ("issue_seconds",), spread, devices=("a100",)) for name in "abc")


def cases(truth: dict[str, float], *, outlier: float = 1.0) -> list[Any]:
    random = np.random.default_rng(0)
    found = []
    for i in range(30):
        parts = tuple(float(x) for x in random.uniform(0.1, 1.0, 3))
        made = Made(None, parts, sum(parts))
        seconds = made.seconds(truth) * (outlier if i == 7 else 1.0)
        found.append(replace(made, run=SimpleNamespace(set=f"set{i % 3}", measured_seconds=seconds, id=str(i))))
    return found


def test_the_fit_finds_factors() -> None:
    truth = {"a": 0.8, "b": 1.2, "c": 1.0}
    fit = fit_prices.Fit(cases(truth), parameters())
    for _ in range(4):
        fit.advance()
    assert np.exp(fit.at) == pytest.approx([0.8, 1.2, 1.0], rel=0.03)  # the priors pull a little
    found = fit_prices.report(fit)
    assert found["in the fit"] < 0.01
    assert found["left out"]["all"]["median"] < 0.02  # type: ignore[index]


def test_one_bad_row_does_not_bend_the_fit() -> None:
    truth = {"a": 0.8, "b": 1.2, "c": 1.0}
    fit = fit_prices.Fit(cases(truth, outlier=5.0), parameters())
    for _ in range(4):
        fit.advance()
    assert np.exp(fit.at) == pytest.approx([0.8, 1.2, 1.0], rel=0.08)


def test_what_no_row_concerns_stays() -> None:
    other = price_parameters.Parameter("z", ("issue_seconds",), 0.5, devices=("v100",))
    fit = fit_prices.Fit(cases({"a": 0.8, "b": 1.2, "c": 1.0}), (*parameters(), other))
    fit.advance()
    assert fit.at[3] == 0.0
    assert fit.step()[1][3] == pytest.approx(0.5)  # as uncertain as before


def test_a_source_left_out_does_not_help_itself() -> None:
    made = cases({"a": 1.0, "b": 1.0, "c": 1.0})
    skewed = [
        replace(c, run=SimpleNamespace(**{**vars(c.run), "measured_seconds": 2 * c.run.measured_seconds}))
        if c.run.set == "set0"
        else c
        for c in made
    ]
    fit = fit_prices.Fit(skewed, parameters())
    fit.differentiate()
    outside = fit.left_out()
    assert np.median(np.abs(outside["set0"])) == pytest.approx(math.log(2), rel=0.05)


def test_parameters_change_what_they_say() -> None:
    cluster = parse_cluster("a100-sxm-80gb:8x2")
    for parameter in price_parameters.PARAMETERS:
        changed = price_parameters.adjusted(cluster, {parameter.name: 2.0})
        assert (changed != cluster) == parameter.concerns(cluster), parameter.name
    names = [p.name for p in price_parameters.PARAMETERS]
    assert len(set(names)) == len(names)
    once = price_parameters.adjusted(cluster, {"a100 matmul": 0.5})
    assert once.device.efficiency("matmul") == 0.5 * cluster.device.efficiency("matmul")
    assert once.device.peak_flops == cluster.device.peak_flops


def test_every_parameter_concerns_a_device() -> None:
    clusters = [parse_cluster(f"{name}:8x2") for name in ("a100-sxm-80gb", "h100-sxm", "v100-sxm-32gb")]
    for parameter in price_parameters.PARAMETERS:
        assert any(parameter.concerns(c) for c in clusters), parameter.name


def test_a_run_says_what_is_given() -> None:
    run: Run = read_row(row())
    assert run.given == ("attention=math", "kernels=fused", "loss=float")
    assert run.case[-1] == run.given


def forty() -> list[Run]:
    """The published runs that come with the tests, as far as they have a measured step."""
    return [
        r for r in read_runs(Path(__file__).parent / "data" / "published_runs.jsonl") if r.usable and r.measured_seconds
    ]


def test_some_published_runs_are_near() -> None:
    """Wide bounds: a slip of a unit or a lost factor shows, the accuracy itself is benchmarks/published.py's."""
    quick = [r for r in forty() if "pp=1" in r.pins and r.set in ("mosaic-mpt", "fms-fsdp")][:4]
    figures = published_errors.tables(published.priced_all(quick, None))["sets"]["all"]
    assert figures["timed"] == len(quick) == 4
    assert figures["median error"] < 0.15


@pytest.mark.nightly
def test_forty_published_runs_are_near() -> None:
    """The targets of docs/accuracy.md on the rows that come with the tests."""
    figures = published_errors.tables(published.priced_all(sorted(forty(), key=lambda r: r.model), None))["sets"]["all"]
    assert figures["timed"] > 20
    assert figures["median error"] < 0.12
    assert 0.8 <= figures["coverage"] <= 1.0
