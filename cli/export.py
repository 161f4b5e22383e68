"""`shardwright export plan.json --to FORMAT`: a plan as a file for the tools that start jobs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import UsageError
from .options import BYTES, json_option, output_option

if TYPE_CHECKING:
    from ..planner.plan import Plan

BUILT = ("script", "slurm", "kubernetes")
FORMATS = ("hf", "torchtitan", "megatron", "deepspeed", *BUILT)


@click.command("export", context_settings={"ignore_unknown_options": False})
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--to", "form", type=click.Choice(FORMATS), required=True, help="What to write.")
@output_option("-o", "--output", help="File to write [default: stdout].")
@click.option("--steps", type=click.IntRange(min=0), metavar="N", help="Training steps to time [default: 5].")
@click.option("--name", default="shardwright", show_default=True, help="Name of the job (slurm, kubernetes).")
@click.option("--image", help="Container image with shardwright in it (kubernetes).")
@click.option(
    "--memory", type=BYTES, metavar="SIZE", help="Host memory of each machine [default: of the plan's cluster]."
)
@click.argument("script", nargs=-1, type=click.UNPROCESSED)
@json_option
def command(
    plan: Path, form: str, output: Path | None, steps: int | None, name: str, image: str | None, memory: int | None,
    script: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Write a plan as a file that starts it: a shell script, a SLURM batch file, a Kubernetes PyTorchJob.

    The file runs the built-in loop, or the script given after `--` with `--plan PLAN` appended, on the machines of the plan.
    """
    from ..planner.capability import check_plan
    from ..planner.planfile import load_plan, write_whole
    from .jobfiles import job_shape
    from .tables import print_json

    if form not in BUILT:
        raise UsageError(f"export to {form} is not supported yet; there are {', '.join(BUILT)}")
    if script and steps is not None:
        raise click.UsageError("--steps belongs to the built-in loop; a script has its own")
    loaded = load_plan(plan)
    check_plan(loaded)
    text = rendered(loaded, form, plan, steps, script, name, image, memory)
    if output is not None:
        write_whole(output, text)
    if as_json:
        shape = job_shape(loaded, memory)
        print_json(
            {
                "to": form, "output": str(output) if output else None, "nodes": shape.nodes,
                "ranks_per_node": shape.per_node, "gpus_per_node": shape.gpus, "memory_bytes_per_node": shape.memory_bytes,
                "text": text,
            }
        )  # fmt: skip
    elif output is None:
        click.echo(text, nl=False)
    else:
        click.echo(f"wrote {output}", err=True)


def rendered(
    plan: Plan, form: str, path: Path, steps: int | None, script: Sequence[str], name: str, image: str | None,
    memory: int | None,
) -> str:  # fmt: skip
    """The text of the file `form` for the plan that lies at `path`."""
    from .jobfiles import FOLDER, job_shape, kubernetes_file, script_file, slurm_file
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
    if form == "script":
        return script_file(shape, where, ["--", *script] if script else [loop])
    return slurm_file(shape, target, name)
