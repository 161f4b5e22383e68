"""Copies of this machine: inside memory, between host and device in each direction and in both, and to and from disk.

All ranks copy at once. Disk figures are honest ones: a write ends when the file is on the disk (fsync), and what is read was
dropped from the page cache before (posix_fadvise; where the system has none, reading is not measured).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from .clock import Watch
from .timing import agree, finish, spread_mean, time_call

COPY_BYTES = 64 << 20
SMALL_BYTES = 4096
DISK_BYTES = 128 << 20
SECONDS = 0.3


def time_copies(folder: Path) -> dict[str, float]:
    """Bytes per second of a rank: "memory"; with a GPU "host_to_device", "device_to_host", "both_ways" (each way, both busy)
    and "latency" (seconds of a small copy); "disk_write" and "disk_read" in `folder`, and the "disk_bytes" that are free there.

    Raises OSError where nothing can be written there.
    """
    found = {"memory": _memory()}
    if torch.cuda.is_available():
        found |= _device()
    return {**found, **_disk(folder)}


def _memory() -> float:
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    return COPY_BYTES / _seconds(lambda: target.copy_(source))


def _device() -> dict[str, float]:
    """Pinned copies on streams of their own, as offload makes them."""
    host_in, host_out = (torch.ones(COPY_BYTES, dtype=torch.uint8).pin_memory() for _ in range(2))
    here, there = (torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    small = torch.ones(SMALL_BYTES, dtype=torch.uint8).pin_memory()
    streams = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def load() -> None:
        with torch.cuda.stream(streams[0]):
            here.copy_(host_in, non_blocking=True)

    def save() -> None:
        with torch.cuda.stream(streams[1]):
            host_out.copy_(there, non_blocking=True)

    def both() -> None:
        load()
        save()

    return {
        "host_to_device": COPY_BYTES / _seconds(load), "device_to_host": COPY_BYTES / _seconds(save),
        "both_ways": COPY_BYTES / _seconds(both),
        "latency": _seconds(lambda: here[:SMALL_BYTES].copy_(small, non_blocking=True)),
    }  # fmt: skip


def _disk(folder: Path) -> dict[str, float]:
    data = memoryview(os.urandom(1 << 20))
    with tempfile.TemporaryDirectory(dir=folder, prefix="shardwright-") as name:
        path = Path(name) / "copy"
        found = {
            "disk_write": DISK_BYTES / spread_mean(_once(lambda: _write(path, data))),
            "disk_bytes": float(shutil.disk_usage(folder).free),
        }
        if hasattr(os, "posix_fadvise"):
            _drop(path)
            found["disk_read"] = DISK_BYTES / spread_mean(_once(lambda: _read(path)))
    return found


def _write(path: Path, data: memoryview) -> None:
    with path.open("wb", buffering=0) as file:
        for _ in range(DISK_BYTES // len(data)):
            file.write(data)
        os.fsync(file.fileno())


def _drop(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(path: Path) -> None:
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while file.readinto(buffer):
            pass


def _once(call: Callable[[], object]) -> float:
    """Wall seconds of one call that cannot be repeated; ranks begin together."""
    agree(0.0)
    watch = Watch()
    call()
    return watch.stop().seconds


def _seconds(call: Callable[[], object]) -> float:
    call()
    finish()
    return spread_mean(time_call(call, SECONDS).seconds)
