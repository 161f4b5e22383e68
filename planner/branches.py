"""Fork-join regions of an outline: sets of ops that wait for one fork, need nothing of each other, and meet in one join.

Two towers, several heads, the branches of an Inception block, a vision and a text encoder ("Parallel Perception Network"). With
edges from the maker of a tensor to its readers, and those left out that follow from others (a skip connection over a branch
orders nothing that the branch does not), a region is a fork f and a join j such that f dominates and j post-dominates every op
between; its branches are what hangs together there. Where a fork has no such join (several ops read both towers: a product and an
auxiliary loss) its branches are what needs it through one of its readers alone: the subtrees of the dominator tree below those that
read nothing else. Regions nest: a branch may fork again.

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

    `join` is the first op that reads several of them; others may, too, and a branch's results may be outputs. `inner` are the
    regions inside the branches.
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
    if len(edges) == 2:
        return ()
    graph = nx.DiGraph([(a, b) for a, users in edges.items() for b in users])
    first = _Tree.of(graph, START)
    found: dict[frozenset[str], ForkJoin] = {}
    for fork, join, ops in _spans(edges, graph, first):
        branches = _together(ops, edges, order)
        if len(branches) > 1:
            region = ForkJoin(fork, join.replace(END, ""), branches)
            found.setdefault(region.ops, region)
    joined = {region.fork for region in found.values()}
    for fork, branches in _open(edges, graph, first, order):
        if fork not in joined:
            region = ForkJoin(fork, _reader(branches, edges, order), branches)
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
    """A dominator tree: the nearest dominator of each op, and when a walk over the tree enters and leaves it."""

    parents: Mapping[str, str]
    enters: Mapping[str, int]
    leaves: Mapping[str, int]

    @classmethod
    def of(cls, graph: nx.DiGraph[str], root: str) -> _Tree:
        known = nx.immediate_dominators(graph, root)
        parents = {name: parent for name, parent in known.items() if parent is not None and name != root}
        children: dict[str, list[str]] = {name: [] for name in graph}
        for name, parent in parents.items():
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
        return cls(parents, enters, leaves)

    def over(self, high: str, low: str) -> bool:
        """Whether `high` stands above `low`, which is another."""
        return self.enters[high] < self.enters[low] < self.leaves[high]


def _spans(edges: Edges, graph: nx.DiGraph[str], first: _Tree) -> Iterator[tuple[str, str, list[str]]]:
    """(fork, join, ops between them) of every fork with its nearest join, and of every join with its nearest fork."""
    last = _Tree.of(graph.reverse(copy=False), END)
    ends = {(name, last.parents[name]) for name in edges if name != END and len(edges[name]) > 1}
    ends |= {(first.parents[name], name) for name in edges if name != START and graph.in_degree(name) > 1}
    order = {name: i for i, name in enumerate(edges)}
    for fork, join in sorted(ends, key=lambda e: (order[e[0]], order[e[1]])):
        seen, queue = set[str](), list(edges[fork])
        while queue:
            name = queue.pop()
            if name not in seen and first.over(fork, name) and order[name] < order[join]:
                seen.add(name)
                queue += edges[name]
        yield fork, join, sorted((name for name in seen if last.over(join, name)), key=order.__getitem__)


def _open(
    edges: Edges, graph: nx.DiGraph[str], first: _Tree, order: Mapping[str, int]
) -> Iterator[tuple[str, tuple[tuple[str, ...], ...]]]:
    """(fork, branches) of every op that several others read first: all that needs it through one of them alone."""
    below: dict[str, list[str]] = {name: [] for name in edges}
    for name in edges:
        if name not in (START, END) and graph.in_degree(name) == 1:
            below[first.parents[name]].append(name)
    named = sorted(edges, key=first.enters.__getitem__)
    for fork, heads in below.items():
        if len(heads) > 1:
            subtrees = (named[first.enters[head] : first.leaves[head]] for head in heads)
            yield fork, tuple(tuple(sorted(ops, key=order.__getitem__)) for ops in subtrees)


def _reader(branches: Sequence[Sequence[str]], edges: Edges, order: Mapping[str, int]) -> str:
    """The first op that reads several branches, "" for none."""
    readers: dict[str, set[int]] = {}
    for i, branch in enumerate(branches):
        for name in branch:
            for user in edges[name]:
                readers.setdefault(user, set()).add(i)
    found = [name for name, read in readers.items() if len(read) > 1 and name != END]
    return min(found, key=order.__getitem__, default="")


def _together(ops: Sequence[str], edges: Edges, order: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
    """Ops in sets that hang together, in order."""
    inside = frozenset(ops)
    graph = nx.Graph()
    graph.add_nodes_from(ops)
    graph.add_edges_from((name, user) for name in ops for user in edges[name] if user in inside)
    found = (tuple(sorted(part, key=order.__getitem__)) for part in nx.connected_components(graph))
    return tuple(sorted(found, key=lambda branch: order[branch[0]]))


def _nested(regions: Sequence[ForkJoin], order: Mapping[str, int]) -> tuple[ForkJoin, ...]:
    """Regions, the largest first, with those that lie in one branch of another put into it; of two that cross, the larger stays."""
    outer: list[tuple[ForkJoin, list[ForkJoin]]] = []
    for region in regions:
        met = [(known, inner) for known, inner in outer if known.ops & region.ops]
        if not met:
            outer.append((region, []))
        elif len(met) == 1 and any(region.ops <= frozenset(branch) for branch in met[0][0].branches):
            met[0][1].append(region)
    found = (replace(region, inner=_nested(inner, order)) for region, inner in outer)
    return tuple(sorted(found, key=lambda region: order[region.branches[0][0]]))
