"""Prices of single decisions: an op under a choice, a chain of transitions, the collectives of a parameter group.

What is priced is what the runtime executes: one chain `placement.steps` per (tensor, wanted placement), bucketed collectives
per parameter group. A bucket's price is affine in its bytes (fixed part + bytes * slope, the chord of the collective's price
from 0 to all parameters of the region), so that it can be shared out over the members of a group exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

from .choices import placed
from .dispatch import DISPATCH
from .inside import INSIDE
from .outline import DTYPE_BYTES, Op, Tensor
from .overlap import NONE, Overlap
from .placement import COLLECTIVES, Dims, Placement, Step, local_dims, local_elements, replaced, row, steps
from .placement import R as WHOLE
from .plan import MeshAxis, Precision
from .ring import RING, block_bytes, split_by


class Price(Protocol):
    """Seconds with their source."""

    @property
    def seconds(self) -> float: ...

    @property
    def source(self) -> str: ...

    @property
    def error(self) -> float: ...

    @property
    def issue_seconds(self) -> float: ...


class PriceBook(Protocol):
    """What the planner asks of planner/prices.py."""

    @property
    def pieces(self) -> bool: ...

    def op(self, op: Op, local_sizes: tuple[int, ...], tensors: Mapping[str, Tensor]) -> tuple[Price, Price]:
        """(forward, backward) of `op` whose factors have the given local sizes."""
        ...

    def collective(self, name: str, full_bytes: float, stride: int, size: int) -> Price:
        """One collective of a full tensor of `full_bytes` over `size` ranks that stand `stride` apart."""
        ...

    def copy(self, bytes_read: float) -> Price:
        """A local copy that reads and writes `bytes_read`."""
        ...

    def optimizer_seconds(self, elements: float, optimizer: str, precision: Precision) -> float:
        """One optimizer step over so many local elements; proportional to them."""
        ...


@dataclass(frozen=True, slots=True)
class Shape:
    """A mesh under consideration; ranks are row-major over `axes`."""

    axes: tuple[MeshAxis, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(a.size for a in self.axes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(a.name for a in self.axes)

    @property
    def devices(self) -> int:
        return math.prod(self.sizes)

    def stride(self, axis: int) -> int:
        """Distance of neighbouring ranks on `axis`."""
        return math.prod(self.sizes[axis + 1 :])

    def axis(self, role: str) -> int | None:
        """Index of the axis of `role` with more than one rank, None where there is none."""
        return next((i for i, a in enumerate(self.axes) if a.role == role and a.size > 1), None)


@dataclass(frozen=True, slots=True)
class Call:
    """One collective: its name, mesh axis (index), bytes of the full tensor on that axis, and whether it runs backward."""

    collective: str
    axis: int
    bytes: float
    backward: bool


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain of transitions: seconds of its collectives and local copies in each direction, its calls, and whether the
    forward direction makes a new buffer."""

    forward: float
    backward: float
    copies_forward: float
    copies_backward: float
    calls: tuple[Call, ...]
    fresh: bool

    @property
    def seconds(self) -> float:
        """All of it, once in each direction."""
        return self.times(1, 1)

    def times(self, forward: int, backward: int) -> float:
        """Seconds when each direction runs so often."""
        return forward * (self.forward + self.copies_forward) + backward * (self.backward + self.copies_backward)


NOTHING = Chain(0.0, 0.0, 0.0, 0.0, (), False)


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds of one op: forward and backward compute, what collectives inside it add in each direction, and those calls.

    `issue` and `issue_backward` are what the host needs to start it, where that is not in the seconds of compute.
    """

    forward: float
    backward: float
    inside: float
    calls: tuple[Call, ...]
    inside_backward: float = 0.0
    issue: float = 0.0
    issue_backward: float = 0.0


@dataclass(frozen=True, slots=True)
class Bucket:
    """The affine price of one bucketed collective: `fixed` seconds per call and `slope` seconds per byte."""

    fixed: float
    slope: float


class Costs:
    """Prices on one mesh, remembered. Frozen inputs, no side effects besides the memory."""

    def __init__(
        self, prices: PriceBook, shape: Shape, loss_is_differentiated: bool = True, *,
        overlap: Overlap = NONE, repeated: Mapping[str, float] = MappingProxyType({}), ahead: bool = False,
        summed: float = 1.0,
    ) -> None:  # fmt: skip
        """`overlap` is what a ring's sends may hide, `repeated` the distinct share of keys and values by op (planner/ring.py).

        `summed` is how many bytes a byte of gradients has as they are summed over ranks (planner/precision.py).

        With `ahead` the host may run ahead of the device: what it needs to start an op is told apart. Without, no op takes
        less than that.
        """
        self.prices, self.shape, self.training = prices, shape, loss_is_differentiated
        self.ahead, self.summed = ahead, summed
        self.overlap, self.repeated = overlap, repeated
        self._sizes = shape.sizes
        self._ops: dict[tuple[object, ...], Run] = {}
        self._sorts: dict[int, tuple[Op, int]] = {}  # with the op, which keeps its id its own
        self._numbered: dict[tuple[object, ...], int] = {}
        self._chains: dict[tuple[object, ...], Chain | None] = {}
        self._collectives: dict[tuple[str, float, int], tuple[float, float]] = {}
        self.sources: dict[str, dict[str, float]] = {"compute": {}, "communication": {}}

    def local_sizes(self, op: Op, choice: Sequence[str]) -> tuple[int, ...] | None:
        """Factor sizes of `op` under one choice per axis; None where they do not divide."""
        sizes = [f.size for f in op.factors]
        for name, n in zip(choice, self._sizes, strict=True):
            for index in split_by(op, name):
                if sizes[index] % n:
                    return None
                sizes[index] //= n
        return tuple(sizes)

    def placed(
        self, op: Op, tensors: Mapping[str, Tensor], choice: Sequence[str]
    ) -> tuple[tuple[Placement, ...], tuple[Placement, ...]]:
        """Wanted operand placements and produced result placements of `op`."""
        return placed(op, dict(tensors) if not isinstance(tensors, dict) else tensors, choice)

    def run(self, op: Op, tensors: Mapping[str, Tensor], choice: Sequence[str]) -> Run | None:
        """What one run of `op` under `choice` (one per axis) takes; None where sizes do not divide."""
        sizes = self.local_sizes(op, choice)
        if sizes is None:
            return None
        inside = self._inside(op, tensors, choice, sizes)
        key = (self._sort(op, tensors), sizes, inside)
        if key not in self._ops:
            rounds = self._rounds(choice)
            forward, backward = self.prices.op(op, sizes, tensors)
            there, back = (self._taken(price) for price in (forward, backward))
            if not self.training:
                back = (0.0, 0.0)
            if there[0] + back[0]:
                self.sources["compute"].setdefault(forward.source, forward.error)
            run = self._added(rounds * there[0], rounds * back[0], inside, rounds)
            self._ops[key] = replace(run, issue=rounds * there[1], issue_backward=rounds * back[1])
        return self._ops[key]

    def _taken(self, price: Price) -> tuple[float, float]:
        """Seconds of the device, and those of the host that are not in them."""
        return (price.seconds, price.issue_seconds) if self.ahead else (max(price.seconds, price.issue_seconds), 0.0)

    def _sort(self, op: Op, tensors: Mapping[str, Tensor]) -> int:
        """A number that ops of equal price share; worked out once per op (to hash its factors takes longer than to look it up)."""
        known = self._sorts.get(id(op))
        if known is None:
            sides = tuple(
                tuple((tensors[u.tensor].dtype, tensors[u.tensor].differentiable, u.factors) for u in uses)
                for uses in (op.operands, op.results)
            )
            full = (op.target, op.kind, op.factors, *sides, op.flops, op.backward_flops, len(op.saved))
            known = self._sorts[id(op)] = op, self._numbered.setdefault(full, len(self._numbered))
        return known[1]

    def _rounds(self, choice: Sequence[str]) -> int:
        """In how many blocks of keys an op runs: as many as its ring has ranks."""
        return math.prod(n for name, n in zip(choice, self._sizes, strict=True) if name == RING)

    def _added(self, forward: float, backward: float, inside: tuple[Call, ...], rounds: int) -> Run:
        """A run with the calls inside it; those of a ring hide under all of its rounds but the last."""
        talk = sum(self.collective(c) for c in inside if not c.backward)
        talk_back = sum(self.collective(c) for c in inside if c.backward)
        if rounds > 1:
            share = (rounds - 1) / rounds
            talk = self.overlap.exposed(share * forward, talk)
            talk_back = self.overlap.exposed(share * backward, talk_back)
        return Run(forward, backward, talk, inside, talk_back)

    def op(
        self, op: Op, tensors: Mapping[str, Tensor], choice: Sequence[str]
    ) -> tuple[float, float, tuple[Call, ...]] | None:
        """(compute seconds forward + backward, seconds of collectives inside, those calls); None where sizes do not divide."""
        run = self.run(op, tensors, choice)
        return None if run is None else (run.forward + run.backward, run.inside, run.calls)

    def _inside(
        self, op: Op, tensors: Mapping[str, Tensor], choice: Sequence[str], sizes: tuple[int, ...]
    ) -> tuple[Call, ...]:
        """Collectives that the implementation of a split factor runs itself."""
        calls: list[Call] = []
        by_name = {f.name: f for f in op.factors}
        for axis, name in enumerate(choice):
            factor = by_name.get(name)
            if name == RING:
                calls += self._passes(op, tensors, axis, sizes)
            inside = INSIDE.get(name if name == DISPATCH else factor.split if factor is not None else "")
            if inside is not None and self.shape.sizes[axis] > 1:
                calls += [
                    Call(c.collective, axis, c.bytes, c.backward)
                    for c in inside(op, tensors, sizes, self.shape.sizes[axis])
                    if self.training or not c.backward
                ]
        return tuple(calls)

    def _passes(self, op: Op, tensors: Mapping[str, Tensor], axis: int, sizes: tuple[int, ...]) -> list[Call]:
        """What a ring sends, as the ring algorithm of an all-gather (keys and values) and a reduce-scatter (their gradients)."""
        n = self.shape.sizes[axis]
        if n == 1:
            return []
        full = n * block_bytes(op, tensors, sizes, self.repeated.get(op.name, 1.0))
        calls = [Call("all_gather", axis, full, False)]
        if self.training and any(tensors[u.tensor].differentiable for u in op.operands[1:3]):
            calls += [Call("all_gather", axis, full, True), Call("reduce_scatter", axis, full, True)]
        return calls

    def collective(self, call: Call) -> float:
        """Seconds of one collective call."""
        return self._called(call)[0]

    def _waited(self, call: Call) -> float:
        """Seconds of a collective between two ops that compute waits.

        Piece by piece, each of n ranks' part is multiplied while the next one arrives (gathers), or sent while the next is
        multiplied (scatters): one part of n is waited for, and the others slow the product down (Wang et al., ASPLOS 2023;
        Transformer Engine's user buffers). Products are taken to be longer than their parts' transfers.
        """
        seconds, n = self.collective(call), self.shape.sizes[call.axis]
        if not self.prices.pieces or call.collective not in BY_PIECES or self.shape.axes[call.axis].role != "model":
            return seconds
        return seconds / n + (self.overlap.slowdown - 1.0) * seconds * (n - 1) / n

    def issue(self, calls: Iterable[Call], *, backward: bool) -> float:
        """Seconds of the host that starts those of `calls` that run in one direction."""
        return sum(self._called(call)[1] for call in calls if call.backward == backward)

    def _called(self, call: Call) -> tuple[float, float]:
        """Seconds of one collective, and of the host that starts it."""
        key = (call.collective, call.bytes, call.axis)
        if key not in self._collectives:
            size = self.shape.sizes[call.axis]
            price = self.prices.collective(call.collective, call.bytes, self.shape.stride(call.axis), size)
            self.sources["communication"].setdefault(price.source, price.error)
            self._collectives[key] = (price.seconds, price.issue_seconds) if size > 1 else (0.0, 0.0)
        return self._collectives[key]

    def chain(self, tensor: Tensor, source: Placement, target: Placement) -> Chain | None:
        """The transitions of `tensor` from `source` to `target`, forward and backward; None where there is no legal chain."""
        if source == target:
            return NOTHING
        both = self.training and tensor.differentiable
        key = (tensor.dims, tensor.dtype, both, source, target)
        if key not in self._chains:
            self._chains[key] = self._chain(tensor.dims, DTYPE_BYTES[tensor.dtype], both, source, target)
        return self._chains[key]

    def _chain(self, dims: Dims, width: int, both: bool, source: Placement, target: Placement) -> Chain | None:
        sizes = self._sizes
        try:
            path = steps(dims, source, target, sizes)
            for step in path:
                local_dims(dims, replaced(step.before, step.axis, WHOLE), sizes)
                local_dims(dims, replaced(step.before, step.axis, step.target), sizes)
        except ValueError:
            return None
        copies, fresh = [0.0, 0.0], False
        calls: list[Call] = []
        for step in path:
            names = row(step.source, step.target)
            full = local_elements(dims, replaced(step.before, step.axis, WHOLE), sizes) * width
            fresh = fresh or (names.forward != "none" and sizes[step.axis] > 1)
            for name, backward in ((names.forward, False), (names.backward, True)):
                if sizes[step.axis] == 1 or (backward and not both):
                    continue
                if name in COLLECTIVES:
                    calls.append(Call(name, step.axis, full, backward))
                elif name != "none":
                    copies[int(backward)] += self.prices.copy(
                        _written(name, backward, step, full, sizes[step.axis])
                    ).seconds
        there = math.fsum(self._waited(c) for c in calls if not c.backward)
        back = math.fsum(self._waited(c) for c in calls if c.backward)
        return Chain(there, back, copies[0], copies[1], tuple(calls), fresh)

    def bucket(self, collective: str, axes: Sequence[int], reference_bytes: float) -> Bucket:
        """Affine price of a bucketed collective over `axes` together; `reference_bytes` is the largest bucket it may be.

        Bytes are in the compute dtype, whatever gradients are summed in.
        """
        ratio = 1.0 if collective == "all_gather" else self.summed
        size = math.prod(self.shape.sizes[a] for a in axes)
        if size == 1 or not axes:
            return Bucket(0.0, 0.0)
        stride = min(self.shape.stride(a) for a in axes)
        fixed = self.prices.collective(collective, 1.0, stride, size).seconds
        whole = self.prices.collective(collective, ratio * max(reference_bytes, 2.0), stride, size).seconds
        return Bucket(fixed, max(whole - fixed, 0.0) / max(reference_bytes, 2.0))


BY_PIECES = ("all_gather", "reduce_scatter")
"""Collectives that a product can be run with piece by piece."""


def _written(name: str, backward: bool, step: Step, full: float, n: int) -> float:
    """Bytes written by a local step: a slice writes its slice, a pad or a scale the whole local tensor."""
    return full / n if name == "slice" else full
