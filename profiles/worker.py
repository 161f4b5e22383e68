"""One rank of a measurement: `python -m shardwright.profiles.worker FOLDER RANK` (started by profiles/jobs.py).

FOLDER/job.json says what to time; rank 0 leaves FOLDER/result.json. Everything is plain JSON.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..planner.collectives import COLLECTIVES
from .comms import time_collectives
from .machine import time_machine
from .ops import decode_request, key_text, time_requests


def main(folder: Path, rank: int) -> None:
    """Run the job in `folder` as rank `rank`; all tasks on all ranks, in one order."""
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    store = torch.distributed.FileStore(str(folder / "store"), job["ranks"])  # type: ignore[attr-defined]
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=job["ranks"], timeout=timedelta(seconds=job["timeout"])
    )
    result = {task: _TASKS[task](job) for task in job["tasks"]}
    if rank == 0:
        part = folder / "result.part"
        part.write_text(json.dumps(result))
        part.rename(folder / "result.json")
    dist.barrier()
    dist.destroy_process_group()


def _machine(job: dict[str, Any]) -> dict[str, float]:
    return time_machine()


def _collectives(job: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    return {f"{name}:{size}": rows for (name, size), rows in time_collectives(COLLECTIVES).items()}


def _ops(job: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    rows = time_requests([decode_request(r) for r in job["requests"]], job["budget"])
    return {key_text(key): (row.forward, row.backward, row.error) for key, row in rows.items()}


_TASKS = {"machine": _machine, "collectives": _collectives, "ops": _ops}

if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
