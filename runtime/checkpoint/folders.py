"""Folders of checkpoints: written beside their place and renamed, found again, thinned out.

    FOLDER/step-00000040/                checkpoint.json, rank-00000.safetensors, ...
    FOLDER/.step-00000050.part/          one being written, or left by a process that was killed
    FOLDER/.step-00000030.old/           one being removed

A folder gets its plain name by one rename, after every file in it is on the disk: what has the name is whole. At no moment is the
newest whole checkpoint removed or renamed away before the next one has its name.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from ...errors import CheckpointError
from . import manifest

_NAME = re.compile(r"step-(\d{8,18})(\.before)?")


def latest(folder: str | Path) -> Path | None:
    """The newest whole checkpoint in `folder`; None where there is none. This is how a run finds where to go on.

    Of two for one step the newly written one; one that it replaced ("before") counts only until the new one has its name.
    """
    return found[-1] if (found := checkpoints(folder)) else None


def checkpoints(folder: str | Path) -> list[Path]:
    """All whole checkpoints in `folder`, oldest first."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    whole = [name for name in names if _NAME.fullmatch(name) and (Path(folder) / name / manifest.FILE).is_file()]
    return [Path(folder) / name for name in sorted(whole, key=_order)]


def resolve(folder: str | Path) -> Path:
    """The checkpoint that `folder` is, or the newest in it; raises CheckpointError where there is none."""
    path = Path(folder)
    if (path / manifest.FILE).is_file():
        return path
    found = latest(path)
    if found is None:
        raise CheckpointError(f"{path}: no checkpoint in it; expected step-NNNNNNNN/{manifest.FILE}")
    return found


def begin(folder: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of `step` into; what a killed process left is removed.

    Raises CheckpointError where the folder already holds a later step: the newest checkpoint is the one with the most steps.
    """
    found = latest(folder)
    if found is not None and _order(found.name)[0] > step:
        raise CheckpointError(
            f"{folder}: holds {found.name}, later than step {step} to be saved; save to another folder, or remove the later ones"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.iterdir():
            if re.fullmatch(r"\.step-\d+(\.before)?\.(part|old)", left.name):
                shutil.rmtree(left)
        part = folder / f".{_name(step)}.part"
        part.mkdir()
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot write: {error.strerror or error}") from None
    return part


def commit(part: Path, text: bytes, *, keep: int) -> Path:
    """Give a written folder its metadata and its name, then remove all but the newest `keep` checkpoints.

    Raises CheckpointError where it cannot be written; the checkpoints before it are then as they were.
    """
    folder, name = part.parent, part.name.removeprefix(".").removesuffix(".part")
    final = folder / name
    try:
        with (part / manifest.FILE).open("xb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        _sync(part)
        if (
            final.exists()
        ):  # the same step again: the one before stays readable under another name until this one has its own
            before = folder / f"{name}.before"
            _remove(before)
            os.rename(final, before)
        os.rename(part, final)
        _sync(folder)
        _thin(folder, final, keep)
    except OSError as error:
        raise CheckpointError(f"{final}: cannot write: {error.strerror or error}") from None
    return final


def _thin(folder: Path, newest: Path, keep: int) -> None:
    found = [path for path in checkpoints(folder) if path != newest]
    plain = [path for path in found if not path.name.endswith(".before")]
    for path in [*(set(found) - set(plain)), *plain[: max(len(plain) - (keep - 1), 0)]]:
        _remove(path)


def _remove(path: Path) -> None:
    """Rename away first, so that a half-removed folder has no checkpoint's name."""
    if path.exists():
        hidden = path.with_name(f".{path.name}.old")
        os.rename(path, hidden)
        shutil.rmtree(hidden)


def _sync(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _order(name: str) -> tuple[int, bool]:
    found = _NAME.fullmatch(name)
    assert found is not None
    return int(found[1]), found[2] is None
