"""The Plan: a frozen, versioned JSON document that says how a model runs on a mesh (docs/plan.md).

Only plain facts: no solver types, no wall-clock figures, no group names. Identical layers appear once, with their repeats.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from .goal import Goal, Point

VERSION = 1


class MeshAxis(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One mesh axis, outermost first. Role "data" splits the batch only; "model" is free. `link` names the level it crosses."""

    name: str
    size: int
    role: str
    link: str


class OpPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One op of a region's template: its choice along each mesh axis and the placement that makes of its first result."""

    op: str
    target: str
    choice: tuple[str, ...]
    result: tuple[str, ...]


class ParameterPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a parameter lives: its home state on each axis, and ZeRO storage (level and the axes that chunk dim 0 of it)."""

    names: tuple[str, ...]
    home: tuple[str, ...]
    zero: int = 0
    zero_axes: tuple[str, ...] = ()
    trainable: bool = True


class RegionPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A region: one template for `repeats` instances that run alike.

    Where instances of one region run in several ways there is an entry for each, and `region` says whose they are; the runs
    of the stages say which instances take which. `recompute` names ops that run again in the backward pass, and copies
    gathered again ("op -> R"); `offload` what lives in the host. `entry` and `exit` are the layouts of what crosses its
    borders: "R" whole on the model axis, "S" split by positions. `policy` and `style` say where the option came from.
    `borrowed_zero` is the ZeRO level of parameters that it uses and another region owns, for the ranks that hold them too.
    """

    name: str
    repeats: int
    ops: tuple[OpPlan, ...]
    parameters: tuple[ParameterPlan, ...]
    recompute: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()
    region: str = ""
    entry: str = "R"
    exit: str = "R"
    policy: str = ""
    style: str = ""
    borrowed_zero: int = 0


class RunPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`count` instances of a region, from instance `first` on, under the entry `use` of the plan's regions."""

    use: str
    first: int
    count: int


class StagePlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A virtual stage: the pipeline rank it is on, what it holds, its seconds per microbatch and bytes at its rank's peak.

    `pool` names the devices of the rank where a cluster has several kinds.
    """

    rank: int
    runs: tuple[RunPlan, ...]
    forward_seconds: float
    backward_seconds: float
    finish_seconds: float
    peak_bytes: int
    pool: str = ""


class PoolPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One pool of a cluster of unlike devices: its pipeline ranks, and the limit of a device of it."""

    name: str
    device: str
    ranks: int
    memory_limit_bytes: int


class Pipeline(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Stages, schedule and microbatches. `micro_batch` is samples per data-parallel rank and microbatch.

    `ranks` pipeline ranks, each a whole mesh, hold `chunks` stages each. `order` names all axes outermost first;
    `experts` data ranks share the experts of a layer.
    """

    stages: int = 1
    schedule: str = "none"
    chunks: int = 1
    microbatches: int = 1
    micro_batch: int = 1
    ranks: int = 1
    order: tuple[str, ...] = ()
    experts: int = 1


class OverlapPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Collectives of parameters beside computing, as far as memory was found for them.

    `prefetch` groups are gathered ahead of the one in use. `reductions` of gradients in packed copies may be under way while the
    backward pass goes on; with 0 every reduction is waited for at once.
    """

    prefetch: int = 1
    reductions: int = 1


class Precision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Dtypes of computation, stored parameter, gradient and optimizer moments; `recipe` is their name."""

    recipe: str
    compute: str
    parameter: str
    gradient: str
    moment: str


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What rebuilds the model: an embedded config ("hf") or a file, function and content hash ("function"), or a live "module"."""

    kind: str
    model: str
    batch: int
    seq: int | None = None
    config: dict[str, Any] | None = None
    file: str | None = None
    function: str | None = None
    sha256: str | None = None
    seed: int = 0


class Traffic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of collective on one axis, per rank and optimizer step: calls and payload bytes (of the full tensor)."""

    collective: str
    axis: str
    count: int
    bytes: int
    seconds: float


class Prediction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Predicted figures of one step. `memory` and `seconds` are by cause; `sources` says where prices came from.

    `host_bytes_per_device` and `disk_bytes_per_device` lie behind the rank that has the most there. `traffic` is of the pipeline
    rank whose collectives take longest; `rank_traffic` has every pipeline rank's where there are several.
    """

    step_seconds: float
    tokens_per_second_per_device: float
    mfu: float
    peak_bytes_per_device: int
    memory: dict[str, int]
    seconds: dict[str, float]
    traffic: tuple[Traffic, ...] = ()
    sources: dict[str, str] = {}
    error: float = 0.0
    host_bytes_per_device: int = 0
    disk_bytes_per_device: int = 0
    step_seconds_low: float = 0.0
    step_seconds_high: float = 0.0
    rank_traffic: tuple[tuple[Traffic, ...], ...] = ()

    def traffic_of(self, rank: int) -> tuple[Traffic, ...]:
        """The collectives of a step on one pipeline rank."""
        return self.rank_traffic[rank] if self.rank_traffic else self.traffic


class ShapeRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One candidate of the search: mesh and microbatches, its bound and value in seconds, and what became of it.

    `pools` is the order of the pools of unlike devices along the pipeline.
    """

    mesh: dict[str, int]
    microbatches: int
    status: str
    bound_seconds: float | None = None
    step_seconds: float | None = None
    peak_bytes: int | None = None
    reason: str = ""
    schedule: str = "none"
    chunks: int = 1
    micro_batch: int = 0
    pools: tuple[int, ...] = ()


class Search(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The search record: what was tried, the proven bound and the gap (a fraction)."""

    bound_seconds: float
    gap: float
    shapes: tuple[ShapeRecord, ...] = ()
    interrupted: bool = False
    solver: str = ""
    given_up: tuple[str, ...] = ()


class PassPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A graph pass that the plan applies, and what it was priced to gain a step on one device (negative: to cost)."""

    name: str
    seconds: float
    saved_bytes: float


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole plan. `phase` is of inference, "" for a training step; `goal` says how an objective beside seconds was met.
    `lowerings` are those of ops that do not run as plain torch ops, by target.

    `update` says when parameters change: at the optimizer's "step", or in the "backward" pass (planner/updates.py).

    `digest` covers all other fields when saved; a file changed by hand no longer matches it (planfile.py)."""

    version: int
    source: Source
    graph: str
    cluster: dict[str, Any]
    cluster_fingerprint: str
    objective: str
    optimizer: str
    precision: Precision
    semantics: str
    mesh: tuple[MeshAxis, ...]
    pipeline: Pipeline
    regions: tuple[RegionPlan, ...]
    memory_limit_bytes: int
    predicted: Prediction
    search: Search
    pins: tuple[str, ...] = ()
    runners_up: tuple[ShapeRecord, ...] = ()
    notes: tuple[str, ...] = ()
    stages: tuple[StagePlan, ...] = ()
    phase: str = ""
    goal: Goal | None = None
    frontier: tuple[Point, ...] = ()
    pools: tuple[PoolPlan, ...] = ()
    overlap: OverlapPlan = OverlapPlan()
    passes: tuple[PassPlan, ...] = ()
    lowerings: dict[str, str] = {}
    update: str = "step"
    edited: bool = False
    digest: str = ""

    @property
    def ranks(self) -> int:
        """Ranks that it runs on: pipeline ranks times those of the mesh."""
        return self.pipeline.ranks * math.prod(axis.size for axis in self.mesh)

    @property
    def memory(self) -> dict[str, Any]:
        """Bytes of a device in plain values: its limit, the peak and what makes it up by cause, the peak of every stage's rank,
        and what lies in host memory and on disk."""
        found = self.predicted
        return {
            "limit_bytes": self.memory_limit_bytes, "peak_bytes": found.peak_bytes_per_device, "bytes": dict(found.memory),
            "stages": [{"stage": s, "rank": one.rank, "peak_bytes": one.peak_bytes} for s, one in enumerate(self.stages)],
            "host_bytes": found.host_bytes_per_device, "disk_bytes": found.disk_bytes_per_device,
        }  # fmt: skip

    def timeline(self) -> dict[str, Any]:
        """What every lane of every pipeline rank does when in a step, and bytes over time, in plain values.

        `{"step_seconds", "devices_per_rank", "ranks": [{"rank", "spans": [{"lane", "name", "cause", "start_seconds",
        "end_seconds", "stage", "microbatch"}], "memory": {"seconds": [..], "bytes": {cause: [..]}}, "alive_at_peak": [{"region",
        "bytes": {cause: ..}}]}]}`; region "" is of none. The model is captured
        anew from its source, for which torch is needed. Raises PlanError for a plan without stages, PlanMismatch or UsageError
        where the source is not there as it was.
        """
        from ..cli.edited import captured
        from .replay import as_data, replay

        return as_data(replay(self, *captured(self, lambda _: None)))

    def _repr_html_(self) -> str:
        """How notebooks show it: the first sentence of its report, key figures, and what takes time and memory."""
        from ..cli.report.notebook import plan_html

        return plan_html(self)
