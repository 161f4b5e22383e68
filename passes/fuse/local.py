"""Which calls of a graph are local in the positions of an image, and a chain of them written as a program (planner/patches.py).

A call is local where every position of its result needs a window of positions of its operands and nothing else: convolutions,
pooling, padding, elementwise functions, norms by running statistics, and channels put together. Whatever it reads besides must be
the same for all positions: a weight, a statistic, a constant.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ...planner.patches import PADS
from ..base import fake, is_tensor
from ..torch_compat import OpOverload, arguments, full_name, overload_name

Inside = Callable[[fx.Node], bool]
"""Whether a node is part of the image's chain."""


def op_name(node: fx.Node) -> str:
    """ "conv2d.default" of a call of an aten op, "" for anything else."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return ""
    space, _, name = full_name(node.target).partition("::")
    return f"{name}.{overload_name(node.target)}" if space == "aten" else ""


def arguments_of(node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    """All arguments of a call in the order of its schema, defaults included; those by name alone apart."""
    args, kwargs = [], {}
    for i, argument in enumerate(arguments(node.target)):  # type: ignore[arg-type]
        default = argument.default_value if argument.has_default_value() else None
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, default)
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return args, kwargs


def is_image(node: fx.Node) -> bool:
    """Whether a node is [n, c, h, w] of floats."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() == 4 and value.is_floating_point() and 0 not in value.shape


def is_local(node: fx.Node, inside: Inside) -> bool:
    """Whether a call goes on with the chain whose nodes (the image included) are `inside`."""
    name = op_name(node)
    if not name or not is_image(node):
        return False
    args, kwargs = arguments_of(node)
    tensors = [n for n in _nodes((args, kwargs)) if is_tensor(fake(n))]
    chain = [n for n in tensors if inside(n)]
    if not chain or not _writable((args, kwargs)):
        return False
    here = fake(node)
    if any(fake(n).dtype != here.dtype or fake(n).device != here.device for n in chain):
        return False
    check = CHECKS.get(name)
    if check is not None:
        return check(args, inside)
    tags = node.target.tags  # type: ignore[union-attr]
    if torch.Tag.pointwise not in tags or torch.Tag.nondeterministic_seeded in tags:
        return False
    return all(fake(n).shape[2:] == here.shape[2:] if inside(n) else _is_point(fake(n)) for n in tensors)


def _is_point(value: torch.Tensor) -> bool:
    """Whether a tensor has no positions and no samples when it is broadcast against [n, c, h, w]."""
    shape = (1,) * (4 - value.dim()) + tuple(value.shape)
    return len(shape) == 4 and shape[0] == shape[2] == shape[3] == 1


def _first(args: Sequence[Any], inside: Inside) -> bool:
    """The chain comes in as the first operand, and nowhere else."""
    return inside(args[0]) and not any(inside(n) for n in _nodes(args[1:]))


def _conv(args: Sequence[Any], inside: Inside) -> bool:
    return _first(args, inside) and fake(args[1]).dim() == 4


def _norm(args: Sequence[Any], inside: Inside) -> bool:
    """batch_norm(x, weight, bias, mean, variance, training, ..): with running statistics only."""
    return _first(args, inside) and args[3] is not None and args[4] is not None and not args[5]


def _average(args: Sequence[Any], inside: Inside) -> bool:
    """avg_pool2d(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor): every window divided by the same number."""
    return _first(args, inside) and not args[4] and (bool(args[5]) or args[6] is not None or not any(_list(args[3])))


def _pad(args: Sequence[Any], inside: Inside) -> bool:
    """pad(x, sizes, mode, value): with a constant, channels and positions, in pairs."""
    constant = not isinstance(args[2], str) or args[2] == "constant"
    return _first(args, inside) and constant and len(args[1]) in (2, 4, 6)


def _cat(args: Sequence[Any], inside: Inside) -> bool:
    """cat(tensors, dim): along channels, all of them the chain's."""
    alike = len({fake(n).shape[2:] for n in args[0]}) == 1
    return args[1] in (1, -3) and all(inside(n) for n in args[0]) and alike


def _list(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


CHECKS: Mapping[str, Callable[[Sequence[Any], Inside], bool]] = {
    "conv2d.default": _conv,
    "conv2d.padding": _conv,
    "batch_norm.default": _norm,
    "prelu.default": _first,
    "max_pool2d.default": _first,
    "avg_pool2d.default": _average,
    "cat.default": _cat,
    **dict.fromkeys(PADS, _pad),
}
"""Local ops that are not elementwise, by what their arguments must be."""


def _nodes(args: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(args, lambda n: found.append(n))
    return found


def _writable(args: Any) -> bool:
    """Whether all arguments that are no tensors can stand in a program."""
    if isinstance(args, list | tuple | fx.immutable_collections.immutable_list):
        return all(_writable(a) for a in args)
    if isinstance(args, Mapping):
        return all(_writable(a) for a in args.values())
    return args is None or isinstance(args, fx.Node | bool | int | float | str)


def written(image: fx.Node, chain: Sequence[fx.Node]) -> tuple[str, list[fx.Node]]:
    """The program of a chain of local calls that ends with its last, and the tensors to give it besides the image."""
    own = {image, *chain}
    given = list(dict.fromkeys(n for node in chain for n in node.all_input_nodes if n not in own))
    number = {node: f"%{i}" for i, node in enumerate((image, *given, *chain))}
    lines = []
    for node in chain:
        args, kwargs = fx.map_arg(arguments_of(node), number.__getitem__)
        lines.append([op_name(node), *args, *([kwargs] if kwargs else [])])
    return f"{len(given)}|{json.dumps(lines, separators=(',', ':'))}", given
