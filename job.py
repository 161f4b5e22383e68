"""One planning job: a captured model on a cluster, priced and solved. The stages of the road, in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from .errors import Infeasible, PinError
from .planner.cluster import Cluster, default_limit_bytes
from .planner.goal import Aim
from .planner.outline import Outline
from .planner.pins import Pins
from .planner.plan import PassPlan, Plan, Precision, Source
from .planner.precision import state_bytes
from .planner.prices import Prices
from .planner.progress import Event
from .planner.pursue import pursue, settled
from .planner.rebatch import rebatch
from .planner.solve import Request, solve

if TYPE_CHECKING:
    from torch import nn

Say = Callable[[str], None]
MOST_DOUBLINGS = 16
WORTHWHILE = 1.02
"""A larger batch is taken while it raises tokens per second by at least this factor."""


@dataclass
class Clock:
    """Seconds by phase; `say` hears the name of each phase as it begins, and what the search says."""

    say: Say | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        self.tell(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def tell(self, text: str) -> None:
        """Pass on one line of progress."""
        if self.say is not None:
            self.say(text)

    def event(self, event: Event) -> None:
        """Pass on what the search says."""
        best = f" (best {event.best_seconds:.4g} s)" if event.best_seconds is not None else ""
        self.tell(f"{event.phase}: {event.text}{best}")


@dataclass(frozen=True)
class Job:
    """What is planned. `outline` is the model at the batch of the inputs, in the phase of `aim`; `prices` are the cluster's.

    `passes` rewrote its graph (passes/choose.py); `lowerings` by target are other kernels for its ops (passes/lowerings.py)."""

    outline: Outline
    cluster: Cluster
    prices: Prices
    request: Request
    clock: Clock
    aim: Aim = field(default_factory=Aim)
    passes: tuple[PassPlan, ...] = ()
    lowerings: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def create(
        cls, model: nn.Module, args: Any, kwargs: Any, cluster: Cluster, pins: Pins, precision: Precision, source: Source,
        *, optimizer: str, objective: str, loss_fn: Callable[..., Any] | None, store: Path | None, clock: Clock,
        runnable: bool = False, aim: Aim | None = None,
    ) -> Job:  # fmt: skip
        """Capture, outline and price `model`; its parameters and inputs are only looked at.

        `runnable` keeps the plan to what the runtime executes. The cluster is calibrated where the store has a factor for its
        devices and the stack (profiles/calibrate.py).
        """
        from .passes.choose import asked, chosen
        from .passes.kernels import dropping_attention
        from .passes.lowerings import priced
        from .passes.prepare import prepare, prepare_phase

        aim = settled(objective, aim or Aim(), runnable=runnable)
        choice = asked(pins, Prices(cluster, precision.compute))
        with clock.phase("capture"):
            if aim.phase:
                summary = prepare_phase(model, args, kwargs, precision.compute, aim.phase, choice=choice)
            else:
                summary = prepare(model, args, kwargs, precision.compute, loss_fn=loss_fn, choice=choice)
        if pins.optimizer is not None:
            optimizer = pins.optimizer
        pins.check("optimizer", optimizer)
        with clock.phase("prices"):
            from .passes.measure import measured_prices
            from .profiles.calibrate import with_stored
            from .profiles.ledger import stack_text
            from .profiles.local import versions
            from .profiles.store import Store

            if not aim.phase:  # factors are of training steps
                cluster = with_stored(
                    cluster, stack_text(precision, pins), versions(), Store(Path(store) if store else None)
                )
            prices = measured_prices(summary, cluster, precision.compute, store=store, stages=pins.pp or 1)
            prices, lowerings = priced(summary, prices, pins)
        request = Request(
            source, optimizer, precision, default_limit_bytes(cluster), pins, objective, source.seed, clock.event, runnable,
            frozenset(dropping_attention(summary.calls)),
        )  # fmt: skip
        return cls(summary.outline, cluster, prices, request, clock, aim, chosen(summary.captured), lowerings)

    def solve(self) -> Plan:
        """The plan; raises Infeasible or PinError."""
        with self.clock.phase("solve"):
            plan = pursue(self.outline, self.cluster, self.prices, self.request, self.aim)
        from .passes.choose import semantics

        plan = msgspec.structs.replace(plan, passes=self.passes, lowerings=dict(self.lowerings))
        return msgspec.structs.replace(plan, semantics=semantics(plan))

    def estimate(self) -> dict[str, float]:
        """Parameters, and bytes by cause if nothing were sharded: what is known before the search."""
        sizes = {p.tensor: self.outline.tensors[p.tensor].elements for p in self.outline.parameters}
        training = not self.aim.phase
        trainable = sum(sizes[p.tensor] for p in self.outline.parameters if p.trainable and training)
        kept = state_bytes(self.request.precision, self.request.optimizer)
        total = sum(sizes.values())
        return {
            "parameters": total,
            "trainable": trainable,
            "parameter_bytes": float(total * (kept.parameter + (kept.master if training else 0))),
            "gradient_bytes": float(trainable * kept.gradient),
            "optimizer_bytes": float(trainable * kept.moments),
            "batch": self.outline.batch,
            "tokens": self.outline.tokens,
            "devices": self.cluster.devices,
            "limit_bytes": self.request.memory_limit_bytes,
        }

    def best_batch(self, unit: int) -> int:
        """The multiple of `unit` by powers of two with the best throughput that fits, while more still pays."""
        best, rate, blocked = 0, 0.0, None
        for k in range(MOST_DOUBLINGS):
            batch = unit * 2**k
            try:
                plan = self._at(batch)
            except Infeasible as error:
                blocked = error
                break
            found = plan.predicted.tokens_per_second_per_device
            if found < rate * WORTHWHILE:
                break
            best, rate = batch, found
        if best == 0:
            assert blocked is not None
            raise blocked
        return best

    def _at(self, batch: int) -> Plan:
        try:
            outline = rebatch(self.outline, batch)
        except ValueError as error:
            raise PinError(f"--batch auto: {error}; give --batch N") from None
        self.clock.tell(f"batch {batch}")
        request = replace(self.request, source=_with_batch(self.request.source, batch))
        return solve(outline, self.cluster, self.prices, request)


def _with_batch(source: Source, batch: int) -> Source:
    return msgspec.structs.replace(source, batch=batch)
