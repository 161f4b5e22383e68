"""`shardwright run plan.json`: start the ranks by torchrun; or be one of them, when torchrun started this process."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .ledger import note_run
from .options import ABOVE_ZERO, NODES, json_option, output_option

if TYPE_CHECKING:
    from ..planner.plan import Plan


@click.command("run", context_settings={"ignore_unknown_options": False})
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--steps", type=click.IntRange(min=0), metavar="N", help="Training steps to time [default: 5].")
@click.option("--verify", is_flag=True, help="Compare loss and every gradient with the original module first.")
@output_option("--trace", help="Chrome trace of one step to write.")
@click.option(
    "--nnodes", type=NODES, default="1", show_default=True, metavar="N|MIN:MAX", help="Machines that take part."
)
@click.option(
    "--node-rank", type=click.IntRange(min=0), metavar="N", default=0, show_default=True, help="Which of them this is."
)
@click.option("--rdzv-endpoint", metavar="HOST:PORT", help="Where several machines meet.")
@click.option(
    "--nproc-per-node", type=click.IntRange(min=1), metavar="K", help="Ranks a machine [default: equal shares]."
)
@click.option(
    "--max-restarts",
    type=click.IntRange(min=0),
    metavar="N",
    default=0,
    show_default=True,
    help="Starts again after a fault.",
)
@click.option("--elastic", is_flag=True, help="Plan again where another number of ranks runs than the plan has.")
@click.option("--timeout", type=ABOVE_ZERO, metavar="SECONDS", help="When a rank counts as lost [default: 600].")
@click.option(
    "--save", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER", help="Where to keep checkpoints."
)
@click.option("--every", type=click.IntRange(min=1), metavar="N", help="Steps between them [default: one at the end].")
@click.option(
    "--resume", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER", help="Go on from the newest in it."
)
@click.argument("script", nargs=-1, type=click.UNPROCESSED)
@json_option
def command(
    plan: Path, steps: int | None, verify: bool, trace: Path | None, nnodes: tuple[int, int], node_rank: int,
    rdzv_endpoint: str | None, nproc_per_node: int | None, max_restarts: int, elastic: bool, timeout: float | None,
    save: Path | None, every: int | None, resume: Path | None, script: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Run a plan on its ranks: rebuild the model from the plan, train some steps, measure.

    After `--` comes a script of your own with its arguments; it is started on every rank with `--plan PLAN` appended.
    What timed steps took goes into the ledger beside the prediction (`profile --from-ledger`, `report`).
    With --nnodes MIN:MAX machines may leave and come: the ranks that are left start again, under a plan made for them.
    With --resume it goes on from the newest checkpoint in FOLDER, which another plan may have written; a folder that is also given
    to --save may be empty, so that one command both starts and goes on. --steps counts further steps then, or, where a run of as
    many steps ended early (a fault, a restart), those that it left.
    Exit status 1 when --verify finds a difference, or a rank held more memory than the plan's limit.
    """
    from ..planner.capability import check_plan
    from ..planner.planfile import load_plan
    from .edited import is_stale, priced_again
    from .launch import Nodes, check_world, torchrun_arguments, under_torchrun

    least, most = nnodes
    nodes = Nodes(most, node_rank, rdzv_endpoint, nproc_per_node, least, max_restarts)

    loaded = load_plan(plan)
    check_plan(loaded)
    if is_stale(loaded) and not under_torchrun():
        from .tables import progress

        with progress() as tell:
            loaded = priced_again(loaded, plan, tell)
    if script:
        if steps is not None or verify or trace or elastic or timeout or as_json or save or every or resume:
            raise click.UsageError(
                "--steps, --verify, --trace, --save, --every, --resume, --elastic, --timeout and --json belong to the built-in "
                "loop; a script has its own"
            )
        if under_torchrun():
            raise click.UsageError("torchrun runs already: start the script itself, with --plan")
        raise SystemExit(_start(torchrun_arguments(loaded, [*script, "--plan", str(plan)], nodes)))
    own = [str(plan), f"--steps={5 if steps is None else steps}"]
    own += ["--verify"] * verify + ([f"--trace={trace}"] if trace else [])
    own += ["--elastic"] * (elastic or nodes.elastic) + ([f"--timeout={timeout:g}"] if timeout else [])
    own += kept(save, every, resume)
    if under_torchrun():
        if not elastic:
            check_world(loaded)
        raise SystemExit(_be_rank(loaded, own))
    status, result = run_ranks(loaded, own, nodes)
    if result is not None:
        ran = planned_again(result) or loaded
        note_run(ran, result)
        _present(ran, result, as_json)
    raise SystemExit(status)


def planned_again(result: dict[str, Any]) -> Plan | None:
    """The plan that an elastic run made for the ranks it found; None where it ran the plan it was given."""
    from ..planner.planfile import parse_plan

    made = result.get("planned_again")
    return parse_plan(json.dumps(made), "the plan made for the ranks that ran") if made else None


def kept(save: Path | None, every: int | None, resume: Path | None) -> list[str]:
    """The ranks' arguments of where checkpoints are saved and found."""
    if every is not None and save is None:
        raise click.UsageError("--every N needs --save FOLDER")
    given = {"save": save, "every": every, "resume": resume}
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def run_ranks(plan: Any, own: list[str], nodes: Any) -> tuple[int, dict[str, Any] | None]:
    """Start all ranks on `runtime.execute` with the arguments `own`; (exit status, what rank 0 measured)."""
    from .launch import EXECUTE, torchrun_arguments

    with tempfile.TemporaryDirectory(prefix="shardwright-") as folder:
        result = Path(folder) / "result.json"
        target = ["-m", EXECUTE, *own]
        arguments = torchrun_arguments(plan, [*target, f"--result={result}"], nodes)
        status = _start(arguments, shown=torchrun_arguments(plan, target, nodes))
        return status, json.loads(result.read_text()) if result.exists() else None


def _be_rank(plan: Any, own: list[str]) -> int:
    """Be one rank of a torchrun that runs already; rank 0 prints what was measured and notes it in the ledger."""
    from ..runtime.execute import main

    with tempfile.TemporaryDirectory(prefix="shardwright-") as folder:
        path = Path(folder) / "result.json"
        status = main([*own, f"--result={path}"])
        if path.exists():
            text = path.read_text()
            click.echo(text)
            result = json.loads(text)
            note_run(planned_again(result) or plan, result)
    return status


def _start(arguments: list[str], shown: list[str] | None = None) -> int:
    from .launch import command_line, launch

    click.echo(command_line(shown or arguments), err=True)
    status = launch(arguments)
    if 2 < status < 128:
        click.echo(f"error: a rank ended with exit status {status}", err=True)
    return status


def _present(plan: Any, result: dict[str, Any], as_json: bool) -> None:
    from .results import result_tables
    from .tables import print_json, show

    if as_json:
        print_json(result)
    elif os.environ.get("RANK", "0") == "0":
        show(result_tables(plan, result))
