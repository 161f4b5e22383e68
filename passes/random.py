"""Random ops under a given seed: equal numbers where a tensor is replicated, different ones where it is split.

Every random op of a lowered graph draws from a generator seeded by `mix(seed, salt)`: the seed tensor changes with every call
and microbatch, the salt is a constant of (op, shard). Ranks that run the same piece share the salt, so their numbers are
equal; and the numbers depend on nothing else, so recomputing an op draws the same ones.

`shardwright::dropout` and `shardwright::attention` (attention with dropout) run eagerly and compiled: their only opaque part is
the op that draws a mask. Other random ops run under a reseeded default generator, eagerly only.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ..planner import rule_packed
from .lift import DRAWN
from .torch_compat import full_name, is_tracing

CallForm = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")
_MASK64 = (1 << 64) - 1

DROPPING = {
    **dict.fromkeys(
        ("aten.dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten.feature_alpha_dropout"), (1, "p")
    ),
    "aten.scaled_dot_product_attention": (4, "dropout_p"),
    rule_packed.TARGET: (4, "dropping"),
}
"""Position and name of the probability of ops that drop (of what probabilities inside are multiplied with)."""


def mix(seed: int, salt: int) -> int:
    """A 63-bit seed that depends on all bits of both (the finaliser of SplitMix64)."""
    z = (seed * 0x9E3779B97F4A7C15 + salt + 0x632BE59BD9B4E019) & _MASK64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & _MASK64
    return (z ^ (z >> 31)) >> 1


@contextlib.contextmanager
def seeded(device: torch.device, seed: Tensor, salt: int) -> Iterator[None]:
    """The default generator of `device` reseeded inside the block and put back after it."""
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        chosen = mix(int(seed.item()), salt)
        if device.type == "cuda":
            torch.cuda.manual_seed(chosen)
        else:
            torch.default_generator.manual_seed(chosen)
        yield


@torch.library.custom_op("shardwright::keep_mask", mutates_args=())
def keep_mask(like: Tensor, p: float, seed: Tensor, salt: int) -> Tensor:
    """A bool mask in the shape of `like`, False with probability p."""
    generator = torch.Generator(like.device).manual_seed(mix(int(seed.item()), salt))
    mask = torch.empty(like.shape, dtype=torch.bool, device=like.device)
    return mask.bernoulli_(1.0 - p, generator=generator)


@keep_mask.register_fake
def _(like: Tensor, p: float, seed: Tensor, salt: int) -> Tensor:
    return torch.empty(like.shape, dtype=torch.bool, device=like.device)


class _Dropout(torch.autograd.Function):
    """x * mask / (1 - p); saves the bool mask."""

    @staticmethod
    def forward(ctx, x, p, seed, salt):  # type: ignore[no-untyped-def,override]
        mask = keep_mask(x, p, seed, salt)
        ctx.save_for_backward(mask)
        ctx.scale = 1.0 / (1.0 - p) if p < 1 else 0.0
        return _kept(x, mask, ctx.scale)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        (mask,) = ctx.saved_tensors
        return _kept(grad, mask, ctx.scale), None, None, None


def _kept(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """x * mask * scale. Eagerly in one new tensor, from the mask's bytes: on a CPU a product with a bool tensor, like a cast of
    one, takes several times as long. A compiler fuses the plain form."""
    if is_tracing():
        return x * mask * scale
    return mask.view(torch.uint8).to(x.dtype).mul_(x).mul_(scale)  # the same roundings as above, in any dtype


def _dropout(x: Tensor, p: float, seed: Tensor, salt: int) -> Tensor:
    return _Dropout.apply(x, p, seed, salt)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    seed: Tensor,
    salt: int,
) -> Tensor:
    if query.device.type == "cuda" and not is_tracing():
        with seeded(query.device, seed, salt):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = (query * (scale or 1.0 / math.sqrt(query.shape[-1]))) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return _Dropout.apply(scores.softmax(-1), dropout_p, seed, salt) @ value


_LIBRARY.define("dropout(Tensor x, float p, Tensor seed, int salt) -> Tensor")
_LIBRARY.impl("dropout", _dropout, "CompositeImplicitAutograd")
_LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, bool is_causal, float? scale, "
    "bool enable_gqa, Tensor seed, int salt) -> Tensor"
)
_LIBRARY.impl("attention", _attention, "CompositeImplicitAutograd")

dropout = torch.ops.shardwright.dropout.default
attention = torch.ops.shardwright.attention.default
"""Attention with dropout. On CUDA, eagerly, torch's kernels under a reseeded generator; else the scores are materialised, as
torch itself does for dropout on a CPU."""


def seeded_op(
    target: Callable[..., Any], seed: Tensor, salt: int, device: torch.device, /, *args: Any, **kwargs: Any
) -> Any:
    """Any random op under the seed (eagerly; a compiler breaks the graph here). `args` and `kwargs` are its own."""
    with seeded(device, seed, salt):
        return target(*args, **kwargs)


def drawn(target: Callable[..., Tensor], /, *args: Any, **kwargs: Any) -> Tensor:
    """What verification takes for the numbers that an op draws."""
    return torch.full_like(target(*args, **kwargs), DRAWN)


def seeded_call(form: CallForm, salt: int, device: torch.device | None = None) -> Callable[[fx.Node], CallForm] | None:
    """How to call `form` given the node of the seed; None if it draws nothing (dropout off, an ordinary op).

    `device` is where the op runs; it matters for ops other than dropout and attention.
    """
    target, args, kwargs = form
    aten = torch.ops.aten
    if target in (aten.dropout.default, aten.native_dropout.default):
        x, p, train = (*args, *kwargs.values())[:3]
        if not train or p == 0:
            return None
        if target is aten.dropout.default:
            return lambda seed: (dropout, (x, p, seed, salt), {})
    if target is aten.scaled_dot_product_attention.default:
        return _attention_call(args, kwargs, salt)
    if _is_packed(target):
        if not rule_packed.drops(args[rule_packed.PROGRAM]):
            return None
        return lambda seed: (target, args, {**kwargs, "seed": seed, "salt": salt})
    if target is torch.ops.aten.feature_dropout.default and not (*args, *kwargs.values())[2]:
        return None
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags:
        where = device or torch.device("cpu")
        return lambda seed: (seeded_op, (target, seed, salt, where, *args), kwargs)
    return None


def own_form(form: CallForm, seed: Any) -> CallForm | None:
    """`form` as the op of this library that draws for it in a lowered graph, given `seed` as its seed; None where there is none.

    Profiles time what runs: such an op keeps a mask of its own, and its backward differs from torch's.
    """
    call = seeded_call(form, 0)
    found = call(seed) if call is not None else None
    return found if found is not None and (found[0] in (dropout, attention) or _is_packed(found[0])) else None


def _is_packed(target: Callable[..., Any]) -> bool:
    """Whether an op is shardwright::packed, which draws inside under a seed of its own (fuse/ops/packed.py)."""
    return isinstance(target, torch._ops.OpOverload) and full_name(target).replace("::", ".") == rule_packed.TARGET


def _attention_call(args: tuple[Any, ...], kwargs: dict[str, Any], salt: int) -> Callable[[fx.Node], CallForm] | None:
    given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
    if not given.get("dropout_p"):
        return None
    rest = (given.get("attn_mask"), given["dropout_p"], given.get("is_causal", False), given.get("scale"))
    heads = given["query"], given["key"], given["value"]
    return lambda seed: (attention, (*heads, *rest, given.get("enable_gqa", False), seed, salt), {})
