"""What ranks can be asked to measure, by name. Every rank runs the same tasks in the same order; results are plain JSON.

machine      figures of one process (machine.py)           collectives  rows by "NAME:SIZE", or "NAME:SIZE@STRIDE" (comms.py)
ops          `requests` within `budget` seconds (ops.py)   regions      `programs` by key (regions.py)
optimizers   [name, sizes, dtype] by key (optimizers.py)   copies       `folder` is written to (copies.py)
overlap      compute beside a collective (overlap.py)      allocator    bytes kept beyond those used (allocator.py)
sends        rows of messages between neighbours, as "pairs" (comms.py)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..planner.collectives import COLLECTIVES
from .allocator import measure_allocator
from .comms import time_collectives, time_sends
from .copies import time_copies
from .failures import KIND, failure, key_of
from .heap import keep_pages
from .machine import time_machine
from .ops import decode_request, key_text, time_requests
from .optimizers import time_optimizer
from .overlap import time_overlap
from .progress import Tell
from .regions import decode_program, time_regions


def run_tasks(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Results of `job["tasks"]` by task; `tell` hears of single rows as they come."""
    names: Sequence[str] = job["tasks"]
    if not torch.cuda.is_available():
        keep_pages()
    return {name: TASKS[name](job, tell) for name in names}


def _machine(job: dict[str, Any], tell: Tell) -> dict[str, float]:
    return time_machine()


def _collectives(job: dict[str, Any], tell: Tell) -> dict[str, list[tuple[int, float]]]:
    groups = [tuple(g) for g in job["groups"]] if "groups" in job else None
    rows = time_collectives(COLLECTIVES, groups=groups)  # type: ignore[arg-type]
    return {collective_key(*key): found for key, found in rows.items()}


def _sends(job: dict[str, Any], tell: Tell) -> dict[str, list[tuple[int, float]]]:
    return {"pairs": time_sends()}


def collective_key(name: str, size: int, stride: int) -> str:
    """What the rows of one collective are filed under; neighbours have no stride in theirs."""
    return f"{name}:{size}" if stride == 1 else f"{name}:{size}@{stride}"


def _ops(job: dict[str, Any], tell: Tell) -> dict[str, tuple[float, float, float]]:
    rows = time_requests([decode_request(r) for r in job["requests"]], job["budget"], tell)
    return {key_text(key): (row.forward, row.backward, row.error) for key, row in rows.items()}


def _regions(job: dict[str, Any], tell: Tell) -> dict[str, tuple[float, float]]:
    programs = [(key, decode_program(one), decode_program(two)) for key, one, two in job["programs"]]
    return time_regions(programs, tell)


def _optimizers(job: dict[str, Any], tell: Tell) -> dict[str, float]:
    found = {}
    for key, (name, sizes, dtype) in job["optimizers"].items():
        tell("begin", "optimizer", key)
        try:
            found[key] = time_optimizer(name, sizes, dtype)
        except (ValueError, MemoryError, RuntimeError) as error:
            tell(KIND, key_of("optimizer", key), failure(error))
    return found


def _copies(job: dict[str, Any], tell: Tell) -> dict[str, float]:
    try:
        return time_copies(Path(job["folder"]))
    except OSError as error:
        tell(KIND, key_of("copies", "disk"), failure(error))
        return {}


def _overlap(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    return time_overlap()


def _allocator(job: dict[str, Any], tell: Tell) -> dict[str, float]:
    return measure_allocator()


TASKS: dict[str, Callable[[dict[str, Any], Tell], Any]] = {
    "machine": _machine, "collectives": _collectives, "ops": _ops, "regions": _regions, "optimizers": _optimizers,
    "copies": _copies, "overlap": _overlap, "allocator": _allocator, "sends": _sends,
}  # fmt: skip
