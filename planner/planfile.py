"""Plan files: canonical JSON that a person can read, review and edit (docs/plan.md).

The same plan always gives the same bytes. Records (an op, a parameter, a search candidate) take one line each, so a line
diff of two files is a diff of decisions. A file is written beside its place and renamed, never half. On loading, unknown
fields, wrong types and placements that do not fit the mesh are refused with the file, the field and what was expected;
a file whose digest no longer matches was changed by hand and comes back marked `edited`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from ..errors import PlanError, UsageError
from .plan import VERSION, Plan
from .plancheck import first_problem

_LINE = 118
_PATH = re.compile(r"^(?P<what>.*?)(?: - at `\$?\.?(?P<path>.*)`)?$", re.DOTALL)


def dump_plan(plan: Plan) -> str:
    """The canonical text of a plan, digest included; raises PlanError for a plan that no file may hold."""
    sealed = msgspec.structs.replace(plan, digest=digest(plan))
    problem = first_problem(sealed)
    if problem is not None:
        raise PlanError(f"cannot write the plan: {problem}")
    return _render(to_plain(sealed), "") + "\n"


def parse_plan(text: str | bytes, name: str = "plan") -> Plan:
    """The plan in `text`; raises PlanError naming `name`, the field and what was expected."""
    raw = _parse(text, name)
    version = raw.get("version")
    if version != VERSION or isinstance(version, bool):
        raise PlanError(
            f"{name}: version: expected {VERSION}, found {json.dumps(version)}; plan again with this shardwright"
        )
    try:
        plan = msgspec.convert(raw, Plan)
    except msgspec.ValidationError as error:
        raise PlanError(f"{name}: {_explain(_with_indices(raw, str(error)))}") from None
    problem = first_problem(plan)
    if problem is not None:
        raise PlanError(f"{name}: {problem}")
    return plan if plan.digest == digest(plan) else msgspec.structs.replace(plan, edited=True)


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write `plan` to `path`: the whole file or, on any error, none of it."""
    write_whole(path, dump_plan(plan))


def load_plan(path: str | Path) -> Plan:
    """Read a plan file; raises PlanError for a file that is missing, unreadable or no plan."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise PlanError(
            f"{path}: {error.strerror or error}; expected a plan file (`shardwright plan ... -o {path}`)"
        ) from None
    return parse_plan(text, str(path))


def schema() -> dict[str, Any]:
    """JSON Schema of a plan file."""
    return msgspec.json.schema(Plan)


def to_plain(plan: Plan) -> dict[str, Any]:
    """Plain JSON values in field order; optional fields that are absent are left out."""
    found: dict[str, Any] = json.loads(msgspec.json.encode(plan))
    found["source"] = _present(found["source"])
    found["search"]["shapes"] = [_present(record) for record in found["search"]["shapes"]]
    found["runners_up"] = [_present(record) for record in found["runners_up"]]
    for key in ("phase", "goal", "frontier", "passes", "lowerings"):
        if not found[key]:
            del found[key]
    if found.get("goal"):
        found["goal"] = _present(found["goal"])
        found["goal"]["trials"] = [_present(trial) for trial in found["goal"]["trials"]]
    if found.get("frontier"):
        found["frontier"] = [_present(point) for point in found["frontier"]]
    return found


def digest(plan: Plan) -> str:
    """16 hex digits over everything in the plan except `digest` and `edited`."""
    facts = to_plain(msgspec.structs.replace(plan, digest="", edited=False))
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_whole(path: str | Path, text: str) -> None:
    """Replace `path` by `text` in one step; raises UsageError where it cannot be written."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, target)
    except OSError as error:
        raise UsageError(f"{target}: cannot write: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _present(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if value is not None}


def _parse(text: str | bytes, name: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [k for k, _ in pairs]
            twice = next(k for k in keys if keys.count(k) > 1)
            raise PlanError(f"{name}: field {twice!r} stands twice in one object")
        return found

    def refuse(constant: str) -> float:
        raise PlanError(f"{name}: {constant} is not a number of JSON; expected a finite number")

    try:
        raw = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise PlanError(f"{name}: not UTF-8 text (byte {error.start}); expected a JSON plan file") from None
    except json.JSONDecodeError as error:
        raise PlanError(f"{name}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise PlanError(f"{name}: nested too deeply for a plan file") from None
    if not isinstance(raw, dict):
        raise PlanError(f"{name}: expected a JSON object with the fields of a plan, found a {type(raw).__name__}")
    return raw


def _explain(message: str) -> str:
    """msgspec's message, field first: "mesh[0].size: expected `int`, got `str`"."""
    match = _PATH.match(message)
    if match is None:
        return message
    what, path = match["what"], match["path"] or ""
    unknown = re.search(r"unknown field `(.+)`", what)
    if unknown:
        return f"{path + '.' if path else ''}{unknown[1]}: unknown field; expected only the fields of a plan (docs/plan.md)"
    what = what[:1].lower() + what[1:]
    return f"{path}: {what}" if path else what


def _with_indices(raw: dict[str, Any], message: str) -> str:
    """msgspec says `ops[...]` for any element; which one, by converting the document with one element left at a time."""
    what, at, path = message.partition(" - at `$")
    if "[...]" not in path:
        return message
    spots = path.rstrip("`").split("[...]")
    done = ""
    for depth in range(len(spots) - 1):
        done += spots[depth]
        keys = [int(k) if k.isdigit() else k for k in re.findall(r"[^.\[\]]+", done)]
        refused = next((each for each in _one_left(raw, keys) if _refusal(each[1]) == message), None)
        if refused is None:
            return message
        index, raw = refused
        spots[depth] += f"[{index}]" if isinstance(index, int) else f".{index}"
        done += "[0]" if isinstance(index, int) else f".{index}"
    return f"{what}{at}{''.join(spots)}`"


def _one_left(raw: dict[str, Any], keys: list[str | int]) -> Iterator[tuple[str | int, dict[str, Any]]]:
    """(index, the document with only that element in the container at `keys`), for every element."""
    here: Any = raw
    for key in keys:
        here = here[key]
    for index in list(here) if isinstance(here, dict) else range(len(here)):
        yield index, _replaced(raw, keys, {index: here[index]} if isinstance(here, dict) else [here[index]])


def _replaced(value: Any, keys: list[str | int], new: Any) -> Any:
    """A copy of `value` with `new` at `keys`."""
    if not keys:
        return new
    copy = value.copy()
    copy[keys[0]] = _replaced(value[keys[0]], keys[1:], new)
    return copy


def _refusal(raw: dict[str, Any]) -> str:
    try:
        msgspec.convert(raw, Plan)
    except msgspec.ValidationError as error:
        return str(error)
    return ""


def _render(value: Any, indent: str) -> str:
    """JSON with one line per record: what is flat and short stays on a line, all else opens up."""
    flat = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not isinstance(value, (dict, list)) or not value:
        return flat
    if isinstance(value, list) and (len(indent) + len(flat) <= _LINE and not any(isinstance(v, dict) for v in value)):
        return flat
    inner = indent + "  "
    if isinstance(value, list):
        items = [
            json.dumps(v, ensure_ascii=False, allow_nan=False) if _is_record(v) else _render(v, inner) for v in value
        ]
        return "[\n" + ",\n".join(inner + item for item in items) + f"\n{indent}]"
    items = [f"{json.dumps(k, ensure_ascii=False)}: {_render(v, inner)}" for k, v in value.items()]
    return "{\n" + ",\n".join(inner + item for item in items) + f"\n{indent}}}"


def _is_record(value: Any) -> bool:
    """An object that holds no list of objects: it reads best on one line."""
    if not isinstance(value, dict):
        return False
    return not any(isinstance(v, list) and any(isinstance(item, dict) for item in v) for v in value.values())
