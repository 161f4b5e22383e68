"""Tensors on disk: one file each, replaced whole, so that a process that is killed leaves every file old or new, never torn.

The files are scratch: what a checkpoint needs it copies. They lie in a folder of their own within the one that is given, which is
removed when the module goes; those of processes of this machine that have died are removed when the next one starts.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import tempfile
import zlib
from pathlib import Path
from urllib.parse import quote

import torch
from torch import Tensor

from ...errors import UsageError
from .memory import from_file

HEADER = struct.Struct("<8sQI44x")
"""A mark, the bytes that follow, and their CRC-32: 64 bytes, so that what follows is aligned."""

MAGIC = b"swdisk01"
PREFIX = "shardwright-offload-"


class Files:
    """The files of one rank."""

    def __init__(self, folder: Path | None) -> None:
        base = Path(tempfile.gettempdir()) if folder is None else Path(folder)
        if not base.is_dir():
            raise UsageError(f"the folder for offloaded states, {base}, does not exist; make it or name another")
        _clear_dead(base)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{socket.gethostname()}-{os.getpid()}-", dir=base))

    def put(self, name: str, value: Tensor) -> Tensor:
        """Write a tensor, in place of an older one of that name; returns it as it lies on disk."""
        path = self.folder / f"{quote(name, safe='')}.bin"
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy() if value.numel() else b""
        fresh = path.with_suffix(".new")
        with fresh.open("wb") as file:
            file.write(HEADER.pack(MAGIC, value.nbytes, zlib.crc32(data)))
            file.write(data)
        os.replace(fresh, path)
        return from_file(path, tuple(value.shape), value.dtype, HEADER.size)

    def close(self) -> None:
        """Remove all of them."""
        shutil.rmtree(self.folder, ignore_errors=True)


def whole(path: Path) -> bool:
    """Whether a file is what was once written whole."""
    data = path.read_bytes()
    if len(data) < HEADER.size:
        return False
    magic, size, check = HEADER.unpack_from(data)
    body = data[HEADER.size :]
    return magic == MAGIC and size == len(body) and check == zlib.crc32(body)


def _clear_dead(base: Path) -> None:
    """Remove the folders of processes of this machine that are no more."""
    mine = f"{PREFIX}{socket.gethostname()}-"
    for path in base.glob(f"{PREFIX}*"):
        number = path.name.removeprefix(mine).partition("-")[0] if path.name.startswith(mine) else ""
        if number.isdecimal() and not _alive(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
