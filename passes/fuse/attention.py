"""Attention written out becomes `scaled_dot_product_attention`.

    s = add(mul(matmul(q, transpose(k, -1, -2)), scale), mask)
    p = dropout(to(softmax(s, -1, float32), bfloat16), 0.1)           becomes      y = sdpa(q, k, v, mask, 0.1, scale=scale)
    y = matmul(p, v)

Dao et al. 2022, "FlashAttention": one kernel never writes the scores, [.., s, t], which the chain keeps several times. Products may
be `matmul` or `bmm`, with reshapes and casts where models put them; the scale may stand on either side, on q or on k; there may be
up to three masks, added or filled in (blocking.py). Masks that are causal then go (passes/masks.py).

Left alone: what else is done to scores (soft capping), other dims, weights that somebody else reads, tensors of unlike dtypes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..base import Contract, Program, fake
from ..cleanup.sweep import Sweep
from ..masks import Judge, RecogniseMasks
from ..pattern import Any_, Match, Number, Pattern, call, either, target_of
from ..rewrite import Make, Rewriting, Row
from ..torch_compat import mode_of
from .blocking import DEPTH, Blocking

aten = torch.ops.aten
QUERY, KEY, TURNED, VALUE = Any_("query"), Any_("key"), Any_("turned"), Any_("value")


def _cast(inner: Pattern, name: str) -> Pattern:
    """`inner`, with a cast or without."""
    return either(call("aten.to", inner, name=name, open=True), inner)


def _shaped(inner: Pattern) -> Pattern:
    """`inner`, reshaped or not."""
    return either(call("aten.reshape", inner, open=True), inner)


def _scaled(inner: Pattern, name: str) -> Pattern:
    """`inner`, multiplied or divided by a number or not."""
    by = Number(f"{name} over")
    return either(
        call("aten.mul", inner, Number(f"{name} times")),
        call("aten.div", inner, either(by, call("aten.full", [], by, open=True))),
        inner,
    )


def _product(left: Pattern, right: Pattern) -> Pattern:
    return either(call("aten.matmul", left, right), call("aten.bmm", left, right))


def _turned() -> Pattern:
    """The key with its last two dims exchanged, which may be how it came."""
    key = _scaled(_cast(KEY, "key wide"), "key")
    turned = call("aten.transpose", key, Number("one"), Number("other"))
    return either(turned, _scaled(_cast(call("aten.transpose", KEY, Number("one"), Number("other")), "key wide"), "key"),
                  _cast(TURNED, "key wide"))  # fmt: skip


def _masked(inner: Pattern, index: int) -> Pattern:
    """`inner` with something added, or filled with a number, or as it is."""
    number, name = Number(f"fill {index}"), f"masked {index}"
    fill = either(number, call("aten.full", [], number, open=True))
    return either(
        call("aten.add", inner, Any_(f"added {index}"), name=name),
        call("aten.where", Any_(f"allowed {index}"), inner, fill, name=name),
        call("aten.masked_fill", inner, Any_(f"forbidden {index}"), fill, name=name),
        inner,
    )


def _weights() -> Pattern:
    """Softmax of the scores, masked."""
    query = _scaled(_cast(QUERY, "query wide"), "query")
    scores = _cast(_shaped(_scaled(_shaped(_product(query, _turned())), "scores")), "scores wide")
    for index in range(DEPTH):
        scores = _masked(scores, index)
    soft = call("aten.softmax", _cast(_shaped(scores), "masked wide"), Number("dim"), open=True, name="soft")
    low = _cast(soft, "low")
    return _shaped(_cast(either(call("aten.dropout", low, Number("p"), True), low), "lower"))


_PATTERN = _product(_weights(), VALUE)


@dataclass(frozen=True)
class FuseAttention(Contract):
    """One attention call for its parts, and is_causal for its causal masks."""

    name: str = "attention"
    requires: tuple[str, ...] = ("simple",)
    provides: tuple[str, ...] = ("masks recognised",)

    def apply(self, program: Program) -> Program:
        judge, before = Judge(program), set(program.graph.nodes)
        row = Row(_PATTERN, lambda match, make: _attention(match, make, judge, program.constants))
        program = Rewriting(table=(row,)).apply(program)
        if set(program.graph.nodes) == before:
            return program
        program = Sweep().apply(RecogniseMasks().apply(Sweep().apply(program)))
        _drop_constants(program)
        refresh([n for n in program.graph.nodes if n not in before])
        return program


def _drop_constants(program: Program) -> None:
    """Masks that were constants go with their last user."""
    for node in program.graph.find_nodes(op="placeholder"):
        if node.meta["role"] == "constant" and not node.users:
            program.constants.pop(node.name, None)
            program.graph.erase_node(node)


def refresh(nodes: Sequence[fx.Node]) -> None:
    """Let what follows from `nodes` have the strides that theirs lead to: attention lays its result out in its own way."""
    queue = [user for node in nodes for user in node.users]
    while queue:
        node = queue.pop(0)
        was = node.meta.get("val")
        if node.op != "call_function" or not isinstance(was, Tensor) or node.target is operator.getitem:
            continue
        with mode_of(was), torch.no_grad():
            made = node.target(*fx.map_arg(node.args, fake), **fx.map_arg(node.kwargs, fake))  # type: ignore[operator]
        if made.stride() != was.stride():
            node.meta["val"] = made
            queue.extend(node.users)


def _attention(match: Match, make: Make, judge: Judge, constants: Mapping[str, Tensor]) -> fx.Node | None:
    query, value = match["query"], match["value"]
    dtype, out, rows = fake(query).dtype, fake(match.root), fake(match["soft"])
    if match["dim"] % rows.dim() != rows.dim() - 1 or not _widens(match, dtype):
        return None
    key, lead = match.get("key") or match["turned"], _lead(match)
    if lead is None or not _turns(match) or {fake(n).dtype for n in (key, value)} != {dtype} or out.dtype != dtype:
        return None
    if not all(_spreads(fake(n).shape[:-2], lead) for n in (query, key, value)):
        return None
    blocked = Blocking(judge, constants, dtype).of(match, make)
    if blocked is None:
        return None
    mask = None if blocked.mask is None else _mask(blocked.mask, lead, make)
    heads = [_four(n, lead, make) for n in (query, _key(match, make), value)]
    found = make(aten.scaled_dot_product_attention.default, *heads, mask, float(match.get("p", 0.0)), blocked.causal,
                 scale=_scale(match))  # fmt: skip
    return found if fake(found).shape == out.shape else make(aten.reshape.default, found, list(out.shape))


def _widens(match: Match, dtype: torch.dtype) -> bool:
    """Whether nothing between was done in a narrower dtype than attention would."""
    casts = [fake(n).dtype for n in match.nodes if target_of(n) == "aten.to"]
    return dtype.is_floating_point and all(
        torch.promote_types(d, dtype) == d for d in (*casts, fake(match["soft"]).dtype)
    )


def _turns(match: Match) -> bool:
    """Whether the dims of the key that are exchanged are its last two."""
    rank = fake(match["query"]).dim()
    return "one" not in match.bound or {match["one"] % rank, match["other"] % rank} == {rank - 2, rank - 1}


def _scale(match: Match) -> float:
    sides = ("query", "key", "scores")
    times = math.prod(float(match.get(f"{side} times", 1.0)) for side in sides)
    return times / math.prod(float(match.get(f"{side} over", 1.0)) for side in sides)


def _lead(match: Match) -> tuple[int, int] | None:
    """Batch and heads of the call: those of a shape between that has four dims, or of what the query was reshaped from."""
    query = match["query"]
    masked = [match[name] for name in match.bound if name.startswith("masked ") and name != "masked wide"]
    between = [fake(n).shape for n in (match.root, match["soft"], *masked)]
    if target_of(query) == "aten.reshape" and fake(query.args[0]).shape[-2:] == fake(query).shape[-2:]:
        between.append(fake(query.args[0]).shape)
    wide = next((s for s in between if len(s) == 4), None)
    if wide is not None:
        return wide[0], wide[1]
    return (fake(match.root).shape[0], 1) if fake(match.root).dim() == 3 else None


def _spreads(have: torch.Size, lead: tuple[int, int]) -> bool:
    """Whether leading dims are `lead`, merged or broadcast."""
    if len(have) == 1:
        return have[0] == lead[0] * lead[1]
    return len(have) == 2 and all(n in (1, m) for n, m in zip(have, lead, strict=True))


def _four(node: fx.Node, lead: tuple[int, int], make: Make) -> fx.Node:
    """With batch and heads as dims of their own."""
    shape = [*lead, *fake(node).shape[-2:]]
    if list(fake(node).shape) == shape:
        return node
    if fake(node).dim() == 4:
        return make(aten.expand.default, node, shape)
    source = node.args[0] if target_of(node) == "aten.reshape" else node
    assert isinstance(source, fx.Node)
    return source if list(fake(source).shape) == shape else make(aten.reshape.default, source, shape)


def _key(match: Match, make: Make) -> fx.Node:
    """The key with its positions before its width, as it was or turned back."""
    return match.get("key") or make(aten.transpose.int, match["turned"], -2, -1)


def _mask(mask: fx.Node, lead: tuple[int, int], make: Make) -> fx.Node:
    """A mask with two or four dims, which fused kernels take."""
    shape = list(fake(mask).shape)
    if len(shape) in (2, 4):
        return mask
    first = list(lead) if len(shape) == 3 and shape[0] == lead[0] * lead[1] else [1, *shape[:-2]]
    return make(
        aten.reshape.default, mask, [*first, *shape[-2:]] if len(shape) == 3 else [1] * (2 - len(shape)) + shape
    )
