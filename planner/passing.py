"""Gradients that share memory: an addition hands the gradient of its sum on to both of its operands as it is.

So along a residual connection one gradient stands for the sum, for the branch until that has used it, and for what went past the
branch until the branch's own gradient comes: only then is there a second one, their sum.
"""

from __future__ import annotations

from collections import defaultdict

from .memory import PASSING, Facts, Span, local_bytes
from .outline import Op, Outline
from .uses import Uses

Interval = tuple[int, int, float]
"""The first and the last op at whose backward pass a gradient is there, and its bytes."""


class Passing:
    """The memory of activations' gradients under one assignment of placements; those of `lasting` ones stay to the end."""

    def __init__(
        self, outline: Outline, found: Facts, uses: Uses, sizes: tuple[int, ...], lasting: frozenset[str] = frozenset()
    ) -> None:
        self.outline, self.facts, self.uses, self.sizes, self.lasting = outline, found, uses, sizes, lasting
        self.users: dict[str, list[int]] = defaultdict(list)
        for i, op in enumerate(outline.ops):
            inside = {found.aliases[use.tensor].root for use in op.results}
            for root in dict.fromkeys(found.aliases[use.tensor].root for use in op.operands):
                if root not in inside:
                    self.users[root].append(i)
        self._first: dict[str, str] = {}

    def intervals(self) -> list[Interval]:
        """When each piece of memory is there, in no order."""
        times: dict[str, list[Interval]] = defaultdict(list)
        for span in sorted(self.facts.spans, key=lambda span: -span.end):
            amount = self._bytes(span.root)
            first, users = self._came(span), self.users[span.root]
            alone = users[-2] if len(users) > 1 and first != span.root else span.start
            times[first].append((alone, span.end - 1, amount))
            if span.root in self.lasting:
                times[first if alone == span.start else span.root].append((0, span.start, amount))
            if alone > span.start:
                times[span.root].append((span.start, alone - 1, amount))
        return [interval for mine in times.values() for interval in _joined(mine)]

    def _came(self, span: Span) -> str:
        """Whose memory the first gradient of a tensor that comes lies in; spans are asked from the last to the first."""
        op = self.outline.ops[span.end]
        result = op.results[0].tensor if op.results else ""
        if result in self.facts.aliases and self._hands_on(op, span.root):
            after = self.facts.aliases[result].root
            self._first[span.root] = self._first.get(after, after) if len(self.users[after]) == 1 else after
        return self._first.setdefault(span.root, span.root)

    def _hands_on(self, op: Op, root: str) -> bool:
        """Whether the gradient of the result of `op` is that of its operand."""
        if op.target not in PASSING or self.users[root][-1:] != [self.facts.order[op.name]]:
            return False
        wanted = zip(op.operands, self.uses.wanted[op.name], strict=True)
        placed = [want for use, want in wanted if self.facts.aliases[use.tensor].root == root]
        result = op.results[0].tensor
        same = self._bytes(root) == local_bytes(self.outline.tensors[result], self.uses.produced[result], self.sizes)
        return same and all(want == self.uses.produced.get(root) for want in placed)

    def _bytes(self, root: str) -> float:
        return local_bytes(self.outline.tensors[root], self.uses.produced[root], self.sizes)


def _joined(intervals: list[Interval]) -> list[Interval]:
    """Intervals of one piece of memory without what they share."""
    found: list[Interval] = []
    for low, high, amount in sorted(interval for interval in intervals if interval[0] <= interval[1]):
        if found and low <= found[-1][1] + 1:
            before = found.pop()
            found.append((before[0], max(before[1], high), amount))
        else:
            found.append((low, high, amount))
    return found
