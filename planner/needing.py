"""Which ops' backward passes need a parameter, and so how long one is there that is gathered or fetched for them.

The backward pass gets a whole group where the first of its ops needs any member, and lets go of each with its own last op.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property

from .memory import Facts
from .outline import Op, Saved

Unit = tuple[int, int]
"""A region and one of its instances."""


class Needing:
    """The ops that need each parameter; `saves` says what an op keeps, `again` names the ops that run again."""

    def __init__(
        self, ops: Sequence[Op], found: Facts, saves: Callable[[Op], tuple[Saved, ...]], again: Collection[str]
    ) -> None:
        self.ops, self.facts, self._saves, self._again = ops, found, saves, again

    @cached_property
    def spans(self) -> Mapping[Unit, tuple[int, int]]:
        """The first and the last op of every unit, in order."""
        spans: dict[Unit, tuple[int, int]] = {}
        for i, unit in enumerate(self.facts.instance):
            spans[unit] = (spans[unit][0] if unit in spans else i, i)
        return spans

    @cached_property
    def ops_of(self) -> Mapping[str, list[int]]:
        """By parameter, the ops whose backward pass needs it; what runs again does so from the end of its unit on."""
        found: dict[str, list[int]] = defaultdict(list)
        for i, op in enumerate(self.ops):
            saved = {item.index for item in self._saves(op) if item.source == "operand"}
            end = [self.spans[self.facts.instance[i]][1]] if op.name in self._again else []
            for j, use in enumerate(op.operands):
                if needs := end + ([i] if j in saved else []):
                    found[self.facts.aliases[use.tensor].root] += needs
        return found

    def asked(self, group: Sequence[str], unit: Unit | None = None) -> int:
        """The op (of a unit) whose backward pass is the first to need one of a group; -1 where none does."""
        low, high = self.spans[unit] if unit is not None else (0, len(self.ops))
        return max((i for t in group for i in self.ops_of.get(t, ()) if low <= i <= high), default=-1)
