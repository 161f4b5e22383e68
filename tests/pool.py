"""A long-lived pool of gloo ranks for tests: spawned once, then every call runs one function on all ranks.

    pool = Pool(4)
    pool.run(function, *args) -> [result of rank 0, ..., result of rank 3]

`function` is a module-level function (pickled by reference) and finds an initialised default process group of
`world_size` gloo ranks with one thread each. An exception on any rank is raised here with the rank's traceback. A call
that does not answer within `timeout` seconds is reported with every rank's stack; the ranks are then killed and the
next call starts fresh ones.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CALLS = 50
"""After so many calls the ranks are started afresh: process groups have three threads each, which wake a hundred times a second,
and DTensor's caches keep them. Meshes over the same ranks share theirs (`_share_groups`); what tests make themselves remains."""
PRELOADED = [
    "torch", "torch._dynamo", "torch.export", "torch.distributed.tensor", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama", "shardwright.passes.prepare", "shardwright.runtime.apply",
    "shardwright.runtime.verify",
    # What torch imports late, at the first capture and the first optimizer.
    "torch._export.non_strict_utils", "torch._functorch._aot_autograd.autograd_cache", "torch._inductor.inductor_prims",
    "networkx",
]  # fmt: skip
"""Imported once, by the process that ranks are forked from; nothing of it starts a thread."""
GRACE_SECONDS = 5.0
"""How long the other ranks may take to answer after one has failed (they may hang in a collective)."""


class RankError(AssertionError):
    """A function raised, died or hung on some rank; the message carries rank and traceback."""


def _share_groups() -> None:
    """Let all plans that this process runs use the same groups for the same ranks and axes."""
    from shardwright.runtime import mesh

    device_mesh, create_flat = mesh._device_mesh, mesh.Mesh._create_flat
    known: dict[Any, Any] = {}

    def shared(device: Any, ranks: Any, names: tuple[str, ...]) -> Any:
        key = device.type, str(ranks.tolist()), names
        if key not in known:
            known[key] = device_mesh(device, ranks, names)
        return known[key]

    def flat(self: Any, axes: tuple[str, ...]) -> tuple[str, ...]:
        key = str(self.ranks.tolist()), self.names, axes
        if key not in known:
            known[key] = create_flat(self, axes)
        return known[key]

    mesh._device_mesh, mesh.Mesh._create_flat = shared, flat  # type: ignore[method-assign]


def _serve(rank: int, world_size: int, folder: str, timeout: float, pipe: Connection) -> None:
    """The loop of one rank: receive (function, args), run it, send ("ok", result) or ("error", traceback)."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    _share_groups()
    with open(Path(folder) / f"stack{rank}", "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        store = dist.FileStore(str(Path(folder) / "store"), world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        pipe.send_bytes(pickle.dumps(("ok", None)))
        while True:
            try:
                function, args = pickle.loads(pipe.recv_bytes())
            except EOFError:
                break
            except BaseException:
                pipe.send_bytes(pickle.dumps(("error", traceback.format_exc())))
                continue
            try:
                answer = pickle.dumps(("ok", function(*args)))
            except BaseException:
                answer = pickle.dumps(("error", traceback.format_exc()))
            pipe.send_bytes(answer)
    os._exit(0)  # taking the process groups down in order costs seconds and tests nothing


class Pool:
    """`world_size` gloo ranks that stay alive between calls; `close()` ends them."""

    def __init__(self, world_size: int, timeout: float = 120.0) -> None:
        self.world_size = world_size
        self.timeout = timeout
        self._workers: list[tuple[Any, Connection]] = []
        self._folder = ""
        self._calls = 0

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(*args)` on every rank and return the results by rank; raises RankError."""
        if self._calls == CALLS:
            self.close()
        if not self._workers:
            self._start()
        self._calls += 1
        request = pickle.dumps((function, args))
        for _, pipe in self._workers:
            pipe.send_bytes(request)
        return self._collect(getattr(function, "__name__", str(function)))

    def close(self) -> None:
        """End all ranks."""
        for _, pipe in self._workers:
            pipe.close()
        for process, _ in self._workers:
            process.join(timeout=5.0)
            if process.is_alive():
                process.kill()
                process.join()
        self._workers, self._calls = [], 0
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._folder = tempfile.mkdtemp(prefix="ranks")
        for rank in range(self.world_size):
            here, there = context.Pipe()
            arguments = (rank, self.world_size, self._folder, self.timeout, there)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))
        self._collect("start")

    def _collect(self, name: str) -> list[Any]:
        answers: dict[int, tuple[str, Any]] = {}
        deadline = time.monotonic() + self.timeout
        while len(answers) < self.world_size and time.monotonic() < deadline:
            for rank, (process, pipe) in enumerate(self._workers):
                if rank in answers:
                    continue
                try:
                    if pipe.poll(0.0005):
                        answers[rank] = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionError):
                    answers[rank] = ("error", f"the process died (exit code {process.exitcode})")
            if any(kind == "error" for kind, _ in answers.values()):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return self._judge(name, answers)

    def _judge(self, name: str, answers: dict[int, tuple[str, Any]]) -> list[Any]:
        failed = {rank: value for rank, (kind, value) in answers.items() if kind == "error"}
        silent = [rank for rank in range(self.world_size) if rank not in answers]
        if not failed and not silent:
            return [answers[rank][1] for rank in range(self.world_size)]
        report = [f"{name} failed on rank(s) {sorted(failed)}" + (f"; no answer from {silent}" if silent else "")]
        report += [f"--- rank {rank}\n{text}" for rank, text in sorted(failed.items())]
        report += [f"--- rank {rank} was at\n{self._stack(rank)}" for rank in silent]
        if silent or len(failed) < self.world_size:
            self._kill()
        raise RankError("\n".join(report))

    def _stack(self, rank: int) -> str:
        process, _ = self._workers[rank]
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.2)
        return (Path(self._folder) / f"stack{rank}").read_text()

    def _kill(self) -> None:
        for process, _ in self._workers:
            process.kill()
        self.close()
