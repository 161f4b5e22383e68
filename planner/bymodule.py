"""What the modules of a model hold: parameters, and what the backward pass keeps, in bytes of the whole batch on one device.

Memory that several ops keep counts once, for the first that keeps it: the module whose backward pass needs it, not the one that
made it. Parameters, buffers and inputs are there anyway and do not count as kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .memory import facts
from .outline import Outline

WITHIN = "(model)"
"""The name of what stands in no part of the model but in itself."""


@dataclass(frozen=True)
class ModuleBytes:
    """Modules at the same place of repeats (`layers.*.mlp`), how many there are, and what they hold together.

    `parameters` counts numbers, `parameter_bytes` and `saved_bytes` are of one device that holds all, and the whole batch.
    """

    name: str
    count: int
    parameters: int
    parameter_bytes: int
    saved_bytes: int


def by_module(outline: Outline) -> tuple[ModuleBytes, ...]:
    """The modules of an outline, those that keep most first.

    An op belongs to the innermost module that called it, by the first word of its source (passes/inline.py). What is at the same
    place of the repeats of a region (planner/outline.py) counts together.
    """
    homes = {op.name: _path(op.source) for op in outline.ops}
    homes |= {p.tensor: p.names[0].rpartition(".")[0] for p in outline.parameters}
    names = _folded(outline, homes)
    paths: dict[str, set[str]] = {}
    sums: dict[str, list[int]] = {}

    def add(item: str, *amounts: int) -> None:
        name = names[item] or WITHIN
        paths.setdefault(name, set()).add(homes[item])
        held = sums.setdefault(name, [0, 0, 0])
        held[:] = [a + b for a, b in zip(held, amounts, strict=True)]

    for parameter in outline.parameters:
        tensor = outline.tensors[parameter.tensor]
        add(parameter.tensor, tensor.elements, tensor.bytes, 0)
    for op, size in _kept(outline):
        add(op, 0, 0, size)
    found = [ModuleBytes(name, len(paths[name]), *sums[name]) for name in sums]
    return tuple(sorted(found, key=lambda m: (-m.saved_bytes, -m.parameter_bytes, m.name)))


def _folded(outline: Outline, homes: Mapping[str, str]) -> dict[str, str]:
    """By op and parameter: its module, with `*` for what differs between the repeats of a region.

    A repeat at an end, which may be in a region of its own, goes by the name of the others.
    """
    names: dict[str, str] = {}
    for region in outline.regions:
        for alike in (*zip(*region.instances, strict=True), *zip(*region.parameters, strict=True)):
            words = [homes[item].split(".") for item in alike]
            if len({len(each) for each in words}) == 1:
                same = (each[0] if len(set(each)) == 1 else "*" for each in zip(*words, strict=True))
                names |= dict.fromkeys(alike, ".".join(same))
    starred = sorted({name for name in names.values() if "*" in name})
    for item, home in homes.items():
        if "*" not in names.get(item, ""):
            names[item] = next((name for name in starred if _fits(home, name)), home)
    return names


def _fits(path: str, name: str) -> bool:
    """Whether a path has a starred name."""
    parts, wanted = path.split("."), name.split(".")
    return len(parts) == len(wanted) and all(w in ("*", p) for p, w in zip(parts, wanted, strict=True))


def _kept(outline: Outline) -> Iterator[tuple[str, int]]:
    """(op, bytes) of what each op is the first to keep."""
    roots, seen = facts(outline).aliases, set[str]()
    for op in outline.ops:
        for saved in op.saved:
            if saved.source == "new":
                yield op.name, saved.bytes
                continue
            uses = op.operands if saved.source == "operand" else op.results
            root = outline.tensors[roots[uses[saved.index].tensor].root]
            if root.role == "activation" and root.name not in seen:
                seen.add(root.name)
                yield op.name, root.bytes


def _path(source: str) -> str:
    """The module path in front of a source line, "" where there is none."""
    first = source.partition(" ")[0]
    return "" if ":" in first else first
