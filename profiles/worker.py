"""One rank of a measurement: `python -m shardwright.profiles.worker FOLDER RANK` (started by profiles/jobs.py).

FOLDER/job.json says what to measure (profiles/tasks.py), and which modules to import for the ops they make; rank 0 leaves rows in
FOLDER/progress as they come, and at the end FOLDER/result.json.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from .progress import into, untold
from .tasks import run_tasks


def main(folder: Path, rank: int) -> None:
    """Run the job in `folder` as rank `rank`; all tasks on all ranks, in one order."""
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    for name in job.get("imports", ()):
        importlib.import_module(name)
    on_gpu = bool(job.get("gpu"))
    if on_gpu:
        torch.cuda.set_device(rank)
    store = torch.distributed.FileStore(str(folder / "store"), job["ranks"])  # type: ignore[attr-defined]
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=job["ranks"],
        timeout=timedelta(seconds=job["timeout"]),
    )  # fmt: skip
    with open(folder / "progress" if rank == 0 else os.devnull, "a") as progress:
        result = run_tasks(job, into(progress) if rank == 0 else untold)
    if rank == 0:
        part = folder / "result.part"
        part.write_text(json.dumps(result))
        part.rename(folder / "result.json")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
