"""Fork-join regions against how graphs were drawn and against their definition; placements against a simulator and all orders."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from types import MappingProxyType

import networkx as nx
import pytest
from forks import drawn, wired
from shardwright.planner.branchcosts import EXACT, Branch, Load, loads, place, side_by_side
from shardwright.planner.branches import ForkJoin, every, fork_joins, reads
from shardwright.planner.cluster import Cluster, Device
from shardwright.planner.outline import Outline
from shardwright.planner.paths import makespan
from shardwright.planner.prices import Prices
from simulations import compiled


def sets(regions: Sequence[ForkJoin]) -> set[frozenset[frozenset[str]]]:
    """Every region as its branches."""
    return {frozenset(map(frozenset, region.branches)) for region in every(regions)}


@pytest.mark.parametrize("seed", range(30))
def test_trees_of_forks_are_found_as_they_were_drawn(seed: int) -> None:
    made, outline = drawn(seed)
    found = fork_joins(outline)
    assert sets(found) == set(made.regions)
    for region in every(found):
        for inner in region.inner:
            assert any(inner.ops <= frozenset(branch) for branch in region.branches)


def by_definition(outline: Outline) -> set[frozenset[frozenset[str]]]:
    """Regions by taking ops out and looking what can still be reached."""
    before = reads(outline)
    graph = nx.DiGraph([(a, b) for b, sources in before.items() for a in sources or ("<",)])
    graph.add_edges_from([(name, ">") for name in before if not graph.out_degree(name)])
    graph = nx.transitive_reduction(graph)

    def cuts(gone: str, source: str, target: str) -> bool:
        rest = graph.subgraph(n for n in graph if n != gone)
        return not nx.has_path(rest, source, target)

    nearest = set()
    for name in graph:
        after = [n for n in nx.descendants(graph, name) if n == ">" or cuts(n, name, ">")]
        ahead = [n for n in nx.ancestors(graph, name) if n == "<" or cuts(n, "<", name)]
        if graph.out_degree(name) > 1:
            nearest.add((name, min(after, key=lambda n: len(nx.ancestors(graph, n)))))
        if graph.in_degree(name) > 1:
            nearest.add((min(ahead, key=lambda n: len(nx.descendants(graph, n))), name))
    found, forks = set(), set()
    for fork, join in nearest:
        between = nx.descendants(graph, fork) & nx.ancestors(graph, join)
        ops = {n for n in between if (fork == "<" or cuts(fork, "<", n)) and (join == ">" or cuts(join, n, ">"))}
        branches = frozenset(map(frozenset, nx.connected_components(graph.subgraph(ops).to_undirected())))
        if len(branches) > 1:
            found.add(branches)
            forks.add(fork)
    for fork in graph:
        heads = [n for n in graph.successors(fork) if graph.in_degree(n) == 1 and n != ">"]
        if fork not in forks and len(heads) > 1:
            rest = set(graph) - {"<", ">"}
            found.add(frozenset(frozenset(n for n in rest if n == h or cuts(h, "<", n)) for h in heads))
    return found


@pytest.mark.parametrize("seed", range(30))
def test_any_graph_has_the_regions_of_the_definition(seed: int) -> None:
    dice = random.Random(seed)
    edges = [dice.sample(range(i), min(i, dice.choice([0, 1, 1, 1, 2]))) for i in range(dice.randint(3, 16))]
    outline = wired(edges)
    found, wanted = sets(fork_joins(outline)), by_definition(outline)
    assert found <= wanted
    for branches in wanted - found:  # one that is not nested, but crosses another
        ops = frozenset().union(*branches)
        crossing = [frozenset().union(*other) for other in found if not any(ops <= branch for branch in other)]
        assert any(ops & other for other in crossing)


def test_two_towers_without_a_fork_and_a_skip_over_the_join() -> None:
    #           0 - 1 - 2 \
    #                      5 - 6 (reads 1, too)
    #           3 - 4 ---- /
    (region,) = fork_joins(wired([[], [0], [1], [], [3], [2, 4], [5, 1]]))
    assert (region.fork, region.join) == ("", "op5")
    assert region.branches == (("op0", "op1", "op2"), ("op3", "op4"))


def test_a_residual_is_no_region_and_cross_talk_ends_one() -> None:
    assert fork_joins(wired([[], [0], [1, 0], [2], [3, 2]])) == ()
    (region,) = fork_joins(wired([[], [0], [0], [1, 2], [1, 2], [3, 4]]))
    assert (region.join, region.branches) == ("op3", (("op1",), ("op2",)))


def test_towers_that_meet_twice() -> None:
    #       1 - 2 - 3          4 and 5 are two towers' ends, 6 reads both, 7 an auxiliary loss of one
    (region,) = fork_joins(wired([[], [0], [1], [0], [3], [2, 4], [2], [5, 6]]))
    assert (region.fork, region.join) == ("op0", "op5")
    assert region.branches == (("op1", "op2", "op6"), ("op3", "op4"))


def test_single_ops_and_branches_that_end_the_graph() -> None:
    (region,) = fork_joins(wired([[], [0], [0], [0]]))
    assert (region.fork, region.join, region.branches) == ("op0", "", (("op1",), ("op2",), ("op3",)))


# -- several workers


def played(branches: Sequence[Branch], workers: Sequence[Sequence[int]], entry: float, fork: int, join: int) -> float:
    """A simulation, event by event: one compute queue a worker, one queue of sends from each to the join."""
    done: list[float] = []
    for w, order in enumerate(workers):
        clock = entry if w != fork and order else 0.0
        link = clock
        for b in order:
            clock += branches[b].seconds
            done.append(clock)
            if w != join:
                link = max(link, clock)
                link += branches[b].sends
                done.append(link)
    return max(done)


def best(branches: Sequence[Branch], workers: int, entry: float, fork: int, join: int) -> float:
    """The least over all assignments and all orders on each worker."""
    found = []
    for at in itertools.product(range(workers), repeat=len(branches)):
        mine = [[b for b, w in enumerate(at) if w == k] for k in range(workers)]
        for orders in itertools.product(*(itertools.permutations(m) for m in mine)):
            found.append(played(branches, orders, entry, fork, join))
    return min(found)


@pytest.mark.parametrize("seed", range(24))
def test_few_branches_are_placed_best(seed: int) -> None:
    dice = random.Random(seed)
    branches = [Branch(dice.uniform(0.1, 4), dice.uniform(0, 2)) for _ in range(dice.randint(2, 5))]
    workers, entry = dice.randint(2, 3), dice.uniform(0, 1)
    fork, join = dice.randrange(workers), dice.randrange(workers)
    found = place(branches, workers, entry=entry, fork=fork, join=join)
    assert found.seconds == pytest.approx(played(branches, found.workers, entry, fork, join))
    assert found.seconds == pytest.approx(best(branches, workers, entry, fork, join))
    assert sorted(b for mine in found.workers for b in mine) == list(range(len(branches)))


@pytest.mark.parametrize("seed", range(6))
def test_many_branches_come_close_to_the_least(seed: int) -> None:
    dice = random.Random(seed)
    branches = [Branch(dice.uniform(0.5, 4)) for _ in range(14)]
    assert 3 ** len(branches) > EXACT
    found = place(branches, 3)
    least = max(sum(b.seconds for b in branches) / 3, max(b.seconds for b in branches))
    assert least <= found.seconds <= 4 / 3 * least  # Graham's bound for the longest first, which moves only improve


@pytest.mark.parametrize("seed", range(12))
def test_branches_are_split_where_the_shorter_takes_longer_than_talk(seed: int) -> None:
    dice = random.Random(seed)
    long, short = sorted((dice.uniform(0.2, 2), dice.uniform(0.2, 2)), reverse=True)
    cost = dice.uniform(0.1, 2)
    found = place([Branch(long), Branch(short)], 2, overhead=cost)
    assert (sum(map(bool, found.workers)) == 2) == (short > cost)
    assert found.seconds == pytest.approx(min(long + cost, long + short))
    # Equal branches, one of them sent its input and its result sent back.
    found = place([Branch(long, cost / 2)] * 2, 2, entry=cost / 2)
    assert found.seconds == pytest.approx(min(long + cost, 2 * long))


@pytest.mark.parametrize("seed", range(12))
def test_a_step_of_two_ranks_is_the_longer_branch_with_its_sends(seed: int) -> None:
    """The simulator of plans on the schedule `branches`, against the formula of one microbatch."""
    dice = random.Random(seed)
    f, b, send, back = ([dice.uniform(0.1, 3) for _ in range(4)] for _ in range(4))
    lists = compiled("branches", 2, 2, 1)
    seconds = makespan(lists, lists.placement, f, b, [0.0] * 4, send, back)[0]
    # Messages between two ranks go one after the other: what the branch leaves waits for what the fork sent.
    ahead = f[0] + max(max(f[1], send[0]) + send[1], send[0] + f[2]) + f[3]
    assert seconds == pytest.approx(ahead + b[3] + max(max(b[2], back[3]) + back[2], back[3] + b[1]) + b[0])
    assert max(f[1], f[2]) < ahead < sum(f) + send[0] + send[1]


# -- one device


def shared(branches: Sequence[Load], steps: int = 20000) -> float:
    """A simulation in small steps: what runs shares the device, all slowed down alike where it is more than whole."""
    left = [load.seconds for load in branches]
    step, clock = sum(left) / steps, 0.0
    while any(x > 1e-9 for x in left):
        running = [i for i, x in enumerate(left) if x > 1e-9]
        slow = max(1.0, sum(branches[i].share for i in running))
        clock += step
        for i in running:
            left[i] -= step / slow
    return clock


@pytest.mark.parametrize("seed", range(8))
def test_side_by_side_is_what_a_shared_device_takes(seed: int) -> None:
    dice = random.Random(seed)
    branches = []
    for _ in range(dice.randint(2, 4)):
        seconds = dice.uniform(0.5, 2)
        branches.append(Load(seconds, seconds * dice.uniform(0.1, 1)))
    assert side_by_side(branches) == pytest.approx(shared(branches), rel=1e-2)


def test_branches_that_fill_the_device_gain_nothing_small_ones_all() -> None:
    full, small = Load(1.0, 1.0), Load(1.0, 0.4)
    assert side_by_side([full, full]) == pytest.approx(2.0)
    assert side_by_side([small, small]) == pytest.approx(1.0)
    assert side_by_side([small, small], overhead=0.25) == pytest.approx(1.25)
    assert side_by_side([Load(1.0, 0.4, 0.9)] * 2) == pytest.approx(1.8)  # one host thread starts all kernels


def test_loads_say_how_much_of_a_device_ops_fill() -> None:
    rates = MappingProxyType({"default": 0.5})
    device = Device("toy", 1 << 34, {"float32": 1e12}, 1e10, 1e-6, rates, issue_seconds=3e-6)
    outline = wired([[], [0], [0], [1, 2]])
    (load,) = loads(outline, Prices(Cluster("toy", device, 1, 1, ()), "float32"), [("op1",)])
    streamed = 2 * 64 * 4 / 1e10 / 0.5, 3 * 64 * 4 / 1e10 / 0.5  # reads and writes; the gradient also reads one of them
    assert load.filled <= sum(streamed) * (1 + 1e-9)
    assert load.seconds == pytest.approx(load.filled + load.issue / 3)
    assert 0 < load.share < 0.5
    assert load.issue == pytest.approx(2 * 3e-6)
