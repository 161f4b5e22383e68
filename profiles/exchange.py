"""Profiles as text: a store written to lines that can be read, compared and put under version control, and read back.

Line 1 is `{"format": "shardwright profiles", "version": 1}`. Every further line is one JSON object of one of two forms, figures
first, sorted, in ASCII; the same store always gives the same bytes:

    {"device": "...", "versions": "...", "kind": "op", "key": "...", "value": [1.5e-05, 3.1e-05, 0.02]}
    {"run": {"plan": "...", "model": "...", "date": "2026-01-31T12:00:00.000000Z", ...}}

Reading checks every line (form, kind, what its values must be) before anything is written, and names the first wrong one.
Nothing in a file is ever executed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import UsageError
from .ledger import parse_entry, run_of
from .store import Figure, Run, Store, text

FORMAT, VERSION = "shardwright profiles", 1
_PLACE = ("device", "versions", "kind", "key")


@dataclass(frozen=True, slots=True)
class Counts:
    """What came in: figures that were new, took the place of others, or stood there already; runs that were new."""

    new: int
    replaced: int
    same: int
    runs: int


def dump(store: Store) -> str:
    """The whole store as text."""
    lines = [json.dumps({"format": FORMAT, "version": VERSION})]
    lines += [
        f'{json.dumps(dict(zip(_PLACE, f, strict=False)))[:-1]}, "value": {text(f.value)}}}' for f in store.figures()
    ]
    runs = sorted(store.runs(), key=lambda run: (str(run.value.get("date")), run.id))
    lines += [f'{{"run": {text(run.value)}}}' for run in runs]
    return "\n".join(lines) + "\n"


def load(data: bytes, name: str) -> tuple[list[Figure], list[Run]]:
    """The figures and runs in a text; raises UsageError naming `name`, the first wrong line and what was expected there."""
    lines = data.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    _header(_object(lines[0] if lines else b"", name, 1), name)
    figures: dict[tuple[str, ...], Figure] = {}
    runs: dict[str, Run] = {}
    for number, line in enumerate(lines[1:], 2):
        found = _object(line, name, number)
        try:
            item = _item(found)
            if (item.id in runs) if isinstance(item, Run) else (item[:-1] in figures):
                raise ValueError("stands twice in the file")
        except ValueError as error:
            raise _wrong(name, number, str(error)) from None
        if isinstance(item, Run):
            runs[item.id] = item
        else:
            figures[item[:-1]] = item
    return list(figures.values()), list(runs.values())


def export_to(store: Store, path: Path) -> int:
    """Write the store to a text file, whole or not at all; the number of lines after the first."""
    from ..planner.planfile import write_whole

    written = dump(store)
    write_whole(path, written)
    return written.count("\n") - 1


def import_from(store: Store, path: Path) -> Counts:
    """Take over all figures and runs of a text file, in one transaction; figures filed alike are replaced."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}; expected a file that `profile --export` wrote") from None
    figures, runs = load(data, str(path))
    old = {tuple(figure[:-1]): figure.value for figure in store.figures()}
    ran = {run.id for run in store.runs()}
    store.add(figures, runs)
    known = [figure for figure in figures if figure[:-1] in old]
    same = sum(text(old[figure[:-1]]) == text(figure.value) for figure in known)
    new_runs = sum(run.id not in ran for run in runs)
    return Counts(len(figures) - len(known), len(known) - same, same, new_runs)


def _object(line: bytes, name: str, number: int) -> dict[str, Any]:
    """One line as an object of plain, finite values."""

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a field stands twice in one object")
        return found

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant[:30]} is not a number that can be kept")

    def finite(number: str) -> float:
        value = float(number)
        return value if math.isfinite(value) else refuse(number)

    def whole(number: str) -> int:
        return int(number) if len(number) <= 19 else int(refuse(number))

    try:
        found = json.loads(
            line.decode(), object_pairs_hook=unique, parse_constant=refuse, parse_float=finite, parse_int=whole
        )
    except UnicodeDecodeError:
        raise _wrong(name, number, "not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise _wrong(name, number, f"not JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        told = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise _wrong(name, number, told) from None
    if not isinstance(found, dict):
        raise _wrong(name, number, "not an object")
    return found


def _header(found: Mapping[str, Any], name: str) -> None:
    if found.get("format") != FORMAT or set(found) != {"format", "version"}:
        raise _wrong(
            name, 1, f'not the first line of profiles: expected {{"format": "{FORMAT}", "version": {VERSION}}}'
        )
    if found["version"] != VERSION or isinstance(found["version"], bool):
        raise _wrong(name, 1, f"version {json.dumps(found['version'])}, this shardwright reads version {VERSION}")


def _item(found: dict[str, Any]) -> Figure | Run:
    """A line's figure or run; raises ValueError saying what is wrong with it."""
    if set(found) == {"run"}:
        return run_of(parse_entry(found["run"]))
    if set(found) != {*_PLACE, "value"}:
        told = ", ".join(sorted(found)) or "nothing"
        raise ValueError(f"expected device, versions, kind, key and value, or run; found {told}")
    for field in _PLACE:
        if not isinstance(found[field], str) or not found[field]:
            raise ValueError(f"{field}: expected a text, found {json.dumps(found[field])}")
    if found["kind"] not in KINDS:
        raise ValueError(f"kind: no figures are of kind {found['kind']!r}; known: {', '.join(KINDS)}")
    KINDS[found["kind"]](found["key"], found["value"])
    return Figure(found["device"], found["versions"], found["kind"], found["key"], found["value"])


def _wrong(name: str, number: int, what: str) -> UsageError:
    return UsageError(f"{name}, line {number}: {what}; nothing was imported")


def _op(key: str, value: Any) -> None:
    """[forward seconds, backward seconds, relative spread] of a target at operand shapes."""
    if not _numbers(value, 3):
        raise ValueError(f"value: expected 3 numbers of at least 0, found {text(value)[:80]}")
    try:
        target, operands, arguments = json.loads(key)
        sound = isinstance(target, str) and isinstance(arguments, str)
        for shape, dtype, grad in operands:
            sound = sound and isinstance(dtype, str) and grad in (True, False) and all(_whole(n) for n in shape)
    except (ValueError, TypeError):
        sound = False
    if not sound:
        raise ValueError("key: expected [target, [[shape, dtype, gradient], ...], arguments] of an op")


def _rows(key: str, value: Any) -> None:
    """[[full bytes, seconds], ...] of a collective over so many ranks, neighbours or so far apart."""
    if not re.fullmatch(r"\w+:\d+(@\d+)?", key, re.ASCII):
        raise ValueError("key: expected COLLECTIVE:RANKS or COLLECTIVE:RANKS@DISTANCE")
    _pairs(value)


def _sends(key: str, value: Any) -> None:
    """[[bytes, seconds], ...] of messages between two ranks."""
    if key != "pairs":
        raise ValueError("key: expected pairs")
    _pairs(value)


def _pairs(value: Any) -> None:
    if not isinstance(value, list) or not value or not all(_numbers(row, 2) for row in value):
        raise ValueError("value: expected rows of bytes and seconds")


def _calibration(key: str, value: Any) -> None:
    """Factor, runs and spread of one stack, and the interval (or null)."""
    good = isinstance(value, dict) and set(value) == {"factor", "runs", "spread", "low", "high"}
    good = good and _numbers([value[name] for name in ("factor", "runs", "spread")])
    good = good and (value["low"] is value["high"] is None or _numbers([value["low"], value["high"]]))
    if not good or value["factor"] <= 0 or not _whole(value["runs"]):
        raise ValueError("value: expected factor, runs, spread, low and high")


def _number(key: str, value: Any) -> None:
    if not _numbers([value]) or value <= 0:
        raise ValueError(f"value: expected a number above 0, found {text(value)[:80]}")


def _failure(key: str, value: Any) -> None:
    """Why something could not be measured: a type and a message."""
    good = (
        isinstance(value, dict)
        and set(value) == {"type", "message"}
        and all(isinstance(v, str) for v in value.values())
    )
    if not good:
        raise ValueError("value: expected the type and the message of a failure")


def _region(key: str, value: Any) -> None:
    """[seconds of one repeat, relative spread] of a region's program."""
    if not _numbers(value, 2):
        raise ValueError(f"value: expected 2 numbers of at least 0, found {text(value)[:80]}")


def _overlap(key: str, value: Any) -> None:
    """Seconds alone and together, and the slowdown, by name."""
    if not isinstance(value, dict) or not _numbers([*value.values()]):
        raise ValueError(f"value: expected numbers by name, found {text(value)[:80]}")


def _numbers(values: Any, count: int | None = None) -> bool:
    if not isinstance(values, list | tuple) or (count is not None and len(values) != count):
        return False
    return all(isinstance(v, int | float) and not isinstance(v, bool) and v >= 0 for v in values)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


KINDS: Mapping[str, Callable[[str, Any], None]] = MappingProxyType({
    "allocator": _number, "calibration": _calibration, "collectives": _rows, "copies": _number, "failure": _failure,
    "machine": _number, "op": _op, "optimizer": _number, "overlap": _overlap, "region": _region,
    "sends": _sends,
})  # fmt: skip
"""What the figures of a kind must be: each raises ValueError for what is not."""
