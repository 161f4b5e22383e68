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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from run_models import cluster_string, config_of, family_of, sizes_of, step_flops
from run_stacks import Stack, attention_of, kernels_of, metric_of, recipe_of, stack_of, zero_of
from shardwright.profiles.devices import load_device

T = TypeVar("T")

KNOBS = frozenset(
    {"dp", "tp", "pp", "vpp", "cp", "ep", "sp", "zero_stage", "fsdp", "micro_batch", "recompute", "precision", "offload",
     "schedule", "other"}
)  # fmt: skip
"""Settings that make a single-knob pair when all but one are equal."""

NOMINAL = 1.1
"""Devices have up to this much of the decimal size in their name (a "16 GB" one 16 GiB)."""


@dataclass(frozen=True)
class Run:
    """One row. Unusable ones have `reasons`; their other fields may be empty.

    `config` is a Hugging Face config, `batch` counts sequences, `pins` are the row's own configuration as `K=V` (without
    the precision recipe, which is part of the question and not of the answer). `assumed`: what the row does not say and
    was filled in; `lost`: what it says and pins cannot. `measured_seconds` is a step's and
    `measured_bytes` a device's peak, 0 where the row gives none; `metric` is what those count (run_layouts.py), "" where they
    cannot be compared. A row that is not `sound` is flagged: its own figures do not add up. `groups` are its ablation groups,
    `stack` its source, device and software, `node_ranks` the devices its nodes have (whether it uses them or not), and `knobs`
    the settings it states.
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
    measured_bytes: float = 0.0
    metric: str = ""
    reliability: str = ""
    sound: bool = True
    groups: tuple[str, ...] = ()
    stack: tuple[str, ...] = ()
    node_ranks: int = 0
    knobs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether its configuration is complete: it can be priced."""
        return not self.reasons

    @property
    def usable(self) -> bool:
        """Whether its configuration is complete and ran."""
        return not self.reasons and not self.out_of_memory

    @property
    def model(self) -> str:
        """The model and its length as text: runs that share it share one capture (per dtype)."""
        return json.dumps([self.config, self.seq], sort_keys=True)

    @property
    def given(self) -> tuple[str, ...]:
        """Pins that say what software runs the model: part of the question, not of the answer."""
        return tuple(pin for pin in self.pins if pin.startswith(("attention=", "kernels=", "loss=", "tp_overlap=")))

    @property
    def chosen(self) -> bool:
        """Whether the planner chooses a setting that the row states and no pin can say: its price is of another configuration."""
        return any(text.startswith(("schedule", "offload", "recompute")) for text in self.lost)

    @property
    def case(self) -> tuple[str, str, int, str, tuple[str, ...]]:
        """(model, cluster, batch, precision, software): runs that share it are answers to one question."""
        return (self.model, self.cluster, self.batch, self.precision, self.given)


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
    """One row as a Run; one whose figures are not numbers is not complete. Raises KeyError without its main parts."""
    try:
        return _read(row)
    except ValueError as error:
        return Run(row["id"], row["set"], {}, 0, "", 0, 0, "", (), reasons=(f"a figure that is no number: {error}",))


def _read(row: Mapping[str, Any]) -> Run:
    model, hardware, stated, result = row["model"], row["hardware"], row["parallelism"], row.get("result") or {}
    assumed: list[str] = []
    lost: list[str] = []
    reasons: list[str] = []
    framework = str(stated.get("framework", ""))
    noted = re.search(r"(\d+)k vocabulary", str(row.get("notes")))
    if noted and model.get("vocab") is None:
        model = {**model, "vocab": int(noted[1]) * 1000}
        assumed.append(f"vocabulary of {model['vocab']}: from the row's notes")
    sizes = sizes_of(model, framework, assumed)
    if sizes is None:
        reasons.append("sizes of the model not stated")
    stack = stack_of(stated)
    seq = int(model.get("seq_len") or 0)
    if not seq:
        reasons.append("sequence length not stated")
    cluster = cluster_string(hardware, assumed, reasons)
    devices = int(hardware.get("gpus") or 0)
    degrees = _degrees(stated, devices, assumed, reasons)
    batch = _batch(stated, degrees, reasons)
    device = (cluster or "").partition(":")[0]
    reasons += _ruled_out(stated, result, device)
    if "single layer" in str(row.get("kind")):
        reasons.append("times one layer, not a step")
    precision = recipe_of(stated, device, stack, assumed, lost)
    pins = _pins(stated, str(model.get("attention") or ""), device, degrees, stack, lost) if not reasons else ()
    config = config_of(model, sizes, seq, stack.dropout) if sizes is not None else {}
    family = family_of(str(model.get("family", "")), model)
    return Run(
        row["id"], row["set"], config, seq, cluster or "", devices, batch, precision, pins, tuple(assumed), tuple(lost),
        tuple(reasons), _out_of_memory(result), _measured(result, sizes or {}, family, batch, seq, devices), _bytes(result),
        metric_of(row, lost) if not reasons else "",
        str(row.get("reliability", "")), not row.get("flags"), tuple(row.get("ablation_groups") or ()),
        _stack(row, device), int(hardware.get("gpus_per_node") or 0), {k: v for k, v in stated.items() if k in KNOBS},
    )  # fmt: skip


def _degrees(stated: Mapping[str, Any], devices: int, assumed: list[str], reasons: list[str]) -> dict[str, int]:
    """dp, tp, pp, cp, vpp, ep as far as they are known; the product of the first four is the number of devices."""
    found = {k: int(stated[k]) for k in ("dp", "tp", "pp", "cp", "vpp", "ep") if stated.get(k) is not None}
    if found.get("dp") == devices or (stated.get("zero_stage") == 3 and "megatron" not in str(stated).lower()):
        found = {"tp": 1, "pp": 1, **found}
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
    batch, micro = stated.get("global_batch"), _micro(stated, degrees)
    counted = stated.get("grad_accum") or degrees.get("pp") == 1
    if batch is None and micro and "dp" in degrees and counted:
        batch = micro * degrees["dp"] * int(stated.get("grad_accum") or 1)
    for name, value in (("global batch", batch), ("microbatch", micro)):
        if not value:
            reasons.append(f"{name} not stated")
    if not batch or not micro:
        return int(batch or 0)
    if "dp" in degrees and batch % (micro * degrees["dp"]):
        reasons.append(f"a batch of {batch} is not whole microbatches of {micro} x dp {degrees['dp']}")
    return int(batch)


def _micro(stated: Mapping[str, Any], degrees: Mapping[str, int]) -> int:
    """Sequences of a microbatch, as stated or what the global batch leaves; one microbatch where none is counted. 0: unknown."""
    if stated.get("micro_batch") is not None:
        return int(stated["micro_batch"])
    batch, parts = stated.get("global_batch"), degrees.get("dp", 0) * int(stated.get("grad_accum") or 1)
    one_stage = degrees.get("pp", 1) == 1 or stated.get("grad_accum")
    return int(batch) // parts if batch and parts and one_stage and batch % parts == 0 else 0


def _out_of_memory(result: Mapping[str, Any]) -> bool:
    ran = any(result.get(k) for k in ("iteration_time_s", "tokens_per_s_per_gpu", "samples_per_s"))
    return not ran and str(result.get("other", "")).startswith("OOM")


def _ruled_out(stated: Mapping[str, Any], result: Mapping[str, Any], device: str) -> list[str]:
    """Why a complete row is no run of this model on this cluster."""
    reasons = []
    if re.search(r"LoRA|bnb\.nf4|4-bit", " ".join(str(stated.get(k)) for k in ("framework", "precision", "other"))):
        reasons.append("trains adapters or quantised weights, not the model")
    needed = float(result.get("memory_gib_per_gpu") or 0.0) * 2**30
    if device and needed > NOMINAL * load_device(device).memory_bytes:
        reasons.append("needs more memory than the device has, by its own figures")
    return reasons


def _measured(
    result: Mapping[str, Any], sizes: Mapping[str, int], family: str, batch: int, seq: int, devices: int
) -> float:  # fmt: skip
    """Seconds of a step, as stated or from tokens, samples or FLOPs a second."""
    if result.get("iteration_time_s"):
        return float(result["iteration_time_s"])
    tokens, samples, flops = (
        float(result.get(k) or 0.0) for k in ("tokens_per_s_per_gpu", "samples_per_s", "tflops_per_gpu")
    )
    if tokens and devices:
        return batch * seq / tokens / devices
    if samples:
        return batch / samples
    if not flops or not devices:
        return 0.0
    kind = str(result.get("tflops_kind") or "")
    return step_flops(sizes, family, batch, seq, recomputed="hardware" in kind) / (flops * 1e12 * devices)


def _bytes(result: Mapping[str, Any]) -> float:
    """A device's peak bytes. What allocators and nvidia-smi call GB is 2**30 bytes."""
    return float(result.get("memory_gib_per_gpu") or 0.0) * 2**30


def _stack(row: Mapping[str, Any], device: str) -> tuple[str, ...]:
    """What one efficiency factor of a user would cover: a source, a device, and the software it ran."""
    stated = row["parallelism"]
    parts = (stated.get("framework"), stated.get("precision"), row["model"].get("attention"))
    return (str((row.get("source") or {}).get("title") or row["set"]), device, *(str(part or "") for part in parts))


def _pins(
    stated: Mapping[str, Any], attention: str, device: str, degrees: Mapping[str, int], stack: Stack, lost: list[str]
) -> tuple[str, ...]:  # fmt: skip
    pins = [f"{k}={degrees[k]}" for k in ("dp", "tp", "pp", "cp")]
    pins.append(f"micro_batch={_micro(stated, degrees)}")
    pins += _schedule(stated, degrees, lost)
    pins += zero_of(stated, degrees["dp"], stack, lost)
    positions = stated["sp"] if stated.get("sp") is not None else stack.overlap or None
    if positions is not None and degrees["tp"] > 1:
        pins.append(f"sequence_parallel={'on' if positions else 'off'}")
    pins += _recompute(str(stated.get("recompute") or ""), stack, lost)
    pins += _offload(str(stated.get("offload") or ""), lost)
    pins += [
        f"attention={attention_of(attention, stack, device)}",
        f"kernels={kernels_of(stated, stack)}",
        f"loss={stack.loss}",
    ]
    if stack.overlap and positions and degrees["tp"] > 1:
        pins.append("tp_overlap=on")
    return tuple(pins)


def _schedule(stated: Mapping[str, Any], degrees: Mapping[str, int], lost: list[str]) -> list[str]:
    """`schedule=` and `vpp=` of a pipeline: what the row says of it, else 1F1B, which every framework has by default."""
    name, chunks = str(stated.get("schedule") or ""), degrees.get("vpp")
    if degrees["pp"] == 1:
        return []
    if (chunks or 1) > 1:
        return ["schedule=interleaved", f"vpp={chunks}"]
    known = {"1F1B": ["schedule=1f1b", "vpp=1"], "GPipe": ["schedule=gpipe", "vpp=1"], "": ["schedule=1f1b", "vpp=1"]}
    if name in known:
        return known[name]
    if name == "ZB-1p":
        lost.append("schedule ZB-1p: zb-h1, the one of that memory")
        return ["schedule=zb-h1", "vpp=1"]
    lost.append(f"schedule {name}: not in the library, the planner chooses one")
    return ["vpp=1"]


def _recompute(text: str, stack: Stack, lost: list[str]) -> list[str]:
    """`recompute=`. "selective" is what Megatron calls running attention again; elsewhere it is a choice of whole layers."""
    if text.startswith(("none", "full")):
        return [f"recompute={text[:4]}"]
    if text.startswith("selective") and ("attention" in text or stack.recipe == "megatron"):
        return ["recompute=selective"]
    if text.startswith("fraction 1.0"):
        return ["recompute=full"]
    if text and not text.startswith("fraction"):  # of layers: run_layouts.py has it
        lost.append(f"recompute {text}: the planner chooses what")
    return []


def _offload(text: str, lost: list[str]) -> list[str]:
    """`offload=`; who does not speak of it does not do it."""
    if not text:
        return ["offload=none"]
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


def by_set(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs by their set, in the order of the file."""
    found: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        found[run.set].append(run)
    return dict(found)


def spread(items: Sequence[T], most: int | None) -> list[T]:
    """At most `most` items at even distances, the first among them."""
    if most is None or len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]


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
