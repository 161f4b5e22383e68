"""Local arguments of an op: how sizes and counts among its arguments change when its factors are split.

Most ops follow the shapes of their tensors. Those that name sizes (views, factories, splits, windows), counts (mean) or
numbers of groups get them from the rule instance and the local size of each letter. Whatever stands in tensor positions
(graph nodes, markers, tensors) is passed through untouched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..planner import rule_made
from ..planner.outline import Op
from ..planner.rule_types import Letters, RuleInstance
from ..planner.rules import packet
from .summarize import Call, operands_of

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Emitted = tuple[Any, tuple[Any, ...], dict[str, Any]]


def split_mean(
    x: torch.Tensor, dims: list[int] | None, keepdim: bool, count: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """This rank's part of a mean over `count` elements of which it holds some: the parts sum to the mean."""
    every = list(range(x.dim())) if dims is None else dims
    return torch.sum(x, every, keepdim, dtype=dtype) / count


@dataclass(frozen=True)
class Local:
    """One op under a split: its rule, and the local size of each letter (global where it is not split)."""

    name: str
    rule: RuleInstance
    sizes: Mapping[str, int]

    def size(self, members: tuple[str, ...]) -> int:
        """Local size of a dim."""
        return math.prod(self.sizes[c] for c in members)

    def shape(self, dims: Letters) -> list[int]:
        """Local shape of a tensor."""
        return [self.size(members) for members in dims]

    @property
    def result(self) -> list[int]:
        """Local shape of the first result."""
        return self.shape(self.rule.results[0])

    def scale(self, dims: Letters, dim: int, elements: int) -> int:
        """A number of elements of a dim, in units of what its split leaves."""
        whole = math.prod(self.rule.sizes[c] for c in dims[dim])
        return elements * self.size(dims[dim]) // whole if whole else elements


def local_form(op: Op, call: Call, sizes: Sequence[int]) -> Emitted:
    """(target, args, kwargs) of an op of the outline where its factors have these local sizes."""
    cut: dict[str, int] = {}
    for factor, size in zip(op.factors, sizes, strict=True):
        if "~" not in factor.name:
            letter = factor.name.split(".")[0]
            cut[letter] = cut.get(letter, 1) * size
    _, args, kwargs = operands_of(call.node)
    return localize(call.node.target, args, kwargs, call.rule, {**call.rule.sizes, **cut})


def localize(
    target: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    instance: RuleInstance,
    local_sizes: Mapping[str, int],
) -> Emitted:
    """(target, args, kwargs) of an op on local shapes.

    `local_sizes` gives the local size of each split letter of `instance`; letters it lacks are whole. `target` is an
    operator overload or a rule key; it changes only where the op itself must (mean over a split dim becomes a scaled sum).
    """
    sizes = {**instance.sizes, **local_sizes}
    name = packet(str(target))
    handler = _HANDLERS.get(name.removeprefix("aten."))
    if handler is None or sizes == instance.sizes:
        return target, tuple(args), dict(kwargs)
    return handler(target, tuple(args), dict(kwargs), Local(name, instance, sizes))


Handler = Callable[[Any, tuple[Any, ...], dict[str, Any], Local], Emitted]


def _put(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, value: Any) -> Arguments:
    """The arguments with one of them replaced where it stands."""
    if position < len(args):
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}


def _get(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str, default: Any = None) -> Any:
    return args[position] if position < len(args) else kwargs.get(name, default)


def _result_size(position: int, name: str) -> Handler:
    """The argument is the result's shape."""

    def handler(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], local: Local) -> Emitted:
        if _is_dtype(_get(args, kwargs, position, name)):
            return target, args, kwargs
        return target, *_put(args, kwargs, position, name, local.result)

    return handler


def _is_dtype(value: Any) -> bool:
    return isinstance(value, torch.dtype)


def _unflatten(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], local: Local) -> Emitted:
    count = len(_get(args, kwargs, 2, "sizes"))
    rank = len(local.rule.operands[0])
    dim = _get(args, kwargs, 1, "dim") % rank
    return target, *_put(args, kwargs, 2, "sizes", local.result[dim : dim + count])


def _squeeze(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], local: Local) -> Emitted:
    """Only dims whose global size is 1 go: a batch of 2 split in two is not one of them."""
    dims = local.rule.operands[0]
    asked = _get(args, kwargs, 1, "dim")
    asked = range(len(dims)) if asked is None else [asked] if isinstance(asked, int) else asked
    gone = sorted({d % len(dims) for d in asked if not dims[d % len(dims)]})
    if not isinstance(target, str):
        target = torch.ops.aten.squeeze.dims
    return target, (args[0], gone), {}


def _expand(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], local: Local) -> Emitted:
    return target, *_put(args, kwargs, 1, "size", local.result)


def _repeat(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], local: Local) -> Emitted:
    """Times per result dim: its local size over the operand's."""
    old = local.shape(local.rule.operands[0])
    new = local.result
    lead = len(new) - len(old)
    times = [n // old[d - lead] if d >= lead else n for d, n in enumerate(new)]
    name = "repeats" if local.name == "aten.repeat" else "dims"
    return target, *_put(args, kwargs, 1, name, times)


def _repeat_interleave(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], local: Local) -> Emitted:
    dim = _get(args, kwargs, 2, "dim") % len(local.rule.operands[0])
    size = local.result[dim]
    args, kwargs = _put(args, kwargs, 1, "repeats", size // local.shape(local.rule.operands[0])[dim])
    if kwargs.get("output_size") is not None:
        kwargs = {**kwargs, "output_size": size}
    return target, args, kwargs


def _split(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], local: Local) -> Emitted:
    """Sizes (a number, or one per part) of the parts of a dim."""
    dim = _get(args, kwargs, 2, "dim", 0) % len(local.rule.operands[0])
    parts = [local.shape(r)[dim] for r in local.rule.results]
    if local.name in ("aten.chunk", "aten.unsafe_chunk"):
        return target, args, kwargs  # parts that can be split are equal, so their number says it all
    name = "split_size" if "with_sizes" not in local.name else "split_sizes"
    asked = _get(args, kwargs, 1, name)
    return target, *_put(args, kwargs, 1, name, parts[0] if isinstance(asked, int) else parts)


def _tensor_split(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], local: Local) -> Emitted:
    dims = local.rule.operands[0]
    dim = _get(args, kwargs, 2, "dim", 0) % len(dims)
    asked = _get(args, kwargs, 1, "indices")
    if asked is None or isinstance(asked, int):
        return target, args, kwargs
    return target, *_put(args, kwargs, 1, "indices", [local.scale(dims, dim, i) for i in asked])


def _slice(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], local: Local) -> Emitted:
    """Bounds in blocks: a split of the minor factor scales start and end alike."""
    at = 2 if local.name == "aten.slice_scatter" else 1
    dims = local.rule.operands[0]
    dim = _get(args, kwargs, at, "dim", 0) % len(dims)
    if not any(local.sizes[c] != local.rule.sizes[c] for c in dims[dim]):
        return target, args, kwargs
    whole = math.prod(local.rule.sizes[c] for c in dims[dim])
    start, stop, _ = slice(_get(args, kwargs, at + 1, "start"), _get(args, kwargs, at + 2, "end")).indices(whole)
    args, kwargs = _put(args, kwargs, at + 1, "start", local.scale(dims, dim, start))
    return target, *_put(args, kwargs, at + 2, "end", local.scale(dims, dim, stop))


def _narrow(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], local: Local) -> Emitted:
    dims = local.rule.operands[0]
    dim = _get(args, kwargs, 1, "dim") % len(dims)
    for position, name in ((2, "start"), (3, "length")):
        value = local.scale(dims, dim, _get(args, kwargs, position, name))
        args, kwargs = _put(args, kwargs, position, name, value)
    return target, args, kwargs


def _mean(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], local: Local) -> Emitted:
    """A mean over split dims: each rank sums its elements and divides by the global count."""
    kept = {c for members in local.rule.results[0] for c in members}
    gone = [c for members in local.rule.operands[0] for c in members if c not in kept]
    if all(local.sizes[c] == local.rule.sizes[c] for c in gone):
        return target, args, kwargs
    asked = _get(args, kwargs, 1, "dim")
    dims = None if asked is None else [asked] if isinstance(asked, int) else list(asked)
    count = math.prod(local.rule.sizes[c] for c in gone)
    dtype = {"dtype": kwargs["dtype"]} if kwargs.get("dtype") is not None else {}
    return split_mean, (args[0], dims or None, bool(_get(args, kwargs, 2, "keepdim", False)), count), dtype


def _groups(position: int) -> Handler:
    """The number of groups is the local size of the group letter."""

    def handler(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], local: Local) -> Emitted:
        if "g" not in local.sizes:
            return target, args, kwargs
        name = "num_groups" if local.name == "aten.group_norm" else "groups"
        return target, *_put(args, kwargs, position, name, local.sizes["g"])

    return handler


def _native_group_norm(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], local: Local) -> Emitted:
    shape = local.shape(local.rule.operands[0])
    values = {"N": shape[0], "C": shape[1], "HxW": math.prod(shape[2:]), "group": local.sizes.get("g", 1)}
    for position, (name, value) in enumerate(values.items(), start=3):
        args, kwargs = _put(args, kwargs, position, name, value)
    return target, args, kwargs


_SIZE = _result_size(0, "size")
_HANDLERS: Mapping[str, Handler] = {
    **dict.fromkeys(("view", "_unsafe_view", "view_copy"), _result_size(1, "size")),
    **dict.fromkeys(("reshape",), _result_size(1, "shape")),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty", "broadcast_to"), _result_size(1, "size")),
    **dict.fromkeys(("zeros", "ones", "full", "empty", "empty_permuted", "rand", "randn"), _SIZE),
    **dict.fromkeys(("expand", "expand_copy"), _expand),
    **dict.fromkeys(("squeeze", "squeeze_copy"), _squeeze),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    **dict.fromkeys(
        ("split", "split_with_sizes", "chunk", "split_copy", "split_with_sizes_copy", "unsafe_split", "unsafe_chunk",
         "unsafe_split_with_sizes"), _split,
    ),
    **dict.fromkeys(("slice", "slice_copy", "slice_scatter"), _slice),
    **dict.fromkeys(("narrow", "narrow_copy"), _narrow),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _groups(6)),
    "unflatten": _unflatten,
    "repeat_interleave": _repeat_interleave,
    "tensor_split": _tensor_split,
    "convolution": _groups(8),
    rule_made.CONV: _groups(rule_made.GROUPS),
    "group_norm": _groups(1),
    "native_group_norm": _native_group_norm,
    "mean": _mean,
}  # fmt: skip
