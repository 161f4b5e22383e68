"""What the simulator is told about stages, ranks and links: seconds and bytes (planner/simulate.py)."""

from __future__ import annotations

from dataclasses import dataclass

from .paths import FinishChain

Lanes = tuple[tuple[str, float], ...]
"""(lane, seconds) entries."""


@dataclass(frozen=True, slots=True)
class StageCost:
    """What one microbatch of a virtual stage takes: seconds and bytes.

    `backward` is the whole backward, `weight` the part of it that a W action runs (I takes the rest). `saved_bytes` live
    from the start of F to the end of B, or of I, after which `saved_weight_bytes` stay until W ends. The working bytes live
    while the action runs. With copies, `offloaded_bytes` of the saved ones leave the device when the copy out after F ends
    and are back from when the copy in starts: as soon as the rank takes up the action before the backward.
    `lanes_forward` and `lanes_backward` are collectives hidden under an action: shown, and replayed under contention, but
    without a part in fixed times. `finish` runs after the stage's last backward (planner/paths.py says in which order).
    """

    forward: float
    backward: float = 0.0
    weight: float = 0.0
    saved_bytes: float = 0.0
    saved_weight_bytes: float = 0.0
    work_forward_bytes: float = 0.0
    work_backward_bytes: float = 0.0
    copy_out_seconds: float = 0.0
    copy_in_seconds: float = 0.0
    offloaded_bytes: float = 0.0
    lanes_forward: Lanes = ()
    lanes_backward: Lanes = ()
    finish: FinishChain = ()

    @property
    def copies(self) -> bool:
        """Whether its saved activations go to the host."""
        return bool(self.offloaded_bytes or self.copy_out_seconds or self.copy_in_seconds)


@dataclass(frozen=True, slots=True)
class RankCost:
    """Bytes of a rank beside its microbatches: there all the time, and beside them while its finish runs."""

    static_bytes: float = 0.0
    finish_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Links:
    """Seconds of sends by sending stage: `send_forward[s]` from s to s + 1, `send_backward[s]` from s to s - 1.

    Between stages of one rank nothing is sent, whatever stands here.
    """

    send_forward: tuple[float, ...]
    send_backward: tuple[float, ...]

    @classmethod
    def free(cls, stages: int) -> Links:
        """Sends that take no time."""
        return cls((0.0,) * stages, (0.0,) * stages)
