"""The reference pages are what docs/make_reference.py makes of the code, and leave nothing out."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
import shardwright
from shardwright.cli.main import COMMANDS, main
from shardwright.planner.pins import KEYS
from shardwright.planner.plan import Plan

DOCS = Path(__file__).resolve().parent.parent / "docs"
MADE: dict[str, Any] = runpy.run_path(str(DOCS / "make_reference.py"), run_name="make_reference")


@pytest.mark.parametrize("name", ["reference_cli.md", "reference_plan.md", "reference_api.md"])
def test_a_page_is_what_the_code_says(name: str) -> None:
    written = (DOCS / name).read_text(encoding="utf-8")
    assert written == MADE["pages"]()[name], f"{name} is stale: python docs/make_reference.py"


def test_every_type_of_a_plan_is_on_the_page() -> None:
    """Those that a plan reaches, and each field has a meaning."""
    meanings = tomllib.loads((DOCS / "reference.toml").read_text(encoding="utf-8"))
    found = {
        name.removeprefix("shardwright.planner.plan.").rpartition(".")[2] for name in msgspec.json.schema(Plan)["$defs"]
    }
    assert {s.__name__ for s in MADE["STRUCTS"]} == found
    for struct in MADE["STRUCTS"]:
        assert list(meanings[struct.__name__]) == [f.name for f in msgspec.structs.fields(struct)]
    assert set(meanings) == found | {"pins"}
    assert set(meanings["pins"]) == set(KEYS)


def test_every_exported_name_is_on_the_page() -> None:
    named = [name for names in MADE["API"].values() for name in names]
    assert sorted([*named, "__version__"]) == sorted(shardwright.__all__)


def test_every_option_says_what_it_does() -> None:
    page = (DOCS / "reference_cli.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        part = re.split(r"^## ", page, flags=re.MULTILINE)[list(COMMANDS).index(name) + 1]
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, (name, option.opts)
                assert all(each in part for each in option.opts), (name, option.opts)
