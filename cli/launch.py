"""Starting ranks: the torchrun command of a plan, printed and executed.

torchrun runs inside this process (`torch.distributed.run` is what the `torchrun` script calls), so that a rank's exit status
is known and its one clear message is not buried under torchrun's own report of the failure.
"""

from __future__ import annotations

import logging
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import LaunchError
from ..planner.plan import Plan

EXECUTE = "shardwright.runtime.execute"


@dataclass(frozen=True, slots=True)
class Nodes:
    """How many machines take part, which of them this one is, and where they meet (HOST:PORT)."""

    count: int = 1
    rank: int = 0
    meet: str | None = None


def under_torchrun() -> bool:
    """Whether this process is already one of the ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def ranks_of(plan: Plan) -> int:
    """The number of ranks a plan runs on."""
    return plan.pipeline.ranks * math.prod(axis.size for axis in plan.mesh)


def check_world(plan: Plan) -> None:
    """Inside torchrun: raise LaunchError unless as many ranks run as the plan has."""
    world, ranks = os.environ.get("WORLD_SIZE", "1"), ranks_of(plan)
    if world != str(ranks):
        mesh = " x ".join(f"{axis.name}={axis.size}" for axis in plan.mesh)
        raise LaunchError(
            f"torchrun started {world} ranks, the plan needs {ranks} ({mesh}); start {ranks}, or plan for {world}"
        )


def torchrun_arguments(plan: Plan, target: Sequence[str], nodes: Nodes) -> list[str]:
    """Arguments of torchrun that start every rank of this machine; raises LaunchError where the nodes cannot share the ranks."""
    ranks = ranks_of(plan)
    if nodes.count > 1 and nodes.meet is None:
        raise LaunchError(f"--nnodes {nodes.count} needs --rdzv-endpoint HOST:PORT, the same on every node")
    if ranks % nodes.count:
        raise LaunchError(f"the plan needs {ranks} ranks, which {nodes.count} nodes cannot share equally")
    if not 0 <= nodes.rank < nodes.count:
        raise LaunchError(f"--node-rank {nodes.rank}: expected 0 to {nodes.count - 1}")
    _check_devices(ranks // nodes.count)
    if nodes.count == 1:
        where = ["--standalone"]
    else:
        where = [
            f"--nnodes={nodes.count}",
            f"--node-rank={nodes.rank}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={nodes.meet}",
        ]
    return [*where, f"--nproc-per-node={ranks // nodes.count}", *target]


def command_line(arguments: Sequence[str]) -> str:
    """The command as a person would type it."""
    return shlex.join(["torchrun", *arguments])


def launch(arguments: Sequence[str]) -> int:
    """Run torchrun with `arguments`; returns 0 or the exit status of the rank that failed first."""
    from torch.distributed import run as torchrun_module
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    torchrun: Any = torchrun_module  # untyped in torch
    options = torchrun.parse_args(list(arguments))
    per_node = int(options.nproc_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // per_node)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun.run(options)
    except ChildFailedError as failed:
        status = int(failed.get_first_failure()[1].exitcode)
        return status if status > 0 else 128 - status
    return 0


def _check_devices(per_node: int) -> None:
    import torch

    found = torch.cuda.device_count()
    if 0 < found < per_node:
        raise LaunchError(f"the plan needs {per_node} devices on this machine, torch sees {found}; use --nnodes")
