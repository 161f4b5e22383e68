"""The outline of a model: everything the planner knows about a captured graph, without torch.

Sizes are global (unsplit). Each op is a set of loops, its *factors*; a tensor dim is an ordered merge of factors. After
factor analysis (planner/factors.py) every op factor is exactly one factor of each tensor dim it appears in, so a split is
"this factor of this op" everywhere, views included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from .placement import Dims

DTYPE_BYTES: Mapping[str, int] = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "bool": 1, "complex64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    """One value of the graph.

    `role` is "input", "parameter", "buffer", "constant" or "activation". `differentiable` says that a gradient flows
    through it (a frozen parameter's does not). `storage` names the tensor whose memory it shares (itself unless a view).
    """

    name: str
    dims: Dims
    dtype: str
    role: str
    differentiable: bool
    storage: str

    @property
    def elements(self) -> int:
        return math.prod(math.prod(d) for d in self.dims)

    @property
    def bytes(self) -> int:
        return self.elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Factor:
    """One loop of an op. `split` is "free", "never", or the name of the implementation a split of it needs.

    `batch`: it runs over samples. `token`: it runs over samples, positions or patches (no projected weight has it).
    """

    name: str
    size: int
    split: str = "free"
    batch: bool = False
    token: bool = False


@dataclass(frozen=True, slots=True)
class Use:
    """A tensor as an op sees it: per dim, per factor of that dim, the index of the op's factor."""

    tensor: str
    factors: tuple[tuple[int, ...], ...]

    def place(self, factor: int) -> tuple[int, int] | None:
        """(dim, factor of the dim) where op factor `factor` stands in this tensor, or None."""
        for dim, members in enumerate(self.factors):
            if factor in members:
                return dim, members.index(factor)
        return None


@dataclass(frozen=True, slots=True)
class Saved:
    """What autograd keeps for the backward pass of an op: an operand, a result, or something new.

    For "new", `factors` are the op factors it scales with and `bytes` is its global size.
    """

    source: str
    index: int = 0
    factors: tuple[int, ...] = ()
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Op:
    """One op of the cleaned graph.

    `linear` lists the ways a partial sum may pass: each entry is the set of operands that are P together while every
    other differentiable operand is V. `kind` selects efficiency and pins: "matmul", "attention", "elementwise", "view",
    "reduction", "norm", "embedding", "loss", "random", "fill", "conv", "experts", "patches", "packed", "other".
    `projection` marks a matmul with a parameter (or experts with theirs). `program` is what runs in the tiles of "patches", `grid`
    how many there are (planner/patches.py), or what runs on the rows of "packed" (planner/rule_packed.py).
    `flops` are global forward FLOPs, `backward_flops` those of the whole backward (input and weight gradients).
    """

    name: str
    target: str
    kind: str
    operands: tuple[Use, ...]
    results: tuple[Use, ...]
    factors: tuple[Factor, ...]
    linear: tuple[tuple[int, ...], ...] = ()
    flops: float = 0.0
    backward_flops: float = 0.0
    saved: tuple[Saved, ...] = ()
    projection: bool = False
    source: str = ""
    discovered: bool = False
    program: str = ""
    grid: tuple[int, int] = (1, 1)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter: original names (several when tied), the graph tensor that carries it, whether it is trained."""

    names: tuple[str, ...]
    tensor: str
    trainable: bool


@dataclass(frozen=True, slots=True)
class Region:
    """Ops that belong together; `instances[k][i]` is the op of repeat k that corresponds to op i of the template.

    `parameters[k][i]` likewise for the parameters first used in that repeat.
    """

    name: str
    instances: tuple[tuple[str, ...], ...]
    parameters: tuple[tuple[str, ...], ...]

    @property
    def repeats(self) -> int:
        return len(self.instances)


@dataclass(frozen=True, slots=True)
class Outline:
    """A model on one page.

    `loss` names the scalar loss tensor ("" for an inference graph); `outputs` are the other returned tensors, among them
    `writes`, the new values of buffers, which every rank needs whole.
    `microbatch_blockers` names what couples samples, so that the batch cannot be cut into microbatches. `trains` is set for
    a part of a model, whose loss may be elsewhere.
    """

    tensors: Mapping[str, Tensor]
    ops: tuple[Op, ...]
    regions: tuple[Region, ...]
    parameters: tuple[Parameter, ...]
    inputs: tuple[str, ...]
    loss: str
    outputs: tuple[str, ...]
    batch: int
    tokens: int
    fingerprint: str
    microbatch_blockers: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    trains: bool | None = None
    writes: tuple[str, ...] = ()

    @property
    def training(self) -> bool:
        """Whether a backward pass runs: there is a loss, here or (for a part of a model) elsewhere."""
        return bool(self.loss) if self.trains is None else self.trains

    @property
    def whole(self) -> tuple[str, ...]:
        """What is wanted whole on every rank: the loss, or all outputs of inference, and the new values of buffers."""
        return (self.loss, *self.writes) if self.loss else self.outputs

    def op(self, name: str) -> Op:
        return self.by_name[name]

    @property
    def by_name(self) -> dict[str, Op]:
        return {op.name: op for op in self.ops}
