"""The code behind the package's own ops, as a digest: compiled graphs are cached under it (torch_compat.py, `compiled`)."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

FOLDERS = ("passes", "runtime")
"""Where composite ops, and what takes their place on a rank, are written."""


@functools.cache
def source_digest() -> str:
    """16 hexadecimal digits that differ when any source file in FOLDERS does."""
    found = hashlib.sha256()
    root = Path(__file__).parent.parent
    for path in sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py")):
        found.update(f"{path.relative_to(root)}\n".encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:16]
