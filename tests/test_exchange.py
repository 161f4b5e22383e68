"""Profiles as text: the same bytes there and back, every wrong line named, and nothing written unless all is right."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import runs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shardwright.errors import UsageError
from shardwright.profiles.exchange import KINDS, Counts, dump, export_to, import_from, load
from shardwright.profiles.ledger import append, entries
from shardwright.profiles.store import Figure, Store
from shardwright.profiles.tasks import TASKS

OP = '["aten.linear",[[[8,16],"float32",true],[[4,16],"float32",true]],"[]"]'
HEAD = '{"format": "shardwright profiles", "version": 1}'
CALIBRATION = {"factor": 1.125, "runs": 8, "spread": 0.04, "low": 0.9, "high": 1.1}
FIGURES = [
    Figure("cpu, 2 cores", "torch 2.11.0+cpu", "op", OP, [1.5e-05, 0.1 + 0.2, 0.02]),
    Figure("cpu, 2 cores", "torch 2.11.0+cpu", "machine", "memory", 12345678901.25),
    Figure("cpu, 2 cores", "torch 2.11.0+cpu", "collectives", "all_reduce:2", [[1024, 1e-05], [1048576, 2e-4]]),
    Figure("h100-sxm", "torch 2.11.0", "calibration", "eager, bf16", CALIBRATION),
    Figure(
        "h100-sxm",
        "torch 2.11.0",
        "failure",
        "matmul \u00e9\u2028",
        {"type": "out of memory", "message": "1 GiB\nmore"},
    ),
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "profiles.sqlite")
    made.add(FIGURES)
    append(made, [runs.entry(day=2), runs.entry(day=1)])
    return made


def test_there_and_back_is_the_same(store: Store, tmp_path: Path) -> None:
    path, copy = tmp_path / "profiles.txt", Store(tmp_path / "copy.sqlite")
    assert export_to(store, path) == 7
    assert import_from(copy, path) == Counts(5, 0, 0, 2)
    assert copy.figures() == store.figures()
    assert entries(copy) == entries(store)
    assert dump(copy).encode() == path.read_bytes()
    assert path.read_bytes().isascii()
    assert import_from(copy, path) == Counts(0, 0, 5, 0)


def test_the_text_is_sorted_lines(store: Store) -> None:
    lines = dump(store).splitlines()
    assert lines[0] == HEAD
    assert lines[1:6] == sorted(lines[1:6])
    assert [json.loads(line)["run"]["date"][:10] for line in lines[6:]] == ["2026-02-01", "2026-02-02"]
    assert lines[2].endswith('"kind": "machine", "key": "memory", "value": 12345678901.25}')


def test_order_of_writing_leaves_no_trace(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other.sqlite")
    append(other, [runs.entry(day=1)])
    for figure in FIGURES:
        other.add([figure])
    append(other, [runs.entry(day=2)])
    assert dump(other) == dump(store)


def test_what_is_there_is_replaced_and_counted(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    changed = FIGURES[1]._replace(value=2.0)
    path.write_text("\n".join([HEAD, line(changed), line(FIGURES[0]), line(changed._replace(key="copy"))]))
    assert import_from(store, path) == Counts(1, 1, 1, 0)
    assert store.read("cpu, 2 cores", "torch 2.11.0+cpu", "machine") == {"copy": 2.0, "memory": 2.0}


def line(figure: Figure, **changes: Any) -> str:
    return json.dumps({**figure._asdict(), **changes})


GOOD = line(FIGURES[0])
WRONG = {
    "empty": ("", "expected an object|not JSON"), "list": ("[1]", "not an object"), "half": (GOOD[:-5], "not JSON"),
    "nan": (line(FIGURES[1], value=math.nan), "NaN is not a number"), "infinite": ('{"a": 1e999}', "1e999 is not a number"),
    "huge": ('{"a": ' + "9" * 5000 + "}", "is not a number"), "deep": ("[" * 100_000, "nested|not JSON"),
    "twice in one": ('{"a": 1, "a": 2}', "stands twice in one object"), "twice": (GOOD + "\n" + GOOD, "stands twice in the file"),
    "field": (line(FIGURES[0], more=1), "found device, key, kind, more"), "device": (line(FIGURES[0], device=""), "device: "),
    "kind": (line(FIGURES[0], kind="recipe"), "kind: no figures are of kind 'recipe'"),
    "op value": (line(FIGURES[0], value=[1.0, 2.0]), "expected 3 numbers"),
    "op negative": (line(FIGURES[0], value=[-1.0, 2.0, 0.1]), "at least 0"),
    "op text": (line(FIGURES[0], value=["1", 2.0, 0.1]), "expected 3 numbers"),
    "op key": (line(FIGURES[0], key="linear"), "key: expected"),
    "op shape": (line(FIGURES[0], key='["a",[[[-1],"f",true]],""]'), "key:"),
    "machine": (line(FIGURES[1], value=0), "above 0"), "rows": (line(FIGURES[2], value=[[1]]), "rows of bytes"),
    "rows key": (line(FIGURES[2], key="all_reduce"), "COLLECTIVE:RANKS"),
    "failure": (line(FIGURES[4], value=0.0), "the type and the message"),
    "region": (line(FIGURES[1], kind="region", value=[1]), "2 numbers"),
    "overlap": (line(FIGURES[1], kind="overlap", value=[1]), "numbers by name"),
    "factor": (line(FIGURES[3], value={**CALIBRATION, "factor": 0}), "expected factor"),
    "run": ('{"run": {}}', "missing field 'plan'"), "pickle": ("\x80\x04\x95", "not JSON|not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_the_first_wrong_line_is_named_and_nothing_is_written(store: Store, tmp_path: Path, name: str) -> None:
    text, told = WRONG[name]
    path, before = tmp_path / "p.txt", dump(store)
    number = 4 if name == "twice" else 3
    path.write_text("\n".join([HEAD, line(FIGURES[1], key="new"), text, "also wrong", ""]))
    with pytest.raises(UsageError, match=rf"p\.txt, line {number}: .*({told})(.|\n)*nothing was imported"):
        import_from(store, path)
    assert dump(store) == before


@pytest.mark.parametrize(
    ("text", "told"),
    [("", "line 1"), ("notes", "line 1: not JSON"), (GOOD, "line 1: not the first line"),
     ('{"format": "shardwright profiles", "version": 2}', "version 2, this shardwright reads version 1"),
     ('{"format": "shardwright profiles", "version": true}', "version true"), ("\x00\xff", "line 1")],
)  # fmt: skip
def test_files_that_are_no_profiles(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        load(text.encode("latin-1"), "p.txt")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a file that"):
        import_from(Store(tmp_path / "p.sqlite"), tmp_path / "nowhere")


KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
NUMBERS = st.integers(0, 10**17) | st.floats(0, allow_nan=False, allow_infinity=False)
VALUES = {
    "region": st.lists(NUMBERS, min_size=2, max_size=2),
    "overlap": st.dictionaries(st.text(), NUMBERS, max_size=3),
    "failure": st.fixed_dictionaries({"type": st.text(), "message": st.text()}),
    "optimizer": NUMBERS.filter(lambda value: value > 0),
}


@pytest.mark.parametrize("kind", VALUES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_values_come_back(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    values = data.draw(st.dictionaries(KEYS, VALUES[kind], min_size=1, max_size=4))
    first, second = (Store(tmp_path / f"{n}.sqlite") for n in "ab")
    for each in (first, second):
        assert each.path is not None
        each.path.unlink(missing_ok=True)
    first.write("d", "v", kind, values)
    second.add(*load(dump(first).encode(), "p.txt"))
    assert dump(second) == dump(first)
    assert second.read("d", "v", kind) == first.read("d", "v", kind)


def test_all_that_is_measured_may_be_exchanged(tmp_path: Path) -> None:
    """What a task of a profile files goes under its own name, or the singular of it."""
    assert {name if name in KINDS else name.removesuffix("s") for name in TASKS} <= set(KINDS)
    path, rows = tmp_path / "p.txt", [[1024, 1e-5], [1 << 20, 1e-3]]
    there, here = Store(tmp_path / "a.sqlite"), Store(tmp_path / "b.sqlite")
    there.add([Figure("cpu", "torch", "sends", "pairs", rows)])
    export_to(there, path)
    import_from(here, path)
    assert here.read("cpu", "torch", "sends") == {"pairs": rows}
