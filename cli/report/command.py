"""`shardwright report plan.json -o report.html`: a plan as one self-contained page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ...errors import UsageError
from ..ledger import runs_of
from ..options import json_option, output_option


@click.command("report")
@click.argument("plan", type=click.Path(path_type=Path))
@output_option("-o", "--output", required=True, help="HTML page to write.")
@click.option(
    "--measured", type=click.Path(path_type=Path), metavar="FILE", help="What `run --json` printed, to compare."
)
@click.option(
    "--sensitivity",
    is_flag=True,
    help="Also plan again with more memory, another link, one more node (takes five searches).",
)
@json_option
def command(plan: Path, output: Path, measured: Path | None, sensitivity: bool, as_json: bool) -> None:
    """Write a plan as one HTML page that needs no network. Runs of it that the ledger knows are shown beside the prediction."""
    from ...planner.planfile import load_plan
    from ...profiles.store import default_path
    from ..edited import is_stale, priced_again
    from ..tables import progress
    from .build import write_report
    from .replayed import replayed
    from .worth import worth

    loaded, result = load_plan(plan), _measured(measured)
    with progress() as tell:
        if is_stale(loaded):
            loaded = priced_again(loaded, plan, tell)
        seen = replayed(loaded, tell)
        if sensitivity:
            seen.charts["worth"] = worth(loaded, tell, default_path())
    runs = runs_of(loaded)
    write_report(loaded, output, result, runs, seen)
    if as_json:
        click.echo(json.dumps({"report": str(output), "bytes": output.stat().st_size, "runs": len(runs)}))
    else:
        click.echo(f"wrote {output}")


def _measured(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}; expected what `run --json` printed") from None
    except ValueError:
        raise UsageError(f"{path}: not JSON; expected what `run --json` printed") from None
    if not isinstance(found, dict) or not ({"verify", "step_seconds"} & set(found)):
        raise UsageError(f"{path}: expected what `run --json` printed (step_seconds, peak_bytes, verify)")
    return found
