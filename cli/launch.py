"""Starting ranks: the torchrun command of a plan, printed and executed.

torchrun runs inside this process (`torch.distributed.run` is what the `torchrun` script calls), so that a rank's exit status
is known and its one clear message is not buried under torchrun's own report of the failure.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from ..errors import LaunchError
from ..planner.plan import Plan
from .places import interface_of, local_address, split_endpoint

EXECUTE = "shardwright.runtime.execute"


@dataclass(frozen=True, slots=True)
class Nodes:
    """How many machines take part, which of them this one is, and where they meet (HOST:PORT).

    `per_node` ranks run on each (None: the plan's ranks in equal shares). With `least` below `count` machines may leave and
    come; the ranks are started again up to `restarts` times.
    """

    count: int = 1
    rank: int = 0
    meet: str | None = None
    per_node: int | None = None
    least: int | None = None
    restarts: int = 0

    @property
    def elastic(self) -> bool:
        """Whether the number of machines may change."""
        return self.least is not None and self.least != self.count


def under_torchrun() -> bool:
    """Whether this process is already one of the ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def mesh_text(plan: Plan) -> str:
    """The mesh in a few words: "dp=2 x tp=4"."""
    return " x ".join(f"{axis.name}={axis.size}" for axis in plan.mesh) or "one device"


def check_world(plan: Plan) -> None:
    """Inside torchrun: raise LaunchError unless as many ranks run as the plan has."""
    world, ranks = os.environ.get("WORLD_SIZE", "1"), plan.ranks
    if world != str(ranks):
        raise LaunchError(
            f"torchrun started {world} ranks, the plan needs {ranks} ({mesh_text(plan)}); "
            f"start {ranks}, or plan for {world}, or pass --elastic"
        )


def torchrun_arguments(plan: Plan, target: Sequence[str], nodes: Nodes) -> list[str]:
    """Arguments of torchrun that start every rank of this machine; raises LaunchError where the nodes cannot share the ranks."""
    if nodes.count > 1 and nodes.meet is None:
        raise LaunchError(f"--nnodes {nodes.count} needs --rdzv-endpoint HOST:PORT, the same on every node")
    if not 0 <= nodes.rank < nodes.count:
        raise LaunchError(f"--node-rank {nodes.rank}: expected 0 to {nodes.count - 1}")
    per_node = _per_node(plan, nodes)
    _check_devices(per_node)
    restarts = [f"--max-restarts={nodes.restarts}"] if nodes.restarts else []
    if nodes.meet is None:
        return ["--standalone", *restarts, f"--nproc-per-node={per_node}", *target]
    split_endpoint(nodes.meet)
    address = local_address(nodes.meet)
    return [
        f"--nnodes={nodes.least}:{nodes.count}" if nodes.elastic else f"--nnodes={nodes.count}",
        f"--node-rank={nodes.rank}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={nodes.meet}",
        f"--rdzv-conf=is_host={int(nodes.rank == 0)}",
        *([f"--local-addr={address}"] if address else []),
        *restarts,
        f"--nproc-per-node={per_node}",
        *target,
    ]


def command_line(arguments: Sequence[str]) -> str:
    """The command as a person would type it."""
    return shlex.join(["torchrun", *arguments])


def launch(arguments: Sequence[str]) -> int:
    """Run torchrun with `arguments`; returns 0 or the exit status of the rank that failed first.

    A rank that a signal ended is named on stderr.
    """
    from torch.distributed import run as torchrun_module
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from ..profiles.local import threads_per_rank

    torchrun: Any = torchrun_module  # untyped in torch
    options = torchrun.parse_args(list(arguments))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(int(options.nproc_per_node))))
    interface = interface_of(options.local_addr) if options.local_addr else None
    if interface is not None:  # else gloo takes the address of the machine's name, which often is one of loopback
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun.run(options)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        status = int(failure.exitcode)
        if status < 0:
            click.echo(f"error: rank {rank} was ended by {_signal_name(-status)}", err=True)
            return 128 - status
        return status
    return 0


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _per_node(plan: Plan, nodes: Nodes) -> int:
    """Ranks on each machine; raises LaunchError where the machines do not make the plan's ranks."""
    ranks = plan.ranks
    if nodes.per_node is None:
        if ranks % nodes.count:
            raise LaunchError(
                f"the plan needs {ranks} ranks ({mesh_text(plan)}), which {nodes.count} nodes cannot share equally; "
                f"take a number of nodes that divides {ranks}, or plan for another number of devices"
            )
        return ranks // nodes.count
    started = nodes.count * nodes.per_node
    if started != ranks and not nodes.elastic:
        raise LaunchError(
            f"--nnodes {nodes.count} with --nproc-per-node {nodes.per_node} starts {started} ranks, the plan needs {ranks} "
            f"({mesh_text(plan)}); {_smallest_fix(ranks, nodes.per_node)}"
        )
    return nodes.per_node


def _smallest_fix(ranks: int, per_node: int) -> str:
    if ranks % per_node == 0:
        return f"pass --nnodes {ranks // per_node}, or plan again"
    return f"choose numbers whose product is {ranks}, or plan again"


def _check_devices(per_node: int) -> None:
    import torch

    found = torch.cuda.device_count()
    if 0 < found < per_node:
        raise LaunchError(f"the plan needs {per_node} devices on this machine, torch sees {found}; use --nnodes")
