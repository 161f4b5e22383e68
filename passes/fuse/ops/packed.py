"""`shardwright::packed`: ops that look at one position at a time, computed on the rows of valid positions alone. One op.

    rows [b, s, ..] --> those where the mask [b, s] is valid: [t, 1, ..] --> the program (planner/rule_packed.py)
                    --> zeros [b, s, ..] with the results where they belong

With lengths l_i in a batch padded to s, t = sum(l_i): products cost t / (b s) of what they cost on all rows (EnergonAI, Du et al.
2022, "distributed redundant computation elimination"). Packed rows keep the rank of what they were packed from, so that every
argument that names a dim still holds. Shapes outside are static; how many rows there are inside is known when the op runs, which
on a GPU waits for the device. A batch without any valid position is computed on one row.

Eagerly the op is composite over the program's own ops: each keeps for its backward pass what it always keeps, of packed rows. A
compiler, which would guess at sizes that depend on data, sees two closed ops with static shapes: the first keeps what went in, the
second makes the inside again for its gradients (Chen et al. 2016), a third more products than eagerly.

Under a seed (passes/random.py) what drops inside draws from `mix(salt, line)`; `dropping` is what its probabilities are
multiplied with: 0.0 makes nothing random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ....errors import UsageError
from ....planner.rule_packed import DROPS, Line, Ref, drops, parse
from ...random import dropout, mix
from ...torch_compat import has_shapes, is_tracing

_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")
aten = torch.ops.aten


@torch.library.custom_op("shardwright::valid_rows", mutates_args=())
def valid_rows(mask: Tensor, zero: bool, share: float) -> Tensor:
    """The positions of a flattened mask that are not zero (with `zero` those that are), ascending: int64 [t].

    The first position where there are none: not every op takes empty tensors.
    """
    valid = mask == 0 if zero else mask != 0
    found = valid.reshape(-1).nonzero().squeeze(1)
    return found if found.numel() else found.new_zeros(1)


@valid_rows.register_fake
def _(mask: Tensor, zero: bool, share: float) -> Tensor:
    # Whoever observes the op without data (what it saves, say) sees the share of rows that is expected.
    return mask.new_empty([max(round(share * mask.numel()), 1)], dtype=torch.int64)


class _Gather(torch.autograd.Function):
    """Rows of a tensor [n, ..] by distinct positions [t]."""

    @staticmethod
    def forward(ctx, x, index):  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(index)
        ctx.count = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        (index,) = ctx.saved_tensors
        return _scattered(grad, index, ctx.count), None


class _Scatter(torch.autograd.Function):
    """Rows [t, ..] at distinct positions of zeros [n, ..]."""

    @staticmethod
    def forward(ctx, rows, index, count):  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(index)
        return _scattered(rows, index, count)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None, None


def _scattered(rows: Tensor, index: Tensor, count: int) -> Tensor:
    return rows.new_zeros(count, *rows.shape[1:]).index_copy(0, index, rows)


def _packed(
    mask: Tensor, rows: Sequence[Tensor], given: Sequence[Tensor], program: str, dropping: float = 1.0,
    seed: Tensor | None = None, salt: int = 0,
) -> list[Tensor]:  # fmt: skip
    if is_tracing() and has_shapes(mask):
        return closed_packed(mask, list(rows), list(given), program, dropping, seed, salt)
    return _opened(mask, rows, given, program, dropping, seed, salt)


def _opened(
    mask: Tensor, rows: Sequence[Tensor], given: Sequence[Tensor], program: str, dropping: float, seed: Tensor | None,
    salt: int, index: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """The op by the program's own ops; `index` are the positions, where not those that the mask says."""
    inside = parse(program)
    index = valid_rows(mask, inside.zero, inside.share) if index is None else index
    values = [_rows(x, lead, index) for x, lead in zip(rows, inside.leads, strict=True)]
    values += given
    for i, line in enumerate(inside.lines):
        values.append(_run(line, values, dropping, seed, mix(salt, i)))
    return [_whole(values[value], lead, index, mask) for value, lead in inside.out]


def _rows(x: Tensor, lead: int, index: Tensor) -> Tensor:
    """[b, s, ..] -> [t, 1, ..]; [b s, ..] -> [t, ..]."""
    found = _Gather.apply(x.flatten(0, 1) if lead == 2 else x, index)
    return found.unsqueeze(1) if lead == 2 else found  # type: ignore[no-any-return]


def _whole(rows: Tensor, lead: int, index: Tensor, mask: Tensor) -> Tensor:
    """[t, 1, ..] -> [b, s, ..]; [t, ..] -> [b s, ..]."""
    found = _Scatter.apply(rows.squeeze(1) if lead == 2 else rows, index, mask.numel())
    return found.unflatten(0, mask.shape) if lead == 2 else found  # type: ignore[no-any-return]


def _run(line: Line, values: Sequence[Tensor], dropping: float, seed: Tensor | None, salt: int) -> Any:
    args = [_filled(a, values) for a in line.args]
    if line.drops:
        p, train = DROPS[line.op]
        args[p] *= dropping
        if seed is not None and args[p]:
            return dropout(args[0], args[p], seed, salt)
        args[train] = bool(args[p])
    special = SPECIAL.get(line.op)
    if special is not None:
        return special(*args)
    space, packet, overload = line.op.split(".")
    kwargs = {k: _filled(v, values) for k, v in line.kwargs.items()}
    return getattr(getattr(getattr(torch.ops, space), packet), overload)(*args, **kwargs)


def _filled(arg: Any, values: Sequence[Tensor]) -> Any:
    if isinstance(arg, Ref):
        return values[arg.index]
    return [_filled(a, values) for a in arg] if isinstance(arg, list) else arg


def _shaped(x: Tensor, lead: int, rest: Sequence[int]) -> Tensor:
    """A reshape of what stands at each position."""
    return x.reshape(x.shape[0], *((1,) if lead == 2 else ()), *rest)


SPECIAL: Mapping[str, Callable[..., Tensor]] = {"rows.reshape": _shaped}
"""Lines that are no calls of an op."""


@torch.library.custom_op("shardwright::closed_packed", mutates_args=())
def closed_packed(
    mask: Tensor, rows: list[Tensor], given: list[Tensor], program: str, dropping: float, seed: Tensor | None, salt: int
) -> list[Tensor]:
    """`packed` as a compiler sees it. Raises UsageError where it draws random numbers without a seed to draw them twice."""
    if seed is None and dropping and drops(program):
        raise UsageError(
            "shardwright::packed makes its inside again for gradients: with dropout in it, compiled, it needs a seed"
        )
    with torch.no_grad():
        return _opened(mask, rows, given, program, dropping, seed, salt)


@torch.library.custom_op("shardwright::closed_packed_backward", mutates_args=())
def closed_packed_backward(
    mask: Tensor, rows: list[Tensor], given: list[Tensor], program: str, dropping: float, seed: Tensor | None, salt: int,
    grads: list[Tensor], needed: list[int],
) -> list[Tensor]:  # fmt: skip
    """Gradients of the rows and given tensors with the numbers `needed`."""

    def again() -> list[Tensor]:
        leaves = [x.detach().requires_grad_(i in needed) for i, x in enumerate((*rows, *given))]
        made = _opened(mask, leaves[: len(rows)], leaves[len(rows) :], program, dropping, seed, salt)
        ways = [(y, g) for y, g in zip(made, grads, strict=True) if y.requires_grad]
        wanted = [leaves[i] for i in needed]
        found = torch.autograd.grad([y for y, _ in ways], wanted, [g for _, g in ways], allow_unused=True)
        return [torch.zeros_like(x) if g is None else g.clone() for x, g in zip(wanted, found, strict=True)]

    return _apart(again, mask.device)


def _apart(run: Callable[[], list[Tensor]], device: torch.device) -> list[Tensor]:
    """What `run` returns in a thread of its own, on this one's stream: inside an op, autograd records nothing on its thread."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def own() -> list[Tensor]:
        with torch.cuda.stream(stream), torch.enable_grad():
            return run()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(own).result()


@closed_packed.register_fake
def _(mask, rows, given, program, dropping, seed, salt):  # type: ignore[no-untyped-def]
    return [
        x.contiguous()
        for x in _opened(mask, rows, given, program, 0.0, None, 0, mask.new_empty([mask.numel()], dtype=torch.int64))
    ]


@closed_packed_backward.register_fake
def _(mask, rows, given, program, dropping, seed, salt, grads, needed):  # type: ignore[no-untyped-def]
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) for i, x in enumerate((*rows, *given)) if i in needed
    ]


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    mask, rows, given, program, dropping, seed, salt = inputs
    ctx.save_for_backward(mask, seed, *rows, *given)
    ctx.home = len(rows), program, dropping, salt


def _back(ctx, grads):  # type: ignore[no-untyped-def]
    mask, seed, *tensors = ctx.saved_tensors
    count, program, dropping, salt = ctx.home
    flags = [*ctx.needs_input_grad[1], *ctx.needs_input_grad[2]]
    needed = [i for i, flag in enumerate(flags) if flag]
    sides = tensors[:count], tensors[count:]
    found = closed_packed_backward(mask, *sides, program, dropping, seed, salt, [g.contiguous() for g in grads], needed)
    own = dict(zip(needed, found, strict=True))
    every = [own.get(i) for i in range(len(tensors))]
    return None, every[:count], every[count:], None, None, None, None


closed_packed.register_autograd(_back, setup_context=_keep)

_LIBRARY.define(
    "packed(Tensor mask, Tensor[] rows, Tensor[] given, str program, float dropping=1.0, Tensor? seed=None, int salt=0) "
    "-> Tensor[]"
)
_LIBRARY.impl("packed", _packed, "CompositeImplicitAutograd")

packed = torch.ops.shardwright.packed.default
