"""What could not be measured, and why: rows of kind "failure" in the profile store, never numbers.

A row's key is the kind and key of what was to be measured ("op [...]"); its value has `type` ("out of memory", "unsupported" or
"timed out") and the error's `message`.
"""

from __future__ import annotations

from typing import Any

import torch

KIND = "failure"
OUT_OF_MEMORY, UNSUPPORTED, TIMED_OUT = "out of memory", "unsupported", "timed out"
LONGEST_MESSAGE = 300


def failure(error: BaseException) -> dict[str, str]:
    """The typed row of an error."""
    text = f"{type(error).__name__}: {error}".splitlines()[0][:LONGEST_MESSAGE]
    short = isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in text
    late = isinstance(error, TimeoutError)
    return {"type": OUT_OF_MEMORY if short else TIMED_OUT if late else UNSUPPORTED, "message": text}


def late(seconds: float) -> dict[str, str]:
    """The row of something that did not answer for so long."""
    return {"type": TIMED_OUT, "message": f"no answer within {seconds:.0f} s"}


def key_of(kind: str, key: str) -> str:
    """What the failure of a figure is filed under."""
    return f"{kind} {key}"


def failed(rows: dict[str, Any], kind: str) -> set[str]:
    """Keys of the figures of one kind that failed before, from the store's rows of kind "failure"."""
    return {key.removeprefix(f"{kind} ") for key in rows if key.startswith(f"{kind} ")}
