"""Experts split over the ranks of an axis that also splits the samples: tokens go to the ranks of their experts and back.

    y[t] = sum_j scale[t, j] * expert[index[t, j]](x[t])

Every rank has its own tokens and e / n of the experts. Slots (t, j) are sorted by expert and sent to the ranks that hold them,
in uneven numbers: first how many, then the rows and their weights; the outputs, weighted already, come back the same way and are
summed by token. So a rank works on every slot of its experts once, whatever the routing, and nothing is dropped. Per rank
and layer that is one all-to-all of e counts, two of weights (one backward), and four of rows: dispatch and combine, and their
gradients.

The work between is `shardwright::experts` on the rows that came (passes/experts/op.py), one slot each. Numbers of rows depend on
the data, so the op runs eagerly only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...passes.experts.op import experts
from .. import collectives
from ..passing import exchange

CallForm = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")


class _Exchange(torch.autograd.Function):
    """Rows to other ranks, `sent` and `received` of each; backward their gradients the other way."""

    @staticmethod
    def forward(ctx, x, sent, received, group):  # type: ignore[no-untyped-def,override]
        ctx.home = sent, received, group
        ctx.ledger = collectives.active_ledger()
        return exchange(x, sent, received, group)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        sent, received, group = ctx.home
        with collectives.backward_phase(ctx.ledger):
            return exchange(grad, received, sent, group), None, None, None


def routed(index: Tensor, experts_: int, ways: int, group: str) -> tuple[Tensor, list[int], list[int], Tensor]:
    """Who gets what: (slots in the order of their experts, rows sent to and received from each rank, local expert of each row).

    `index` [t, k] names one of all `experts_` experts per slot, of which rank r holds the r-th part. Exchanges the counts.
    """
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts_).view(ways, experts_ // ways)
    there = collectives.all_to_all(counts, ways, group)
    own = torch.arange(experts_ // ways, device=index.device).expand(ways, -1)
    local = own.reshape(-1).repeat_interleave(there.reshape(-1))
    sent, received = torch.stack([counts.sum(1), there.sum(1)]).tolist()
    return order, sent, received, local


def _dispatched(
    x: Tensor, index: Tensor, scale: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None,
    gate: str, transposed: bool, place: Sequence[int] = (), parts: Sequence[int] = (), shared: bool = True, ways: int = 1,
    group: str = "",
) -> Tensor:  # fmt: skip
    rest = up, down, up_bias, down_bias, gate, transposed, list(place), list(parts), shared
    if ways == 1:
        return experts(x, index, scale, *rest)  # type: ignore[no-any-return]
    here = up.shape[0]
    for n in parts:
        here *= n
    order, sent, received, local = routed(index, here * ways, ways, group)
    rows = _Exchange.apply(x.index_select(0, order // index.shape[1]), sent, received, group)
    weights = _Exchange.apply(scale.reshape(-1).index_select(0, order), sent, received, group)
    made = experts(rows, local.unsqueeze(1), weights.unsqueeze(1), *rest)
    back = _Exchange.apply(made, received, sent, group)
    return back.index_select(0, order.argsort()).view(*index.shape, x.shape[-1]).sum(1)


_LIBRARY.define(
    "dispatched_experts(Tensor x, Tensor index, Tensor scale, Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias, "
    "str gate, bool transposed, int[] place=[], int[] parts=[], bool shared=True, int ways=1, str group='') -> Tensor"
)
_LIBRARY.impl("dispatched_experts", _dispatched, "CompositeImplicitAutograd")

dispatched_experts = torch.ops.shardwright.dispatched_experts.default
"""`shardwright::experts` on this rank's tokens, `up` and `down` its part of the experts over `ways` ranks of `group`; `place` and
`parts` split that part further over other axes."""


def dispatch_form(form: CallForm, group: str, index: int, size: int) -> CallForm:
    """The op with its experts and its tokens split over an axis."""
    _, args, kwargs = form
    return dispatched_experts, args, {**kwargs, "ways": size, "group": group}
