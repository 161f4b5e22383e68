"""Regions: repeats found whatever stands before them, long spans cut at their narrow points, every op and parameter once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shardwright.planner.outline import Region
from shardwright.planner.regions import LEAST_OPS, WHOLE_OPS, Node, find_regions


class Graph:
    """Builds nodes; every op has one result, named like it."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.parameters: list[str] = []
        self.borders: list[int] = [0]

    def op(self, signature: str, *operands: str, weight: bool = False, elements: int = 1) -> str:
        name = f"op{len(self.nodes)}"
        if weight:
            self.parameters.append(f"w{len(self.nodes)}")
            operands = (*operands, self.parameters[-1])
        self.nodes.append(Node(name, signature, operands, (name,), (elements,)))
        return name

    def unique(self, *operands: str, elements: int = 1) -> str:
        return self.op(f"unique{len(self.nodes)}", *operands, elements=elements)

    def chain(self, x: str, length: int) -> str:
        for _ in range(length):
            x = self.unique(x)
        return x

    def block(self, x: str, inside: int, *, kind: str = "") -> str:
        """A residual block of `inside` + 1 ops; of one kind, blocks are equal; of none, nothing is."""
        y = x
        for i in range(inside):
            y = self.op(f"{kind}{i}", y, weight=i % 3 == 0) if kind else self.unique(y)
        y = self.op(f"{kind}add", x, y) if kind else self.unique(x, y)
        self.borders.append(len(self.nodes))
        return y

    def regions(self) -> tuple[Region, ...]:
        return find_regions(self.nodes, self.parameters)


def sizes(regions: Sequence[Region]) -> list[tuple[int, int]]:
    """(instances, ops of each)."""
    return [(r.repeats, len(r.instances[0])) for r in regions]


def starts(regions: Sequence[Region]) -> list[int]:
    found, at = [], 0
    for region in regions:
        found.append(at)
        at += sum(map(len, region.instances))
    return found


def test_layers_repeat() -> None:
    g = Graph()
    x = g.chain("input", 4)
    for _ in range(5):
        x = g.block(x, 9, kind="layer")
    g.chain(x, 3)
    assert sizes(g.regions()) == [(1, 4), (5, 10), (1, 3)]


@pytest.mark.parametrize("ops", [1, 12, WHOLE_OPS])
def test_embeddings_and_heads_stay_whole(ops: int) -> None:
    g = Graph()
    g.chain("input", ops)
    assert sizes(g.regions()) == [(1, ops)]


def test_long_spans_are_cut_between_blocks() -> None:
    g = Graph()
    x = "input"
    for inside in (15, 18, 13, 22, 16, 14, 17, 19):
        x = g.block(x, inside)
    assert starts(g.regions()) == g.borders[:-1]
    assert [r.name for r in g.regions()] == [f"r{i}" for i in range(8)]


def test_short_blocks_go_together() -> None:
    g = Graph()
    x = "input"
    for inside in (7, 8, 6, 9, 7, 6, 8, 9, 7, 8, 6, 7):
        x = g.block(x, inside)
    found = starts(g.regions())
    assert set(found) <= set(g.borders)
    assert all(b - a >= LEAST_OPS for a, b in zip(found, [*found[1:], len(g.nodes)], strict=True))
    assert 4 <= len(found) <= 6


def test_long_blocks_are_cut_inside() -> None:
    g = Graph()
    g.block(g.block("input", 100), 100)
    regions = g.regions()
    assert g.borders[1] in starts(regions)
    assert all(LEAST_OPS <= ops <= WHOLE_OPS for _, ops in sizes(regions))


def test_long_skips_do_not_move_the_cuts() -> None:
    """Encoder and decoder with a skip from each level to its mirror image: cut at the narrow points all the same."""
    g = Graph()
    x, kept = "input", []
    for inside in (15, 17, 14, 16):
        x = g.block(x, inside)
        kept.append(x)
    x = g.block(x, 15)
    joined = []
    for inside in (16, 14, 17, 15):
        x = g.unique(x, kept.pop())
        joined.append(len(g.nodes))
        x = g.block(x, inside)
    found = starts(g.regions())
    assert len(found) >= 8
    assert set(found) <= {*g.borders, *joined}
    assert set(joined) <= set(found)  # one tensor fewer than before the skip was joined


def test_cuts_avoid_large_tensors() -> None:
    """An upsampling grows what crosses: of two gaps with one tensor the smaller is cut."""
    g = Graph()
    x = g.block("input", 20)
    small = len(g.nodes)
    x = g.unique(x, elements=64)
    x = g.unique(x, elements=64)
    y = x
    for _ in range(20):
        y = g.unique(y, elements=64)
    g.unique(x, y)
    assert starts(g.regions()) == [0, small]


def test_first_blocks_of_stages_do_not_hide_repeats() -> None:
    """A ResNet: the first block of a stage ends like the others but has another way around; all equal blocks are found."""
    g = Graph()
    x = g.chain("input", 5)
    repeats = []
    for stage, blocks in enumerate((3, 4, 6)):
        around = g.op(f"shortcut{stage}", x, weight=True)
        y = g.op(f"down{stage}", x, weight=True)
        for i in range(1, 8):
            y = g.op(f"s{stage}.{i}", y, weight=i % 3 == 0)
        x = g.op(f"s{stage}.relu", g.op(f"s{stage}.add", around, y))
        repeats.append((blocks - 1, 10, len(g.nodes)))
        for _ in range(blocks - 1):
            y = x
            for i in range(8):
                y = g.op(f"s{stage}.{i}", y, weight=i % 3 == 0)
            x = g.op(f"s{stage}.relu", g.op(f"s{stage}.add", x, y))
    g.chain(x, 4)
    regions = g.regions()
    found = [(r.repeats, len(r.instances[0]), at) for r, at in zip(regions, starts(regions), strict=True)]
    assert [f for f in found if f[0] > 1] == repeats


def test_parameters_belong_to_their_first_use() -> None:
    g = Graph()
    x = g.block("input", 20)
    g.parameters.append("shared")
    x = g.op("first", x, "shared")
    x = g.block(x, 20)
    g.op("second", x, "shared")
    regions = g.regions()
    assert len(regions) > 1
    owners = [r for r in regions if "shared" in r.parameters[0]]
    assert [any(op == "op21" for op in r.instances[0]) for r in owners] == [True]


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Random operands near and far, some parameters, signatures that repeat now and then."""
    g = Graph()
    for _ in range(draw(st.integers(0, 150))):
        back = draw(st.lists(st.integers(1, 40), max_size=3))
        operands = [g.nodes[-b].name for b in back if b <= len(g.nodes)] or ["input"]
        kind = draw(st.integers(0, 3))
        name = f"kind{kind}" if kind else f"unique{len(g.nodes)}"
        g.op(name, *operands, weight=draw(st.booleans()), elements=draw(st.integers(0, 9)))
    return g


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_every_op_and_parameter_once(g: Graph) -> None:
    regions = g.regions()
    assert [op for r in regions for ops in r.instances for op in ops] == [n.name for n in g.nodes]
    assert sorted(p for r in regions for names in r.parameters for p in names) == sorted(g.parameters)
    assert [r.name for r in regions] == [f"r{i}" for i in range(len(regions))]
    assert regions == g.regions()
    for region in regions:
        assert len({len(ops) for ops in region.instances}) == 1
