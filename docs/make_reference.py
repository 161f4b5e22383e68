"""Write the reference pages from the code: `python docs/make_reference.py`. A test holds the pages against what this makes.

docs/reference_cli.md from the commands, docs/reference_plan.md from the types of the plan and reference.toml, docs/reference_api.md
from what the package exports.
"""

from __future__ import annotations

import inspect
import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
import shardwright
from shardwright.cli.main import COMMANDS, main
from shardwright.planner import goal, plan
from shardwright.planner.pins import KEYS
from shardwright.planner.precision import OPTIMIZERS

DOCS = Path(__file__).resolve().parent
WIDTH = 132
MADE = "<!-- Made by docs/make_reference.py from the code; do not edit. -->"

STRUCTS: tuple[type[msgspec.Struct], ...] = (
    plan.Plan, plan.Source, plan.Precision, plan.MeshAxis, plan.Pipeline, plan.StagePlan, plan.RunPlan, plan.RegionPlan,
    plan.OpPlan, plan.ParameterPlan, plan.OverlapPlan, plan.PassPlan, plan.PoolPlan, plan.Prediction, plan.Traffic, plan.Search,
    plan.ShapeRecord, goal.Goal, goal.Trial, goal.Point,
)  # fmt: skip
"""The types of a plan file, in the order of the page."""

UNITS: Sequence[tuple[str, str]] = (
    (r"tokens_per_second_per_device", "1/s"), (r"price_per_device_hour", "USD/h"), (r"dollars(_per_step)?", "USD"),
    (r"(.*_)?seconds(_.*)?", "s"), (r"(.*_)?bytes(_.*)?|memory", "bytes"), (r"mfu|gap|error", "fraction"),
)  # fmt: skip
"""Names of fields that hold a quantity, and its unit."""

API: Mapping[str, Sequence[str]] = {
    "Plan and apply": ("auto_parallelize", "make_plan", "apply_plan", "plan_model", "choose_update"),
    "Plans, clusters, reports": ("Plan", "PlanResult", "load_plan", "save_plan", "Cluster", "parse_cluster", "Report",
        "export_plan"),
    "Running": ("ParallelModule", "keep_pages"),
    "Checkpoints and weights": (
        "save_checkpoint", "finish_saving", "load_checkpoint", "export_safetensors", "load_safetensors",
    ),
    "Errors": (
        "ShardwrightError", "CaptureError", "ClusterError", "PinError", "PlanError", "PlanMismatch", "UsageError",
        "UnsupportedOp", "LaunchError", "CheckpointError", "Infeasible",
    ),
}  # fmt: skip
"""What the package exports, by purpose; a test says that nothing is left out."""

ABOUT_COMMANDS = """
Results go to stdout, progress to stderr. Exit status: 0 done; 1 what was asked is legal but does not fit the memory, or `diff` or
`run --verify` found a difference; 2 it cannot be expressed or executed, with one message that says why. `shardwright --version`
prints the version; `-h` or `--help` describes any command.
"""
ABOUT_PINS = """
`--pin K=V` fixes a part of a plan and the rest is searched around it; `--pin K!=V` forbids a value. `explain --why-not` and
`simulate --sweep` take the same keys, and beside them `devices`, `batch`, `seq`, `memory` (of a device) and `link` (a factor on the
outermost link).
"""
ABOUT_FIELDS = """
A plan file is a `Plan` as JSON; [plan.md](plan.md) explains how to read and edit one, `shardwright.planner.planfile.schema()` is
its JSON Schema. Fields with a default may be left out.
"""


def pages() -> dict[str, str]:
    """The text of every page, by file name."""
    made = {"reference_cli.md": cli(), "reference_plan.md": plan_file(), "reference_api.md": api()}
    return {name: "\n".join(lines).rstrip() + "\n" for name, lines in made.items()}


def cli() -> Iterator[str]:
    """Every command with its arguments and options."""
    yield from ("# Commands", "", MADE, "")
    yield from _prose(ABOUT_COMMANDS)
    yield from _table(("command", "purpose"), ((f"[`{n}`](#{n})", text) for n, (_, text) in COMMANDS.items()))
    context = click.Context(main)
    for name in COMMANDS:
        command = main.get_command(context, name)
        assert command is not None
        yield from _command(name, command)
    meanings = tomllib.loads((DOCS / "reference.toml").read_text(encoding="utf-8"))["pins"]
    yield from ("", "## Pins", "")
    yield from _prose(ABOUT_PINS)
    yield from _table(("key", "values", "what it fixes"), ((f"`{key}`", _values(key), meanings[key]) for key in KEYS))


def _values(key: str) -> str:
    """What a pin takes, in the words of the message that refuses another value."""
    if key == "optimizer":
        return ", ".join(OPTIMIZERS)
    try:
        KEYS[key].read(key, "?")
    except shardwright.PinError as error:
        return str(error).partition(f" {key} is ")[2].removeprefix("one of ")
    raise AssertionError(key)


def _command(name: str, command: click.Command) -> Iterator[str]:
    yield from ("", f"## {name}", "")
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    usage = [f"shardwright {name}", "[OPTIONS]", *(_argument(p) for p in arguments)]
    yield from (f"    {' '.join(usage)}", "")
    yield from _prose(command.help or "")
    options = [p for p in command.params if isinstance(p, click.Option)]
    yield from _table(("option", "meaning"), ((_names(p), _meaning(p)) for p in options))


def _argument(argument: click.Argument) -> str:
    shown = (argument.name or "").upper() + ("..." if argument.nargs != 1 else "")
    return shown if argument.required else f"[{shown}]"


def _names(option: click.Option) -> str:
    if option.is_flag:
        return ", ".join(f"`{each}`" for each in option.opts)
    if isinstance(option.type, click.Choice):
        value = "|".join(option.type.choices)
    else:
        value = option.metavar or (
            "N" if isinstance(option.type, click.IntRange | click.types.IntParamType) else "VALUE"
        )
    return f"`{', '.join(option.opts)} {value}`"


def _meaning(option: click.Option) -> str:
    notes = ["required"] if option.required else []
    notes += [f"default: {option.default}"] if option.show_default else []
    notes += ["may be given several times"] if option.multiple else []
    return (option.help or "") + (f" ({'; '.join(notes)})" if notes else "")


def plan_file() -> Iterator[str]:
    """Every field of a plan file with type, unit and default."""
    meanings = tomllib.loads((DOCS / "reference.toml").read_text(encoding="utf-8"))
    yield from ("# Fields of a plan file", "", MADE, "")
    yield from _prose(ABOUT_FIELDS)
    for struct in STRUCTS:
        yield from ("", f"## {struct.__name__}", "")
        said = meanings[struct.__name__]
        fields = [
            (f.name, _type(f.name, struct), _unit(f.name), _default(f), said[f.name])
            for f in msgspec.structs.fields(struct)
        ]
        yield from _table(("field", "type", "unit", "default", "meaning"), ((f"`{n}`", *rest) for n, *rest in fields))


def _type(name: str, struct: type[msgspec.Struct]) -> str:
    """The annotation as written, in words of JSON, linked where it is a type of this page."""
    text = inspect.get_annotations(struct)[name]
    text = re.sub(r"tuple\[(.*), \.\.\.\]", r"list of \1", re.sub(r"tuple\[(.*), \.\.\.\]", r"list of \1", text))
    text = (
        re.sub(r"dict\[str, (\w+)\]", r"object of \1", text).replace("Any", "anything").replace(" | None", " or null")
    )
    text = re.sub(r"\bstr\b", "string", re.sub(r"\bint\b", "integer", re.sub(r"\bfloat\b", "number", text)))
    known = {s.__name__ for s in STRUCTS}
    return re.sub(r"\b[A-Z]\w+", lambda m: f"[{m[0]}](#{m[0].lower()})" if m[0] in known else m[0], text)


def _unit(name: str) -> str:
    return next((unit for pattern, unit in UNITS if re.fullmatch(pattern, name)), "")


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    value = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    return f"`{msgspec.json.encode(value).decode()}`"


def api() -> Iterator[str]:
    """What `import shardwright` offers."""
    yield from ("# Python", "", MADE, "")
    yield "All of these are names of `shardwright`; they are imported on first use."
    for title, names in API.items():
        yield from ("", f"## {title}", "")
        if title == "Errors":
            yield from _table(("error", "meaning"), ((f"`{n}`", _first(getattr(shardwright, n))) for n in names))
            continue
        for name in names:
            yield from _entry(name, getattr(shardwright, name))


def _entry(name: str, value: Any) -> Iterator[str]:
    yield from (f"### {name}", "")
    if not isinstance(value, type) or "__init__" in vars(value):
        yield from ("```text", signature(name, value), "```", "")
    yield from _prose(inspect.getdoc(value) or "")
    if not isinstance(value, type):
        return
    for method, each in _public(value):
        call = " ".join(signature(method, each).split()).replace("( ", "(").replace(",)", ")").replace(", )", ")")
        yield f"- `{call}`: {_first(each)}"
    yield ""


def _public(value: type) -> Iterator[tuple[str, Any]]:
    """Methods and properties of a class that its own file describes."""
    for name, member in vars(value).items():
        each = member.__func__ if isinstance(member, classmethod) else member
        if (
            not name.startswith("_")
            and (inspect.isfunction(each) or isinstance(each, property))
            and inspect.getdoc(each)
        ):
            yield name, each


def signature(name: str, value: Any) -> str:
    """A call as it is written, on several lines where it is long; of a property its name."""
    if isinstance(value, property):
        return name
    found = inspect.signature(value)
    parts: list[str] = []
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not any(part.startswith("*") for part in parts):
            parts.append("*")
        if parameter.name not in ("self", "cls"):
            parts.append(_parameter(parameter))
    made = isinstance(value, type) or found.return_annotation is found.empty
    result = "" if made else f" -> {found.return_annotation}"
    text = f"{name}({', '.join(parts)}){result}"
    return text if len(text) <= WIDTH else f"{name}(\n    " + ",\n    ".join(parts) + f",\n){result}"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    typed = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    return f"{stars}{parameter.name}{typed}{default}"


def _prose(text: str) -> Iterator[str]:
    """Paragraphs of a docstring, an empty line after each; indented lines stay as they are."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        kept = any(line.startswith("    ") for line in paragraph.splitlines())
        yield from (
            paragraph if kept else textwrap.fill(" ".join(paragraph.split()), WIDTH, break_on_hyphens=False),
            "",
        )


def _first(value: Any) -> str:
    return " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())


def _table(head: Sequence[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(each.replace('|', chr(92) + '|') for each in row)} |"


if __name__ == "__main__":
    for file, text in pages().items():
        (DOCS / file).write_text(text, encoding="utf-8")
