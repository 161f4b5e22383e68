"""What can go wrong, in one tree; every message says what was asked, what was found and the smallest change that works.

    ShardwrightError
    ├── CaptureError     the model cannot be captured (all problems of one capture together)
    ├── ClusterError     the machine description cannot be used
    ├── PinError         a pin is unknown, malformed, contradictory, or does not divide what it must
    ├── PlanError        a plan file is malformed, or an edit is not legal (file, field, what was expected)
    ├── PlanMismatch     the plan belongs to another model, cluster or world (first difference)
    ├── UsageError       a call that cannot be expressed: wrong inputs, shapes that do not divide, calling order
    ├── UnsupportedOp    no rule for an op, and none could be discovered
    ├── LaunchError      world size, backend or process group do not fit the plan
    ├── CheckpointError  a file of weights or a checkpoint is malformed, incomplete or for something else (file, field)
    └── Infeasible       legal, but does not fit the memory (exit status 1); carries the nearest fits

Exit status of the command line: `error.exit_status` (2 for all but Infeasible).
"""

from __future__ import annotations

from collections.abc import Sequence


class ShardwrightError(Exception):
    """Base of everything shardwright raises on purpose."""

    exit_status = 2


class CaptureError(ShardwrightError):
    """The model cannot be captured; `problems` lists every problem found, not only the first."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join([message, *(f"  - {p}" for p in self.problems)]))


class ClusterError(ShardwrightError):
    """The machine description cannot be used."""


class PinError(ShardwrightError):
    """A pin is unknown, malformed, contradictory, or does not divide what it must."""


class PlanError(ShardwrightError):
    """A plan file is malformed or an edit to it is not legal."""


class PlanMismatch(ShardwrightError):
    """The plan belongs to another model, cluster or world."""


class UsageError(ShardwrightError):
    """A call that cannot be expressed or executed."""


class UnsupportedOp(ShardwrightError):
    """An op has no rule and none could be discovered."""


class LaunchError(ShardwrightError):
    """World size, backend or process group do not fit the plan."""


class CheckpointError(ShardwrightError):
    """A checkpoint or a file of weights is malformed, incomplete, or does not fit the module."""


class Infeasible(ShardwrightError):
    """Legal, but no plan fits the memory; `nearest` lists settings that do, cheapest change first."""

    exit_status = 1

    def __init__(self, message: str, *, cause: str = "", nearest: Sequence[str] = ()) -> None:
        self.cause = cause
        self.nearest = tuple(nearest)
        lines = [message]
        if self.nearest:
            lines += ["nearest settings that fit:", *(f"  - {n}" for n in self.nearest)]
        super().__init__("\n".join(lines))
