"""What commands print fits a terminal of 80 columns: no line is longer, no word of a header is broken, no number is folded."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import stagedplans
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.text import Text
from shardwright.api import plan_model
from shardwright.cli.listings import cluster_details, cluster_list, difference_tables
from shardwright.cli.sheet import Prose, Sheet
from shardwright.cli.simulate import shape_text, sweep_table
from shardwright.cli.tables import plan_tables, table
from shardwright.planner.plan import Plan
from shardwright.planner.plandiff import diff
from shardwright.profiles.devices import describe, list_clusters
from test_explain import GPT2, LLAMA

WIDTH = 80
NUMBER = re.compile(r"\d[\d.,]* (?:%|µs|ms|s|min|h|B|[KMGTP]iB|[KMGT]B(?:/s)?|[kMBT]?FLOP/s)(?![\w/])")


def drawn(part: RenderableType, width: int) -> str:
    console = Console(width=width, markup=False, highlight=False, emoji=False)
    with console.capture() as caught:
        console.print(part)
    return caught.get()


def check(part: RenderableType, width: int = WIDTH) -> None:
    """Hold what is drawn on `width` columns against what is drawn where there is room for all."""
    narrow, wide = drawn(part, width), drawn(part, 1000)
    assert max(map(cell_len, narrow.splitlines())) <= width
    assert Counter(NUMBER.findall(narrow)) == Counter(NUMBER.findall(wide))
    letters = [re.sub(r"[^\w]", "", text) for text in (narrow, wide)]
    assert len(letters[0]) >= len(letters[1])  # nothing is cut off; what goes under its row is named
    for made in (each for each in _tables(part)):
        for column in made.columns if made.show_header else ():
            for word in str(column.header).split():
                assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", narrow), word


def _tables(part: RenderableType) -> list[Sheet]:
    if isinstance(part, Sheet):
        return [part]
    return [made for each in getattr(part, "renderables", ()) for made in _tables(each)]


@cache
def plans() -> dict[str, Plan]:
    """Real plans: several axes with a pipeline, a limit that forces offload and recompute, one device."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        gpt2, llama = Path(folder) / "gpt2.json", Path(folder) / "a-model-with-a-long-name.json"
        gpt2.write_text(json.dumps(GPT2))
        llama.write_text(json.dumps(LLAMA))
        return {
            "axes": plan_model(f"hf:{llama}", "h100-sxm:8x2", batch=64, pins=["pp=2", "tp=2", "cp=2"]).plan,
            "pipeline": plan_model(f"hf:{gpt2}", "a100-sxm-40gb:8", batch=32, pins=["pp=4", "vpp=1"]).plan,
            "offload": plan_model(
                f"hf:{llama}", "a100-sxm-40gb:2", batch=64, pins=["offload=optimizer", "recompute=full"]
            ).plan,
            "plain": plan_model(f"hf:{gpt2}", "h100-sxm:1", batch=8).plan,
        }


@pytest.mark.parametrize("name", ["axes", "pipeline", "offload", "plain"])
@pytest.mark.parametrize("width", [80, 60])
def test_tables_of_a_plan_fit(name: str, width: int) -> None:
    check(plan_tables(plans()[name], {"capture": 1.5, "solve": 2.5}), width)


def test_tables_of_a_hand_made_plan_fit() -> None:
    check(plan_tables(stagedplans.plan()))


def test_differences_fit() -> None:
    one, two = plans()["axes"], plans()["pipeline"]
    for part in difference_tables(diff(one, two), "a-folder/axes.json", "pipeline.json"):
        check(part)


def test_clusters_fit() -> None:
    check(cluster_list([describe(name) for name in list_clusters()]))
    check(cluster_details(describe("h100-sxm")))


def test_a_sweep_fits() -> None:
    why = "nothing fits in 1.00 GiB per device: the least any plan needs is 3.18 GiB (stage 1 of 2, pp=2 x cp=2 x tp=2)"
    rows = [
        {"changes": {"devices": "8", "memory": "40GiB", "micro_batch": "2"}, "why": why},
        {"changes": {"devices": "16", "memory": "40GiB", "micro_batch": "2"}, "step_seconds": 0.0123, "samples_per_second": 7163.0,
         "peak_bytes_per_device": 3.7e9, "shape": "pp=2 dp=2 tp=2 interleaved, 8 x 32"},
    ]  # fmt: skip
    check(sweep_table(rows))


def test_what_does_not_fit_goes_under_its_row() -> None:
    made = table("name", "bytes", "first long text", "second", right=(1,))
    made.add_row("a" * 20, "1.50 GiB", "one two three " * 3, Text("longer than all of the others " * 2))
    lines = drawn(made, 50).splitlines()
    assert lines[0].split() == ["name", "bytes", "first", "long", "text"] or lines[0].split() == ["name", "bytes"]
    assert any("1.50 GiB" in line for line in lines)
    assert any(line.startswith("    ") and "second: longer than" in " ".join(lines) for line in lines)
    assert max(map(len, lines)) <= 50


def test_a_long_word_breaks_after_punctuation() -> None:
    lines = drawn(Prose("cluster.device.efficiencies.attention_flash3_backward"), 30).splitlines()
    assert lines == ["cluster.device.efficiencies.", "  attention_flash3_backward"]
    assert drawn(Prose("x" * 25), 10).split() == ["x" * 8, "x" * 8, "x" * 8, "x"]


def test_a_real_terminal_is_not_overrun(tmp_path: Path) -> None:
    for words in (("clusters",), ("clusters", "cpu"), ("explain", str(tmp_path / ("a-long-name-" * 5)))):
        for line in on_terminal(*words).splitlines():
            assert cell_len(line) <= WIDTH, line


def on_terminal(*words: str) -> str:
    """What a command writes to a terminal of 80 columns, without its colours."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"TERM": "xterm", "COLUMNS": str(WIDTH), "LINES": "50"}
        os.execv(sys.executable, [sys.executable, "-m", "shardwright.cli.main", *words])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, WIDTH, 0, 0))
    written = b""
    try:
        while data := os.read(terminal, 65536):
            written += data
    except OSError:  # the end of a terminal whose other side is closed
        pass
    os.waitpid(child, 0)
    os.close(terminal)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode()).replace("\r", "")


def test_a_shape_in_words_has_ranks_not_stages() -> None:
    plan = stagedplans.plan()
    assert (plan.pipeline.ranks, plan.pipeline.stages) == (2, 4)
    assert shape_text(plan).startswith("pp=2 dp=2 tp=2 interleaved x 2, ")
