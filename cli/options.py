"""Option types that several commands share, and the checks that come before any work."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ..errors import ClusterError

Command = TypeVar("Command", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


class Bytes(click.ParamType[int]):
    """A size: 12GiB, 80GB, 512MiB or plain bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from ..profiles.devices import parse_bytes

        try:
            size = int(parse_bytes(value))
        except (ClusterError, ValueError) as error:
            self.fail(str(error), param, ctx)
        if size < 1:
            self.fail(f"{value}: expected a size above zero, such as 12GiB", param, ctx)
        return size


class Batch(click.ParamType["int | str"]):
    """A number of sequences of at least 1, or "auto"."""

    name = "batch"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if isinstance(value, int):
            return value
        if value == "auto":
            return "auto"
        if not re.fullmatch(r"[0-9]+", str(value)) or int(value) < 1:
            self.fail(f"{value!r}: expected a number of at least 1, or auto", param, ctx)
        return int(value)


class AboveZero(click.ParamType[float]):
    """A number above zero."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number > 0):
            self.fail(f"{value!r}: expected a number above zero", param, ctx)
        return number


class NodeCount(click.ParamType["tuple[int, int]"]):
    """A number of machines, or the least and the most of them: N or MIN:MAX."""

    name = "nodes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([0-9]{1,6})(?::([0-9]{1,6}))?", str(value))
        least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= least <= most:
            self.fail(f"{value!r}: expected a number of machines of at least 1, or MIN:MAX", param, ctx)
        return least, most


class OutputFile(click.ParamType[Path]):
    """A file to write: its folder must be there before any work starts."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value)
        if path.is_dir():
            self.fail(f"{path} is a folder; expected a file name", param, ctx)
        if not path.parent.is_dir():
            self.fail(f"the folder {path.parent} does not exist", param, ctx)
        return path


BYTES, BATCH, OUTPUT, ABOVE_ZERO, NODES = Bytes(), Batch(), OutputFile(), AboveZero(), NodeCount()


def output_option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    """An option that names a file to write."""
    settings.setdefault("help", "File to write.")
    return click.option(*names, type=OUTPUT, metavar="FILE", **settings)
