"""Published runs as their frameworks divide them: stages, layers that run again, and what their bytes count."""

from __future__ import annotations

import json
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))

import run_layouts  # noqa: E402
from published_runs import read_row  # noqa: E402
from run_jobs import Jobs  # noqa: E402
from run_layouts import Laid, lay  # noqa: E402
from test_benchmarks import row  # noqa: E402

WHOLE = {
    "parallelism__dp": 8,
    "parallelism__tp": 1,
    "parallelism__pp": 2,
    "parallelism__zero_stage": 1,
    "model__layers": 4,
}
ONE = {"parallelism__dp": 16, "parallelism__tp": 1, "parallelism__pp": 1, "model__layers": 4, "parallelism__sp": None}


JOBS = Jobs()


@cache
def laid(text: str) -> Laid:
    run = read_row(row(**json.loads(text)))
    return lay(JOBS.job(run), run)


def of(**changes: Any) -> Laid:
    return laid(json.dumps(changes, sort_keys=True))


def test_stages_are_even_and_bytes_follow_the_metric() -> None:
    found = of(**WHOLE)
    assert found.fits
    assert found.bytes["states"] < found.bytes["allocated"] < found.bytes["reserved"] < found.bytes["total"]
    assert found.bytes["reserved"] == pytest.approx(run_layouts.KEPT * found.bytes["allocated"])
    assert found.bytes["first"] <= found.bytes["total"]
    assert found.predicted.peak_bytes_per_device == pytest.approx(
        found.bytes["allocated"] + found.bytes["total"] - found.bytes["reserved"], abs=10
    )


@pytest.mark.parametrize(
    ("layers", "stages", "fewer", "cuts"),
    [
        (6, 3, False, [0, 3, 5, 8]), (4, 3, True, [0, 2, 4, 6]), (5, 3, False, None), (6, 1, False, None),
        (4, 6, True, [0, 1, 2, 3, 4, 5, 6]),
    ],
)  # fmt: skip
def test_even_cuts(layers: int, stages: int, fewer: bool, cuts: list[int] | None) -> None:
    """An embedding before the layers and a head after them: units 0 and `layers` + 1."""

    class Chain:
        regions = (0, *[1] * layers, 2)
        chain = type("C", (), {"parts": (0, 1, 2), "__len__": lambda self: layers + 2})()

    shape = type("S", (), {"pp": stages, "chunks": 1})()
    own = list(range(stages + 1))
    assert run_layouts._own_cuts(Chain(), shape, own, fewer) == (cuts if cuts is not None else own)  # type: ignore[arg-type]


def test_more_layers_run_again_keep_less() -> None:
    """Each share a little less than the one before, and all of them between none and all."""
    shares = ("none", "fraction 0.25 of layers", "fraction 0.5 of layers", "fraction 0.75 of layers", "full")
    found = [of(**ONE, parallelism__recompute=share) for share in shares]
    states = [one.bytes["states"] for one in found]
    assert states == sorted(states, reverse=True)
    assert len(set(states)) == len(states)
    steps = [a - b for a, b in pairwise(states[:4])]
    assert steps == pytest.approx([steps[0]] * 3, rel=1e-6)
    assert found[0].predicted.step_seconds < found[2].predicted.step_seconds < found[4].predicted.step_seconds


def test_sequence_parallelism_keeps_shards_of_what_is_gathered() -> None:
    more = {"parallelism__recompute": "selective", "parallelism__dp": 2, "parallelism__tp": 4, "parallelism__pp": 2}
    with_shards = of(**more, parallelism__sp=True)
    whole = of(**more, parallelism__sp=False)
    assert with_shards.bytes["states"] < whole.bytes["states"]


@pytest.mark.parametrize(("text", "seconds"), [("sync gradient flush", 2.0), ("async gradient flush", 0.0), ("", 0.0)])
def test_a_blocking_flush_takes_the_time_of_its_copies(text: str, seconds: float) -> None:
    """Of bf16 gradients into memory that is not pinned."""
    run = read_row(row(parallelism__offload=f"optimizer on CPU; ZeRO-Offload ({text})" if text else None))
    assert run_layouts._flush_seconds(run, run_layouts.PAGEABLE_BYTES_PER_SECOND) == seconds


def test_deepspeed_reduces_and_gathers_through_flat_buffers() -> None:
    """Of all a rank has, where that is less than 5e8 elements; ZeRO-3 has none."""
    run = read_row(row(parallelism__framework="Megatron-DeepSpeed"))
    assert run_layouts._buckets(run, 1e6) == 4e6
    assert run_layouts._buckets(run, 1e9) == 2e9
    assert run_layouts._buckets(read_row(row()), 1e9) == 0
    third = read_row(
        row(parallelism__framework="DeepSpeed", parallelism__zero_stage=3, parallelism__tp=1, parallelism__pp=1)
    )
    assert run_layouts._buckets(third, 1e9) == 0


@pytest.mark.parametrize(
    ("changes", "metric"),
    [
        ({}, "allocated"),
        ({"parallelism__framework": "Megatron-DeepSpeed"}, "first"),
        ({"parallelism__framework": "PyTorch FSDP"}, "total"),
        ({"result__memory_unit_as_stated": "GiB (peak reserved)"}, "reserved"),
        ({"result__memory_unit_as_stated": "GB (max of Max_MA, DeepSpeed); reserved Max_CA 29.0 GB"}, "allocated"),
        ({"parallelism__schedule": "ZB-2p"}, ""),
        ({"parallelism__recompute": None}, ""),
    ],
)
def test_what_bytes_count(changes: dict[str, Any], metric: str) -> None:
    assert read_row(row(**changes)).metric == metric


def test_a_framework_with_a_tokenizer_of_its_own() -> None:
    changes = {
        "model__vocab": None,
        "model__family": "LLAMA 13B",
        "parallelism__framework": "AA-Scaling (Megatron-LM derived)",
    }
    run = read_row(row(**changes))
    assert (run.config["vocab_size"], run.config["attention_dropout"], run.precision) == (128000, 0.1, "zero")
