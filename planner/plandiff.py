"""What differs between two plans: decisions first, then what is predicted of them.

Records are matched by what names them (an op by its name, a parameter by its first name, a mesh axis by its name), so an
inserted op is one difference and not a shift of all that follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .plan import Plan
from .planfile import to_plain

# Top-level field of a plan -> the dimension a reader thinks in; fields not named here stand for themselves.
_DIMENSIONS = {
    "source": "model", "graph": "model", "cluster_fingerprint": "cluster", "memory_limit_bytes": "memory limit",
    "regions": "placements",
}  # fmt: skip
_ORDER = ("model", "cluster", "objective", "optimizer", "precision", "semantics", "memory limit", "pins", "mesh", "pipeline",
          "placements", "parameters", "predicted", "search", "runners_up", "notes", "edited", "version")  # fmt: skip
# How records in a list are matched: the fields that name them.
_KEYS = (("op",), ("names",), ("collective", "axis"), ("mesh", "microbatches"), ("name",))


@dataclass(frozen=True, slots=True)
class Difference:
    """One field that differs; a side that lacks the field has None."""

    dimension: str
    where: str
    a: Any
    b: Any

    @property
    def change(self) -> float | None:
        """(b - a) / a where both are numbers and a is not zero."""
        sides = (self.a, self.b)
        if any(isinstance(s, bool) or not isinstance(s, (int, float)) for s in sides) or not self.a:
            return None
        return float((self.b - self.a) / self.a)


def diff(a: Plan, b: Plan) -> tuple[Difference, ...]:
    """Every difference between two plans, decisions before consequences; empty when they say the same."""
    left, right = to_plain(a), to_plain(b)
    found = [Difference(_dimension(where), where, x, y) for where, x, y in _walk(left, right, "") if where != "digest"]
    return tuple(sorted(found, key=lambda d: _rank(d.dimension)))


def _rank(dimension: str) -> int:
    return _ORDER.index(dimension) if dimension in _ORDER else len(_ORDER)


def _dimension(where: str) -> str:
    top = where.partition(".")[0].partition("[")[0]
    if top == "regions" and ".parameters" in where:
        return "parameters"
    return _DIMENSIONS.get(top, top)


def _walk(a: Any, b: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if a == b and type(a) is type(b):
        return
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            yield from _walk(a.get(key), b.get(key), f"{where}.{key}" if where else key)
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
    for fields in _KEYS:
        if all(f in record for f in fields):
            return " ".join(_spell(record[f]) for f in fields)
    return ""


def _spell(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{k}={v}" for k, v in value.items())
    return str(value[0]) if isinstance(value, list) and value else str(value)
