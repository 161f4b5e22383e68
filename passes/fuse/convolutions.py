"""Convolutions as passes see them: what a call reads, in one form for every op, and the call that does it.

`read` takes conv1d to conv3d, the transposed ones, `convolution` and `folded_conv`; `emit` writes a `folded_conv`. Convolutions of
unbatched inputs, and paddings that differ at the two ends (an even kernel under "same"), are read as None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from ..base import fake
from ..pattern import target_of
from ..rewrite import Make
from ..torch_compat import OpOverload, arguments
from .ops.folded_conv import folded_conv
from .ops.recipe import VECTORS

PLAIN = tuple(f"aten.{name}" for name in ("conv1d", "conv2d", "conv3d", "convolution"))
TRANSPOSED = tuple(f"aten.conv_transpose{n}d" for n in (1, 2, 3))
FOLDED = "shardwright.folded_conv"
Places = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Branch:
    """One convolution of several that are one: its weight (None: the identity), what stands behind it, where its taps stand."""

    weight: fx.Node | None
    vectors: tuple[fx.Node | None, ...] = (None,) * VECTORS
    eps: float = 0.0
    places: Places = ()

    @property
    def normed(self) -> bool:
        return self.vectors[-1] is not None

    def taps(self, rank: int) -> tuple[int, ...]:
        return (1,) * rank if self.weight is None else tuple(fake(self.weight).shape[2:])


@dataclass(frozen=True)
class Frame:
    """How a kernel moves over its input; two convolutions that share it differ in weights alone."""

    x: fx.Node
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        """Dims of space."""
        return len(self.stride)


@dataclass(frozen=True)
class Convolution:
    """Parts that follow each other in the channels of the result; each is a sum of branches. `kernel` are the taps by dim."""

    frame: Frame
    kernel: tuple[int, ...]
    parts: tuple[tuple[Branch, ...], ...] = field(default=())

    @property
    def branches(self) -> tuple[Branch, ...]:
        return tuple(b for part in self.parts for b in part)


def read(node: fx.Node) -> Convolution | None:
    """The convolution that a call does, if it is one."""
    name = target_of(node)
    if name not in (*PLAIN, *TRANSPOSED, FOLDED):
        return None
    given = arguments_of(node)
    return _read_folded(given) if name == FOLDED else _read_plain(given, name in TRANSPOSED)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Every argument of a call by name, defaults included."""
    assert isinstance(node.target, OpOverload)
    found: dict[str, Any] = {}
    for i, argument in enumerate(arguments(node.target)):
        default = argument.default_value if argument.has_default_value() else None
        found[argument.name] = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, default)
    return found


def emit(make: Make, found: Convolution) -> fx.Node:
    """The call that does a convolution."""
    frame, branches = found.frame, found.branches
    framed = any(b.places for b in branches)
    extra = {
        "groups": frame.groups if frame.groups != 1 else None,
        "transposed": frame.transposed or None,
        "output_padding": list(frame.output_padding) if any(frame.output_padding) else None,
        "parts": [len(p) for p in found.parts] if len(found.parts) > 1 else None,
        "kernel": list(found.kernel) if framed else None,
        "places": [n for b in branches for place in _placed(b, frame.rank) for n in place] if framed else None,
    }
    return make(
        folded_conv, frame.x, [b.weight for b in branches], [v for b in branches for v in b.vectors],
        [b.eps for b in branches], list(frame.stride), list(frame.padding), list(frame.dilation),
        **{k: v for k, v in extra.items() if v is not None},
    )  # fmt: skip


def _placed(branch: Branch, rank: int) -> Places:
    return branch.places or ((0, 1),) * rank


def _read_plain(given: dict[str, Any], transposed: bool) -> Convolution | None:
    x, weight = given["input"], given["weight"]
    rank = fake(weight).dim() - 2
    if fake(x).dim() != rank + 2 or fake(x).dtype != fake(weight).dtype:
        return None
    taps, dilation = tuple(fake(weight).shape[2:]), _wide(given["dilation"], rank)
    padding = _padding(given["padding"], taps, dilation)
    if padding is None:
        return None
    frame = Frame(
        x, _wide(given["stride"], rank), padding, dilation, given["groups"], bool(given.get("transposed", transposed)),
        _wide(given.get("output_padding", (0,)), rank),
    )  # fmt: skip
    return Convolution(frame, taps, ((Branch(weight, (given["bias"], *(None,) * (VECTORS - 1))),),))


def _padding(padding: Any, taps: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...] | None:
    if not isinstance(padding, str):
        return _wide(padding, len(taps))
    if padding == "valid":
        return (0,) * len(taps)
    total = [d * (k - 1) for d, k in zip(dilation, taps, strict=True)]
    return None if any(n % 2 for n in total) else tuple(n // 2 for n in total)


def _wide(numbers: Sequence[int], rank: int) -> tuple[int, ...]:
    """One number for each dim of space."""
    return tuple(numbers) if len(numbers) == rank else tuple(numbers) * rank


def _read_folded(given: dict[str, Any]) -> Convolution:
    rank, weights = len(given["stride"]), given["weights"]
    kernel, flat = tuple(given["kernel"]), list(given["places"])
    vectors = _cut(given["vectors"], VECTORS)
    places = _cut(list(zip(flat[::2], flat[1::2], strict=True)), rank) or [()] * len(weights)
    branches = [Branch(*b) for b in zip(weights, vectors, given["eps"], places, strict=True)]
    counts, parts = given["parts"] or [len(branches)], list[tuple[Branch, ...]]()
    for count in counts:
        parts.append(tuple(branches[:count]))
        branches = branches[count:]
    frame = Frame(
        given["x"], *(tuple(given[k]) for k in ("stride", "padding", "dilation")), given["groups"],
        bool(given["transposed"]), tuple(given["output_padding"]) or (0,) * rank,
    )  # fmt: skip
    return Convolution(frame, kernel or parts[0][0].taps(rank), tuple(parts))


def _cut(row: Sequence[Any], length: int) -> list[tuple[Any, ...]]:
    return [tuple(row[i : i + length]) for i in range(0, len(row), length)]


def normed(found: Convolution, norm: dict[str, Any]) -> Convolution | None:
    """The convolution with a batch norm on running statistics behind it, by the arguments of `aten.batch_norm`; None where one
    stands behind a branch already, or behind parts side by side."""
    if len(found.parts) > 1 or any(b.normed for b in found.branches):
        return None
    gamma, beta, mean, var = (norm[name] for name in ("weight", "bias", "running_mean", "running_var"))
    parts = [
        replace(b, vectors=(b.vectors[0], gamma, None if i else beta, None if i else mean, var), eps=norm["eps"])
        for i, b in enumerate(found.branches)
    ]
    return replace(found, parts=(tuple(parts),))
