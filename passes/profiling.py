"""`shardwright profile`: measure a machine or a cluster, and a model's ops and regions on it, into the profile store.

Alone, it starts as many ranks as the cluster has on this machine. Under torchrun its ranks are torchrun's, on as many machines as
those stand on: rank 0 decides what is measured and writes, the others take part. What the store has is not measured again, rows
are written as they come, and what fails is kept as a failure (profiles/failures.py) and not tried again.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..planner.cluster import Cluster
from ..planner.fit import samples
from ..planner.pins import Pins
from ..planner.precision import choose_precision
from ..planner.prices import Prices
from ..profiles.comms import strided_groups
from ..profiles.devices import parse_cluster
from ..profiles.failures import KIND, failed, key_of, late
from ..profiles.jobs import TimeUp
from ..profiles.local import versions
from ..profiles.ops import argument_text, encode_request, key_text
from ..profiles.places import Place, place_of
from ..profiles.progress import Row
from ..profiles.store import Store
from .choose import asked
from .inplace import optimizer_key, parameter_sizes
from .lowerings import requests_of
from .measure import OWN_OPS, request_of
from .models import Loaded, load_model
from .prepare import prepare
from .regions import timed_regions
from .summarize import Summary, operands_of

Say = Callable[[str], None]
MACHINE_KINDS = ("machine", "collectives", "sends", "overlap", "copies", "allocator")
OPS_SHARE = 0.6
"""Of the budget that is left for a model, what its single ops may take; regions and the optimizer take the rest."""
LEAST_SECONDS = 10.0
"""What is left for a model however long the machine took."""
SLACK_SECONDS = 60.0
"""How much longer than its budget a measurement may take before it is ended: starting Python on a crowded machine is slow."""


@dataclass
class ProfileResult:
    """Rows by kind: `measured` now, `known` before; `failures` by what could not be measured, with their types; seconds of all."""

    cluster: str
    device: str = ""
    measured: dict[str, int] = field(default_factory=dict)
    known: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def profile(
    cluster_spec: str, model_spec: str | None = None, *, store: Store, budget_seconds: float = 240.0, say: Say | None = None,
    resume: bool = True, batch: int | None = None, seq: int | None = None, optimizer: str = "adamw",
) -> ProfileResult:  # fmt: skip
    """Measure the machine of `cluster_spec` ("local[:N]", "local-cpu:N"; under torchrun any cluster), and a model's ops there.

    `resume` off measures again what the store has. Raises ClusterError for a cluster that is not here, UsageError for a model
    that cannot be built, LaunchError when a rank fails.
    """
    place = place_of(cluster_spec)
    if not place.leads:
        place.serve()
        return ProfileResult(cluster_spec, place.key)
    begin = time.perf_counter()
    made = _Profiler(place, store, ProfileResult(cluster_spec, place.key), say or (lambda text: None), resume)
    try:
        made.machine()
        if model_spec is not None:
            cluster = parse_cluster(cluster_spec, cache=store.path)
            loaded = load_model(model_spec, batch=batch or place.ranks, seq=seq)
            made.model(loaded, cluster, optimizer, max(LEAST_SECONDS, budget_seconds - (time.perf_counter() - begin)))
    finally:
        place.dismiss()
    made.result.seconds = round(time.perf_counter() - begin, 1)
    return made.result


@dataclass
class _Profiler:
    place: Place
    store: Store
    result: ProfileResult
    say: Say
    resume: bool
    timed: dict[str, set[str]] = field(default_factory=dict)
    """Keys by kind of what was measured: quicker times of one thing come later."""

    def machine(self) -> None:
        """What does not depend on a model."""
        wanted = [k for k in MACHINE_KINDS if k not in self.place.unusable and not self._known(k)]
        if not wanted:
            return
        self.say(f"measuring {', '.join(wanted)}")
        folder = str(
            self.store.path.parent if self.store.path and self.store.path.parent.is_dir() else tempfile.gettempdir()
        )
        found = self._run(wanted, folder=folder, groups=strided_groups(self.place.ranks))
        for kind in wanted:
            self._keep(kind, found.get(kind, {}))

    def model(self, loaded: Loaded, cluster: Cluster, optimizer: str, budget: float) -> None:
        """Single ops, whole regions and the optimizer step of a model."""
        compute = choose_precision(cluster.device).compute
        self.say(f"capturing {loaded.source.model}")
        choice = asked(Pins(), Prices(cluster, compute))  # the graph of a plan without pins
        summary = prepare(loaded.model, loaded.args, loaded.kwargs, compute, choice=choice)
        arguments = {name: argument_text(*operands_of(call.node)[1:]) for name, call in summary.calls.items()}
        prices = Prices(cluster, compute, arguments=arguments)
        tasks = {**self._ops(summary, prices), **self._regions(summary), **self._optimizer(summary, optimizer, prices)}
        if tasks:
            details = {"requests": [], "programs": [], "optimizers": {}, "imports": OWN_OPS} | {
                k: v for made in tasks.values() for k, v in made.items()
            }
            found = self._run(list(tasks), budget=OPS_SHARE * budget, limit=budget, **details)
            self._keep("optimizer", found.get("optimizers", {}))

    def _ops(self, summary: Summary, prices: Prices) -> dict[str, dict[str, Any]]:
        """The task of timing what is not known, or none; the same below."""
        known = set(self._known("op")) | self._failed("op")
        asked = [(s, request_of(summary, s, prices)) for s in samples(summary.outline, prices)]
        every = [(r, *requests_of(r, summary.calls[s.op.name])) for s, r in asked if r is not None]
        coded = {key_text(r.key): encode_request(r) for group in every for r in group}
        wanted = [data for key, data in coded.items() if key not in known and data is not None]
        self.result.known["op"] = sum(key in known for key in coded)
        self.say(f"{len(wanted)} ops to time, {self.result.known['op']} are known")
        return {"ops": {"requests": wanted}} if wanted else {}

    def _regions(self, summary: Summary) -> dict[str, dict[str, Any]]:
        known = set(self._known("region")) | self._failed("region")
        regions, why = timed_regions(summary, self.place.ranks)
        for name, text in why.items():
            self.result.failures[key_of("region", name)] = f"unsupported: {text}"
        wanted = [(r.key, r.one, r.two) for r in regions if r.key not in known]
        self.result.known["region"] = len(regions) - len(wanted)
        self.say(f"{len(wanted)} regions to time, {self.result.known['region']} are known")
        return {"regions": {"programs": wanted}} if wanted else {}

    def _optimizer(self, summary: Summary, name: str, prices: Prices) -> dict[str, dict[str, Any]]:
        sizes, dtype = parameter_sizes(summary), prices.compute
        key = optimizer_key(name, dtype, sizes, prices.cluster.device.kind)
        if not sizes or key in self._known("optimizer") or key in self._failed("optimizer"):
            return {}
        return {"optimizers": {"optimizers": {key: [name, sizes, dtype]}}}

    def _run(self, tasks: Sequence[str], *, limit: float = SLACK_SECONDS, **details: Any) -> dict[str, Any]:
        """Results of `tasks`; rows told on the way are kept at once, and what it was at when the time was up has failed."""
        begun: list[tuple[str, str]] = []

        def heard(rows: list[Row]) -> None:
            begun.extend((key, value) for kind, key, value in rows if kind == "begin")
            for kind in {row[0] for row in rows} - {"begin"}:
                self._keep(kind, {key: value for k, key, value in rows if k == kind})

        try:
            return self.place.run(tasks, heard=heard, timeout=limit + SLACK_SECONDS, **details)
        except TimeUp:
            if not begun:
                raise
            self._keep(KIND, {key_of(*begun[-1]): late(limit + SLACK_SECONDS)})
            return {}

    def _known(self, kind: str) -> dict[str, Any]:
        """Rows of a kind that need not be measured; those of the machine count as known."""
        found = self.store.read(self.place.key, versions(), kind) if self.resume else {}
        if kind in MACHINE_KINDS and found:
            self.result.known[kind] = len(found)
        return found

    def _failed(self, kind: str) -> set[str]:
        return failed(self.store.read(self.place.key, versions(), KIND), kind) if self.resume else set()

    def _keep(self, kind: str, rows: dict[str, Any]) -> None:
        if not rows:
            return
        self.store.write(self.place.key, versions(), kind, rows)
        if kind == KIND:
            self.result.failures |= {key: f"{row['type']}: {row['message']}" for key, row in rows.items()}
            return
        new = rows.keys() - self.timed.setdefault(kind, set())
        self.timed[kind] |= new
        self.result.measured[kind] = len(self.timed[kind])
        if kind in ("op", "region") and new:
            self.say(f"{len(self.timed[kind])} {kind}s timed")
