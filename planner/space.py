"""The space of one mesh shape: every strategy of every op class and every way to store every parameter class, with prices.

On the data axis an op that has a batch factor splits it; on the model axis all choices are open but for the pins.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import PinError
from .assign import Storage
from .choices import choices, states
from .costs import Bucket, Call, Chain, Costs
from .outline import DTYPE_BYTES, Factor, Op, Tensor
from .pins import Pins
from .placement import Placement, R, V, local_dims, local_elements, replaced
from .plan import Precision
from .template import OpClass, ParameterClass, Template


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to run an op: a choice per axis, the placements it makes, its seconds (collectives inside it included)."""

    choice: tuple[str, ...]
    operands: tuple[Placement, ...]
    results: tuple[Placement, ...]
    compute: float
    communication: float
    calls: tuple[Call, ...]

    @property
    def seconds(self) -> float:
        return self.compute + self.communication


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a parameter. `now` is where it stands once gathered, before its uses; `chunks` ranks share dim 0."""

    home: Placement
    zero: int
    zero_axes: tuple[int, ...]
    now: Placement
    chunks: int


@dataclass(frozen=True, slots=True)
class Entry:
    """How a parameter goes from `Option.now` to one wanted placement: axes it is reduced over, then a chain."""

    reduced: tuple[int, ...]
    chain: Chain


@dataclass(frozen=True, slots=True)
class Times:
    """How often a step runs a parameter's collectives at a ZeRO level: gathers, scatters, reductions and other transitions."""

    gather: int
    scatter: int
    forward: int
    backward: int


def times(zero: int, microbatches: int, training: bool, trainable: bool, again: bool = True) -> Times:
    """Levels 0 and 1 communicate once a step, level 2 scatters every microbatch, level 3 gathers twice in each.

    Unless `again`: parameters whose backward does not need them (an embedding's) are not gathered a second time.
    """
    m = microbatches
    if not training:
        return Times(m if zero == 3 else 1, 0, m if zero == 3 else 1, 0)
    scatter = (m if zero >= 2 else 1) if trainable else 0
    return Times((2 if again else 1) * m if zero == 3 else 1, scatter, m if zero == 3 else 1, m if zero >= 2 else 1)


class Space:
    """Strategies and options of a template on one mesh, with what they cost. Building it raises PinError for impossible pins."""

    def __init__(self, template: Template, costs: Costs, pins: Pins, precision: Precision, optimizer: str,
                 fixed: Mapping[str, Storage] | None = None,
                 residual: Mapping[str, frozenset[str]] = MappingProxyType({})) -> None:  # fmt: skip
        self.residual = residual
        self.template, self.costs, self.pins = template, costs, pins
        self.precision, self.optimizer, self.shape = precision, optimizer, costs.shape
        self.training = template.outline.training
        self.tensors = dict(template.tensors)
        self.strategies = tuple(self._strategies(c) for c in template.ops)
        self.wants = self._parameter_wants()
        self.options = tuple(
            self._options(w, p) if fixed is None else (self._option(p, fixed[p.tensor.name]),)
            for w, p in enumerate(template.parameters)
        )
        self.references = self._references()
        self._entries: dict[tuple[int, int, Placement], Entry | None] = {}

    # -- ops

    def _strategies(self, item: OpClass) -> tuple[Strategy, ...]:
        op = item.op
        allowed = [self._axis_choices(op, a) for a in range(len(self.shape.axes))]
        sides = {c: states(op, self.tensors, c) for c in dict.fromkeys(itertools.chain(*allowed))}
        found: dict[tuple[tuple[Placement, ...], tuple[Placement, ...]], Strategy] = {}
        for choice in itertools.product(*allowed):
            price = self.costs.op(op, self.tensors, choice)
            if price is None:
                continue
            operands = tuple(zip(*(sides[c][0] for c in choice), strict=True))
            results = tuple(zip(*(sides[c][1] for c in choice), strict=True))
            made = Strategy(choice, operands, results, *price)
            known = found.get((operands, results))
            if known is None or made.seconds < known.seconds:
                found[operands, results] = made
        if not found:
            raise PinError(
                f"{op.name} ({op.target}) has no legal way to run on this mesh under the pins {self.pins.texts}"
            )
        return tuple(found.values())

    def _axis_choices(self, op: Op, axis: int) -> tuple[str, ...]:
        n = self.shape.sizes[axis]
        if n == 1:
            return ("R",)
        legal = choices(op, self.tensors, n)
        factors = {f.name: f for f in op.factors}
        if self.shape.axes[axis].role == "data":
            batch = tuple(c for c in legal if c in factors and factors[c].batch)
            return batch or tuple(c for c in legal if c not in factors)
        return restrict(op, self.tensors, legal, n, self.pins, self.residual.get(op.name, frozenset()))

    # -- parameters

    def _parameter_wants(self) -> tuple[tuple[Placement, ...], ...]:
        found: list[dict[Placement, None]] = [{} for _ in self.template.parameters]
        for item in self.template.classes:
            if item.parameter is not None:
                for v, i in item.consumers:
                    for strategy in self.strategies[v]:
                        found[item.parameter].setdefault(strategy.operands[i])
        return tuple(tuple(f) for f in found)

    def _options(self, w: int, item: ParameterClass) -> tuple[Option, ...]:
        model, axes = self.shape.axis("model"), len(self.shape.axes)
        homes: dict[Placement, None] = {(R,) * axes: None}
        if model is not None:
            for want in self.wants[w]:
                if want[model].is_split:
                    homes.setdefault(replaced((R,) * axes, model, want[model]))
        found = [option for home in homes for option in self._levels(item, home)]
        if not found:
            raise PinError(f"the pins {', '.join(self.pins.texts)} leave no way to store {item.parameter.names[0]}")
        return tuple(found)

    def _levels(self, item: ParameterClass, home: Placement) -> list[Option]:
        data, model = self.shape.axis("data"), self.shape.axis("model")
        # A tp pin means tensor parallelism alone: ZeRO over the same axis only where it is asked for.
        chunked = data if data is not None else model if self.pins.tp is None or self.pins.zero is not None else None
        pinned, trainable = self.pins.zero, item.parameter.trainable and self.training
        levels = [0]
        if chunked is not None and home[chunked] == R and item.tensor.dims:
            levels = [0, 1, 2, 3] if trainable else [0, 3]
            if pinned is not None:
                # Over a data axis every trainable parameter is stored so; over a model axis those that are used V there.
                forced = data is not None and trainable
                levels = [z for z in levels if z == pinned or (not forced and z == 0)]
        levels = [z for z in levels if not self.pins.forbids("zero", z)]
        axes = (chunked,) if chunked is not None else ()
        return [self._option(item, Storage(home, zero, axes if zero else ())) for zero in levels]

    def _option(self, item: ParameterClass, storage: Storage) -> Option:
        now = storage.home
        for axis in storage.zero_axes if storage.zero else ():
            now = replaced(now, axis, V if item.parameter.trainable and self.training else R)
        chunks = math.prod(self.shape.sizes[a] for a in storage.zero_axes) if storage.zero else 1
        return Option(storage.home, storage.zero, storage.zero_axes, now, chunks)

    def entry(self, w: int, o: int, want: Placement) -> Entry | None:
        """How option `o` of parameter class `w` serves `want`; None where it cannot."""
        key = (w, o, want)
        if key not in self._entries:
            self._entries[key] = self._entry(w, self.options[w][o], want)
        return self._entries[key]

    def _entry(self, w: int, option: Option, want: Placement) -> Entry | None:
        tensor, data = self.template.parameters[w].tensor, self.shape.axis("data")
        reduced: tuple[int, ...] = ()
        at = option.now
        if tensor.differentiable:
            reduced = tuple(a for a, (s, q) in enumerate(zip(at, want, strict=True)) if s == R and q == V)
            for axis in reduced:
                at = replaced(at, axis, V)
        if self.pins.zero and option.zero == 0 and data is None and reduced and tensor.dims:
            return None
        chain = self.costs.chain(tensor, at, want)
        return None if chain is None else Entry(reduced, chain)

    def used_bytes(self, w: int, option: Option) -> float:
        """Bytes of the parameter as its uses see it: the home-local tensor at the compute dtype."""
        tensor = self.template.parameters[w].tensor
        return local_elements(tensor.dims, option.home, self.shape.sizes) * DTYPE_BYTES[tensor.dtype]

    def stored_elements(self, w: int, option: Option) -> int:
        """Elements on the rank that stores most of it (chunks of dim 0 need not be even)."""
        return stored_elements(self.template.parameters[w].tensor, option, self.shape.sizes)

    def _references(self) -> tuple[float, ...]:
        """Per region, the bytes of all its parameters: the largest bucket it can have."""
        total = [0.0] * len(self.template.outline.regions)
        for item in self.template.parameters:
            total[item.region] += item.tensor.bytes
        return tuple(total)

    def times(self, w: int, option: Option) -> Times:
        """How often a step runs the collectives of parameter class `w` under `option`."""
        item = self.template.parameters[w]
        again = item.bucket in self.template.regathered
        return times(option.zero, self.template.microbatches, self.training, item.parameter.trainable, again)

    def bucket(self, collective: str, region: int, axes: tuple[int, ...]) -> Bucket:
        """The affine price of one bucketed collective of a region's parameters."""
        return self.costs.bucket(collective, axes, self.references[region])

    def group(self, w: int, option: Option) -> tuple[object, ...]:
        """Parameters of a region instance with equal groups share their collectives."""
        item = self.template.parameters[w]
        return item.region, option.zero, option.zero_axes, item.parameter.trainable, item.tensor.dtype


def stored_elements(tensor: Tensor, option: Option, sizes: tuple[int, ...]) -> int:
    """Elements of the largest chunk of a home-local tensor, dim 0 cut as torch.chunk does."""
    shape = [math.prod(d) for d in local_dims(tensor.dims, option.home, sizes)]
    if option.chunks > 1 and shape:
        shape[0] = -(-shape[0] // option.chunks)
    return math.prod(shape)


def restrict(
    op: Op, tensors: Mapping[str, Tensor], legal: tuple[str, ...], n: int, pins: Pins, residual: frozenset[str]
) -> tuple[str, ...]:
    """Choices on the model axis that the pins leave; raises PinError naming the size that does not divide.

    `residual` are the op's factors that the stream between layers has: closed under a tp or sequence_parallel pin.
    """
    factors = {f.name: f for f in op.factors}
    on = pins.sequence_parallel is True or pins.forbids("sequence_parallel", False)
    off = pins.sequence_parallel is False or pins.forbids("sequence_parallel", True) or (pins.tp is not None and not on)
    kept = list(legal)
    if off:
        kept = [c for c in kept if c not in factors or not factors[c].token]
    if on or off:
        kept = [c for c in kept if c not in residual]
    if pins.tp is not None or pins.dp is not None:
        kept = [c for c in kept if c not in factors or not factors[c].batch]
    if pins.tp is not None and op.projection:
        weight = _weight_factors(op, tensors)
        split = [c for c in kept if c in factors and c in weight]
        kept = split or kept
    elif on and not op.projection:
        kept = _must_split(op, tensors, kept, factors, n)
    return tuple(kept)


def _weight_factors(op: Op, tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """Names of the factors of the operand that comes from a parameter."""
    found: set[str] = set()
    for use in op.operands:
        if tensors[tensors[use.tensor].storage].role == "parameter":
            found.update(op.factors[i].name for members in use.factors for i in members)
    return frozenset(found)


def _must_split(
    op: Op, tensors: Mapping[str, Tensor], kept: list[str], factors: Mapping[str, Factor], n: int
) -> list[str]:
    """Under sequence_parallel=on, an op over positions with a differentiable result splits one of its factors."""
    candidates = [f for f in op.factors if f.split != "never" and not f.batch]
    tokens = [f for f in candidates if f.token]
    if not tokens or not any(tensors[u.tensor].differentiable for u in op.results):
        return kept
    split = [c for c in kept if c in factors and not factors[c].batch]
    if not split:
        sizes = " or ".join(str(f.size) for f in tokens)
        raise PinError(
            f"sequence_parallel=on: {sizes} positions do not divide by {n} in {op.name} ({op.target}); pad the sequence"
        )
    return split
