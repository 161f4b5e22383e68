"""Fork-join regions of an outline: sets of ops that wait for one fork, need nothing of each other, and meet in one join.

Two towers, several heads, the branches of an Inception block, a vision and a text encoder ("Parallel Perception Network"). With
edges from the maker of a tensor to its readers, and those left out that follow from others (a skip connection over a branch
orders nothing that the branch does not), a region is a fork f and a join j such that f dominates and j post-dominates every op
between; its branches are what hangs together there. Regions nest: a branch may fork again.

What carries no gradient and follows from inputs, buffers and constants alone (masks, tables of positions) ties no branches
together: whoever reads it makes it again, as stages of a pipeline do (planner/staging.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import networkx as nx

from .outline import Outline
from .staging import made_again

START, END = "", "\0"
"""What comes before every op and after it; both are "" in a region."""

Edges = dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class ForkJoin:
    """Branches between the ops `fork` and `join` ("": the inputs, the end of the graph), in the order of the outline.

    `inner` are the regions inside the branches. A branch's results may be read after the join, too, or be outputs.
    """

    fork: str
    join: str
    branches: tuple[tuple[str, ...], ...]
    inner: tuple[ForkJoin, ...] = ()

    @property
    def ops(self) -> frozenset[str]:
        """All ops of all branches."""
        return frozenset(name for branch in self.branches for name in branch)


def fork_joins(outline: Outline) -> tuple[ForkJoin, ...]:
    """The outermost regions of an outline with what is nested in them, in order."""
    edges = _reduced(outline)
    order = {name: i for i, name in enumerate(edges)}
    found: dict[frozenset[str], ForkJoin] = {}
    for fork, join, ops in _spans(edges):
        branches = _together(ops, edges, order)
        if len(branches) > 1:
            region = ForkJoin(fork, join.replace(END, ""), branches)
            found.setdefault(region.ops, region)
    return _nested(sorted(found.values(), key=lambda r: (-len(r.ops), order[r.branches[0][0]])), order)


def every(regions: Sequence[ForkJoin]) -> Iterator[ForkJoin]:
    """All regions, each before what is nested in it."""
    for region in regions:
        yield region
        yield from every(region.inner)


def reads(outline: Outline) -> dict[str, tuple[str, ...]]:
    """The ops that each op waits for, in order; those that are made again where they are read stand for nothing."""
    makers = {use.tensor: op.name for op in outline.ops for use in op.results}
    again = made_again(outline)
    found: dict[str, tuple[str, ...]] = {}
    for op in outline.ops:
        if op.name not in again:
            mine = dict.fromkeys(makers[use.tensor] for use in op.operands if use.tensor in makers)
            found[op.name] = tuple(name for name in mine if name not in again)
    return found


def _reduced(outline: Outline) -> Edges:
    """Edges from every op to those that wait for it, between the start and the end, without any that follows from others."""
    before = reads(outline)
    after: Edges = {START: [], **{name: [] for name in before}, END: []}
    for name, sources in before.items():
        for source in sources or (START,):
            after[source].append(name)
    for name, users in after.items():
        if not users and name != END:
            users.append(END)
    bit = {name: 1 << i for i, name in enumerate(after)}
    reach: dict[str, int] = {}
    for name in reversed(after):  # every op stands after those it waits for
        beyond = 0
        for user in after[name]:
            beyond |= reach[user]
        after[name] = [user for user in after[name] if not beyond & bit[user]]
        reach[name] = beyond | sum(bit[user] for user in after[name])
    return after


@dataclass(frozen=True, slots=True)
class _Tree:
    """A dominator tree: when a walk over it enters and leaves each op."""

    enters: Mapping[str, int]
    leaves: Mapping[str, int]

    @classmethod
    def of(cls, parents: Mapping[str, str], root: str) -> _Tree:
        children: dict[str, list[str]] = {name: [] for name in parents}
        for name, parent in parents.items():
            if name != root:
                children[parent].append(name)
        enters, leaves = dict[str, int](), dict[str, int]()
        stack = [(root, False)]
        while stack:
            name, done = stack.pop()
            if done:
                leaves[name] = len(enters)
                continue
            enters[name] = len(enters)
            stack += [(name, True), *((child, False) for child in children[name])]
        return cls(enters, leaves)

    def over(self, high: str, low: str) -> bool:
        """Whether `high` stands above `low`, which is another."""
        return self.enters[high] < self.enters[low] < self.leaves[high]


def _spans(edges: Edges) -> Iterator[tuple[str, str, list[str]]]:
    """(fork, join, ops between them) of every fork with its nearest join, and of every join with its nearest fork."""
    graph = nx.DiGraph([(a, b) for a, users in edges.items() for b in users])
    if START not in graph:
        return
    above = {name: p for name, p in nx.immediate_dominators(graph, START).items() if p is not None}
    below = {name: p for name, p in nx.immediate_dominators(graph.reverse(copy=False), END).items() if p is not None}
    first, last = _Tree.of({START: START} | above, START), _Tree.of({END: END} | below, END)
    ends = {(name, below[name]) for name in edges if name != END and len(edges[name]) > 1}
    ends |= {(above[name], name) for name in edges if name != START and graph.in_degree(name) > 1}
    order = {name: i for i, name in enumerate(edges)}
    for fork, join in sorted(ends, key=lambda e: (order[e[0]], order[e[1]])):
        seen, queue = set[str](), list(edges[fork])
        while queue:
            name = queue.pop()
            if name not in seen and first.over(fork, name) and order[name] < order[join]:
                seen.add(name)
                queue += edges[name]
        yield fork, join, sorted((name for name in seen if last.over(join, name)), key=order.__getitem__)


def _together(ops: Sequence[str], edges: Edges, order: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
    """Ops in sets that hang together, in order."""
    inside = frozenset(ops)
    graph = nx.Graph()
    graph.add_nodes_from(ops)
    graph.add_edges_from((name, user) for name in ops for user in edges[name] if user in inside)
    found = (tuple(sorted(part, key=order.__getitem__)) for part in nx.connected_components(graph))
    return tuple(sorted(found, key=lambda branch: order[branch[0]]))


def _nested(regions: Sequence[ForkJoin], order: Mapping[str, int]) -> tuple[ForkJoin, ...]:
    """Regions, the largest first, with those that lie in one branch of another put into it."""
    outer: list[tuple[ForkJoin, list[ForkJoin]]] = []
    for region in regions:
        first = region.branches[0][0]
        home = next((inner for known, inner in outer if first in known.ops), None)
        if home is None:
            outer.append((region, []))
        else:
            home.append(region)
    found = (replace(region, inner=_nested(inner, order)) for region, inner in outer)
    return tuple(sorted(found, key=lambda region: order[region.branches[0][0]]))
