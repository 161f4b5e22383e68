"""Sample calls for every op with a rule: the lines of rule_samples.txt, and calls made from the schema of elementwise ops."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
Sample = Callable[["Draw"], Call]

UNIT = frozenset(
    """acos asin atanh arccos arcsin arctanh logit log log2 log10 log1p sqrt rsqrt digamma lgamma erfinv reciprocal i0 xlogy
    log_sigmoid""".split()  # noqa: SIM905
)
"""Elementwise ops that want values inside (0, 1)."""
INTEGER = frozenset(
    """bitwise_and bitwise_or bitwise_xor bitwise_not bitwise_left_shift bitwise_right_shift __lshift__ __rshift__ __and__
    __or__ __xor__""".split()  # noqa: SIM905
)
RANDOM = frozenset(
    """bernoulli rand_like randn_like randint_like empty_like rand randn randint randperm empty new_empty
    empty_permuted""".split()  # noqa: SIM905
)
"""Ops whose values cannot be compared."""


class Draw:
    """Random sizes and tensors for one sample; its attributes are the names the lines use."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.b, self.s, self.h, self.k, self.v = (self.random.choice((2, 4, 6)) for _ in range(5))

    def x(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def unit(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64) * 0.8 + 0.1

    def ids(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def permutation(self, size: int) -> torch.Tensor:
        return torch.randperm(size, generator=self.generator)

    def mask(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator) < 0.6

    def attend(self, *shape: int) -> torch.Tensor:
        return self.mask(*shape).index_fill(-1, torch.tensor([0]), True)

    def labels(self, classes: int, *shape: int) -> torch.Tensor:
        ids = self.ids(classes, *shape)
        return torch.where(torch.rand(shape, generator=self.generator) < 0.3, torch.full_like(ids, -100), ids)

    def grad(self, x: torch.Tensor) -> torch.Tensor:
        return x.requires_grad_()

    def names(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in dir(self) if not name.startswith("_")} | {"torch": torch}


def read() -> dict[str, list[Sample]]:
    """The lines of rule_samples.txt by op."""
    found: dict[str, list[Sample]] = defaultdict(list)
    for line in (Path(__file__).parent / "rule_samples.txt").read_text().splitlines():
        if not line.startswith("#"):
            found[line.partition(".")[0]].append(parse(line))
    return found


def parse(line: str) -> Sample:
    """ "linear.default(x(b, h), x(k, h))" as a function of a draw."""
    target, _, rest = line.partition("(")
    packet, _, overload = target.partition(".")
    op = getattr(getattr(torch.ops.aten, packet), overload)
    code = compile(f"arguments({rest}", line, "eval")

    def sample(draw: Draw) -> Call:
        args, kwargs = eval(code, draw.names() | {"arguments": lambda *a, **k: (a, k)})
        return op, args, kwargs

    return sample


def elementwise(name: str) -> list[Sample]:
    """Calls of every overload that takes only tensors and numbers: equal shapes, then broadcast ones."""
    packet = getattr(torch.ops.aten, name)
    found: list[Sample] = []
    for overload in packet.overloads():
        op = getattr(packet, overload)
        every = op._schema.arguments
        required = [a for a in every if not a.has_default_value()]
        kinds = [str(a.type) for a in required]
        plain = all(k in ("Tensor", "number", "float", "int") for k in kinds) and kinds[:1] == ["Tensor"]
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in every)
        if not plain or writes or any(a.kwarg_only for a in required):
            continue
        for spread in (False, True)[: kinds.count("Tensor")]:
            found.append(lambda draw, op=op, kinds=kinds, spread=spread: (op, _values(draw, name, kinds, spread), {}))
    return found


def _values(draw: Draw, name: str, kinds: list[str], spread: bool) -> tuple[Any, ...]:
    values: list[Any] = []
    for i, kind in enumerate(kinds):
        shape = (draw.b, draw.s, draw.h) if i == 0 or not spread else (1, draw.h)
        if kind != "Tensor":
            values.append(2 if kind == "int" or name in INTEGER else 0.5)
        elif name in INTEGER:
            values.append(draw.ids(4, *shape))
        elif name in UNIT:
            values.append(draw.unit(*shape))
        else:
            values.append(draw.x(*shape) if name not in ("acosh", "arccosh") else draw.unit(*shape) + 1)
    return tuple(values)
