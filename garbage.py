"""Python's cyclic garbage collector, held back where a command makes millions of objects that stay."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

THRESHOLDS = (100_000, 20, 20)
"""Objects, and younger collections, between two collections (Python's own: 700, 10, 10)."""


@contextmanager
def held_back() -> Iterator[None]:
    """Collect rarely inside: importing and tracing keep nearly all they make, and looking for garbage is a sixth of their time.

    The thresholds of before hold again afterwards; a collector that is off stays off.
    """
    before = gc.get_threshold()
    if before[0] > 0:
        gc.set_threshold(*(max(ours, theirs) for ours, theirs in zip(THRESHOLDS, before, strict=True)))
    try:
        yield
    finally:
        gc.set_threshold(*before)


def leave_unswept() -> None:
    """Let this process end without a last search for garbage, which takes a second after torch was imported.

    For commands that only compute: finalizers of objects in reference cycles do not run at exit then.
    """
    atexit.register(gc.freeze)
