"""How long `shardwright plan` takes, from a config file to a plan, and how much memory.

    python benchmarks/plan_speed.py [--case NAME]... [--json]

Each case is one run of the whole command in a process of its own, against limits on wall-clock seconds, on memory (resident
bytes summed over the command's processes at one moment) and on the proven gap. Libraries are imported once before the first case,
so that none is charged for reading them from disk. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SAMPLE_SECONDS = 0.05
PATIENCE = 5.0
"""A case is stopped at this many times its limit."""


@dataclass(frozen=True)
class Case:
    """A command and its limits: seconds of the whole command, gigabytes (1e9 bytes), and the gap its plan must prove."""

    name: str
    model: str
    cluster: str
    batch: int
    seq: int | None
    seconds: float
    gigabytes: float | None = None
    gap: float = 0.01


CASES = (
    Case("gpt2", "hf:gpt2", "h100-sxm:8", 64, 1024, 10.0, gap=0.001),
    Case("llama3-8b", "hf:llama3-8b", "h100-sxm:8x8", 512, 4096, 30.0),
    Case("llama3-70b", "hf:llama3-70b", "h100-sxm:8x64", 1024, 8192, 60.0),
    Case("llama3-405b", "hf:llama3-405b", "h100-sxm:8x2048", 2048, 8192, 90.0, gigabytes=3.0),
    Case("mixtral-8x7b", "hf:mixtral-8x7b", "h100-sxm:8x8", 512, 4096, 60.0),
    Case("unet", f"{HERE / 'models' / 'unet.py'}:unet", "h100-sxm:8x2", 256, None, 60.0, gap=0.001),
)
"""At most 1 % of gap, 0.1 % below 64 devices. llama3-405b: 16,384 devices."""


@dataclass(frozen=True)
class Outcome:
    """What one case took. `phases` are the command's own seconds; `error` is its message where it made no plan."""

    case: Case
    seconds: float
    gigabytes: float
    status: int
    step_seconds: float = 0.0
    bound_seconds: float = 0.0
    gap: float = 1.0
    mesh: str = ""
    phases: dict[str, float] = field(default_factory=dict)
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether there is a plan within all limits."""
        fits = self.case.gigabytes is None or self.gigabytes <= self.case.gigabytes
        return self.status == 0 and self.seconds <= self.case.seconds and fits and self.gap <= self.case.gap


def command(case: Case) -> list[str]:
    """The command line of a case."""
    found = [sys.executable, "-m", "shardwright.cli.main", "plan", case.model, "--cluster", case.cluster]
    found += ["--batch", str(case.batch), "--json"]
    return found if case.seq is None else [*found, "--seq", str(case.seq)]


def measure(case: Case) -> Outcome:
    """Run a case; a command that exceeds `PATIENCE` times its limit is stopped with its children."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(command(case), stdout=out, stderr=err, start_new_session=True)
        try:
            peak, stopped = _watch(process, start + PATIENCE * case.seconds)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # its own session does not hear Ctrl-C
            raise
        seconds = time.perf_counter() - start
        out.seek(0)
        err.seek(0)
        text, said = out.read().decode(), err.read().decode(errors="replace")
    gigabytes = peak / 1e9
    if process.returncode != 0:
        error = f"stopped after {seconds:.0f} s" if stopped else said.strip()[-2000:]
        return Outcome(case, seconds, gigabytes, process.returncode, error=error)
    return _outcome(case, seconds, gigabytes, json.loads(text))


def _watch(process: subprocess.Popen[bytes], deadline: float) -> tuple[int, bool]:
    """Wait for a process: (its peak of resident bytes, whether it was stopped at the deadline)."""
    peak, stopped = 0, False
    while True:
        peak = max(peak, resident_bytes(process.pid))
        if not stopped and time.perf_counter() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            stopped = True
        time.sleep(SAMPLE_SECONDS)
        found, status, usage = os.wait4(process.pid, os.WNOHANG)  # poll() would drop the process's own peak
        if found == process.pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return max(peak, usage.ru_maxrss * 1024), stopped


def _outcome(case: Case, seconds: float, gigabytes: float, plan: dict[str, Any]) -> Outcome:
    search, pipeline = plan["search"], plan["pipeline"]
    mesh = " ".join(f"{axis['name']}={axis['size']}" for axis in plan["mesh"])
    mesh += f" pp={pipeline['ranks']} mb={pipeline['micro_batch']}"
    return Outcome(
        case, seconds, gigabytes, 0, plan["predicted"]["step_seconds"], search["bound_seconds"], search["gap"], mesh,
        dict(search["seconds"]),
    )  # fmt: skip


def resident_bytes(pid: int) -> int:
    """Resident bytes of a process and all that descend from it, now (Linux; 0 elsewhere)."""
    total, waiting = 0, [pid]
    while waiting:
        current = Path("/proc") / str(waiting.pop())
        try:
            total += int((current / "statm").read_text().split()[1]) * resource.getpagesize()
            for task in (current / "task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except (OSError, IndexError):
            continue  # it ended meanwhile
    return total


def show(outcomes: Sequence[Outcome]) -> None:
    """Print the table, then phases and errors."""
    print(
        f"{'case':14}{'seconds':>9}{'limit':>7}{'GB':>7}{'limit':>7}{'gap':>9}{'limit':>7}{'step s':>10}{'bound s':>10}  ok  plan"
    )
    for o in outcomes:
        most = f"{o.case.gigabytes:.1f}" if o.case.gigabytes is not None else "-"
        gap = f"{o.gap:.3%}" if o.status == 0 else "-"
        print(
            f"{o.case.name:14}{o.seconds:>9.1f}{o.case.seconds:>7.0f}{o.gigabytes:>7.2f}{most:>7}{gap:>9}{o.case.gap:>7.1%}"
            f"{o.step_seconds:>10.4g}{o.bound_seconds:>10.4g}  {'yes' if o.passed else 'NO':3} {o.mesh}"
        )
    print()
    for o in outcomes:
        inside = sum(o.phases.values())
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in o.phases.items())
        print(f"{o.case.name}: {o.error or f'{phases}, start and imports {o.seconds - inside:.1f}'}")


def main() -> None:
    """Run the cases and print. Exits with 1 where one missed a limit."""
    parser = argparse.ArgumentParser(description="Seconds, memory and gap of whole `shardwright plan` commands.")
    names = [case.name for case in CASES]
    parser.add_argument(
        "--case", action="append", choices=names, metavar="NAME", help=f"only this one: {', '.join(names)}"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    outcomes = []
    subprocess.run(
        [sys.executable, "-c", "import ortools.math_opt.python.mathopt, torch.export, transformers"], check=True
    )
    for case in CASES:
        if given.case is None or case.name in given.case:
            print(f"{case.name}: {' '.join(command(case)[3:])}", file=sys.stderr)
            outcomes.append(measure(case))
    if given.json:
        print(json.dumps([{**asdict(o), "passed": o.passed} for o in outcomes]))
    else:
        show(outcomes)
    if not all(o.passed for o in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
