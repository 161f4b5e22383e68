"""What everything costs: seconds of ops, collectives, optimizer steps and copies, each with its source and error.

An op is priced in this order: a measured row of exactly its local shapes; else a rate fitted to measured rows of its target or
kind ("modelled"); else the data sheet times an efficiency factor ("datasheet"):

    seconds = max(issue, overhead * kernels + max(flops / (peak * efficiency), bytes / (bandwidth * efficiency)))

Bytes are those of operands and results at their local sizes, floats at the compute dtype. The backward pass reads the
gradients of the results and what was saved, and writes the gradients of the operands that take one. A matmul's efficiency
falls with its shape: output tiles fill the compute units in whole waves, and a short contraction does not fill its pipeline
(k / (k + contraction_half)); each of its two backward matmuls is priced at its own shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from . import rule_experts
from .attention import MATH, MATH_KIND, moved, price_kind
from .cluster import Cluster
from .collectives import Table, collective_seconds, measured_seconds
from .outline import DTYPE_BYTES, Op, Saved, Tensor, Use
from .plan import Precision
from .precision import find_optimizer, state_bytes

FLOPS_KINDS = frozenset({"matmul", "attention", MATH_KIND, "conv", "experts"})
"""Kinds priced by FLOP/s; all others move bytes."""

FREE_KINDS = frozenset({"view"})
"""Kinds that launch no kernel."""

PASS_THROUGH = frozenset({"aten.add", "aten.sub", "aten.clone", "aten.contiguous"})
"""Their gradient is the incoming one: only operands that were broadcast need a sum."""

TILES = ((256, 128, 1.0), (128, 128, 0.95), (128, 64, 0.8), (64, 64, 0.6))
"""Output tile shapes of dense matmul kernels with their rate relative to the best one (CUTLASS-style kernels)."""

DATASHEET_ERROR = 0.25
MODELLED_ERROR = 0.15


@dataclass(frozen=True, slots=True)
class Price:
    """Seconds, where they come from ("measured", "modelled" or "datasheet") and their relative error."""

    seconds: float
    source: str
    error: float


FREE = Price(0.0, "modelled", 0.0)


@dataclass(frozen=True, slots=True)
class OpKey:
    """What a measured op row is filed under. `operands` are (local shape, dtype, differentiable) in order.

    `arguments` is the canonical text of the plain arguments (profiles/ops.py makes it), "" when there are none.
    """

    target: str
    operands: tuple[tuple[tuple[int, ...], str, bool], ...]
    arguments: str = ""


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
    of an optimizer step by name (the optimizer's), `copy_rate` measured bytes per second of a local copy.
    """

    cluster: Cluster
    compute: str
    ops: Mapping[OpKey, OpRow] = field(default_factory=dict)
    rates: Mapping[str, Rate] = field(default_factory=dict)
    collectives: Table = field(default_factory=dict)
    arguments: Mapping[str, str] = field(default_factory=dict)
    optimizer_rates: Mapping[str, float] = field(default_factory=dict)
    copy_rate: float = 0.0
    _shapes: dict[int, tuple[Op, _Work]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _known: dict[tuple[int, tuple[float, ...]], tuple[Price, Price]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _links: dict[tuple[str, float, int, int], Price] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def op(self, op: Op, local_sizes: tuple[float, ...], tensors: Mapping[str, Tensor]) -> tuple[Price, Price]:
        """(forward, backward) of `op` where its factors have `local_sizes` on each rank (same order as `op.factors`)."""
        key = (id(op), local_sizes)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._price(self._work(op, tensors), local_sizes)
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
        seconds = moved / (device.memory_bytes_per_second * device.efficiency("optimizer"))
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
        return self._work(op, tensors).key(local_sizes)

    def amounts(
        self, op: Op, local_sizes: tuple[float, ...], tensors: Mapping[str, Tensor]
    ) -> tuple[float, float, int]:
        """What rates count: forward and backward FLOPs or bytes at these local sizes, and kernels of the backward."""
        work = self._work(op, tensors)
        return (*work.amounts(local_sizes), work.kernels)

    def _work(self, op: Op, tensors: Mapping[str, Tensor]) -> _Work:
        kept = self._shapes.get(id(op))
        if kept is None:
            # The op is kept beside its work so that its id is not used again while this table lives.
            kept = self._shapes[id(op)] = (op, _work(op, tensors, self.compute, self.arguments.get(op.name, "")))
        return kept[1]

    def _price(self, work: _Work, sizes: tuple[float, ...]) -> tuple[Price, Price]:
        if work.kind in FREE_KINDS:
            return FREE, FREE
        row = self.ops.get(work.key(sizes)) if self.ops else None
        if row is not None:
            backward = Price(row.backward, "measured", row.error) if work.differentiable else FREE
            return Price(row.forward, "measured", row.error), backward
        rate = self.rates.get(work.target) or self.rates.get(work.kind)
        if rate is not None:
            return _by_rate(work, sizes, rate)
        return self._roofline(work, sizes)

    def _roofline(self, work: _Work, sizes: tuple[float, ...]) -> tuple[Price, Price]:
        device = self.cluster.device
        read = device.memory_bytes_per_second * device.efficiency("memory" if work.kind in FLOPS_KINDS else work.kind)
        seconds = work.forward_bytes(sizes) / read
        back = work.backward_bytes(sizes) / read
        if work.kind in FLOPS_KINDS:
            peak = device.peak(self.compute)
            done, undone = work.flops(sizes)
            shape = work.shape(sizes)
            kind = "matmul" if work.kind == "experts" else work.kind
            best = peak * device.efficiency(kind)
            best_back = peak * device.efficiency(f"{kind}_backward" if kind != "matmul" else kind)
            seconds = max(seconds, done / (best * self._shape_factor(shape, 0)))
            parts = work.gradients if shape is not None else (1,)
            rates = [best_back * self._shape_factor(shape, part) for part in parts]
            back = max(back, sum(undone / len(parts) / rate for rate in rates))
        beside = device.memory_bytes_per_second * device.efficiency("elementwise")
        seconds += sum(term.at(sizes) for term in work.beside[0]) / beside
        back += sum(term.at(sizes) for term in work.beside[1]) / beside
        launch = device.kernel_overhead_seconds
        forward = Price(max(device.issue_seconds, launch + seconds), "datasheet", DATASHEET_ERROR)
        if not work.differentiable or back == 0.0:
            return forward, FREE
        back = max(device.issue_seconds * work.kernels, launch * work.kernels + back)
        return forward, Price(back, "datasheet", DATASHEET_ERROR)

    def _shape_factor(self, shape: tuple[float, float, float, float] | None, which: int) -> float:
        """How much of the best rate a matmul of `shape` (batch, m, n, k) reaches: 0 forward, 1 input and 2 weight gradient."""
        device = self.cluster.device
        if shape is None or not device.compute_units:
            return 1.0
        batch, m, n, k = shape
        rows, columns, contracted = ((m, n, k), (m, k, n), (k, n, m))[which]
        filled = contracted / (contracted + device.contraction_half)
        return filled * wave_factor(batch, rows, columns, device.compute_units)

    def _collective(self, name: str, full_bytes: float, stride: int, size: int) -> Price:
        route = self.cluster.route(stride, size)
        level = route.level
        if level is not None:
            measured = measured_seconds(self.collectives, name, full_bytes, size, level.name)
            if measured is not None:
                return Price(measured, "measured", MODELLED_ERROR)
        return Price(collective_seconds(name, full_bytes, route), "datasheet", DATASHEET_ERROR)


def wave_factor(batch: float, rows: float, columns: float, units: int) -> float:
    """The share of the best matmul rate left after cutting the output into tiles and those into whole waves over `units`."""
    best = 0.0
    for high, wide, rate in TILES:
        tiles = batch * math.ceil(rows / high) * math.ceil(columns / wide)
        waves = math.ceil(tiles / units)
        best = max(best, rate * batch * rows * columns / (waves * units * high * wide))
    return max(best, 1e-3)


@dataclass(frozen=True, slots=True)
class _Term:
    """So many bytes times the local sizes of some factors."""

    scale: float
    factors: tuple[int, ...]

    def at(self, sizes: tuple[float, ...]) -> float:
        product = self.scale
        for f in self.factors:
            product *= sizes[f]
        return product


@dataclass(frozen=True, slots=True)
class _Work:
    """An op made ready to be priced at any local sizes.

    `rows_shared` are the groups that share the rows of a grouped product; `beside` what a composite op moves besides.
    """

    target: str
    kind: str
    forward: tuple[_Term, ...]
    backward: tuple[_Term, ...]
    differentiable: bool
    kernels: int
    flops_global: tuple[float, float]
    global_sizes: tuple[int, ...]
    matmul: tuple[tuple[int, ...], ...]
    gradients: tuple[int, ...]
    shapes: tuple[tuple[tuple[tuple[int, ...], ...], str, bool], ...]
    arguments: str
    rows_shared: int = 1
    beside: tuple[tuple[_Term, ...], tuple[_Term, ...]] = ((), ())

    def forward_bytes(self, sizes: tuple[float, ...]) -> float:
        return sum(term.at(sizes) for term in self.forward)

    def backward_bytes(self, sizes: tuple[float, ...]) -> float:
        return sum(term.at(sizes) for term in self.backward)

    def flops(self, sizes: tuple[float, ...]) -> tuple[float, float]:
        share = 1.0
        for local, whole in zip(sizes, self.global_sizes, strict=True):
            share *= local / whole
        if self.kind == "experts":
            share *= rule_experts.imbalance(math.prod(sizes[f] for f in self.matmul[0]), self.rows_shared)
        return self.flops_global[0] * share, self.flops_global[1] * share

    def amounts(self, sizes: tuple[float, ...]) -> tuple[float, float]:
        """(forward, backward) in the unit of rates."""
        if self.kind in FLOPS_KINDS:
            return self.flops(sizes)
        return self.forward_bytes(sizes), self.backward_bytes(sizes)

    def shape(self, sizes: tuple[float, ...]) -> tuple[float, float, float, float] | None:
        """(batch, m, n, k) of a matmul (of the experts' first one), else None."""
        if not self.matmul:
            return None
        batch, m, n, k = (math.prod(sizes[f] for f in group) for group in self.matmul)
        return batch, m / self.rows_shared, n, k

    def key(self, sizes: tuple[float, ...]) -> OpKey:
        operands = tuple(
            (tuple(int(math.prod(sizes[f] for f in dim)) for dim in dims), dtype, grad)
            for dims, dtype, grad in self.shapes
        )
        return OpKey(self.target, operands, self.arguments)


def _by_rate(work: _Work, sizes: tuple[float, ...], rate: Rate) -> tuple[Price, Price]:
    done, undone = work.amounts(sizes)
    forward = Price(rate.overhead + done / rate.forward, "modelled", rate.error)
    if not work.differentiable or undone == 0.0:
        return forward, FREE
    return forward, Price(rate.overhead * work.kernels + undone / rate.backward, "modelled", rate.error)


def _work(op: Op, tensors: Mapping[str, Tensor], compute: str, arguments: str) -> _Work:
    sides = [tensors[use.tensor] for use in op.operands]
    grads = tuple(t.differentiable for t in sides)
    outs = tuple(tensors[use.tensor].differentiable for use in op.results)
    differentiable = any(grads) and any(outs)
    reads = [_bytes(use, t.dtype, compute) for use, t in zip(op.operands, sides, strict=True)]
    writes = [_bytes(use, tensors[use.tensor].dtype, compute) for use in op.results]
    forward = [*reads, *writes] if op.kind != "embedding" else [*reads[1:], *(_twice(w) for w in writes)]
    backward = _backward(op, reads, writes, grads, compute) if differentiable else []
    kernels = max(1, sum(grads)) if op.kind in FLOPS_KINDS else 1
    shapes = tuple(
        (use.factors, _dtype(t.dtype, compute), t.differentiable) for use, t in zip(op.operands, sides, strict=True)
    )
    experts = op.kind == "experts"
    gradients = tuple(i + 1 for i, grad in enumerate(grads[:2]) if grad) if not experts else (1, 2)
    return _Work(
        op.target, price_kind(op), tuple(forward), tuple(backward), differentiable, kernels, (op.flops, op.backward_flops),
        tuple(f.size for f in op.factors), _matmul(op), gradients, shapes, arguments,
        rule_experts.experts_of(op.factors) if experts else 1, _beside(op, compute),
    )  # fmt: skip


def _backward(op: Op, reads: list[_Term], writes: list[_Term], grads: tuple[bool, ...], compute: str) -> list[_Term]:
    """Bytes the backward pass moves: result gradients and saved tensors read, operand gradients written."""
    wanted = [term for term, grad in zip(reads, grads, strict=True) if grad]
    if op.target in PASS_THROUGH:
        # An operand that lacks a factor of the result was broadcast: its gradient is a sum over the result's.
        summed = [t for t in wanted if len(t.factors) < len(writes[0].factors)]
        return [part for t in summed for part in (writes[0], t)]
    if op.kind == "matmul":
        return [*(writes * len(wanted)), *reads, *wanted]
    if op.kind == "embedding":
        # Zeros for the whole table, then rows of the gradient read and added.
        return [*wanted, *(_twice(w) for w in writes)]
    saved = [_saved(s, op, reads, writes, compute) for s in op.saved if op.target != MATH or s.source != "new"]
    return [*writes, *saved, *wanted]


def _saved(item: Saved, op: Op, reads: list[_Term], writes: list[_Term], compute: str) -> _Term:
    if item.source == "operand":
        return reads[item.index]
    if item.source == "result":
        return writes[item.index]
    whole = math.prod(op.factors[f].size for f in item.factors)
    return _Term(item.bytes / whole, item.factors)


def _bytes(use: Use, dtype: str, compute: str) -> _Term:
    return _Term(float(DTYPE_BYTES[_dtype(dtype, compute)]), tuple(f for dim in use.factors for f in dim))


def _beside(op: Op, compute: str) -> tuple[tuple[_Term, ...], tuple[_Term, ...]]:
    """Bytes a composite op moves besides its products, forward and backward."""
    sides = rule_experts.moved(op) if op.kind == "experts" else moved(op, compute)
    forward, backward = (tuple(_Term(n * DTYPE_BYTES[compute], f) for n, f in side) for side in sides)
    return forward, backward


def _twice(term: _Term) -> _Term:
    return _Term(2 * term.scale, term.factors)


def _dtype(dtype: str, compute: str) -> str:
    """Floating tensors of the graph run at the compute dtype; others stay."""
    return compute if "float" in dtype else dtype


def _matmul(op: Op) -> tuple[tuple[int, ...], ...]:
    """Factor groups (batch, m, n, k) of a product of the two operands with the most factors; () for other kinds."""
    if op.kind == "experts":
        return rule_experts.product_groups(op)
    if op.kind != "matmul":
        return ()
    uses = sorted(op.operands, key=lambda use: -sum(map(len, use.factors)))[:2]
    if len(uses) < 2 or not op.results:
        return ()
    first, second = sorted(uses, key=op.operands.index)
    left, right, out = (frozenset(f for dim in use.factors for f in dim) for use in (first, second, op.results[0]))
    groups = (left & right & out, (left & out) - right, (right & out) - left, (left & right) - out)
    return tuple(tuple(sorted(group)) for group in groups)
