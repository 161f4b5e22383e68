"""Put fitted factors (fit_prices.py) into the data of devices and links, each figure with where it came from and its error bar.

    python benchmarks/write_factors.py factors.json [--data profiles/data] [--note "..."]

factors.json is what `fit_prices.py --json` printed. A figure that a device does not have of its own gets a line in its file.
Factors whose deviation is nearly as wide as their prior said nothing and are left out.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

from price_parameters import PARAMETERS, Parameter
from shardwright.planner.cluster import Level
from shardwright.profiles.devices import load_device
from shardwright.profiles.presets import level

INFORMED = 0.85
"""A deviation below this share of the prior's is news."""

MOST = 0.95
"""No efficiency is fitted beyond this."""


def main() -> None:
    """Write."""
    parser = argparse.ArgumentParser(description="Put fitted factors into the data of devices.")
    parser.add_argument("factors", type=Path, help="what fit_prices.py --json printed")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[1] / "profiles" / "data")
    parser.add_argument(
        "--note", default="published runs, benchmarks/fit_prices.py", help="what the figures were fitted to"
    )
    given = parser.parse_args()
    found = json.loads(given.factors.read_text())["factors"]
    for parameter in PARAMETERS:
        factor, deviation, prior = found.get(parameter.name, (1.0, 1.0, 1.0))
        if deviation >= INFORMED * prior:
            continue
        for file, table, key, value in _targets(parameter, given.data):
            text = f"fitted to {given.note}: {factor:.2f} x {value:.3g}, give or take {deviation:.0%}"
            _write(file, table, key, float(f"{value * factor:.3g}"), text)


def _targets(parameter: Parameter, data: Path) -> Iterator[tuple[Path, str, str, float]]:
    """(file, table, key, present value) of every figure a parameter multiplies."""
    if parameter.links:
        file = data / "networks.toml"
        for kind, name in re.findall(r"^\[(rank|node)\.([^\]]+)\]", file.read_text(), re.MULTILINE):
            if name.startswith(parameter.links):
                found: Level = level(kind, name, 1)
                yield from ((file, f"{kind}.{name}", key, getattr(found, key)) for key in parameter.figures)
        return
    for file in sorted((data / "devices").glob("*.toml")):
        if file.stem.startswith(parameter.devices):
            device = load_device(file.stem)
            for figure in parameter.figures:
                head, _, kind = figure.partition(".")
                if kind:
                    yield file, "efficiencies", kind, device.efficiency(kind)
                elif head == "overlap_slowdown":
                    yield file, "overlap", "slowdown", device.overlap_slowdown
                else:
                    yield file, "", head, getattr(device, head)


def _write(file: Path, table: str, key: str, value: float, source: str) -> None:
    """One line of a table, replaced or added at its end. No efficiency is above what anybody has seen."""
    lines = file.read_text().splitlines()
    begin = lines.index(f"[{table}]") + 1 if table else 0
    end = next((i for i in range(begin, len(lines)) if lines[i].startswith("[")), len(lines))
    shown = min(value, MOST) if table == "efficiencies" or key == "efficiency" else value
    line = f'{key} = {{ value = {shown:g}, source = "{source}" }}'
    own = next((i for i in range(begin, end) if lines[i].startswith(f"{key} =")), None)
    if own is not None:
        lines[own] = line
    else:
        last = max(i for i in range(begin - 1, end) if lines[i].strip())
        lines.insert(last + 1, line)
    file.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
