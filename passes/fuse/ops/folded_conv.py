"""`shardwright::folded_conv`: one convolution by a kernel that is made of the weights of others (recipe.py).

    y = conv(x, K) + c        K = cat over parts of sum over branches of place(w s)

A branch is a convolution of x, with a batch norm on running statistics behind it or without (folded as in "Efficient ConvBN Blocks
for Transfer Learning and Beyond", You et al. 2023: Tune mode). Branches of one part are added (structural
re-parameterisation: "RepVGG", Ding et al. 2021, section 3.3; dilated kernels: "UniRepLKNet", Ding et al. 2023, section 3.1);
parts follow each other in the channels of the result.

Shapes: x [z, g i, *space]; weights [g o, i, *taps], or [g i, o, *taps] where transposed (then there is one branch); no weight
is the identity, g o = g i. `vectors` has bias, gamma, beta, mean and var of each branch, [g o] or None; without var there is no
norm. `parts` are the numbers of branches of each part ([] for one part), `kernel` the taps of K by dim, `places` per branch and
dim the (first tap, step) at which its taps stand in K ([] for both where every branch has all taps).

It keeps x and what the kernel is made of, and makes the kernel again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .recipe import VECTORS, Recipe

aten = torch.ops.aten
_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")


class _FoldedConv(torch.autograd.Function):
    """Keeps x where weights or scales want a gradient.

    `ctx.half` says which gradients the backward is to make (runtime/meetings.py): of x, or of the rest.
    """

    @staticmethod
    def forward(ctx, recipe, frame, x, *given):  # type: ignore[no-untyped-def,override]
        count = len(recipe.eps)
        weights, vectors = given[:count], given[count:]
        wants = ctx.needs_input_grad[3:]
        ctx.reads = any(wants[:count]) or any(wants[count + 1 :: VECTORS]) or any(wants[count + 4 :: VECTORS])
        ctx.save_for_backward(x if ctx.reads else None, *given)
        ctx.home, ctx.half = (recipe, frame, x.shape), None
        kernel, constant = recipe.made(x, weights, vectors), recipe.constant(x, weights, vectors)
        return aten.convolution(x, kernel, constant, *frame)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        (recipe, frame, shape), (x, *given) = ctx.home, ctx.saved_tensors
        x = x if ctx.reads else grad.new_empty(shape)
        count, wants = len(recipe.eps), ctx.needs_input_grad
        weights, vectors = given[:count], given[count:]
        flows = wants[2] and ctx.half != "weight"
        mask = [flows, ctx.reads and ctx.half != "input", False]
        kernel = recipe.made(x, weights, vectors)
        d_x, d_kernel, _ = aten.convolution_backward(grad, x, kernel, None, *frame, mask)
        if ctx.half == "input" or not any(wants[3:]):
            return None, None, d_x, *(None for _ in given)
        d_kernel = torch.zeros_like(kernel) if d_kernel is None else d_kernel
        # By a sum of its own, which is closer than the convolution's: the gradient of a scale is a difference of two such sums.
        shifts = any(wants[3 + count :])
        d_constant = grad.sum([0, *range(2, grad.dim())]) if shifts else grad.new_zeros(grad.shape[1])
        made = _made_of(recipe, d_kernel, d_constant, x, weights, vectors)
        own = [g.to(v.dtype) if want else None for g, v, want in zip(made, given, wants[3:], strict=True)]
        return None, None, d_x, *own


def _made_of(
    recipe: Recipe, d_kernel: Tensor, d_constant: Tensor, x: Tensor, weights: Sequence[Tensor | None],
    vectors: Sequence[Tensor | None],
) -> list[Tensor]:  # fmt: skip
    """Gradients of all weights, then of all vectors."""
    channels = recipe.channels(x, weights)
    kernels = [d_kernel] if len(channels) == 1 else d_kernel.split(channels)
    constants = d_constant.split(channels)
    each = [
        recipe.gradients(i, own, shifted, x, weights, vectors)
        for branches, own, shifted in zip(recipe.branches(), kernels, constants, strict=True)
        for i in branches
    ]
    return [g[0] for g in each] + [v for g in each for v in g[1:]]


def _folded_conv(
    x: Tensor, weights: Sequence[Tensor | None], vectors: Sequence[Tensor | None], eps: Sequence[float],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int = 1, transposed: bool = False,
    output_padding: Sequence[int] = (), parts: Sequence[int] = (), kernel: Sequence[int] = (), places: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    recipe = Recipe(tuple(eps), tuple(parts), tuple(kernel), tuple(places), groups, transposed)
    beyond = list(output_padding) or [0] * len(stride)
    frame = (list(stride), list(padding), list(dilation), transposed, beyond, groups)
    return _FoldedConv.apply(recipe, frame, x, *weights, *vectors)


_LIBRARY.define(
    "folded_conv(Tensor x, Tensor?[] weights, Tensor?[] vectors, float[] eps, int[] stride, int[] padding, int[] dilation, "
    "int groups=1, bool transposed=False, int[] output_padding=[], int[] parts=[], int[] kernel=[], int[] places=[]) -> Tensor"
)
_LIBRARY.impl("folded_conv", _folded_conv, "CompositeImplicitAutograd")

folded_conv = torch.ops.shardwright.folded_conv.default
