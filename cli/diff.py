"""`shardwright diff a.json b.json`: what differs, by dimension, and what is predicted of it; exit status 1 if anything."""

from __future__ import annotations

from pathlib import Path

import click

from .options import json_option


@click.command("diff")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@json_option
def command(a: Path, b: Path, as_json: bool) -> None:
    """Compare two plans. Exit status 1 when they differ."""
    from ..planner.plandiff import diff
    from ..planner.planfile import load_plan
    from .edited import priced_again
    from .listings import difference_tables
    from .tables import print_json, progress, show

    with progress() as tell:
        found = diff(*(priced_again(load_plan(path), path, tell) for path in (a, b)))
    if as_json:
        print_json(
            [{**{f: getattr(d, f) for f in ("dimension", "where", "a", "b")}, "change": d.change} for d in found]
        )
    elif found:
        show(*difference_tables(found, a.name, b.name))
    else:
        show("The plans are the same.")
    if found:
        raise SystemExit(1)
