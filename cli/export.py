"""`shardwright export plan.json --to FORMAT`: a plan in the words of another tool, or as a file that starts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from .options import BYTES, json_option, output_option

if TYPE_CHECKING:
    from ..planner.plan import Plan
    from .exports.base import Export

TOOLS = ("hf", "torchtitan", "megatron", "deepspeed", "script")
JOBS = ("shell", "slurm", "kubernetes")


@click.command("export", context_settings={"ignore_unknown_options": False})
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--to", "form", type=click.Choice((*TOOLS, *JOBS)), required=True, help="What to write.")
@output_option("-o", "--output", help="File to write [default: stdout].")
@click.option(
    "--steps",
    type=click.IntRange(min=0),
    metavar="N",
    help="Training steps to time [default: 5] (shell, slurm, kubernetes).",
)
@click.option("--name", help="Name of the job (slurm, kubernetes) [default: shardwright].")
@click.option("--image", help="Container image with shardwright in it (kubernetes).")
@click.option(
    "--memory",
    type=BYTES,
    metavar="SIZE",
    help="Host memory of each machine (slurm, kubernetes) [default: of the plan's cluster].",
)
@click.argument("script", nargs=-1, type=click.UNPROCESSED)
@json_option
def command(
    plan: Path, form: str, output: Path | None, steps: int | None, name: str | None, image: str | None, memory: int | None,
    script: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Write a plan for another tool, or as a file that starts it.

    hf, torchtitan, megatron, deepspeed: that tool's configuration. script: a PyTorch program that needs nothing of shardwright.
    What the target cannot express is said on stderr. `plan --like FILE` reads such a file back.

    shell, slurm, kubernetes: a file that runs the plan on its machines by `shardwright`: the built-in loop, or the script given
    after `--` with `--plan PLAN` appended.
    """
    from ..planner.planfile import load_plan, write_whole
    from .tables import aside, print_json

    loaded = load_plan(plan)
    if form in TOOLS:
        _refuse_job_options(
            form, {"--steps": steps, "--name": name, "--image": image, "--memory": memory, "a script": script or None}
        )
        made = export_plan(loaded, form)
        text, facts = made.text, {"losses": list(made.losses)}
    else:
        made = None
        text, facts = started(loaded, form, plan, steps, script, name or "shardwright", image, memory)
    if output is not None:
        write_whole(output, text)
    for loss in made.losses if made is not None else ():
        aside(f"not in {form}: {loss}")
    if as_json:
        print_json({"to": form, "output": str(output) if output else None, **facts, "text": text})
    elif output is None:
        click.echo(text, nl=False)
    else:
        click.echo(f"wrote {output}", err=True)


def _refuse_job_options(form: str, given: Mapping[str, Any]) -> None:
    """Raise UsageError for an option of job files."""
    for option, value in given.items():
        if value is not None:
            raise UsageError(f"{option} belongs to --to {'|'.join(JOBS)}, not to {form}")


def export_plan(plan: Plan, form: str) -> Export:
    """A plan in the words of another tool: `form` is "hf", "torchtitan", "megatron", "deepspeed" or "script".

    `text` of what is returned is the file, `losses` says what of the plan it leaves out. Raises UsageError for what the tool
    cannot run, and for another `form`.
    """
    from .exports.base import export
    from .exports.facts import facts_of
    from .exports.read import TARGETS

    if form not in TARGETS:
        raise UsageError(f"no export to {form!r}; expected one of {', '.join(TARGETS)}")
    return export(TARGETS[form], facts_of(plan))


def started(
    plan: Plan, form: str, path: Path, steps: int | None, script: Sequence[str], name: str, image: str | None,
    memory: int | None,
) -> tuple[str, dict[str, Any]]:  # fmt: skip
    """The file that starts a plan that lies at `path`, and the shape of its job."""
    from ..planner.capability import check_plan
    from .jobfiles import job_shape

    if script and steps is not None:
        raise click.UsageError("--steps belongs to the built-in loop; a script has its own")
    check_plan(plan)
    text, shape = rendered(plan, form, path, steps, script, name, image, memory), job_shape(plan, memory)
    return text, {
        "nodes": shape.nodes, "ranks_per_node": shape.per_node, "gpus_per_node": shape.gpus,
        "memory_bytes_per_node": shape.memory_bytes,
    }  # fmt: skip


def rendered(
    plan: Plan, form: str, path: Path, steps: int | None, script: Sequence[str], name: str, image: str | None,
    memory: int | None,
) -> str:  # fmt: skip
    """The text of the file `form` for the plan that lies at `path`."""
    from .jobfiles import FOLDER, job_shape, kubernetes_file, shell_file, slurm_file
    from .launch import EXECUTE

    shape = job_shape(plan, memory)
    where, loop = (
        f"{FOLDER}/plan.json" if form == "kubernetes" else str(path),
        f"--steps={5 if steps is None else steps}",
    )
    target = [*script, "--plan", where] if script else ["-m", EXECUTE, where, loop]
    if form == "kubernetes":
        if image is None:
            raise UsageError("--to kubernetes needs --image, a container image with shardwright installed in it")
        return kubernetes_file(shape, plan, target, name, image)
    if image is not None:
        raise UsageError(f"--image belongs to --to kubernetes, not to {form}")
    if form == "shell":
        return shell_file(shape, where, ["--", *script] if script else [loop])
    return slurm_file(shape, target, name)
