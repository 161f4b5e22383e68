"""What a unit under a design comes to (planner/bench.py works it out): seconds, bytes, parameters, mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass

from .costs import Call
from .experts import ExpertFacts


@dataclass(frozen=True, slots=True)
class Weights:
    """Parameters of a unit that are stored alike: local elements on the inner mesh, and how their gradients come about.

    `whole`: they stand whole on the model axis, so that their gradients are summed over it. `borrowed`: an earlier unit owns
    them. `needed`: the backward pass needs them again. `expert`: they are split with the experts of a mixture.
    """

    elements: float
    rows: float
    trainable: bool
    whole: bool
    borrowed: bool
    needed: bool
    expert: bool = False


@dataclass(frozen=True, slots=True)
class UnitExperts:
    """One mixture-of-experts op of a unit under one design, on one rank of the inner mesh and for one microbatch.

    `local` of all experts are the rank's, and `slots` token copies of `token_bytes` go through them; buffers have `rows`, those
    of all experts. `forward`, `backward` and `weight` are seconds of compute, `gates` the bytes it saves anew, `scratch` those
    inside it (forward, backward); `again` says that it runs again.
    """

    facts: ExpertFacts
    local: int
    slots: float
    rows: float
    token_bytes: int
    forward: float
    backward: float
    weight: float
    gates: float
    scratch: tuple[float, float]
    again: bool


@dataclass(frozen=True, slots=True)
class Numbers:
    """One unit under one design.

    `forward` and `backward` are seconds with their exposed communication, `weight` the part of `backward` that makes weight
    gradients, `again` what is run again in the backward pass (not in `backward`). `compute_forward` and `compute_backward`
    are what other collectives may hide under. `saved` are bytes kept per microbatch, `peak` the most that is alive in the
    backward pass of the unit with all it saves made again, `work` the most alive in its forward pass beyond what is kept.
    `calls` are the collectives of one microbatch. `experts` are its mixtures of experts, with all
    of their experts within the inner mesh.
    """

    forward: float
    backward: float
    weight: float
    again: float
    compute_forward: float
    compute_backward: float
    saved: float
    peak: float
    work: float
    weights: tuple[Weights, ...]
    calls: tuple[tuple[Call, int], ...] = ()
    experts: tuple[UnitExperts, ...] = ()


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass through a unit: seconds of compute, of communication it waits for, and of the host that starts both."""

    compute: float
    talk: float
    issue: float

    @property
    def seconds(self) -> float:
        """As long as the device or the host needs."""
        return max(self.compute + self.talk, self.issue)

    @property
    def busy(self) -> float:
        """All but communication: compute, and waiting for the host."""
        return self.seconds - self.talk
