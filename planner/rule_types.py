"""The types of op rules: a rule as it stands in the table, one call of an op, and the rule made concrete for that call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]
Letters = tuple[tuple[str, ...], ...]
"""Per dim, the letters of that dim, major to minor; a dim of size 1 (or one that is broadcast) has none."""
Linear = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Operand:
    """Stands in an argument list where the `index`-th tensor operand of the op goes."""

    index: int


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an op. `name` is the overload packet ("aten.linear"); tensors in `args` are `Operand` markers."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """The argument at `position` or named `name`, else `default`."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def has(self, position: int, name: str) -> bool:
        """Whether that argument is a tensor."""
        return isinstance(self.arg(position, name), Operand)

    @property
    def rank(self) -> int:
        """Number of dims of the first operand."""
        return len(self.operands[0])


@dataclass(frozen=True, slots=True)
class Rule:
    """How an op may be split: one line of the table (the language is in `rule_pattern`).

    `linear` lists the ways a partial sum may pass: each entry is the operands that are P together, in the order of the
    line. `dims` are the dims `@` letters stand for: positions, or (position, name) of the argument that holds them.
    `slots` are the arguments the operands of the line come from, where some may be absent. `adapt` rewrites the rule for
    the flags of one call; None from it means that this form of the call has no rule.
    """

    line: str
    linear: Linear = ()
    kind: str = "elementwise"
    flops: str = "elements"
    implementation: Mapping[str, str] = field(default_factory=dict)
    dims: tuple[int, ...] | tuple[int, str] | tuple[int, str, int] | None = None
    slots: tuple[tuple[int, str], ...] = ()
    adapt: Callable[[Call, Rule], Rule | None] | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Factors:
    """The letters of one call: per operand and result, per dim, with sizes; `never` may not be split."""

    operands: tuple[Letters, ...]
    results: tuple[Letters, ...]
    sizes: dict[str, int]
    never: frozenset[str]


@dataclass(frozen=True, slots=True)
class RuleInstance:
    """A rule for one call: every letter has a size, and every dim of every tensor is a merge of letters.

    `flops` and `backward_flops` count a multiply-add as two, over unsplit sizes. `str()` writes the line back.
    """

    letters: tuple[str, ...]
    sizes: dict[str, int]
    never: frozenset[str]
    implementation: dict[str, str]
    operands: tuple[Letters, ...]
    results: tuple[Letters, ...]
    linear: Linear
    kind: str
    flops: float
    backward_flops: float
    projection: bool = False

    def free(self) -> tuple[str, ...]:
        """Letters that may be split without code of their own."""
        return tuple(c for c in self.letters if c not in self.never and c not in self.implementation)

    def __str__(self) -> str:
        shown: set[str] = set()
        sides = (", ".join(self._side(dims, shown) for dims in side) for side in (self.operands, self.results))
        return " -> ".join(sides)

    def _side(self, dims: Letters, shown: set[str]) -> str:
        return " ".join(self._dim(members, shown) for members in dims)

    def _dim(self, members: tuple[str, ...], shown: set[str]) -> str:
        texts = []
        for letter in members:
            mark = "!" if letter in self.never and letter not in shown else ""
            shown.add(letter)
            texts.append(letter + mark)
        if len(texts) == 1:
            return texts[0]
        return f"({' '.join(texts)})" if texts else "1"
