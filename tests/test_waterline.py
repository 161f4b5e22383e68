"""Waterline and efficiency gap: parts against rooflines by hand, sums, drawings, escaping, passes on a real model."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
from click.testing import CliRunner
from shardwright.cli.main import main
from shardwright.cli.report import gapplot, waterplot
from shardwright.cli.report.axes import decade_text, linear_ticks, text_box, tick_text
from shardwright.cli.report.passes import build_passes
from shardwright.errors import UsageError
from shardwright.planner.cluster import Cluster, Device
from shardwright.planner.outline import Outline, Region
from shardwright.planner.prices import OpRow, Prices
from shardwright.planner.waterline import PARTS, Waterline, by_target, totals, waterline
from solver_outlines import Builder
from test_report import HOSTILE, Page

PEAK, BANDWIDTH, OVERHEAD = 1e12, 1e10, 1e-6
M, K, N = 512, 1024, 2048
FOUND = {"passes": [], "cluster": "toy", "dtype": "float32", "unverified": ""}


def toy(**changes: object) -> Prices:
    """A device of round figures that reaches them all."""
    device = Device("toy", 1 << 34, {"float32": PEAK}, BANDWIDTH, OVERHEAD, MappingProxyType({"default": 1.0}))
    return Prices(Cluster("toy", device, 1, 1, ()), "float32", **changes)


def network() -> Outline:
    """x (m, k) times w (k, n), then an element-wise op on the product; trained."""
    made = Builder()
    made.tensor("x", [[M], [K]])
    made.tensor("w", [[K], [N]], role="parameter")
    made.tensor("y", [[M], [N]])
    made.tensor("z", [[M], [N]])
    sizes = {"m": {"size": M}, "k": {"size": K}, "n": {"size": N}}
    flops = 2.0 * M * K * N
    made.op("product", "matmul", [("x", ["m", "k"]), ("w", ["k", "n"])], [("y", ["m", "n"])], sizes, flops=flops,
            backward_flops=2 * flops)  # fmt: skip
    made.op("point", "elementwise", [("y", ["m", "n"])], [("z", ["m", "n"])], {k: sizes[k] for k in "mn"},
            flops=1.0 * M * N, backward_flops=2.0 * M * N)  # fmt: skip
    region = Region("layer", (("product", "point"),), ((),))
    return Outline(made.tensors, tuple(made.ops), (region,), (), ("x",), "", ("z",), 1, 1, "", trains=True)


@pytest.fixture(scope="module")
def line() -> Waterline:
    return waterline(network(), toy())


def test_parts_are_those_of_the_roofline(line: Waterline) -> None:
    product, point, *_ = line.moments
    assert (product.op, product.phase, point.op) == ("product", "forward", "point")
    ideal, streamed = 2 * M * K * N / PEAK, 4 * (M * K + K * N + M * N) / BANDWIDTH
    assert product.ideal_seconds == pytest.approx(ideal)
    assert product.parts == pytest.approx((ideal, max(streamed - ideal, 0.0), OVERHEAD, 0.0), abs=1e-12)
    ideal, streamed = M * N / PEAK, 8 * M * N / BANDWIDTH
    assert point.bytes == 8 * M * N
    assert point.parts == pytest.approx((ideal, streamed - ideal, OVERHEAD, 0.0), abs=1e-12)
    assert (product.bound, point.bound) == ("compute", "memory")
    assert point.efficiency == pytest.approx(ideal / (streamed + OVERHEAD))


def test_backward_passes_follow_in_reverse(line: Waterline) -> None:
    assert [(one.op, one.phase) for one in line.moments] == [
        ("product", "forward"), ("point", "forward"), ("point", "backward"), ("product", "backward"),
    ]  # fmt: skip
    assert line.moments[3].flops == 4.0 * M * K * N


def test_what_kernels_do_not_reach_is_the_shortfall() -> None:
    prices = toy()
    device = replace(prices.cluster.device, efficiencies={"default": 0.5}, memory_bytes_per_second=1e15)
    slow = replace(prices, cluster=replace(prices.cluster, device=device))
    product = waterline(network(), slow).moments[0]
    ideal = 2 * M * K * N / PEAK
    assert product.parts == pytest.approx((ideal, 0.0, OVERHEAD, ideal), abs=1e-12)


def test_sums_are_totals_and_nothing_is_lost(line: Waterline) -> None:
    whole = line.totals
    assert sum(whole.parts) == pytest.approx(whole.seconds)
    for one in line.moments:
        assert sum(one.parts) == pytest.approx(one.seconds)
        assert min(one.parts) >= 0.0
    kinds = by_target(line.moments).values()
    assert sum(one.seconds for one in kinds) == pytest.approx(whole.seconds)
    assert sum(one.flops for one in kinds) == pytest.approx(whole.flops) == pytest.approx(6.0 * M * K * N + 3.0 * M * N)
    assert whole.calls == 2
    assert whole.efficiency == pytest.approx(whole.flops / PEAK / whole.seconds)
    assert totals(()).efficiency == 0.0


def test_a_measured_op_may_beat_the_peak_figure() -> None:
    outline, prices = network(), toy()
    op = outline.ops[0]
    sizes = tuple(float(f.size) for f in op.factors)
    quick = 1e-9
    rows = {prices.op_key(op, sizes, outline.tensors): OpRow(quick, quick, 0.01)}
    product = waterline(outline, toy(ops=rows)).moments[0]
    assert product.parts == (quick, 0.0, 0.0, 0.0)
    assert product.origin == "measured"
    assert product.efficiency > 1.0
    assert product.gap_seconds < 0.0


def test_areas_of_the_plot_are_seconds(line: Waterline) -> None:
    longest = 2 * line.totals.seconds
    plot = waterplot.water_plot("Before", line, longest)
    wide, high = waterplot.WIDTH - waterplot.LEFT - waterplot.RIGHT, waterplot.HEIGHT - waterplot.TOP - waterplot.BOTTOM
    for part, seconds in zip(PARTS, line.totals.parts, strict=True):
        area = sum(r.width * r.height for column in plot.columns for r in column.rects if r.part == part)
        assert area / (wide * high) * longest == pytest.approx(seconds, abs=1e-12)
    assert plot.spans[-1].right == pytest.approx(waterplot.LEFT + wide / 2)


def test_points_stand_on_their_diagonals(line: Waterline) -> None:
    plot = gapplot.gap_plot(line, line)
    assert len(plot.points) == 2 * (1 + len(by_target(line.moments)))
    first = plot.diagonals[0]  # all of the peak
    for point in plot.points:  # y falls as seconds grow: no point lies below the line of the peak
        slope = (first.y2 - first.y1) / (first.x2 - first.x1)
        assert point.y <= first.y1 + slope * (point.x - first.x1) + 1e-6
    boxes = [text_box(one.x, one.y, one.text, one.anchor) for one in (*plot.labels, *plot.percents)]
    assert not any(a.covers(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_ticks_are_round() -> None:
    assert linear_ticks(0.16, 10) == pytest.approx([0.02 * i for i in range(9)])
    assert [tick_text(value) for value in (0.0, 0.02, 1.5)] == ["0", "20 ms", "1.5 s"]
    assert [decade_text(n) for n in (-9, -5, 0, 4)] == ["1 ns", "10 µs", "1 s", "10,000 s"]


def test_nothing_of_a_model_becomes_markup(line: Waterline) -> None:
    moments = tuple(replace(one, op=HOSTILE, target=HOSTILE, source=HOSTILE) for one in line.moments)
    hostile = replace(line, moments=moments)
    page = Page(build_passes(HOSTILE, FOUND | {"cluster": HOSTILE}, (hostile, line)))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not {"img", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert "{{ 7*7 }}" in page.text


def test_a_model_that_takes_no_time_is_refused(line: Waterline) -> None:
    with pytest.raises(UsageError, match="leave out --report"):
        build_passes("empty", FOUND, (replace(line, moments=()), line))


def test_check_writes_the_page_and_the_numbers(tmp_path: Path) -> None:
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 256}))
    out = tmp_path / "passes.html"
    done = CliRunner().invoke(
        main, ["check", f"hf:{config}", "--passes", "--seq", "16", "--report", str(out), "--json"]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    before, after = found["waterline"]["before"], found["waterline"]["after"]
    (gelu,) = [row for row in found["passes"] if row["name"] == "gelu"]
    gains = sum(row["gain_seconds"] for row in found["passes"] if row.get("applied"))
    assert gelu["applied"]
    assert before["seconds"] - after["seconds"] == pytest.approx(gains, rel=1e-6)
    assert after["efficiency"] > before["efficiency"]
    for side in (before, after):
        assert sum(side["parts"].values()) == pytest.approx(side["seconds"])
        assert sum(op["seconds"] for op in side["ops"]) == pytest.approx(side["seconds"])
    assert "aten.gelu" in {op["target"] for op in after["ops"]} - {op["target"] for op in before["ops"]}
    page = Page(out.read_text())
    assert [tag for tag, _ in page.tags].count("title") > 20
    assert re.search(r"Before the passes: .* efficiency .*After the passes", page.text)
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--report", "x.html"], "add --passes"), (["--passes", "--report", "no/such/x.html"], "does not exist")],
)
def test_bad_input_gets_one_message(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(main, ["check", "hf:gpt2", *arguments])
    assert done.exit_code == 2
    assert message in done.output
