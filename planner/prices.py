"""What everything costs: seconds of ops, collectives, optimizer steps and copies, each with its source and error.

An op is priced in this order: a measured row of exactly its local shapes; else rows of other shapes (planner/nearest.py) or a
rate fitted to measured rows of its target or kind, whichever has the smaller error ("modelled"); else from its device's
figures (planner/roofline.py, "datasheet").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from .cluster import Cluster
from .collectives import Table, collective_seconds, measured_seconds
from .fusing import Fusion
from .nearest import Measured
from .outline import Op, Tensor
from .plan import Precision
from .precision import find_optimizer, fused, state_bytes
from .roofline import Roofline
from .work import ALONE, FREE_KINDS, OpKey, Work, work_of

DATASHEET_ERROR = 0.25
MODELLED_ERROR = 0.15
FUSED_STEP = "fused_optimizer"
"""The efficiency of an optimizer step that is one kernel (planner/precision.py); where a device has none, that of "optimizer"."""


@dataclass(frozen=True, slots=True)
class Price:
    """Seconds, where they come from ("measured", "modelled" or "datasheet") and their relative error.

    `issue_seconds` is what the host needs to start it; the device may wait for that.
    """

    seconds: float
    source: str
    error: float
    issue_seconds: float = 0.0


FREE = Price(0.0, "modelled", 0.0)


@dataclass(frozen=True, slots=True)
class OpRow:
    """Measured forward and backward seconds of one op at one local shape, with their relative spread."""

    forward: float
    backward: float
    error: float


@dataclass(frozen=True, slots=True)
class Rate:
    """Units (FLOPs or bytes) per second reached forward and backward by a target or a kind, and the fixed seconds of a call."""

    forward: float
    backward: float
    overhead: float
    error: float = MODELLED_ERROR


@dataclass(frozen=True)
class Prices:
    """The price list of one cluster at one compute dtype.

    `ops` are measured rows, `rates` fitted rates by target ("aten.gelu") or kind ("matmul"), `collectives` measured rows,
    `arguments` the canonical plain arguments of ops by name (to find their rows), `optimizer_rate` measured seconds per byte
    of an optimizer step by name (the optimizer's), `copy_rate` measured bytes per second of a local copy. `fused` says what
    ops need not do where kernels are fused (planner/fusing.py), `products` the dtype of products with parameters where that is
    not `compute`, `attention` the kind of fused attention, `pieces` whether what tensor parallelism gathers and scatters goes
    piece by piece with the products around it (`tp_overlap=on`).
    """

    cluster: Cluster
    compute: str
    ops: Mapping[OpKey, OpRow] = field(default_factory=dict)
    rates: Mapping[str, Rate] = field(default_factory=dict)
    collectives: Table = field(default_factory=dict)
    arguments: Mapping[str, str] = field(default_factory=dict)
    optimizer_rates: Mapping[str, float] = field(default_factory=dict)
    copy_rate: float = 0.0
    fused: Mapping[str, Fusion] = field(default_factory=dict)
    products: str = ""
    attention: str = "attention"
    pieces: bool = False
    _shapes: dict[int, tuple[Op, Work]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _known: dict[tuple[int, tuple[float, ...]], tuple[Price, Price]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _links: dict[tuple[str, float, int, int], Price] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @cached_property
    def _measured(self) -> Measured:
        return Measured.of(self.ops)

    def op(self, op: Op, local_sizes: tuple[float, ...], tensors: Mapping[str, Tensor]) -> tuple[Price, Price]:
        """(forward, backward) of `op` where its factors have `local_sizes` on each rank (same order as `op.factors`)."""
        key = (id(op), local_sizes)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._price(self.work(op, tensors), local_sizes)
        return found

    def collective(self, name: str, full_bytes: float, stride: int, size: int) -> Price:
        """One collective over groups of `size` ranks `stride` apart; `full_bytes` as in planner/collectives.py."""
        if size == 1 or full_bytes <= 0:
            return FREE
        key = (name, full_bytes, stride, size)
        found = self._links.get(key)
        if found is None:
            found = self._links[key] = self._collective(name, full_bytes, stride, size)
        return found

    def optimizer(self, elements: float, optimizer: str, precision: Precision) -> Price:
        """One optimizer step over `elements` local parameter elements: read all state, write parameter, master and moments."""
        kept = state_bytes(precision, optimizer)
        moved = elements * (2 * kept.parameter + kept.gradient + 2 * kept.master + 2 * kept.moments)
        rate = self.optimizer_rates.get(find_optimizer(optimizer).name, 0.0)
        if rate:
            return Price(moved / rate, "modelled", MODELLED_ERROR)
        device = self.cluster.device
        one = fused(find_optimizer(optimizer).name, device.kind, precision.parameter)
        kind = FUSED_STEP if one and FUSED_STEP in device.efficiencies else "optimizer"
        seconds = moved / (device.memory_bytes_per_second * device.efficiency(kind))
        return Price(seconds, "datasheet", DATASHEET_ERROR)

    def optimizer_seconds(self, elements: float, optimizer: str, precision: Precision) -> float:
        """Seconds of `optimizer(...)`."""
        return self.optimizer(elements, optimizer, precision).seconds

    def copy(self, bytes_read: float, bytes_written: float | None = None) -> Price:
        """A local copy, cast, slice, pad or scale that reads and writes so many bytes (as many when one is given)."""
        moved = bytes_read + (bytes_read if bytes_written is None else bytes_written)
        if moved <= 0:
            return FREE
        device = self.cluster.device
        if self.copy_rate:
            return Price(device.kernel_overhead_seconds + moved / self.copy_rate, "modelled", MODELLED_ERROR)
        seconds = moved / (device.memory_bytes_per_second * device.efficiency("copy"))
        return Price(device.kernel_overhead_seconds + seconds, "datasheet", DATASHEET_ERROR)

    def op_key(self, op: Op, local_sizes: tuple[float, ...], tensors: Mapping[str, Tensor]) -> OpKey:
        """What a measured row of `op` at these local sizes is filed under."""
        return self.work(op, tensors).key(local_sizes)

    def amounts(
        self, op: Op, local_sizes: tuple[float, ...], tensors: Mapping[str, Tensor]
    ) -> tuple[float, float, int]:
        """What rates count: forward and backward FLOPs or bytes at these local sizes, and kernels of the backward."""
        work = self.work(op, tensors)
        return (*work.amounts(local_sizes), work.kernels)

    def work(self, op: Op, tensors: Mapping[str, Tensor]) -> Work:
        """What `op` does, made ready to be priced."""
        kept = self._shapes.get(id(op))
        if kept is None:
            # The op is kept beside its work so that its id is not used again while this table lives.
            kept = self._shapes[id(op)] = (op, self._made(op, tensors))
        return kept[1]

    def peak_flops(self, work: Work) -> float:
        """Dense peak FLOP/s of the dtype that `work` runs at; raises ClusterError where the device has no figure for it."""
        return self.cluster.device.peak(self.products if self._roofline.narrow(work) else self.compute)

    def _made(self, op: Op, tensors: Mapping[str, Tensor]) -> Work:
        return work_of(op, tensors, self.compute, self.arguments.get(op.name, ""), self.fused.get(op.name, ALONE))

    def _price(self, work: Work, sizes: tuple[float, ...]) -> tuple[Price, Price]:
        if work.kind in FREE_KINDS:
            return FREE, FREE
        row = self.ops.get(work.key(sizes)) if self.ops else None
        if row is not None:
            backward = Price(row.backward, "measured", row.error) if work.differentiable else FREE
            return Price(row.forward, "measured", row.error), backward
        rate = self.rates.get(work.target) or self.rates.get(work.kind)
        near = self._measured.near(work, sizes, self.cluster.device.kernel_overhead_seconds) if self.ops else None
        if near is not None and near.error <= (rate.error if rate is not None else DATASHEET_ERROR):
            forward, backward = (Price(seconds, "modelled", near.error) for seconds in (near.forward, near.backward))
            return forward, backward if work.differentiable else FREE
        if rate is not None:
            return _by_rate(work, sizes, rate)
        return self._modelled(work, sizes)

    @cached_property
    def _roofline(self) -> Roofline:
        return Roofline(self.cluster.device, self.compute, self.products, self.attention)

    def _modelled(self, work: Work, sizes: tuple[float, ...]) -> tuple[Price, Price]:
        ahead, back = self._roofline.seconds(work, sizes)
        issue = self.cluster.device.issue_seconds
        forward = Price(ahead, "datasheet", DATASHEET_ERROR, issue * work.launched[0])
        if not back:
            return forward, FREE
        return forward, Price(back, "datasheet", DATASHEET_ERROR, issue * work.launched[1])

    def _collective(self, name: str, full_bytes: float, stride: int, size: int) -> Price:
        route = self.cluster.route(stride, size)
        level = route.level
        if level is not None:
            measured = measured_seconds(self.collectives, name, full_bytes, size, level.name)
            if measured is not None:
                return Price(measured, "measured", MODELLED_ERROR)
        issue = self.cluster.device.issue_seconds
        return Price(collective_seconds(name, full_bytes, route), "datasheet", DATASHEET_ERROR, issue)


def _by_rate(work: Work, sizes: tuple[float, ...], rate: Rate) -> tuple[Price, Price]:
    done, undone = work.amounts(sizes)
    forward = Price(rate.overhead + done / rate.forward, "modelled", rate.error)
    if not work.differentiable or undone == 0.0:
        return forward, FREE
    return forward, Price(rate.overhead * work.kernels + undone / rate.backward, "modelled", rate.error)
