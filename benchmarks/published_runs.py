"""Published training runs (one JSON object a line) as what shardwright plans: a model, a cluster, a batch and pins.

    python benchmarks/published_runs.py --runs runs.jsonl [--sets a,b] [--reasons] [--json]

prints how many rows of each set are usable, and why the others are not. A row is usable when it states, or its own numbers
imply, the model's sizes, the sequence length, the devices, dp, tp and pp, the microbatch and the global batch. The other
scripts import `read_runs`.

What a row does not state stays out of its pins, so the planner chooses it. What it states and no pin can say is kept in `lost`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run_models import cluster_string, config_of, sizes_of
from shardwright.profiles.devices import load_device

MEGATRON_DROPOUT = 0.1
"""Megatron-LM trains with it unless told otherwise; the other frameworks here use none."""

NOMINAL = 1.1
"""Devices have up to this much of the decimal size in their name (a "16 GB" one 16 GiB)."""


@dataclass(frozen=True)
class Run:
    """One row. Unusable ones have `reasons`; their other fields may be empty.

    `config` is a Hugging Face config, `batch` counts sequences, `pins` are the row's own configuration as `K=V` (without
    the precision recipe, which is part of the question and not of the answer). `assumed`: what the row does not say and
    was filled in; `lost`: what it says and pins cannot. `measured_seconds` is a step's, 0 where the row gives none.
    """

    id: str
    set: str
    config: Mapping[str, Any]
    seq: int
    cluster: str
    devices: int
    batch: int
    precision: str
    pins: tuple[str, ...]
    assumed: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    out_of_memory: bool = False
    measured_seconds: float = 0.0

    @property
    def usable(self) -> bool:
        """Whether its configuration is complete and ran."""
        return not self.reasons

    @property
    def model(self) -> str:
        """The model and its length as text: runs that share it share one capture (per dtype)."""
        return json.dumps([self.config, self.seq], sort_keys=True)

    @property
    def case(self) -> tuple[str, str, int, str]:
        """(model, cluster, batch, precision): runs that share it are answers to one question."""
        return (self.model, self.cluster, self.batch, self.precision)


def read_runs(path: Path, sets: Sequence[str] = ()) -> list[Run]:
    """All rows of a file, or those of some sets. Raises ValueError naming the line that is not a row."""
    runs = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not sets or row["set"] in sets:
                runs.append(read_row(row))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a published run ({type(error).__name__}: {error})") from error
    return runs


def read_row(row: Mapping[str, Any]) -> Run:
    """One row as a Run."""
    model, hardware, stated, result = row["model"], row["hardware"], row["parallelism"], row.get("result", {})
    assumed: list[str] = []
    lost: list[str] = []
    reasons: list[str] = []
    framework = str(stated.get("framework", ""))
    sizes = sizes_of(model, framework, assumed)
    if sizes is None:
        reasons.append("sizes of the model not stated")
    seq = int(model.get("seq_len") or 0)
    if not seq:
        reasons.append("sequence length not stated")
    cluster = cluster_string(hardware, assumed, reasons)
    devices = int(hardware.get("gpus") or 0)
    if devices == 1:
        reasons.append("one device")
    degrees = _degrees(stated, devices, assumed, reasons)
    batch = _batch(stated, degrees, reasons)
    device = (cluster or "").partition(":")[0]
    failed = _out_of_memory(result)
    reasons += _ruled_out(stated, result, device, failed)
    precision = _precision(stated, framework, device, assumed, lost)
    pins = _pins(stated, model, degrees, lost) if not reasons else ()
    dropout = MEGATRON_DROPOUT if framework.startswith("Megatron") else 0.0
    config = config_of(model, sizes, seq, dropout) if sizes is not None else {}
    return Run(
        row["id"], row["set"], config, seq, cluster or "", devices, batch, precision, pins, tuple(assumed), tuple(lost),
        tuple(reasons), failed, _measured(result, batch * seq, devices),
    )  # fmt: skip


def _degrees(stated: Mapping[str, Any], devices: int, assumed: list[str], reasons: list[str]) -> dict[str, int]:
    """dp, tp, pp, cp, vpp, ep as far as they are known; the product of the first four is the number of devices."""
    found = {k: int(stated[k]) for k in ("dp", "tp", "pp", "cp", "vpp", "ep") if stated.get(k) is not None}
    if found.get("dp") == devices:
        found |= {"tp": 1, "pp": 1}
    for key in ("tp", "pp"):
        if key not in found:
            reasons.append(f"{key} not stated")
            return found
    found.setdefault("cp", 1)
    rest = found["tp"] * found["pp"] * found["cp"]
    if "dp" not in found and devices and devices % rest == 0:
        found["dp"] = devices // rest
        assumed.append(f"dp {found['dp']}: the devices that tp, pp and cp leave")
    if devices and found.get("dp", 0) * rest != devices:
        reasons.append(f"dp x tp x pp x cp is not the {devices} devices")
    if found.get("ep", 1) > 1:
        reasons.append("number of experts not stated")
    return found


def _batch(stated: Mapping[str, Any], degrees: Mapping[str, int], reasons: list[str]) -> int:
    """The global batch in sequences; 0, or a reason, where it is missing or does not fit the microbatches."""
    batch, micro = stated.get("global_batch"), stated.get("micro_batch")
    for name, value in (("global batch", batch), ("microbatch", micro)):
        if value is None:
            reasons.append(f"{name} not stated")
    if batch is None or micro is None:
        return int(batch or 0)
    if "dp" in degrees and batch % (micro * degrees["dp"]):
        reasons.append(f"a batch of {batch} is not whole microbatches of {micro} x dp {degrees['dp']}")
    return int(batch)


def _out_of_memory(result: Mapping[str, Any]) -> bool:
    ran = any(result.get(k) for k in ("iteration_time_s", "tokens_per_s_per_gpu", "samples_per_s"))
    return not ran and str(result.get("other", "")).startswith("OOM")


def _ruled_out(stated: Mapping[str, Any], result: Mapping[str, Any], device: str, failed: bool) -> list[str]:
    """Why a complete row is no run of this model on this cluster."""
    reasons = ["out of memory in the source"] if failed else []
    if re.search(r"LoRA|bnb\.nf4|4-bit", " ".join(str(stated.get(k)) for k in ("framework", "precision", "other"))):
        reasons.append("trains adapters or quantised weights, not the model")
    needed = float(result.get("memory_gib_per_gpu") or 0.0) * 2**30
    if device and needed > NOMINAL * load_device(device).memory_bytes:
        reasons.append("needs more memory than the device has, by its own figures")
    return reasons


def _measured(result: Mapping[str, Any], tokens: int, devices: int) -> float:
    if result.get("iteration_time_s"):
        return float(result["iteration_time_s"])
    rate = float(result.get("tokens_per_s_per_gpu") or 0.0)
    return tokens / rate / devices if rate and devices else 0.0


def _precision(stated: Mapping[str, Any], framework: str, device: str, assumed: list[str], lost: list[str]) -> str:
    """Our recipe for a row's precision: the bytes kept per parameter by its framework, at the dtype it computes in."""
    text = str(stated.get("precision") or "").lower()
    if not text:
        assumed.append("mixed precision: not stated")
    if "fp32" in text:
        return "fp32"
    if "fp8" in text:
        lost.append(f"precision {stated['precision']}: priced in bf16")
    if device.startswith(("v100", "t4")):
        lost.append("fp16 with a master copy: priced as the recipe fp16, which keeps parameters in fp32 alone")
        return "fp16"
    if "fp16" in text:
        lost.append(f"precision {stated['precision']}: priced in bf16, which has the same sizes and rates here")
    if "megatron" in framework.lower() or framework.startswith("AA-Scaling"):
        return "megatron"
    if "deepspeed" in framework.lower():
        return "zero"
    if text.endswith("-true"):
        return "pure-bf16"
    if "PURE" in str(stated.get("fsdp")):
        lost.append("gradients reduced in bf16")
    return "fsdp-fp32"


def _pins(
    stated: Mapping[str, Any], model: Mapping[str, Any], degrees: Mapping[str, int], lost: list[str]
) -> tuple[str, ...]:
    pins = [f"{k}={degrees[k]}" for k in ("dp", "tp", "pp", "cp")]
    pins.append(f"micro_batch={int(stated['micro_batch'])}")
    pins += _schedule(stated, degrees, lost)
    pins += _zero(stated, degrees, lost)
    if stated.get("sp") is not None and degrees["tp"] > 1:
        pins.append(f"sequence_parallel={'on' if stated['sp'] else 'off'}")
    pins += _recompute(str(stated.get("recompute") or ""), lost)
    pins += _offload(str(stated.get("offload") or ""), lost)
    pins += _attention(str(model.get("attention") or ""))
    return tuple(pins)


def _schedule(stated: Mapping[str, Any], degrees: Mapping[str, int], lost: list[str]) -> list[str]:
    """`schedule=` and `vpp=`: a pipeline only, and only what the row says of it."""
    name, chunks = str(stated.get("schedule") or ""), degrees.get("vpp")
    if degrees["pp"] == 1:
        return []
    if "first/last stage" in str(stated.get("other")):
        lost.append("the row's own stage sizes: the planner chooses them")
    if (chunks or 1) > 1:
        return ["schedule=interleaved", f"vpp={chunks}"]
    known = {"1F1B": ["schedule=1f1b", "vpp=1"], "GPipe": ["schedule=gpipe", "vpp=1"], "": []}
    if name in known:
        return known[name] or ([f"vpp={chunks}"] if chunks else [])
    if name == "ZB-1p":
        lost.append("schedule ZB-1p: zb-h1, the one of that memory")
        return ["schedule=zb-h1", "vpp=1"]
    lost.append(f"schedule {name}: not in the library, the planner chooses one")
    return ["vpp=1"]


def _zero(stated: Mapping[str, Any], degrees: Mapping[str, int], lost: list[str]) -> list[str]:
    """`zero=`; what splits among one data-parallel rank is no choice."""
    fsdp = str(stated.get("fsdp") or "")
    if "HSDP" in fsdp or "replicas" in fsdp:
        lost.append(f"{fsdp}: parameters sharded inside a group of ranks; zero=3 shards over all")
    if degrees["dp"] == 1:
        return []
    level = stated.get("zero_stage")
    if level is None and re.search(r"full_shard|fsdp", f"{fsdp} {stated.get('framework', '')}", re.IGNORECASE):
        level = 0 if "FSDP=0" in fsdp else 3
    return [] if level is None else [f"zero={2 if 'SHARD_GRAD_OP' in fsdp else int(level)}"]


def _recompute(text: str, lost: list[str]) -> list[str]:
    for value in ("full", "selective", "none"):
        if text.startswith(value):
            return [f"recompute={value}"]
    if text:
        lost.append(f"recompute {text}: the planner chooses it")
    return []


def _offload(text: str, lost: list[str]) -> list[str]:
    if not text:
        return []
    if text == "none" or "=False" in text:
        return ["offload=none"]
    if "stride" in text:
        lost.append("offload: updates interleaved between device and host; the planner chooses the stride")
    if text.startswith("optimizer"):
        return ["offload=optimizer"]
    if text.startswith("activations"):
        return ["offload=activations"]
    lost.append(f"offload {text}: parameters and optimizer states; pinned as params")
    return ["offload=params"]


def _attention(text: str) -> list[str]:
    """`attention=` from a row's words; "fused" alone is a fused softmax, which keeps the scores.

    Fused norms and the like are not priced (`kernels=eager` is the only value built), so they are not pinned.
    """
    low = text.lower()
    if "flash" in low and "unfused" not in low:
        return ["attention=flash"]
    return ["attention=math"] if low else []


def by_set(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs by their set, in the order of the file."""
    found: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        found[run.set].append(run)
    return dict(found)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every script over published runs takes."""
    parser.add_argument(
        "--runs", type=Path, required=True, metavar="FILE", help="published runs, one JSON object a line"
    )
    parser.add_argument("--sets", default="", metavar="A,B", help="only these sets")
    parser.add_argument("--json", action="store_true", help="print JSON")


def summary(runs: Sequence[Run]) -> dict[str, int]:
    """Numbers of rows, usable rows, and distinct (model, cluster, batch), models and clusters among the usable."""
    usable = [r for r in runs if r.usable]
    return {
        "rows": len(runs),
        "usable": len(usable),
        "cases": len({r.case for r in usable}),
        "models": len({r.model for r in usable}),
        "clusters": len({r.cluster for r in usable}),
        "inexact": sum(bool(r.lost) for r in usable),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Which published runs can be priced, by set, and why others cannot.")
    add_arguments(parser)
    parser.add_argument(
        "--reasons", action="store_true", help="also list reasons, assumptions and what pins cannot say"
    )
    given = parser.parse_args()
    runs = read_runs(given.runs, [s for s in given.sets.split(",") if s])
    groups = {**by_set(runs), "all": runs}
    counts = {name: summary(found) for name, found in groups.items()}
    if given.json:
        print(json.dumps({"sets": counts, "reasons": Counter(r for run in runs for r in run.reasons)}, indent=1))
        return
    columns = ("rows", "usable", "cases", "models", "clusters", "inexact")
    print(f"{'set':20}" + "".join(f"{c:>10}" for c in columns))
    for name, count in counts.items():
        print(f"{name:20}" + "".join(f"{count[c]:>10}" for c in columns))
    if given.reasons:
        for title, texts in (("not usable", "reasons"), ("assumed", "assumed"), ("not expressible", "lost")):
            print(f"\n{title}:")
            pairs = Counter((r.set, t) for r in runs if r.usable or texts == "reasons" for t in getattr(r, texts))
            for (name, text), count in sorted(pairs.items()):
                print(f"  {name:20}{count:>6}  {text}")


if __name__ == "__main__":
    main()
