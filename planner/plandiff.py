"""What differs between two plans: decisions first, then what is predicted of them.

Records are matched by what names them (an op by its name, a parameter by its first name, a mesh axis by its name), so an
inserted op is one difference and not a shift of all that follow. Stages have no name and are matched by their place. A region
that one plan runs in one way and the other in several is matched to the one that most of its instances take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from .plan import Plan
from .planfile import to_plain

# Top-level field of a plan -> the dimension a reader thinks in; fields not named here stand for themselves.
_DIMENSIONS = {
    "source": "model", "graph": "model", "cluster_fingerprint": "cluster", "memory_limit_bytes": "memory limit",
    "regions": "placements",
}  # fmt: skip
# Fields of a region's entry that are a dimension of their own, and those of a stage that follow from the plan.
_REGION = {
    "parameters": "parameters", "borrowed_zero": "parameters", "recompute": "recompute", "policy": "recompute",
    "offload": "offload",
}  # fmt: skip
_CONSEQUENCES = ("forward_seconds", "backward_seconds", "finish_seconds", "peak_bytes")
_ORDER = ("version", "edited", "model", "cluster", "objective", "phase", "goal", "optimizer", "update", "precision", "semantics",
          "memory limit", "pins", "mesh", "pipeline", "stages", "placements", "parameters", "recompute", "offload", "notes",
          "search", "runners_up", "frontier", "predicted")  # fmt: skip
# Numbers that name something.
_LABELS = ("rank", "zero", "borrowed_zero", "first", "version", "seed")
# How records in a list are matched: the fields that name them.
_KEYS = (("op",), ("names",), ("collective", "axis"), ("name",))


@dataclass(frozen=True, slots=True)
class Difference:
    """One field that differs; a side that lacks the field has None."""

    dimension: str
    where: str
    a: Any
    b: Any

    @property
    def change(self) -> float | None:
        """(b - a) / a where both are numbers that measure something and a is not zero."""
        sides = (self.a, self.b)
        if self.where.rpartition(".")[2] in _LABELS:
            return None
        if any(isinstance(s, bool) or not isinstance(s, (int, float)) for s in sides) or not self.a:
            return None
        return float((self.b - self.a) / self.a)


def diff(a: Plan, b: Plan) -> tuple[Difference, ...]:
    """Every difference between two plans, decisions before consequences; empty when they say the same."""
    left, right = to_plain(a), to_plain(b)
    _align(left, right)
    pairs = list(_regions(left.pop("regions"), right.pop("regions")))
    walked = [*_walk(left, right, ""), *(found for where, x, y in pairs for found in _walk(x, y, where))]
    found = [Difference(_dimension(where), where, x, y) for where, x, y in walked if where != "digest"]
    return tuple(sorted(found, key=lambda d: _rank(d.dimension)))


def _rank(dimension: str) -> int:
    return _ORDER.index(dimension) if dimension in _ORDER else len(_ORDER)


def _dimension(where: str) -> str:
    top = where.partition(".")[0].partition("[")[0]
    field = where.partition("].")[2].partition(".")[0].partition("[")[0]
    if top == "regions" and field in _REGION:
        return _REGION[field]
    if top == "stages" and field in _CONSEQUENCES:
        return "predicted"
    return _DIMENSIONS.get(top, top)


def _regions(a: list[Any], b: list[Any]) -> Iterator[tuple[str, Any, Any]]:
    """(where, entry or None, entry or None): entries by name where both plans have the same, else by how many instances."""
    left, right = _by_region(a), _by_region(b)
    for region in [*left, *(r for r in right if r not in left)]:
        mine, other = left.get(region, {}), right.get(region, {})
        if set(mine) == set(other):
            yield from ((f"regions[{name}]", mine[name], other[name]) for name in mine)
            continue
        sides = (_most_first(mine), _most_first(other))
        for i, (x, y) in enumerate(zip_longest(*sides)):
            yield f"regions[{region}]" if i == 0 else f"regions[{region}, option {i + 1}]", x, y


def _align(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Where the meshes have other axes, placements are spelled on the axes of both: whole on one that a mesh lacks."""
    own = [[axis["name"] for axis in side["mesh"]] for side in (a, b)]
    if own[0] == own[1]:
        return
    both = list(dict.fromkeys([*own[0], *own[1]]))
    for side, names in zip((a, b), own, strict=True):
        for entry in side["regions"]:
            for record in [*entry["ops"], *entry["parameters"]]:
                for name in {"choice", "result", "home"} & set(record):
                    if record[name]:
                        record[name] = _spread(dict(zip(names, record[name], strict=True)), both)


def _spread(states: dict[str, str], axes: list[str]) -> list[str]:
    return [states.get(axis, "R") for axis in axes]


def _by_region(entries: list[Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        found.setdefault(entry["region"] or entry["name"], {})[entry["name"]] = entry
    return found


def _most_first(entries: dict[str, Any]) -> list[Any]:
    """Entries of a region without the names that only tell them apart."""
    ordered = sorted(entries.values(), key=lambda e: -e["repeats"])
    return [{k: v for k, v in entry.items() if k not in ("name", "region")} for entry in ordered]


def _walk(a: Any, b: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if a == b and type(a) is type(b):
        return
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            yield from _walk(a.get(key), b.get(key), f"{where}.{key}" if where else key)
        return
    if where == "stages" and a and b:
        for i, (x, y) in enumerate(zip_longest(a, b)):
            yield from _walk(x, y, f"stages[{i}]")
        return
    if isinstance(a, list) and isinstance(b, list):
        left, right = _named(a), _named(b)
        if left is not None and right is not None:
            for key in [*left, *(k for k in right if k not in left)]:
                yield from _walk(left.get(key), right.get(key), f"{where}[{key}]")
            return
    yield where, a, b


def _named(records: list[Any]) -> dict[str, Any] | None:
    """Records by their name; None for a list that holds something else, or names that repeat."""
    if not all(isinstance(r, dict) for r in records):
        return None
    found = {_name(r): r for r in records}
    return found if len(found) == len(records) and "" not in found else None


def _name(record: dict[str, Any]) -> str:
    if "microbatches" in record and isinstance(record.get("mesh"), dict):
        return _shape_name(record)
    for fields in _KEYS:
        if all(f in record for f in fields):
            return " ".join(_spell(record[f]) for f in fields)
    return ""


def _shape_name(record: dict[str, Any]) -> str:
    """ "dp=4 pp=2, zbv x 2, 4 of 16": a candidate of the search."""
    parts = [" ".join(f"{name}={size}" for name, size in record["mesh"].items())]
    if record["schedule"] != "none":
        parts.append(record["schedule"] + (f" x {record['chunks']}" if record["chunks"] > 1 else ""))
    size = f" of {record['micro_batch']}" if record["micro_batch"] else ""
    return ", ".join([*parts, f"{record['microbatches']}{size}"])


def _spell(value: Any) -> str:
    return str(value[0]) if isinstance(value, list) and value else str(value)
