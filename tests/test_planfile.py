"""Plan files: the same bytes for the same plan, one record a line, and every illegal edit refused by field."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import plans
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shardwright.errors import PlanError, UsageError
from shardwright.planner.plan import Plan
from shardwright.planner.plandiff import diff
from shardwright.planner.planfile import digest, dump_plan, load_plan, parse_plan, save_plan, schema, write_whole


def test_round_trip_and_same_bytes() -> None:
    text = dump_plan(plans.plan())
    again = parse_plan(text)
    assert dump_plan(again) == text
    assert not again.edited
    assert msgspec.structs.replace(again, digest="") == plans.plan()


def test_one_record_a_line() -> None:
    lines = dump_plan(plans.plan()).splitlines()
    for op in ("linear_1", "gelu"):
        (line,) = [line for line in lines if f'"op": "{op}"' in line]
        record = json.loads(line.rstrip(","))
        assert set(record) == {"op", "target", "choice", "result"}
    assert max(len(line) for line in lines) < 240


def test_nothing_from_the_clock_or_this_machine() -> None:
    text = dump_plan(plans.plan())
    assert str(Path.cwd()) not in text
    assert "seconds_spent" not in text


def test_file_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    save_plan(plans.plan(), path)
    assert load_plan(path).source.model == "hf:tiny"
    assert os.listdir(tmp_path) == ["plan.json"]
    with pytest.raises(UsageError, match="cannot write"):
        write_whole(tmp_path / "missing" / "plan.json", "text")
    with pytest.raises(PlanError, match=r"pipeline\.micro_batch"):
        save_plan(plans.plan(pipeline=msgspec.structs.replace(plans.plan().pipeline, micro_batch=0)), path)
    assert load_plan(path).pipeline.micro_batch == 4


def test_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nowhere\.json: No such file"):
        load_plan(tmp_path / "nowhere.json")
    with pytest.raises(PlanError, match="Is a directory"):
        load_plan(tmp_path)


def test_hand_edit_is_accepted_and_marked() -> None:
    raw = json.loads(dump_plan(plans.plan()))
    raw["regions"][1]["ops"][1]["choice"] = ["b", "R"]
    raw["regions"][1]["ops"][1]["result"] = ["S(0)", "R"]
    edited = parse_plan(json.dumps(raw))
    assert edited.edited
    assert parse_plan(dump_plan(edited)).edited  # saving does not give the certificate back


def test_reformatting_is_no_edit() -> None:
    assert not parse_plan(json.dumps(json.loads(dump_plan(plans.plan())), indent=7, sort_keys=True)).edited


def test_schema_names_every_field() -> None:
    document = schema()
    assert set(document["$defs"]["Plan"]["properties"]) == set(Plan.__struct_fields__)
    assert document["$defs"]["Plan"]["additionalProperties"] is False


def _set(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        here: Any = raw
        for key in path[:-1]:
            here = here[key]
        here[path[-1]] = value

    return change


REFUSED = [
    (_set("mehs", value=1), "mehs: unknown field"),
    (_set("regions", 1, "ops", 0, "colour", value=1), r"regions\[1\]\.ops\[0\]\.colour: unknown field"),
    (_set("version", value=2), "version: expected 1, found 2"),
    (_set("version", value=True), "version: expected 1, found true"),
    (_set("mesh", 0, "size", value="2"), r"mesh\[0\]\.size: expected `int`, got `str`"),
    (_set("mesh", 0, "size", value=0), r"mesh\[0\]\.size: 0; expected at least 1"),
    (_set("mesh", 0, "size", value=4), "expected the cluster's 4"),
    (_set("mesh", 0, "role", value="outer"), r"mesh\[0\]\.role: 'outer'; expected one of data, context, model"),
    (_set("mesh", 1, "name", value="dp"), "name 'dp' stands twice"),
    (_set("mesh", value=[]), "mesh: empty"),
    (_set("regions", 1, "ops", 1, "result", 1, value="S(x)"), r"regions\[1\]\.ops\[1\]\.result\[1\]: 'S\(x\)' is not"),
    (_set("regions", 1, "ops", 1, "result", value=["S(0)"]), "expected one entry per mesh axis"),
    (_set("regions", 1, "ops", 1, "choice", value=["b", ""]), r"choice\[1\]: empty"),
    (_set("regions", 1, "parameters", 1, "home", value=["R", "P"]), "a parameter is stored whole"),
    (_set("regions", 1, "parameters", 1, "zero", value=4), r"zero: 4; expected 0, 1, 2 or 3"),
    (_set("regions", 1, "parameters", 1, "zero_axes", value=["pp"]), "expected one of the mesh axes dp, tp"),
    (_set("regions", 1, "parameters", 1, "zero_axes", value=[]), "levels 1 to 3 need an axis"),
    (_set("regions", 1, "parameters", 1, "names", value=["wte.weight"]), "'wte.weight' stands twice"),
    (_set("regions", 1, "repeats", value=0), "repeats: 0; expected at least 1"),
    (_set("regions", 1, "recompute", value=["gelu"]), "everything is kept"),
    (_set("pipeline", "micro_batch", value=3), "12 samples; expected the batch of 16"),
    (_set("pipeline", "stages", value=2), "expected ranks x chunks, 1"),
    (_set("semantics", value="FAST"), "expected one of EXACT"),
    (_set("source", "kind", value="git"), "expected one of hf, function, module"),
    (_set("source", "config", value=None), "embeds its configuration"),
    (_set("predicted", "mfu", value="high"), "mfu: expected `float`, got `str`"),
    (_set("predicted", "memory", "reserve", value="x"), r"predicted\.memory\.reserve: expected `int`, got `str`"),
    (
        _set("regions", 1, "parameters", 2, "home", 1, value=3),
        r"regions\[1\]\.parameters\[2\]\.home\[1\]: expected `str`",
    ),
    (_set("memory_limit_bytes", value=-1), "expected a positive number of bytes"),
    (_set("memory_limit_bytes", value=1.5), "expected `int`, got `float`"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[m[:40] for _, m in REFUSED])
def test_illegal_edit_is_refused_by_field(change: Callable[[dict[str, Any]], None], message: str) -> None:
    raw = json.loads(dump_plan(plans.plan()))
    change(raw)
    with pytest.raises(PlanError, match=message) as caught:
        parse_plan(json.dumps(raw), "my.json")
    assert str(caught.value).startswith("my.json: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"), ("{", "line 1, column 2: not JSON"), ("[]", "expected a JSON object"), ("3", "found a int"),
        ('{"version": NaN}', "NaN is not a number of JSON"), ('{"version": 1, "version": 1}', "'version' stands twice"),
        ('{"version": 1}', "missing required field"), ("{}", "version: expected 1, found null"),
        ("[" * 100_000, "nested too deeply"),
    ],
)  # fmt: skip
def test_text_that_is_no_plan(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_plan(text)


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(PlanError, match="not UTF-8"):
        parse_plan(b"\xff\xfe\xfa{}")


@given(st.text(max_size=40), st.floats(allow_nan=False, allow_infinity=False, min_value=1e-9, max_value=1e9))
def test_any_name_and_figure_survives(name: str, seconds: float) -> None:
    predicted = msgspec.structs.replace(plans.predicted(), step_seconds=seconds)
    plan = plans.plan(notes=(name,), predicted=predicted)
    again = parse_plan(dump_plan(plan))
    assert again.notes == (name,)
    assert again.predicted.step_seconds == seconds
    assert digest(again) == digest(plan)


def test_infinite_figures_are_not_written() -> None:
    predicted = msgspec.structs.replace(plans.predicted(), step_seconds=float("inf"))
    with pytest.raises(PlanError, match=r"predicted\.step_seconds: inf; expected a finite number"):
        dump_plan(plans.plan(predicted=predicted))


def test_equal_plans_have_no_difference() -> None:
    assert diff(plans.plan(), parse_plan(dump_plan(plans.plan()))) == ()


def test_difference_names_dimension_field_and_change() -> None:
    plan = plans.plan()
    first, block, last = plan.regions
    changed = msgspec.structs.replace(block.ops[1], choice=("b", "R"))
    block = msgspec.structs.replace(block, ops=(block.ops[0], changed, *block.ops[2:]))
    other = plans.plan(
        regions=(first, block, last), predicted=msgspec.structs.replace(plan.predicted, step_seconds=0.25)
    )
    placed, predicted = diff(plan, other)
    assert (placed.dimension, placed.where) == ("placements", "regions[h].ops[linear].choice")
    assert (placed.a, placed.b) == (["b", "n"], ["b", "R"])
    assert predicted.dimension == "predicted"
    assert predicted.change == pytest.approx(1.0)


def test_an_inserted_op_is_one_difference() -> None:
    plan = plans.plan()
    first, block, last = plan.regions
    longer = msgspec.structs.replace(block, ops=(msgspec.structs.replace(block.ops[0], op="new"), *block.ops))
    (only,) = diff(plan, plans.plan(regions=(first, longer, last)))
    assert only.where == "regions[h].ops[new]"
    assert only.a is None
