"""Outlines that fork and join, for tests: trees of branches drawn at random, of ops that only read and write."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from shardwright.planner.outline import Outline, Region
from solver_outlines import Builder

SIZE = 64


@dataclass
class Drawn:
    """An outline on its way, and the branches of every region in it as sets of ops."""

    made: Builder = field(default_factory=Builder)
    regions: list[frozenset[frozenset[str]]] = field(default_factory=list)

    def op(self, *sources: str) -> str:
        """One more op that reads results of ops (or the input "x"); returns its name."""
        name = f"op{len(self.made.ops)}"
        self.made.tensor(f"{name}.out", [[SIZE]])
        uses = [(s if s == "x" else f"{s}.out", ["n"]) for s in dict.fromkeys(sources)]
        self.made.op(name, "elementwise", uses, [(f"{name}.out", ["n"])], {"n": {"size": SIZE}})
        return name

    def part(self, dice: random.Random, source: str, depth: int) -> str:
        """A chain of ops and forks from `source` on; returns its last op."""
        for _ in range(dice.randint(1, 3)):
            source = self.fork(dice, self.op(source), depth - 1) if depth and dice.random() < 0.6 else self.op(source)
        return source

    def fork(self, dice: random.Random, source: str, depth: int) -> str:
        """Several branches and the op where they meet, which may read the fork, too."""
        ends, branches = [], []
        for _ in range(dice.randint(2, 4)):
            first = len(self.made.ops)
            ends.append(self.part(dice, source, depth))
            branches.append(frozenset(op.name for op in self.made.ops[first:]))
        self.regions.append(frozenset(branches))
        return self.op(*ends, *([source] if dice.random() < 0.5 else []))

    def outline(self, *outputs: str) -> Outline:
        """All of it as one region, with the last op's and other results as outputs."""
        ops = tuple(self.made.ops)
        wanted = tuple(dict.fromkeys((*(f"{name}.out" for name in outputs), f"{ops[-1].name}.out")))
        region = Region("all", (tuple(op.name for op in ops),), ((),))
        return Outline(self.made.tensors, ops, (region,), (), ("x",), "", wanted, 1, 1, "", trains=True)


def drawn(seed: int) -> tuple[Drawn, Outline]:
    """A tree of forks and its outline; some results inside branches are outputs or are read again at the end."""
    dice, made = random.Random(seed), Drawn()
    made.made.tensor("x", [[SIZE]], role="input")
    last = made.fork(dice, made.op("x"), 2)
    inside = [op.name for op in made.made.ops]
    made.op(last, *dice.sample(inside, min(2, len(inside))))
    return made, made.outline(*dice.sample(inside, 1))


def wired(edges: Sequence[Sequence[int]]) -> Outline:
    """Op i reads the ops `edges[i]`, or the input where those are none."""
    made = Drawn()
    made.made.tensor("x", [[SIZE]], role="input")
    for sources in edges:
        made.op(*(f"op{s}" for s in sources) if sources else ("x",))
    return made.outline()
