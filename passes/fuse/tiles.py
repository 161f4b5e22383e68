"""`shardwright::patched`: a chain of local ops on an image, computed tile by tile of its result. One op.

    y = program(x, given)       x [n, c, h, w] -> y [n, c', h', w']; `program` and `grid` as in planner/patches.py

A tile of the result is made from the part of the image that it needs, halo included; padding is made on the image's own borders
only, so that every tile sees what the whole image would show it. No tile's intermediate values outlive the tile (Lin et al. 2021,
"MCUNetV2"). The op is composite over an autograd function which keeps image and given tensors alone: its backward makes every tile
again, one at a time (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", with tiles in the place of segments).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...planner.patches import PADS, Layout, Line, Ref, Span, Tile, last_uses, layout, tiles

_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")
aten = torch.ops.aten


def run_tile(plan: Layout, tile: Tile, image: Tensor, given: Sequence[Tensor]) -> Tensor:
    """One tile of the result from its part of the image."""
    program, last = plan.program, last_uses(plan.program)
    values: dict[int, Tensor] = {0: image, **{i + 1: x for i, x in enumerate(given)}}
    for i, line in enumerate(program.lines):
        operands = []
        refs = list(line.refs)
        for place, ref in enumerate(refs):
            ends = last[ref] == i and ref not in refs[place + 1 :]
            operands.append(_seen(plan, tile, i, ref, values.pop(ref) if ends else values[ref]))
        result = _run(line, operands)
        operands.clear()
        values[program.result(i)] = result
        del result
    return values.popitem()[1]


def _seen(plan: Layout, tile: Tile, line: int, value: int, x: Tensor) -> Tensor:
    """What a line reads of a value: the part that it needs, and padding where that lies beyond the borders."""
    if not plan.program.tiled(value):
        return x
    made, pads, sides = plan.program.result(line), [0, 0, 0, 0], []
    for axis, spans in enumerate(tile):
        lo, hi = plan.windows[line][axis].reads_one(spans[made])
        n, start = plan.shapes[value][1 + axis], spans[value][0]
        first = min(max(lo, 0), n)
        end = max(min(hi, n), first)  # nothing where all of it lies beyond
        before = max(0, min(hi, 0) - lo)
        sides.append((first - start, end - start))
        pads[2 - 2 * axis : 4 - 2 * axis] = before, hi - lo - (end - first) - before
    (a, b), (c, d) = sides
    if (a, b, c, d) != (0, x.shape[2], 0, x.shape[3]):
        x = x[:, :, a:b, c:d]
    op = plan.program.lines[line]
    if op.op in PADS:
        return aten.constant_pad_nd.default(x, [*pads, *op.args[1][4:]], _fill(op))
    return aten.constant_pad_nd.default(x, pads, _fill(op)) if any(pads) else x


def _fill(line: Line) -> float:
    """What an op takes to stand beyond the borders."""
    if line.op in PADS:
        value = line.args[3 if line.op == "pad.default" else 2]
        return 0.0 if value is None else float(value)
    return float("-inf") if line.op.startswith("max_pool") else 0.0


def _run(line: Line, operands: Sequence[Tensor]) -> Tensor:
    """A line on what it reads; padding is there already."""
    if line.op in PADS:
        return operands[0]
    own = iter(operands)
    args = [_filled(a, own) for a in line.args]
    kwargs = {k: _filled(v, own) for k, v in line.kwargs.items()}
    special = UNPADDED.get(line.op)
    if special is not None:
        target, replaced = special
        return target(*[replaced.get(i, a) for i, a in enumerate(args)], **kwargs)  # type: ignore[no-any-return]
    packet, _, overload = line.op.partition(".")
    return getattr(getattr(aten, packet), overload)(*args, **kwargs)  # type: ignore[no-any-return]


def _filled(arg: Any, own: Any) -> Any:
    if isinstance(arg, Ref):
        return next(own)
    return [_filled(a, own) for a in arg] if isinstance(arg, list) else arg


UNPADDED: Mapping[str, tuple[Callable[..., Tensor], Mapping[int, Any]]] = {
    "conv2d.default": (aten.conv2d.default, {4: [0, 0]}),
    "conv2d.padding": (aten.conv2d.default, {4: [0, 0]}),
    "max_pool2d.default": (aten.max_pool2d.default, {3: [0, 0], 5: False}),
    "avg_pool2d.default": (aten.avg_pool2d.default, {3: [0, 0]}),
}
"""Ops that pad: what runs where the padding is there, and the arguments that say so."""


def _plan(x: Tensor, given: Sequence[Tensor], program: str) -> Layout:
    return layout(program, tuple(x.shape[1:]), tuple(tuple(g.shape) for g in given))


def _part(x: Tensor, rows: Span, columns: Span) -> Tensor:
    return x[:, :, rows[0] : rows[1], columns[0] : columns[1]]


class _Patched(torch.autograd.Function):
    """Forward without a trace; backward tile by tile."""

    @staticmethod
    def forward(ctx, program, grid, x, *given):  # type: ignore[no-untyped-def,override]
        plan = _plan(x, given, program)
        found = x.new_empty(x.shape[0], *plan.out)
        for rows, columns in tiles(plan, grid):
            made = _part(found, *(max(spans.items())[1] for spans in (rows, columns)))
            made.copy_(run_tile(plan, (rows, columns), _part(x, rows[0], columns[0]), given))
        ctx.save_for_backward(x, *given)
        ctx.home = program, grid
        return found

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        x, *given = ctx.saved_tensors
        program, grid = ctx.home
        plan, needed = _plan(x, given, program), ctx.needs_input_grad[2:]
        totals = [torch.zeros_like(t) if need else None for t, need in zip((x, *given), needed, strict=True)]
        for rows, columns in tiles(plan, grid):
            came = _part(grad, *(max(spans.items())[1] for spans in (rows, columns)))
            found = _tile_gradients(plan, (rows, columns), [x, *given], needed, came)
            for i, (total, own) in enumerate(zip(totals, found, strict=True)):
                if total is not None and own is not None:
                    (_part(total, rows[0], columns[0]) if i == 0 else total).add_(own)
            del found
        return None, None, *totals


def _tile_gradients(
    plan: Layout, tile: Tile, operands: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of the image's part and of what is given through one tile; None for what needs none or is not read."""
    part = _part(operands[0], tile[0][0], tile[1][0])
    leaves = [t.detach().requires_grad_(need) for t, need in zip((part, *operands[1:]), needed, strict=True)]
    with torch.enable_grad():
        made = run_tile(plan, tile, leaves[0], leaves[1:])
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(torch.autograd.grad(made, wanted, grad, allow_unused=True))
    return [next(found) if leaf.requires_grad else None for leaf in leaves]


def _patched(x: Tensor, given: list[Tensor], program: str, grid: Sequence[int]) -> Tensor:
    rows, columns = grid
    return _Patched.apply(program, (rows, columns), x, *given)  # type: ignore[no-untyped-call, no-any-return]


_LIBRARY.define("patched(Tensor x, Tensor[] given, str program, int[2] grid) -> Tensor")
_LIBRARY.impl("patched", _patched, "CompositeImplicitAutograd")

patched = torch.ops.shardwright.patched.default
