"""`shardwright demo`: a small GPT is planned for two processes under a memory limit that one would break, run and verified.

Everything it makes lies in the folder `demo` (model configuration, text, plan, result) and in `demo-report.html`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from .ledger import note_run, runs_of
from .options import json_option

if TYPE_CHECKING:
    from ..api import PlanResult
    from ..planner.plan import Plan
    from .tables import Teller

FOLDER, REPORT = Path("demo"), Path("demo-report.html")
BATCH, SEQ, STEPS, PROCESSES = 8, 128, 4, 2
# GPT-2 with bytes for tokens: 25.4 M parameters. Weights of a GPT-2 are tied, its dropout is on: nothing is made easy.
CONFIG = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 256, "n_positions": SEQ, "n_embd": 512,
    "n_layer": 8, "n_head": 8, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


@click.command("demo")
@json_option
def command(as_json: bool) -> None:
    """Plan, run and verify a small GPT on this machine; writes demo-report.html.

    Two processes train it on text under a memory limit that one process would break. Loss and every gradient are compared
    with the original model's.
    """
    from ..planner.planfile import save_plan
    from . import tables
    from .report.build import write_report
    from .report.replayed import replayed
    from .results import result_tables

    FOLDER.mkdir(exist_ok=True)
    with tables.progress() as tell:
        model, text = _inputs()
        limit = _limit(model, tell)
        made = _plan(model, f"local-cpu:{PROCESSES}", limit, tell)
    plan_file = FOLDER / "plan.json"
    save_plan(made.plan, plan_file)
    if not as_json:
        tables.show(tables.plan_tables(made.plan, made.seconds))
    status, result = _run(made.plan, plan_file, text)
    if result is None:
        raise SystemExit(status or 2)
    note_run(made.plan, result)
    with tables.progress() as tell:
        seen = replayed(made.plan, tell)
    write_report(made.plan, REPORT, result, runs_of(made.plan), seen)
    if as_json:
        tables.print_json(
            {"plan": str(plan_file), "report": str(REPORT), "memory_limit_bytes": limit, "result": result}
        )
    else:
        tables.show(result_tables(made.plan, result), "", f"wrote {REPORT} and {plan_file}")
    raise SystemExit(status)


def _inputs() -> tuple[str, Path]:
    """Write the model's configuration and the text it is trained on; (MODEL, text file)."""
    from ..planner.planfile import write_whole

    config, text = FOLDER / "gpt.json", FOLDER / "text.txt"
    write_whole(config, json.dumps(CONFIG, indent=2) + "\n")
    write_whole(text, english())
    return f"hf:{config}", text


def english() -> str:
    """Real prose that every Python carries: the language reference as its help system has it (about 700 kB of ASCII)."""
    from pydoc_data.topics import topics

    prose = "\n\n".join(topics[name] for name in sorted(topics))
    return prose.encode("ascii", "ignore").decode()


def _limit(model: str, tell: Teller) -> int:
    """A limit that one process breaks: its parameters, gradients and optimizer, nothing beside. Shows the planner say so."""
    from ..errors import Infeasible

    alone = _plan(model, "cpu:1", None, tell).estimate
    limit = int(sum(alone[f"{cause}_bytes"] for cause in ("parameter", "gradient", "optimizer")))
    try:
        _plan(model, "cpu:1", limit, tell)
    except Infeasible as error:
        tell.note(f"one process: {error}")
        return limit
    raise UsageError(f"the demo is broken: one process fits {limit} bytes")


def _plan(model: str, cluster: str, limit: int | None, tell: Teller) -> PlanResult:
    from ..api import plan_model
    from ..profiles.store import default_path
    from .tables import estimate_line

    return plan_model(
        model, cluster, batch=BATCH, seq=SEQ, memory_limit=limit, say=tell, store=default_path(),
        show=lambda estimate: tell.note(f"{cluster}: {estimate_line(estimate)}"),
    )  # fmt: skip


def _run(plan: Plan, plan_file: Path, text: Path) -> tuple[int, dict[str, Any] | None]:
    from ..planner.planfile import write_whole
    from .launch import Nodes
    from .run import run_ranks

    own = [str(plan_file), f"--steps={STEPS}", "--verify", f"--data={text}"]
    status, result = run_ranks(plan, own, Nodes())
    if result is not None:
        write_whole(FOLDER / "result.json", json.dumps(result, indent=2) + "\n")
    return status, result
