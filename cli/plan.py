"""`shardwright plan MODEL --cluster C`: the fastest plan that fits, as tables, as JSON, as a file, as a report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..planner.goal import OBJECTIVES, PHASES
from .options import ABOVE_ZERO, BATCH, BYTES, json_option, output_option

if TYPE_CHECKING:
    from ..planner.plan import Plan


@click.command("plan")
@click.argument("model")
@click.option(
    "--cluster",
    required=True,
    metavar="C",
    help="Machines: h100-sxm:8x4 (see clusters), cluster.toml, local[:N], local-cpu:N.",
)
@click.option("--batch", type=BATCH, metavar="N|auto", help="Global batch in samples; auto: the fastest that fits.")
@click.option("--seq", type=click.IntRange(min=1), metavar="N", help="Sequence length [default: up to 1024].")
@click.option("--memory-limit", type=BYTES, metavar="SIZE", help="Per device, such as 12GiB [default: 92 % of it].")
@click.option(
    "--objective",
    type=click.Choice(OBJECTIVES),
    default="throughput",
    show_default=True,
    help="What the plan is best in.",
)
@click.option(
    "--phase", type=click.Choice(PHASES), help="Plan inference: the whole prompt, or one token [latency: decode]."
)
@click.option("--target-seconds", type=ABOVE_ZERO, metavar="S", help="Most seconds of a step (devices, cost).")
@click.option(
    "--target-tokens-per-second", type=ABOVE_ZERO, metavar="N", help="Least throughput of all devices (devices, cost)."
)
@click.option("--price-per-device-hour", type=ABOVE_ZERO, metavar="USD", help="For cost [default: the list price].")
@click.option("--frontier", is_flag=True, help="Also find the plans that none beats in time, memory and devices.")
@click.option("--pin", "pins", multiple=True, metavar="K=V", help="Fix (K=V) or forbid (K!=V) part of the plan.")
@click.option(
    "--like", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Pin what a configuration of another tool says (see export).",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of weights and random ops.")
@output_option("-o", "--output", help="Plan file to write.")
@output_option("--report", help="HTML page to write.")
@json_option
def command(
    model: str, cluster: str, batch: int | str | None, seq: int | None, memory_limit: int | None, objective: str,
    phase: str | None, target_seconds: float | None, target_tokens_per_second: float | None,
    price_per_device_hour: float | None, frontier: bool, pins: tuple[str, ...], like: Path | None, seed: int,
    output: Path | None, report: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Find the fastest plan for MODEL that fits the memory of cluster C, or the best by another objective.

    MODEL is hf:NAME (gpt2, llama3-8b, ...), hf:config.json, or file.py:function. No GPU and no weights are needed.

    With --like FILE, a configuration of Transformers, torchtitan, Megatron-LM or DeepSpeed, or a program of `export --to script`,
    is priced: it gives pins, batch and sequence length; --pin, --batch and --seq go before what it says.
    """
    from ..api import plan_model
    from ..garbage import held_back, leave_unswept
    from ..planner.goal import Aim
    from ..planner.planfile import save_plan
    from ..profiles.store import default_path
    from . import tables

    if like is not None:
        pins, batch, seq = pinned_like(like, pins, batch, seq)
    aim = Aim(phase or "", target_seconds, target_tokens_per_second, price_per_device_hour, frontier)
    leave_unswept()
    with held_back(), tables.progress() as tell:

        def estimated(estimate: Mapping[str, float]) -> None:
            tell.note(f"estimate: {tables.estimate_line(estimate)}")

        result = plan_model(
            model, cluster, batch=batch, seq=seq, memory_limit=memory_limit, pins=pins, objective=objective, seed=seed,
            store=default_path(), say=tell, show=estimated, aim=aim,
        )  # fmt: skip
    if output is not None:
        save_plan(result.plan, output)
    if report is not None:
        from .report.build import write_report
        from .report.replayed import replayed

        with tables.progress() as tell:
            seen = replayed(result.plan, tell)
        write_report(result.plan, report, seen=seen)
    if as_json:
        tables.print_json(document(result.plan, result.seconds, result.estimate))
    else:
        tables.show(tables.plan_tables(result.plan, result.seconds))
        written = [str(path) for path in (output, report) if path is not None]
        if written:
            tables.aside(f"wrote {' and '.join(written)}")


def pinned_like(
    path: Path, pins: tuple[str, ...], batch: int | str | None, seq: int | None
) -> tuple[tuple[str, ...], int | str | None, int | None]:
    """Pins, batch and sequence length: those given, and for the rest what the configuration at `path` says."""
    from .exports.read import read_like
    from .tables import aside

    said = read_like(path)
    given = {re.split("!?=", pin)[0].strip() for pin in pins}
    added = tuple(f"{key}={word}" for key, word in said.pins.items() if key not in given)
    batch, seq = said.batch if batch is None else batch, said.seq if seq is None else seq
    aside(f"{path} says {' '.join(added) or 'nothing that can be pinned'}, batch {batch}, sequence {seq}")
    return (*pins, *added), batch, seq


def document(plan: Plan, seconds: Mapping[str, float], estimate: Mapping[str, float]) -> dict[str, Any]:
    """What `plan --json` prints: the plan's own fields, and the seconds by phase that never enter a file."""
    from ..planner.planfile import to_plain

    found = to_plain(plan)
    found["search"]["seconds"] = dict(seconds)
    found["estimate"] = dict(estimate)
    return found
