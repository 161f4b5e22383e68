"""How the kernel of one convolution is made of the weights of others, and what its gradient is to them.

    K = cat over parts of sum over branches of place(w s)        c = cat over parts of sum over branches of (b - mean) s + beta
    s = gamma / sqrt(var + eps), 1 for a branch without a norm

`place` puts the taps of a branch among those of K. Shapes are those of folded_conv.py. Scales and sums of several branches are
worked out in float32 at least, so that K is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

VECTORS = 5
"""Bias, gamma, beta, mean and var of a branch."""
Given = Sequence[Tensor | None]


@dataclass(frozen=True)
class Norm:
    """What stands behind a branch: its bias, and a batch norm on running statistics where there is a `var`."""

    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float

    def root(self) -> Tensor:
        """1 / sqrt(var + eps)."""
        assert self.var is not None
        return torch.rsqrt(_wide(self.var) + self.eps)

    def scale(self) -> Tensor | None:
        if self.var is None:
            return None
        return self.root() if self.gamma is None else self.root() * self.gamma

    def centre(self) -> Tensor | None:
        """Bias less mean."""
        if self.mean is None:
            return self.bias
        return -self.mean if self.bias is None else self.bias - self.mean

    def shift(self) -> Tensor | None:
        centre, scale = self.centre(), self.scale()
        scaled = centre if scale is None or centre is None else centre * scale
        return self.beta if scaled is None else (scaled if self.beta is None else scaled + self.beta)

    def gradients(self, weighed: Tensor, shifted: Tensor) -> tuple[Tensor, ...]:
        """Those of bias, gamma, beta, mean and var, from dK w summed per channel and dc."""
        scale = self.scale()
        if scale is None:
            return (shifted,) * VECTORS
        centre, root = self.centre(), self.root()
        scaled = weighed if centre is None else weighed + centre * shifted
        gained = scaled if self.gamma is None else scaled * self.gamma
        return shifted * scale, scaled * root, shifted, -shifted * scale, gained * root**3 * -0.5


@dataclass(frozen=True)
class Recipe:
    """The numbers among the op's arguments that say how its kernel is made."""

    eps: tuple[float, ...]
    parts: tuple[int, ...]
    kernel: tuple[int, ...]
    places: tuple[int, ...]
    groups: int
    transposed: bool

    def branches(self) -> Iterator[range]:
        """The branches of each part."""
        start = 0
        for count in self.parts or (len(self.eps),):
            yield range(start, start + count)
            start += count

    def channels(self, x: Tensor, weights: Given) -> list[int]:
        """Channels of the result that each part makes."""
        firsts = [weights[branches[0]] for branches in self.branches()]
        if self.transposed:
            return [w.shape[1] * self.groups for w in firsts if w is not None]
        return [x.shape[1] if w is None else w.shape[0] for w in firsts]

    def norm(self, i: int, vectors: Given) -> Norm:
        """What stands behind branch i."""
        return Norm(*vectors[VECTORS * i : VECTORS * (i + 1)], self.eps[i])

    def at(self, i: int, taps: Sequence[int]) -> tuple[slice, ...]:
        """Where the taps of branch i stand in the kernel; everywhere where they are all of it."""
        if not self.kernel:
            return (slice(None),)
        own = self.places[2 * len(taps) * i : 2 * len(taps) * (i + 1)]
        spans = zip(own[::2], own[1::2], taps, strict=True)
        return (slice(None), slice(None), *(slice(start, start + step * (n - 1) + 1, step) for start, step, n in spans))

    def weight(self, i: int, x: Tensor, weights: Given) -> Tensor:
        """The weight of branch i, the identity's if it has none."""
        given = weights[i]
        if given is not None:
            return given
        eye = torch.eye(x.shape[1] // self.groups, dtype=x.dtype, device=x.device).repeat(self.groups, 1)
        return eye.reshape(*eye.shape, *(1 for _ in x.shape[2:]))

    def made(self, x: Tensor, weights: Given, vectors: Given) -> Tensor:
        """K, in the dtype of x."""
        parts = []
        for branches in self.branches():
            each = [self._scaled(i, x, weights, vectors) for i in branches]
            if self.kernel:
                total = _wide(each[0]).new_zeros(*each[0].shape[:2], *self.kernel)
                for i, weight in zip(branches, each, strict=True):
                    total[self.at(i, weight.shape[2:])] += weight
            else:
                total = each[0] if len(each) == 1 else sum(map(_wide, each[1:]), _wide(each[0]))
            parts.append(total.to(x.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def constant(self, x: Tensor, weights: Given, vectors: Given) -> Tensor | None:
        """c, in the dtype of x; None where nothing is added."""
        if all(v is None for v in vectors):
            return None
        parts = []
        for branches, channels in zip(self.branches(), self.channels(x, weights), strict=True):
            shifts = [s for i in branches if (s := self.norm(i, vectors).shift()) is not None]
            parts.append(sum(shifts[1:], shifts[0]).to(x.dtype) if shifts else x.new_zeros(channels))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def gradients(
        self, i: int, grad: Tensor, shifted: Tensor, x: Tensor, weights: Given, vectors: Given
    ) -> tuple[Tensor, ...]:
        """Of the weight of branch i and its vectors, from its part of dK and dc."""
        weight, norm = self.weight(i, x, weights), self.norm(i, vectors)
        grad, scale = grad[self.at(i, weight.shape[2:])], norm.scale()
        own = grad if scale is None else grad * self._spread(scale, weight)
        weighed = shifted if scale is None else self._gathered(grad * weight)
        return own, *norm.gradients(weighed, shifted)

    def _scaled(self, i: int, x: Tensor, weights: Given, vectors: Given) -> Tensor:
        weight, scale = self.weight(i, x, weights), self.norm(i, vectors).scale()
        return weight if scale is None else weight * self._spread(scale, weight)

    def _spread(self, scale: Tensor, weight: Tensor) -> Tensor:
        """A number per channel of the result as a factor of a weight."""
        ones = [1] * (weight.dim() - 2)
        if not self.transposed:
            return scale.reshape(-1, 1, *ones)
        inner = weight.shape[0] // self.groups
        return scale.reshape(self.groups, 1, -1).expand(-1, inner, -1).reshape(*weight.shape[:2], *ones)

    def _gathered(self, product: Tensor) -> Tensor:
        """A tensor shaped as a weight, summed per channel of the result."""
        flat = product.flatten(2).sum(2)
        return flat.reshape(self.groups, -1, flat.shape[1]).sum(1).reshape(-1) if self.transposed else flat.sum(1)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
