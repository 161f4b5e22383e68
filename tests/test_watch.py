"""Lost ranks: every survivor ends within the timeout and says which rank was lost in which collective."""

from __future__ import annotations

import contextlib
import inspect
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from pool import PRELOADED, Pool
from shardwright.errors import LaunchError
from shardwright.runtime.checkpoint.folders import latest
from shardwright.runtime.watch import Beat, RankFailure, RankWatch, is_lost, waiting, watch_ranks

TIMEOUT = 5.0
SLACK = 2.0
"""Seconds that a busy machine may add."""
Lost = tuple[float, str, bool]
"""When a rank raised (monotonic seconds), its message, and whether it was the first to find out."""


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def a_rank(rank: int, world: int, port: int, ends: bool, what: Callable[[int, int], None], pipe: Connection) -> None:
    """A process of its own: collectives without end, with `what` called before each; tells when it runs, and how it was lost."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "RANK": str(rank)}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    from shardwright.runtime.collectives import all_reduce
    from shardwright.runtime.mesh import ensure_process_group, leave_process_group

    torch.set_num_threads(1)
    ensure_process_group(torch.device("cpu"), TIMEOUT, ends=ends)
    x = torch.ones(1000)
    try:
        for i in range(1_000_000):
            what(rank, i)
            all_reduce(x, torch.distributed.group.WORLD.group_name)
            time.sleep(0.002)
            if i == 10:
                pipe.send("ready")
    except RankFailure as error:
        pipe.send((time.monotonic(), str(error), error.first))
        leave_process_group()


def nothing(rank: int, turn: int) -> None:
    """Join every collective."""


def stay_away(rank: int, turn: int) -> None:
    """Wait for something else."""
    if rank == 1 and turn == 11:
        time.sleep(1000)


def spin(rank: int, turn: int) -> None:
    """Compute for ever in Python, in which other threads get their turn."""
    while rank == 1 and turn == 11:
        pass


class StopsWhileItSaves:
    """From its eleventh turn on every rank saves; rank 1 is stopped in the middle of writing its file."""

    def __init__(self, folder: Path, async_: bool) -> None:
        self.folder, self.async_ = folder, async_

    def __call__(self, rank: int, turn: int) -> None:
        import torch
        from shardwright.runtime import state
        from shardwright.runtime.checkpoint import safe_files

        if turn < 11:
            return
        if rank == 1:
            safe_files.write = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
        if turn == 11:
            self.model = torch.nn.Linear(2, 2)
        state.save_checkpoint(self.folder, self.model, step=turn, async_=self.async_)


class Ranks:
    """Processes that have met and run collectives."""

    def __init__(self, world: int, what: Callable[[int, int], None], ends: bool) -> None:
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        port, self.started, self.pipes = free_port(), list[Any](), list[Connection]()
        for rank in range(world):
            here, there = context.Pipe()
            self.started.append(
                context.Process(target=a_rank, args=(rank, world, port, ends, what, there), daemon=True)
            )
            self.started[-1].start()
            there.close()
            self.pipes.append(here)
        for pipe in self.pipes:
            assert pipe.poll(120)
            assert pipe.recv() == "ready"

    def send(self, rank: int, number: signal.Signals) -> float:
        """Send a signal to a rank; returns when."""
        os.kill(self.started[rank].pid, number)
        return time.monotonic()

    def lost(self, rank: int) -> Lost:
        """What a rank raised; it must come within the timeout, more or less."""
        assert self.pipes[rank].poll(2 * TIMEOUT + SLACK), "a silent hang"
        return self.pipes[rank].recv()


@contextlib.contextmanager
def ranks(world: int = 2, what: Callable[[int, int], None] = nothing, *, ends: bool = False) -> Iterator[Ranks]:
    """Ranks that are killed at the end, whatever became of them."""
    made = Ranks(world, what, ends)
    try:
        yield made
    finally:
        for process in made.started:
            process.kill()
            process.join()


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
def test_a_lost_rank_is_named_with_the_collective_within_the_timeout(number: signal.Signals) -> None:
    with ranks() as two:
        began = two.send(1, number)
        ended, said, first = two.lost(0)
    assert first
    assert "rank 1 gave no sign of life" in said
    assert "rank 0 waited in all_reduce over all ranks (collective " in said
    assert "rank 1 was last seen " in said
    # Nobody waits for the timeout where a connection is closed.
    assert ended - began < (0.6 * TIMEOUT if number == signal.SIGKILL else TIMEOUT) + SLACK


def test_the_rank_that_serves_the_store_may_be_the_lost_one() -> None:
    with ranks() as two:
        began = two.send(0, signal.SIGSTOP)
        ended, said, _ = two.lost(1)
    assert "rank 0" in said
    assert "rank 1 waited in all_reduce over all ranks" in said
    assert ended - began < TIMEOUT + SLACK


def test_a_rank_that_stays_away_is_named_with_its_line_and_others_agree() -> None:
    with ranks(3, stay_away) as three:
        told = [three.lost(0), three.lost(2)]
    assert sorted(first for _, _, first in told) == [False, True]  # one found it, the other repeats it
    assert told[0][1] == told[1][1]
    assert "rank 1 did not come within" in told[0][1]
    line = inspect.getsourcelines(stay_away)[1] + 3
    assert f"rank 1 is at test_watch.py:{line}, after all_reduce over all ranks (collective 11)" in told[0][1]


@pytest.mark.nightly
def test_a_rank_that_hangs_in_python_is_named_with_its_line() -> None:
    with ranks(2, spin) as two:
        _, said, _ = two.lost(0)
    line = inspect.getsourcelines(spin)[1] + 2
    assert "rank 1 did not come within" in said
    assert any(
        f"rank 1 is at test_watch.py:{at}, after all_reduce over all ranks (collective 11)" in said
        for at in (line, line + 1)
    )


@pytest.mark.parametrize(
    "async_", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["waiting", "background"]
)
def test_a_rank_that_is_stopped_while_it_saves_is_named(async_: bool, tmp_path: Path) -> None:
    with ranks(2, StopsWhileItSaves(tmp_path, async_)) as two:
        _, said, first = two.lost(0)
        two.started[0].join(TIMEOUT + SLACK)  # nothing of the save holds the process up
        assert two.started[0].exitcode == 0
    assert first
    assert "rank 1 gave no sign of life" in said
    assert "rank 0 waited in " + ("the background save" if async_ else "a checkpoint's save") in said
    assert latest(tmp_path) is None


def test_a_rank_told_to_end_while_it_waits_does_so_and_says_where() -> None:
    with ranks(2, stay_away, ends=True) as two:
        time.sleep(0.5)
        two.send(0, signal.SIGTERM)
        two.started[0].join(SLACK)
        assert two.started[0].exitcode == 128 + signal.SIGTERM


def limits() -> list[float]:
    """Rank function: seconds that collectives of a mesh's groups wait under a watch of 100 s."""
    import torch
    from shardwright.planner.plan import MeshAxis
    from shardwright.runtime.mesh import Mesh
    from shardwright.runtime.watch import active_watch, unwatch
    from torch.distributed.distributed_c10d import _resolve_process_group

    made = watch_ranks(100.0)
    assert made is not None
    axes = [MeshAxis("dp", 2, "data", "x"), MeshAxis("cp", 1, "model", "x"), MeshAxis("tp", 2, "model", "x")]
    mesh = Mesh.create(axes, torch.device("cpu"))
    names = [mesh.group_name("dp"), mesh.group_name("tp"), mesh.group_name("dp", "tp")]
    assert [made.axes[name] for name in names] == ["dp", "tp", "dp+tp"]
    found = [_resolve_process_group(name)._get_backend(torch.device("cpu")).options._timeout for name in names]
    made.enter("all_reduce", names[1])
    assert made.collective() == "all_reduce over tp"
    unwatch()
    assert active_watch() is None
    assert not made._thread.is_alive()
    return [each.total_seconds() for each in found]


def test_every_group_of_a_mesh_gets_the_limit(ranks4: Pool) -> None:
    assert ranks4.run(limits) == [[70.0, 70.0, 70.0]] * 4


class Board:
    """A store in memory, with the beats of other ranks written by hand."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.said[key] = value

    def get(self, key: str) -> bytes:
        return self.said[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.said for key in keys)


def judged(before: dict[int, Beat], after: dict[int, Beat]) -> str:
    watch = RankWatch(0, 3, Board(), 10.0)
    watch.axes["g"] = "tp"
    watch.enter("all_gather", "g")
    return watch._verdict(before, after, "torch said so\nand more")


def test_verdicts() -> None:
    here = Beat(5, 1, "all_gather over tp", True, "t.py:1")
    later = Beat(8, 1, "all_gather over tp", True, "t.py:1")
    away = Beat(8, 0, "no collective", False, "t.py:9")
    other = Beat(8, 4, "all_reduce over dp", True, "t.py:1")
    everyone = {r: here for r in range(3)}
    assert "ranks 1, 2 gave no sign of life" in judged(everyone, everyone)
    assert "rank 2 gave no sign of life" in judged(everyone, {0: later, 1: later})
    assert judged(everyone, {0: later, 1: later, 2: away}).endswith("rank 2 is at t.py:9, before any collective")
    assert (
        "different collectives: rank 0 waited in all_gather over tp (collective 1); rank 2 waits in all_reduce over dp"
        in (judged(everyone, {0: later, 1: later, 2: other}))
    )
    assert judged(everyone, {r: later for r in range(3)}).endswith("(collective 1): torch said so")


def test_what_is_no_loss_stays_what_it_is() -> None:
    assert is_lost(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:63150"))
    assert not is_lost(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"))
    with pytest.raises(RuntimeError, match="mine"), waiting("all_reduce"):
        raise RuntimeError("mine")
    assert issubclass(RankFailure, LaunchError)
    with pytest.raises(LaunchError, match=r"0\.5 s is too short"):
        watch_ranks(0.5)
    assert watch_ranks(5.0) is None  # one rank waits for nobody


def test_a_mark_costs_next_to_nothing() -> None:
    """Two marks a collective, which on gloo takes 200 us and more: far below a hundredth of it."""
    watch = RankWatch(0, 2, Board(), 600.0)

    def marks(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            watch.enter("all_reduce", "g")
            watch.leave()
        return (time.perf_counter() - start) / count

    assert min(marks(1000) for _ in range(20)) < 5e-6
