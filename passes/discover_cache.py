"""What `discover` found, kept in a JSON file: one entry per op, schema and argument signature."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..planner.rule_types import Shape

VERSION = 1
Factor = tuple[dict[int, int], list[int | None]]
"""A factor: {operand: dim} that are split together, and per result the dim it joins along (None: the pieces sum)."""


@dataclass
class Finding:
    """Factors, linear entries, and what did not hold."""

    factors: list[Factor] = field(default_factory=list)
    linear: list[tuple[int, ...]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def signature(
    target: Callable[..., Any],
    args: Any,
    kwargs: Mapping[str, Any],
    shapes: Sequence[Shape],
    dtypes: Sequence[torch.dtype],
) -> str:
    """The key of a call: the op with its schema, the shapes and dtypes of its tensors, and its other arguments."""
    schema = getattr(target, "_schema", None)
    name = str(schema) if schema is not None else f"{target.__module__}.{getattr(target, '__qualname__', target)}"
    tensors = ", ".join(f"{d}{list(s)}" for s, d in zip(shapes, dtypes, strict=True))
    return f"{name} | {tensors} | {args} {dict(kwargs)}"


def _entries(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}  # absent or damaged: found anew
    if not isinstance(document, dict) or document.get("version") != VERSION:
        return {}
    entries = document.get("entries")
    return entries if isinstance(entries, dict) else {}


def load(path: Path, key: str) -> Finding | None:
    """The entry of `key`, or None where there is none or it cannot be read."""
    entry: Any = _entries(path).get(key)
    try:
        factors: list[Factor] = [
            ({int(i): int(d) for i, d in f["operands"].items()}, list(f["results"])) for f in entry["factors"]
        ]
        return Finding(factors, [tuple(g) for g in entry["linear"]], list(entry["failures"]))
    except (TypeError, KeyError, ValueError, AttributeError):
        return None


def store(path: Path, key: str, finding: Finding) -> None:
    """Add an entry; the file is replaced in one step, so a reader never sees half of it."""
    entry = {
        "factors": [
            {"operands": {str(i): d for i, d in dims.items()}, "results": joined} for dims, joined in finding.factors
        ],
        "linear": [list(g) for g in finding.linear],
        "failures": finding.failures,
    }
    document = {"version": VERSION, "entries": {**_entries(path), key: entry}}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(document, file, indent=1, sort_keys=True)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
