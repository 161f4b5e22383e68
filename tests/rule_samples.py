"""Sample calls for every op with a rule: `SAMPLES[op]` are functions from a `Draw` to (overload, args, kwargs)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

A = torch.ops.aten
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Draw:
    """Random sizes and tensors for one sample."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.b, self.s, self.h, self.k, self.v = (self.size() for _ in range(5))

    def size(self) -> int:
        return self.random.choice((2, 4, 6))

    def x(self, *shape: int) -> torch.Tensor:
        """Normal float64 values, both signs."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def unit(self, *shape: int) -> torch.Tensor:
        """Values inside (0, 1)."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64) * 0.8 + 0.1

    def ids(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def mask(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator) < 0.6

    def labels(self, classes: int, *shape: int) -> torch.Tensor:
        """Class ids, some of them ignored."""
        ids = self.ids(classes, *shape)
        return torch.where(torch.rand(shape, generator=self.generator) < 0.3, torch.full_like(ids, -100), ids)


def grad(x: torch.Tensor) -> torch.Tensor:
    return x.requires_grad_()


def call(target: Any, *args: Any, **kwargs: Any) -> Call:
    return target, args, kwargs


Sample = Callable[[Draw], Call]

UNIT = ("acos asin atanh arccos arcsin arctanh logit log log2 log10 log1p sqrt rsqrt digamma lgamma erfinv reciprocal i0 "
        "xlogy log_sigmoid").split()  # fmt: skip
INTEGER = "bitwise_and bitwise_or bitwise_xor bitwise_not bitwise_left_shift bitwise_right_shift __lshift__ __rshift__ __and__ __or__ __xor__".split()
RANDOM = "bernoulli rand_like randn_like randint_like empty_like rand randn randint randperm empty new_empty empty_permuted".split()


def elementwise(name: str) -> list[Sample]:
    """Samples of an op that works element by element: same shapes, broadcasting, and a number where it takes one."""
    packet = getattr(A, name)
    found: list[Sample] = []
    for overload in packet.overloads():
        op = getattr(packet, overload)
        required = [a for a in op._schema.arguments if not a.has_default_value() and not a.kwarg_only]
        kinds = [str(a.type) for a in required]
        if any(k not in ("Tensor", "number", "Optional[number]", "float", "int") for k in kinds) or kinds[:1] != ["Tensor"]:
            continue
        if any(a.kwarg_only and not a.has_default_value() for a in op._schema.arguments):
            continue
        if any(a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments):
            continue
        for broadcast in (False, True)[: kinds.count("Tensor")]:
            found.append(lambda d, op=op, kinds=kinds, broadcast=broadcast: call(op, *_values(d, name, kinds, broadcast)))
    return found


def _values(d: Draw, name: str, kinds: list[str], broadcast: bool) -> list[Any]:
    values: list[Any] = []
    for i, kind in enumerate(kinds):
        shape = (d.b, d.s, d.h) if i == 0 or not broadcast else (1, d.h)
        if kind != "Tensor":
            values.append(2 if kind == "int" or name in INTEGER else 0.5)
        elif name in INTEGER:
            values.append(d.ids(4, *shape))
        elif name in UNIT:
            values.append(d.unit(*shape))
        elif name in ("acosh", "arccosh"):
            values.append(d.unit(*shape) + 1)
        else:
            values.append(d.x(*shape))
    return values


def _sdpa(d: Draw, *, gqa: bool = False, mask: tuple[int, ...] | None = None, floating: bool = False, **kwargs: Any) -> Call:
    heads, kv = (2 * d.k, d.k) if gqa else (d.k, d.k)
    q, k, v = d.x(d.b, heads, d.s, d.h), d.x(d.b, kv, d.v, d.h), d.x(d.b, kv, d.v, 6)
    if kwargs.get("is_causal"):
        k, v = d.x(d.b, kv, d.s, d.h), d.x(d.b, kv, d.s, d.h)
    extra = []
    if mask is not None:
        shape = [{0: d.b, 1: heads, 2: d.s, 3: d.v}[4 - len(mask) + i] if m else 1 for i, m in enumerate(mask)]
        extra = [d.x(*shape) if floating else d.mask(*shape).index_fill(-1, torch.tensor([0]), True)]
    if gqa:
        kwargs["enable_gqa"] = True
    return call(A.scaled_dot_product_attention.default, q, k, v, *extra, **kwargs)


def _conv(d: Draw, n: int, *, groups: int = 1, bias: bool = False, transposed: bool = False, batch: bool = True) -> Call:
    i, o = groups * d.h, groups * d.k
    space = [5 + j for j in range(n)]
    x = d.x(*([d.b] if batch else []), i, *space)
    w = d.x(i, d.k, *[3] * n) if transposed else d.x(o, d.h, *[3] * n)
    b = [d.x(o)] if bias else [None]
    if transposed:
        op = (A.conv_transpose1d.default, A.conv_transpose2d.input, A.conv_transpose3d.input)[n - 1]
        return call(op, x, w, *b, [1] * n, [0] * n, [0] * n, groups)
    op = (A.conv1d.default, A.conv2d.default, A.conv3d.default)[n - 1]
    return call(op, x, w, *b, [1] * n, [1] * n, [1] * n, groups)


def _norm_args(d: Draw) -> tuple[Any, ...]:
    return d.x(d.b, d.s, d.h), [d.h]


def _channels(d: Draw, training: bool, op: Any, *rest: Any) -> Call:
    x, w, b = grad(d.x(d.b, d.h, 3, 3)), grad(d.x(d.h)), grad(d.x(d.h))
    return call(op, x, w, b, d.x(d.h), d.unit(d.h), training, 0.1, 1e-5, *rest)


def _ce(d: Draw, *shape: int, weight: bool = False, **kwargs: Any) -> Call:
    rows = shape or (d.b * d.s,)
    logits = grad(d.x(rows[0], d.v, *rows[1:]))
    return call(A.cross_entropy_loss.default, logits, d.labels(d.v, *rows), d.unit(d.v) if weight else None, **kwargs)


def dims_of(op: Any, *, keep: bool = True, **kwargs: Any) -> list[Sample]:
    """Samples of a reduction over one dim."""
    found: list[Sample] = [lambda d: call(op, d.x(d.b, d.s, d.h), 1, **kwargs)]
    if keep:
        found.append(lambda d: call(op, d.x(d.b, d.s, d.h), -1, True, **kwargs))
    return found


def lists_of(op: Any, **kwargs: Any) -> list[Sample]:
    """Samples of a reduction over a list of dims."""
    return [
        lambda d: call(op, d.x(d.b, d.s, d.h), [0, 2], False, **kwargs),
        lambda d: call(op, d.x(d.b, d.s, d.h), [-1], True, **kwargs),
    ]


def loss(op: Any, *extra: Any, unit: bool = False) -> list[Sample]:
    """Samples of a loss with a reduction argument."""
    def sample(mode: int) -> Sample:
        def make(d: Draw) -> Call:
            value = d.unit if unit else d.x
            return call(op, value(d.b, d.s), value(d.b, d.s), *extra, mode)
        return make
    return [sample(mode) for mode in (0, 1, 2)]


_RED = {
    "sum": [*lists_of(A.sum.dim_IntList), lambda d: call(A.sum.default, d.x(d.b, d.s)), lambda d: call(A.sum.default, d.mask(d.b, d.s)),
            lambda d: call(A.sum.dim_IntList, d.x(d.b, d.s), None), lambda d: call(A.sum.dim_IntList, d.ids(9, d.b, d.s), [1])],
    "mean": [*lists_of(A.mean.dim), lambda d: call(A.mean.default, d.x(d.b, d.s)),
             lambda d: call(A.mean.dim, d.x(d.b, d.s).float(), [0], dtype=torch.float64)],
    "nansum": lists_of(A.nansum.default), "amax": lists_of(A.amax.default), "amin": lists_of(A.amin.default),
    "count_nonzero": [lambda d: call(A.count_nonzero.dim_IntList, d.ids(2, d.b, d.s), [1]), lambda d: call(A.count_nonzero.default, d.ids(2, d.b))],
    "logsumexp": lists_of(A.logsumexp.default), "var": [*lists_of(A.var.dim), lambda d: call(A.var.correction, d.x(d.b, d.s), [1], correction=0)],
    "std": [*lists_of(A.std.dim), lambda d: call(A.std.default, d.x(d.b, d.s))],
    "var_mean": lists_of(A.var_mean.dim), "std_mean": lists_of(A.std_mean.dim),
    "argmax": dims_of(A.argmax.default), "argmin": dims_of(A.argmin.default), "prod": [*dims_of(A.prod.dim_int), lambda d: call(A.prod.default, d.x(d.b))],
    "all": [lambda d: call(A.all.dim, d.mask(d.b, d.s), 1), lambda d: call(A.all.default, d.mask(d.b, d.s))],
    "any": [lambda d: call(A.any.dim, d.mask(d.b, d.s), 0, True), lambda d: call(A.any.default, d.mask(d.b, d.s))],
    "aminmax": [lambda d: call(A.aminmax.default, d.x(d.b, d.s), dim=1)],
    "median": dims_of(A.median.dim), "nanmedian": dims_of(A.nanmedian.dim), "mode": dims_of(A.mode.default),
    "max": [*dims_of(A.max.dim), lambda d: call(A.max.default, d.x(d.b, d.s)), lambda d: call(A.max.other, d.x(d.b, d.s), d.x(d.s))],
    "min": [*dims_of(A.min.dim), lambda d: call(A.min.default, d.x(d.b, d.s)), lambda d: call(A.min.other, d.x(d.b, d.s), d.x(d.s))],
    "norm": [lambda d: call(A.norm.ScalarOpt_dim, d.x(d.b, d.s), 2, [1]), lambda d: call(A.norm.Scalar, d.x(d.b, d.s), 2)],
    "linalg_vector_norm": [lambda d: call(A.linalg_vector_norm.default, d.x(d.b, d.s), 2, [1], True)],
    "kthvalue": [lambda d: call(A.kthvalue.default, d.x(d.b, d.s), 2, 1)],
    "cumsum": dims_of(A.cumsum.default, keep=False), "cumprod": dims_of(A.cumprod.default, keep=False),
    "cummax": dims_of(A.cummax.default, keep=False), "cummin": dims_of(A.cummin.default, keep=False),
    "logcumsumexp": dims_of(A.logcumsumexp.default, keep=False),
    "sort": [lambda d: call(A.sort.default, d.x(d.b, d.s)), lambda d: call(A.sort.stable, d.x(d.b, d.s), stable=True, dim=0)],
    "argsort": [lambda d: call(A.argsort.default, d.x(d.b, d.s), 0)], "msort": [lambda d: call(A.msort.default, d.x(d.b, d.s))],
    "topk": [lambda d: call(A.topk.default, d.x(d.b, d.s), 2), lambda d: call(A.topk.default, d.x(d.b, d.s), 1, 0)],
    "softmax": [*dims_of(A.softmax.int, keep=False), lambda d: call(A.softmax.int, d.x(d.b, d.s).float(), -1, torch.float64)],
    "_softmax": [lambda d: call(A._softmax.default, d.x(d.b, d.s), 0, False)], "log_softmax": dims_of(A.log_softmax.int, keep=False),
    "_log_softmax": [lambda d: call(A._log_softmax.default, d.x(d.b, d.s), 1, False)],
}  # fmt: skip

_MAT = {
    "linear": [lambda d: call(A.linear.default, d.x(d.b, d.s, d.h), d.x(d.k, d.h)), lambda d: call(A.linear.default, d.x(d.h), d.x(d.k, d.h)),
               lambda d: call(A.linear.default, d.x(d.b, d.h), d.x(d.k, d.h), d.x(d.k)), lambda d: call(A.linear.default, d.x(d.b, d.h), d.x(d.h))],
    "mm": [lambda d: call(A.mm.default, d.x(d.b, d.h), d.x(d.h, d.k))], "mv": [lambda d: call(A.mv.default, d.x(d.b, d.h), d.x(d.h))],
    "bmm": [lambda d: call(A.bmm.default, d.x(d.b, d.s, d.h), d.x(d.b, d.h, d.k))],
    "matmul": [lambda d: call(A.matmul.default, d.x(d.h), d.x(d.h)), lambda d: call(A.matmul.default, d.x(d.b, d.s, d.h), d.x(d.h)),
               lambda d: call(A.matmul.default, d.x(d.h), d.x(d.b, d.h, d.k)), lambda d: call(A.matmul.default, d.x(d.b, 1, d.s, d.h), d.x(d.v, d.h, d.k)),
               lambda d: call(A.matmul.default, d.x(d.b, d.s, d.h), d.x(d.h, d.k))],
    "dot": [lambda d: call(A.dot.default, d.x(d.h), d.x(d.h))], "vdot": [lambda d: call(A.vdot.default, d.x(d.h), d.x(d.h))],
    "outer": [lambda d: call(A.outer.default, d.x(d.h), d.x(d.k))], "ger": [lambda d: call(A.ger.default, d.x(d.h), d.x(d.k))],
    "addmm": [lambda d: call(A.addmm.default, d.x(d.k), d.x(d.b, d.h), d.x(d.h, d.k)),
              lambda d: call(A.addmm.default, d.x(d.b, 1), d.x(d.b, d.h), d.x(d.h, d.k), beta=2, alpha=3)],
    "addmv": [lambda d: call(A.addmv.default, d.x(d.b), d.x(d.b, d.h), d.x(d.h))],
    "baddbmm": [lambda d: call(A.baddbmm.default, d.x(d.b, 1, d.k), d.x(d.b, d.s, d.h), d.x(d.b, d.h, d.k), alpha=0.5)],
    "bilinear": [lambda d: call(A.bilinear.default, d.x(d.b, d.h), d.x(d.b, d.k), d.x(d.s, d.h, d.k)),
                 lambda d: call(A.bilinear.default, d.x(d.b, d.h), d.x(d.b, d.k), d.x(d.s, d.h, d.k), d.x(d.s))],
    "einsum": [lambda d: call(A.einsum.default, "bsh,hk->bsk", [d.x(d.b, d.s, d.h), d.x(d.h, d.k)]),
               lambda d: call(A.einsum.default, "...ij,...jk", [d.x(d.b, d.s, d.h), d.x(d.h, d.k)]),
               lambda d: call(A.einsum.default, "bi,bj,ij->b", [d.x(d.b, d.s), d.x(d.b, d.h), d.x(d.s, d.h)])],
    "scaled_dot_product_attention": [
        _sdpa, lambda d: _sdpa(d, is_causal=True), lambda d: _sdpa(d, gqa=True), lambda d: _sdpa(d, gqa=True, is_causal=True, scale=0.3),
        lambda d: _sdpa(d, mask=(1, 1, 1, 1)), lambda d: _sdpa(d, mask=(1, 0, 1, 1), floating=True), lambda d: _sdpa(d, mask=(1, 1), floating=True),
        lambda d: _sdpa(d, mask=(1, 0, 0, 1)), lambda d: _sdpa(d, gqa=True, mask=(1, 0, 1, 1)), lambda d: _sdpa(d, gqa=True, mask=(1, 1, 1, 1)),
        lambda d: _sdpa(d, gqa=True, mask=(1, 1)), lambda d: call(A.scaled_dot_product_attention.default, d.x(d.b, d.s, d.h), d.x(d.b, d.v, d.h), d.x(d.b, d.v, d.h))],
    **{f"conv{n}d": [lambda d, n=n: _conv(d, n), lambda d, n=n: _conv(d, n, groups=2, bias=True)] for n in (1, 3)},
    "conv2d": [lambda d: _conv(d, 2), lambda d: _conv(d, 2, groups=4), lambda d: _conv(d, 2, bias=True), lambda d: _conv(d, 2, batch=False)],
    **{f"conv_transpose{n}d": [lambda d, n=n: _conv(d, n, transposed=True, groups=2), lambda d, n=n: _conv(d, n, transposed=True, bias=True)] for n in (1, 2, 3)},
    "convolution": [lambda d: call(A.convolution.default, d.x(d.b, 2 * d.h, 5), d.x(2 * d.k, d.h, 3), None, [1], [0], [1], False, [0], 2),
                    lambda d: call(A.convolution.default, d.x(d.b, d.h, 5), d.x(d.h, d.k, 3), d.x(d.k), [2], [0], [1], True, [0], 1)],
}  # fmt: skip

_NORMS = {
    "layer_norm": [lambda d: call(A.layer_norm.default, *_norm_args(d), d.x(d.h), d.x(d.h)), lambda d: call(A.layer_norm.default, *_norm_args(d)),
                   lambda d: call(A.layer_norm.default, d.x(d.b, d.s, d.h), [d.s, d.h], d.x(d.s, d.h), None, 1e-3)],
    "native_layer_norm": [lambda d: call(A.native_layer_norm.default, *_norm_args(d), d.x(d.h), d.x(d.h), 1e-5)],
    "rms_norm": [lambda d: call(A.rms_norm.default, *_norm_args(d), d.x(d.h)), lambda d: call(A.rms_norm.default, *_norm_args(d))],
    "_fused_rms_norm": [lambda d: call(A._fused_rms_norm.default, *_norm_args(d), d.x(d.h), 1e-5)],
    "group_norm": [lambda d: call(A.group_norm.default, d.x(d.b, d.h * 3, 4), d.h, d.x(d.h * 3), d.x(d.h * 3)), lambda d: call(A.group_norm.default, d.x(d.b, d.h, 4, 2), 2)],
    "native_group_norm": [lambda d: call(A.native_group_norm.default, d.x(d.b, 2 * d.h, 4), d.x(2 * d.h), d.x(2 * d.h), d.b, 2 * d.h, 4, d.h, 1e-5)],
    "batch_norm": [lambda d: _channels(d, False, A.batch_norm.default, False), lambda d: _channels(d, True, A.batch_norm.default, False)],
    "native_batch_norm": [lambda d: _channels(d, True, A.native_batch_norm.default)],
    "_native_batch_norm_legit_functional": [lambda d: _channels(d, True, A._native_batch_norm_legit_functional.default)],
    "instance_norm": [lambda d: call(A.instance_norm.default, d.x(d.b, d.h, 5), d.x(d.h), d.x(d.h), None, None, True, 0.1, 1e-5, False)],
    "cross_entropy_loss": [lambda d: _ce(d, reduction=2), lambda d: _ce(d, reduction=0), _ce, lambda d: _ce(d, reduction=2, label_smoothing=0.1),
                           lambda d: _ce(d, reduction=2, weight=True), lambda d: _ce(d, d.b, d.s, reduction=2), lambda d: call(A.cross_entropy_loss.default, d.x(d.b, d.v), d.ids(d.v, d.b), None, 2, 1),
                           lambda d: call(A.cross_entropy_loss.default, d.x(d.b, d.v), d.unit(d.b, d.v), reduction=2)],
    "nll_loss": [lambda d: call(A.nll_loss.default, grad(d.x(d.b, d.v)), d.labels(d.v, d.b), None, 2), lambda d: call(A.nll_loss.default, grad(d.x(d.b, d.v)), d.labels(d.v, d.b), d.unit(d.v), 0)],
    "nll_loss2d": [lambda d: call(A.nll_loss2d.default, grad(d.x(d.b, d.v, 3, 4)), d.labels(d.v, d.b, 3, 4), None, 2)],
    "nll_loss_nd": [lambda d: call(A.nll_loss_nd.default, grad(d.x(d.b, d.v, d.s)), d.labels(d.v, d.b, d.s), None, 2)],
    "nll_loss_forward": [lambda d: call(A.nll_loss_forward.default, grad(d.x(d.b, d.v)), d.labels(d.v, d.b), None, 2, -100)],
    "nll_loss2d_forward": [lambda d: call(A.nll_loss2d_forward.default, grad(d.x(d.b, d.v, 3, 4)), d.labels(d.v, d.b, 3, 4), None, 2, -100)],
    "mse_loss": loss(A.mse_loss.default), "l1_loss": loss(A.l1_loss.default), "smooth_l1_loss": loss(A.smooth_l1_loss.default),
    "huber_loss": loss(A.huber_loss.default), "soft_margin_loss": loss(A.soft_margin_loss.default), "kl_div": loss(A.kl_div.default, unit=True),
    "binary_cross_entropy": loss(A.binary_cross_entropy.default, None, unit=True),
    "binary_cross_entropy_with_logits": [*loss(A.binary_cross_entropy_with_logits.default, None, None, unit=True),
        lambda d: call(A.binary_cross_entropy_with_logits.default, grad(d.x(d.b, d.s)), d.unit(d.b, d.s), None, d.unit(d.s), 2)],
}  # fmt: skip

_MOVE = {
    "embedding": [lambda d: call(A.embedding.default, d.x(d.v, d.h), d.ids(d.v, d.b, d.s)), lambda d: call(A.embedding.default, d.x(d.v, d.h), d.ids(d.v, d.b), 1),
                  lambda d: call(A.embedding.default, d.x(d.v, d.h), d.ids(d.v, d.b, d.s), -1, True)],
    "index_select": [lambda d: call(A.index_select.default, d.x(d.b, d.s, d.h), 1, d.ids(d.s, d.k))],
    "gather": [lambda d: call(A.gather.default, d.x(d.b, d.s), 1, d.ids(d.s, d.b, d.k)), lambda d: call(A.gather.default, d.x(d.b + 1, d.s), -1, d.ids(d.s, d.b, d.k))],
    "index": [lambda d: call(A.index.Tensor, d.x(d.b, d.s, d.h), [None, d.ids(d.s, d.k)]), lambda d: call(A.index.Tensor, d.x(d.b, d.s, d.h), [d.ids(d.b, d.k, 1), d.ids(d.s, d.v)]),
              lambda d: call(A.index.Tensor, d.x(d.b, d.s, d.h), [d.ids(d.b, d.k), None, d.ids(d.h, d.k)]), lambda d: call(A.index.Tensor, d.x(d.b, d.s), [d.ids(d.b, 1, 1)])],
    "index_put": [lambda d: call(A.index_put.default, d.x(d.b, d.s, d.h), [None, d.ids(d.s, d.k)], d.x(d.b, d.k, d.h), True),
                  lambda d: call(A.index_put.default, d.x(d.s, d.h), [torch.randperm(d.s)[:2]], d.x(d.h)), lambda d: call(A.index_put.default, d.x(d.s, d.h), [d.ids(d.s, d.k)], d.x(d.k, d.h), True)],
    "_unsafe_index_put": [lambda d: call(A._unsafe_index_put.default, d.x(d.s, d.h), [d.ids(d.s, d.k)], d.x(d.k, d.h), True)],
    "scatter": [lambda d: call(A.scatter.src, d.x(d.b, d.s), 1, d.ids(d.s, d.b, 1), d.x(d.b, 1)), lambda d: call(A.scatter.value, d.x(d.b, d.s), 0, d.ids(d.b, 1, d.s), 0.0),
                lambda d: call(A.scatter.value, d.x(d.b, d.s), 1, d.ids(d.s, d.b, 2), 1.5)],
    "scatter_add": [lambda d: call(A.scatter_add.default, d.x(d.b, d.s), 1, d.ids(d.s, d.b, d.k), d.x(d.b, d.k)), lambda d: call(A.scatter_add.default, d.x(d.b + 1, d.s), 1, d.ids(d.s, d.b, d.k), d.x(d.b, d.k))],
    "scatter_reduce": [lambda d: call(A.scatter_reduce.two, d.x(d.b, d.s), 1, d.ids(d.s, d.b, d.k), d.x(d.b, d.k), "amax")],
    "triu": [lambda d: call(A.triu.default, d.x(d.b, d.s, d.h), 1)], "tril": [lambda d: call(A.tril.default, d.x(d.b, d.s, d.h))],
    "roll": [lambda d: call(A.roll.default, d.x(d.b, d.s), [1], [1]), lambda d: call(A.roll.default, d.x(d.b, d.s), [1])], "flip": [lambda d: call(A.flip.default, d.x(d.b, d.s), [-1])],
    "diff": [lambda d: call(A.diff.default, d.x(d.b, d.s)), lambda d: call(A.diff.default, d.x(d.b, d.s), 1, -1, d.x(d.b, 1)), lambda d: call(A.diff.default, d.x(d.b, d.s), append=d.x(d.b, 2))],
    "one_hot": [lambda d: call(A.one_hot.default, d.ids(d.v, d.b, d.s), d.v)], "prelu": [lambda d: call(A.prelu.default, d.x(d.b, d.h, 3), d.x(d.h)), lambda d: call(A.prelu.default, d.x(d.b, d.h), d.x(1))],
    "dropout": [lambda d: call(A.dropout.default, d.x(d.b, d.s), 0.0, True), lambda d: call(A.dropout.default, d.x(d.b, d.s), 0.5, False)],
    "native_dropout": [lambda d: call(A.native_dropout.default, d.x(d.b, d.s), 0.0, True)],
    "to": [lambda d: call(A.to.dtype, d.x(d.b, d.s), torch.float32), lambda d: call(A.to.dtype, d.x(d.b, d.s), torch.int64), lambda d: call(A.to.dtype, d.mask(d.b, d.s), torch.float64),
           lambda d: call(A.to.other, d.x(d.b, d.s), d.x(1)), lambda d: call(A.to.dtype_layout, d.ids(9, d.b, d.s), dtype=torch.bool)],
    "_to_copy": [lambda d: call(A._to_copy.default, d.x(d.b, d.s), dtype=torch.float32), lambda d: call(A._to_copy.default, d.x(d.b, d.s), dtype=torch.bool)],
    "type_as": [lambda d: call(A.type_as.default, d.x(d.b, d.s), d.x(1))],
    "add": [lambda d: call(A.add.Tensor, d.x(d.b, d.s, d.h), d.x(d.s, 1), alpha=2), lambda d: call(A.add.Tensor, d.x(d.b, d.s), 1.5), lambda d: call(A.add.Tensor, d.x(d.b, d.s), 0), lambda d: call(A.add.Tensor, d.ids(9, d.b, d.s), d.ids(9, d.s))],
    "rsub": [lambda d: call(A.rsub.Scalar, d.x(d.b, d.s), 1.0), lambda d: call(A.rsub.Tensor, d.x(d.b, d.s), d.x(d.s))],
    "mul": [lambda d: call(A.mul.Tensor, d.x(d.b, 1, d.s), d.x(d.h, d.s)), lambda d: call(A.mul.Tensor, d.x(d.b, d.s), 2.5), lambda d: call(A.mul.Tensor, d.mask(d.b, d.s), d.x(d.s))],
    "div": [lambda d: call(A.div.Tensor, d.x(d.b, d.s), d.unit(d.s)), lambda d: call(A.div.Tensor, d.x(d.b, d.s), 3), lambda d: call(A.div.Tensor_mode, d.x(d.b, d.s), d.unit(d.b, 1), rounding_mode="floor")],
    "pow": [lambda d: call(A.pow.Tensor_Scalar, d.x(d.b, d.s), 3), lambda d: call(A.pow.Tensor_Scalar, d.x(d.b, d.s), 1), lambda d: call(A.pow.Tensor_Tensor, d.unit(d.b, d.s), d.x(d.s)), lambda d: call(A.pow.Scalar, 2.0, d.x(d.b, d.s))],
    "where": [lambda d: call(A.where.self, d.mask(d.b, 1, d.s), d.x(d.h, d.s), d.x(d.b, 1, 1)), lambda d: call(A.where.ScalarOther, d.mask(d.b, d.s), d.x(d.b, d.s), 0), lambda d: call(A.where.ScalarSelf, d.mask(d.b, d.s), 2.0, d.x(d.s)), lambda d: call(A.where.Scalar, d.mask(d.b, d.s), 1.0, 0.0)],
    "masked_fill": [lambda d: call(A.masked_fill.Scalar, d.x(d.b, d.s), d.mask(d.s), 0.0), lambda d: call(A.masked_fill.Scalar, d.x(d.b, d.s), d.mask(d.b, 1), -1e9), lambda d: call(A.masked_fill.Tensor, d.x(d.b, d.s), d.mask(d.b, d.s), d.x())],
    "clamp": [lambda d: call(A.clamp.default, d.x(d.b, d.s), -0.5, 0.5), lambda d: call(A.clamp.Tensor, d.x(d.b, d.s), d.x(d.s))], "clip": [lambda d: call(A.clip.default, d.x(d.b, d.s), min=0.0)],
    "lerp": [lambda d: call(A.lerp.Scalar, d.x(d.b, d.s), d.x(d.b, d.s), 0.3), lambda d: call(A.lerp.Tensor, d.x(d.b, d.s), d.x(d.s), d.x(d.b, 1))],
    "copy": [lambda d: call(A.copy.default, d.x(d.b, d.s), d.x(d.b, d.s))], "full_like": [lambda d: call(A.full_like.default, d.x(d.b, d.s), 2.0)],
    "fill": [lambda d: call(A.fill.Scalar, d.x(d.b, d.s), 2.0), lambda d: call(A.fill.Tensor, d.x(d.b, d.s), d.x())],
    "gelu": [lambda d: call(A.gelu.default, d.x(d.b, d.s)), lambda d: call(A.gelu.default, d.x(d.b, d.s), approximate="tanh")], "isclose": [lambda d: call(A.isclose.default, d.x(d.b, d.s), d.x(d.s))],
    "bitwise_not": [lambda d: call(A.bitwise_not.default, d.mask(d.b, d.s))], "nan_to_num": [lambda d: call(A.nan_to_num.default, d.x(d.b, d.s), 0.0)],
}  # fmt: skip

_POOLS = {
    **{name: [lambda d, op=op: call(op, d.x(d.b, d.h, 6, 6), [2, 2])] for name, op in {
        "max_pool2d": A.max_pool2d.default, "max_pool2d_with_indices": A.max_pool2d_with_indices.default, "avg_pool2d": A.avg_pool2d.default,
        "adaptive_max_pool2d": A.adaptive_max_pool2d.default, "adaptive_avg_pool2d": A.adaptive_avg_pool2d.default, "_adaptive_avg_pool2d": A._adaptive_avg_pool2d.default}.items()},
    **{name: [lambda d, op=op: call(op, d.x(d.b, d.h, 6), [2])] for name, op in {
        "max_pool1d": A.max_pool1d.default, "avg_pool1d": A.avg_pool1d.default, "adaptive_max_pool1d": A.adaptive_max_pool1d.default, "adaptive_avg_pool1d": A.adaptive_avg_pool1d.default}.items()},
    **{name: [lambda d, op=op: call(op, d.x(d.b, d.h, 4, 4, 4), [2, 2, 2])] for name, op in {
        "max_pool3d": A.max_pool3d.default, "max_pool3d_with_indices": A.max_pool3d_with_indices.default, "avg_pool3d": A.avg_pool3d.default,
        "adaptive_max_pool3d": A.adaptive_max_pool3d.default, "adaptive_avg_pool3d": A.adaptive_avg_pool3d.default, "_adaptive_avg_pool3d": A._adaptive_avg_pool3d.default}.items()},
    **{f"{base}{n}d": [lambda d, n=n, base=base: call(getattr(A, f"{base}{n}d").default, d.x(d.b, d.h, *[3] * n), [6] * n)]
       for base in ("upsample_nearest", "_upsample_nearest_exact") for n in (1, 2)},
    "upsample_nearest3d": [lambda d: call(A.upsample_nearest3d.default, d.x(d.b, d.h, 2, 2, 2), [4, 4, 4])],
    "upsample_linear1d": [lambda d: call(A.upsample_linear1d.default, d.x(d.b, d.h, 3), [6], False)], "upsample_trilinear3d": [lambda d: call(A.upsample_trilinear3d.default, d.x(d.b, d.h, 2, 2, 2), [4, 4, 4], True)],
    **{n: [lambda d, n=n: call(getattr(A, n).default, d.x(d.b, d.h, 3, 3), [6, 6], False)] for n in ("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")},
    **{f"{base}_pad{n}d": [lambda d, n=n, base=base: call(getattr(A, f"{base}_pad{n}d").default, d.x(d.b, d.h, *[4] * n), [1] * 2 * n)] for base in ("reflection", "replication") for n in (1, 2, 3)},
}  # fmt: skip

_VIEWS = {
    "view": [lambda d: call(A.view.default, d.x(d.b, d.s, d.h), [d.b * d.s, -1]), lambda d: call(A.view.default, d.x(d.b * d.s, d.h), [d.b, d.s, d.h]), lambda d: call(A.view.default, d.x(d.b, 3 * d.h * d.k), [d.b, 1, 3, d.h, d.k]),
             lambda d: call(A.view.default, d.x(6, 4), [8, 3]), lambda d: call(A.view.default, d.x(d.b, 6, 4, 2), [d.b, 2, 24]), lambda d: call(A.view.dtype, d.x(d.b, d.s), torch.int64)],
    "reshape": [lambda d: call(A.reshape.default, d.x(d.b, d.s, d.h).transpose(0, 1), [d.s, -1]), lambda d: call(A.reshape.default, d.x(d.b, 4, 9), [-1, 6, 6])],
    "_unsafe_view": [lambda d: call(A._unsafe_view.default, d.x(d.b, d.s * d.h), [d.b, d.s, d.h])], "view_copy": [lambda d: call(A.view_copy.default, d.x(d.b, d.s), [d.b * d.s])],
    "flatten": [lambda d: call(A.flatten.using_ints, d.x(d.b, d.s, d.h), 1), lambda d: call(A.flatten.using_ints, d.x(d.b, d.s, d.h), 0, 1)], "unflatten": [lambda d: call(A.unflatten.int, d.x(d.b, d.s * d.h), -1, [d.s, -1])],
    "squeeze": [lambda d: call(A.squeeze.default, d.x(d.b, 1, d.s)), lambda d: call(A.squeeze.dim, d.x(2, d.s), 0), lambda d: call(A.squeeze.dims, d.x(2, 1, d.s), [0, 1])], "squeeze_copy": [lambda d: call(A.squeeze_copy.dim, d.x(d.b, 1), 1)],
    "unsqueeze": [lambda d: call(A.unsqueeze.default, d.x(d.b, d.s), -1), lambda d: call(A.unsqueeze.default, d.x(d.b, d.s), 1)], "unsqueeze_copy": [lambda d: call(A.unsqueeze_copy.default, d.x(d.b, d.s), 0)],
    "view_as": [lambda d: call(A.view_as.default, d.x(d.b * d.s, d.h), d.x(d.b, d.s * d.h))], "reshape_as": [lambda d: call(A.reshape_as.default, d.x(d.b * d.s), d.x(d.b, d.s))], "ravel": [lambda d: call(A.ravel.default, d.x(d.b, d.s))],
    "transpose": [lambda d: call(A.transpose.int, d.x(d.b, d.s, d.h), 1, -1)], "transpose_copy": [lambda d: call(A.transpose_copy.int, d.x(d.b, d.s), 0, 1)], "permute": [lambda d: call(A.permute.default, d.x(d.b, d.s, d.h), [2, 0, -2])],
    "permute_copy": [lambda d: call(A.permute_copy.default, d.x(d.b, d.s), [1, 0])], "t": [lambda d: call(A.t.default, d.x(d.b, d.s)), lambda d: call(A.t.default, d.x(d.b))], "t_copy": [lambda d: call(A.t_copy.default, d.x(d.b, d.s))],
    "movedim": [lambda d: call(A.movedim.int, d.x(d.b, d.s, d.h), 0, -1), lambda d: call(A.movedim.intlist, d.x(d.b, d.s, d.h), [0, 1], [2, 0])], "moveaxis": [lambda d: call(A.moveaxis.int, d.x(d.b, d.s, d.h), 2, 0)],
    "swapaxes": [lambda d: call(A.swapaxes.default, d.x(d.b, d.s, d.h), 0, 2)], "swapdims": [lambda d: call(A.swapdims.default, d.x(d.b, d.s, d.h), 0, 1)], "numpy_T": [lambda d: call(A.numpy_T.default, d.x(d.b, d.s, d.h))], "mT": [lambda d: call(A.mT.default, d.x(d.b, d.s, d.h))],
    "expand": [lambda d: call(A.expand.default, d.x(d.b, 1, d.h), [d.b, d.s, -1]), lambda d: call(A.expand.default, d.x(d.h), [d.b, d.s, d.h])], "expand_copy": [lambda d: call(A.expand_copy.default, d.x(d.b, 1), [d.b, d.s])],
    "broadcast_to": [lambda d: call(A.broadcast_to.default, d.x(d.h), [d.b, d.h])], "expand_as": [lambda d: call(A.expand_as.default, d.x(d.b, 1), d.x(d.b, d.s))],
    "slice": [lambda d: call(A.slice.Tensor, d.x(d.b, d.s, 2 * d.h), 2, d.h), lambda d: call(A.slice.Tensor, d.x(d.b, d.s), 1, 0, -1), lambda d: call(A.slice.Tensor, d.x(d.b, d.s), 0, 0, 9223372036854775807), lambda d: call(A.slice.Tensor, d.x(8, 12 * d.h), -1, 4 * d.h, 8 * d.h), lambda d: call(A.slice.Tensor, d.x(8, d.s), 0, 0, 8, 2)],
    "slice_copy": [lambda d: call(A.slice_copy.Tensor, d.x(d.b, 3 * d.s), 1, 0, d.s)], "narrow": [lambda d: call(A.narrow.default, d.x(d.b, 3 * d.s), 1, d.s, d.s), lambda d: call(A.narrow.default, d.x(d.b, 3 * d.s), 1, -d.s, d.s)], "narrow_copy": [lambda d: call(A.narrow_copy.default, d.x(d.b, 3 * d.s), 1, d.s, d.s)],
    "slice_scatter": [lambda d: call(A.slice_scatter.default, d.x(d.b, 3 * d.s), d.x(d.b, d.s), 1, d.s, 2 * d.s), lambda d: call(A.slice_scatter.default, d.x(d.b, 5), d.x(d.b, 2), 1, 1, 3)],
    "select": [lambda d: call(A.select.int, d.x(d.b, d.s, d.h), 1, -1)], "select_copy": [lambda d: call(A.select_copy.int, d.x(d.b, d.s), 0, 1)], "select_scatter": [lambda d: call(A.select_scatter.default, d.x(d.b, d.s, d.h), d.x(d.b, d.h), 1, 1)],
    "unbind": [lambda d: call(A.unbind.int, d.x(d.b, d.s, d.h), 1)], "unbind_copy": [lambda d: call(A.unbind_copy.int, d.x(d.b, d.s))],
    "split": [lambda d: call(A.split.Tensor, d.x(d.b, 3 * d.h), d.h, 1), lambda d: call(A.split.Tensor, d.x(d.b, 5), 2, -1), lambda d: call(A.split.sizes, d.x(d.b, 6 * d.h), [4 * d.h, d.h, d.h], 1)], "split_copy": [lambda d: call(A.split_copy.Tensor, d.x(2 * d.b, d.h), d.b)],
    "split_with_sizes": [lambda d: call(A.split_with_sizes.default, d.x(d.b, 3 * d.h), [d.h, 2 * d.h], 1)], "split_with_sizes_copy": [lambda d: call(A.split_with_sizes_copy.default, d.x(3 * d.h), [d.h, 2 * d.h])],
    "chunk": [lambda d: call(A.chunk.default, d.x(d.b, 2 * d.h), 2, 1), lambda d: call(A.chunk.default, d.x(7), 3)], "tensor_split": [lambda d: call(A.tensor_split.sections, d.x(d.b, 4 * d.h), 2, 1), lambda d: call(A.tensor_split.indices, d.x(4 * d.h), [d.h, 3 * d.h])],
    "unsafe_split": [lambda d: call(A.unsafe_split.Tensor, d.x(2 * d.b), d.b)], "unsafe_chunk": [lambda d: call(A.unsafe_chunk.default, d.x(2 * d.b), 2)], "unsafe_split_with_sizes": [lambda d: call(A.unsafe_split_with_sizes.default, d.x(3 * d.h), [d.h, 2 * d.h])],
    "cat": [lambda d: call(A.cat.default, [d.x(d.b, d.h), d.x(d.b, 2 * d.h)], -1), lambda d: call(A.cat.default, [d.x(d.b, 1, d.h), d.x(d.b, 4, d.h)], 1), lambda d: call(A.cat.default, [d.x(0), d.x(d.b, d.h), d.x(d.b, d.h)])],
    "concat": [lambda d: call(A.concat.default, [d.x(d.b), d.x(d.b)])], "concatenate": [lambda d: call(A.concatenate.default, [d.x(d.b), d.x(d.b)])], "stack": [lambda d: call(A.stack.default, [d.x(d.b, d.h), d.x(d.b, d.h)], -1)],
    "repeat": [lambda d: call(A.repeat.default, d.x(d.b, d.h), [2, 1, 4])], "tile": [lambda d: call(A.tile.default, d.x(d.b, d.h), [2, 4])], "repeat_interleave": [lambda d: call(A.repeat_interleave.self_int, d.x(d.b, d.h, d.s), 4, 1)],
    "constant_pad_nd": [lambda d: call(A.constant_pad_nd.default, d.x(d.b, d.s, d.h), [1, 2]), lambda d: call(A.constant_pad_nd.default, d.x(d.b, d.s, d.h), [0, 0, 1, 0], 5.0)], "pad": [lambda d: call(A.pad.default, d.x(d.b, d.s), [0, 1], "constant", -100.0), lambda d: call(A.pad.default, d.x(d.b, d.h, 4), [1, 1], "reflect")],
    "unfold": [lambda d: call(A.unfold.default, d.x(d.b, 8), 1, 4, 2)], "glu": [lambda d: call(A.glu.default, d.x(d.b, 2 * d.h))], "pixel_shuffle": [lambda d: call(A.pixel_shuffle.default, d.x(d.b, 4 * d.h, 2, 4), 2)], "pixel_unshuffle": [lambda d: call(A.pixel_unshuffle.default, d.x(d.b, d.h, 4, 8), 2)],
    "zeros": [lambda d: call(A.zeros.default, [d.b, d.s])], "ones": [lambda d: call(A.ones.default, [d.b, d.s])], "full": [lambda d: call(A.full.default, [d.b, d.s], 3.0)], "scalar_tensor": [lambda d: call(A.scalar_tensor.default, 2.0)],
    **{n: [lambda d, n=n: call(getattr(A, n).default, d.x(d.b), [d.b, d.s])] for n in ("new_zeros", "new_ones")}, "new_full": [lambda d: call(A.new_full.default, d.x(d.b), [d.b, d.s], 2.0)],
    "arange": [lambda d: call(A.arange.default, d.s), lambda d: call(A.arange.start, 1, 5)], "linspace": [lambda d: call(A.linspace.default, 0, 1, d.s)], "logspace": [lambda d: call(A.logspace.default, 0, 1, d.s)], "eye": [lambda d: call(A.eye.default, d.s)],
    "tril_indices": [lambda d: call(A.tril_indices.default, 4, 4)], "triu_indices": [lambda d: call(A.triu_indices.default, 4, 4)],
}  # fmt: skip

SAMPLES: dict[str, list[Sample]] = {**_RED, **_MAT, **_NORMS, **_MOVE, **_POOLS, **_VIEWS}
