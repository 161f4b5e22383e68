"""The first, widest part of a network on images, computed patch by patch (Lin et al. 2021, "MCUNetV2").

The chain of local ops (local.py) that begins at an image of the model's inputs and leaves through one value becomes one
`shardwright::patched` (tiles.py): of all such chains and all grids the one whose graph has the lowest peak of live bytes, at no
more work than `budget` on top of the model's. Where tiles overlap, halos are computed twice; a training step computes every tile
twice besides. A graph whose peak no chain lowers is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from ...planner.liveness import Step, curve, lifetimes
from ...planner.patches import Grid
from ...planner.rules import instantiate
from ...planner.tilings import Tilings, tilings
from ...planner.work import FLOPS_KINDS
from ..base import Contract, Program, emit, fake, is_tensor
from ..gradients import differentiable
from ..steps import Steps, steps_of, trains
from ..summarize import operands_of, target_name
from .local import is_image, is_local, written
from .tiles import patched

BEFORE = frozenset({
    "aten.permute", "aten.transpose", "aten.to", "aten._to_copy", "aten.contiguous", "aten.clone", "aten.unsqueeze",
    "aten.squeeze", "aten.reshape", "aten.view",
})  # fmt: skip
"""What may stand between an input and the image."""


@dataclass(frozen=True)
class Chain:
    """Calls that may become one, with the program that they are."""

    image: fx.Node
    nodes: tuple[fx.Node, ...]
    program: str
    given: tuple[fx.Node, ...]

    @property
    def tilings(self) -> Tilings:
        """The program on one sample of this image, in tiles."""
        shapes = tuple(tuple(fake(n).shape) for n in self.given)
        return tilings(self.program, tuple(fake(self.image).shape[1:]), shapes)


@dataclass(frozen=True)
class Patching:
    """One way to do it: which calls become one, on which grid, and what that is predicted to give.

    `peak` are the bytes alive at the fullest moment, inputs included and parameters not; `work` is that of the whole model
    (all products of a step) over what it was.
    """

    chain: Chain
    grid: Grid
    peak: int
    work: float


def images(graph: fx.Graph) -> list[fx.Node]:
    """The images of a graph: inputs of four dims, and what casts and changes of layout make of inputs."""
    found: list[fx.Node] = []
    early: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            fits = node.meta.get("role") == "input"
        else:
            fits = node.op == "call_function" and target_name(node.target) in BEFORE and node.args[0] in early
        if fits and is_tensor(node.meta.get("val")):
            early.add(node)
            found += [node] if is_image(node) else []
    return found


def chains(graph: fx.Graph) -> Iterator[Chain]:
    """Every chain of local calls from an image to one value, such that nothing else of it is used outside or returned."""
    for image in images(graph):
        own: dict[fx.Node, frozenset[fx.Node]] = {image: frozenset()}
        for node in graph.nodes:
            if node.op != "call_function" or node in own or not is_local(node, own.__contains__):
                continue
            parts = [n for n in node.all_input_nodes if n in own]
            own[node] = frozenset([node]).union(*(own[n] for n in parts))
            if all(user in own[node] for n in own[node] - {node} for user in n.users):
                nodes = tuple(n for n in own if n in own[node])
                program, given = written(image, nodes)
                yield Chain(image, nodes, program, tuple(given))


@dataclass(frozen=True)
class Around:
    """What is alive around a chain that has become one step: at most elsewhere, during it and in its backward pass.

    Without what the step holds inside. `width` are the bytes of an element.
    """

    most: int
    during: int
    backward: int
    samples: int
    width: int

    @property
    def least(self) -> int:
        """What is alive at least, however small tiles are."""
        return max(self.most, self.during, self.backward)

    def peak(self, plan: Tilings, grid: Grid) -> int:
        """Bytes alive at the fullest moment with the chain in tiles."""
        inside = self.during + self.samples * plan.held(grid, self.width)
        again = self.backward + self.samples * plan.held_backward(grid, self.width) if self.backward else 0
        return max(self.most, inside, again)


class Search:
    """Finds the best way for one graph."""

    def __init__(self, graph: fx.Graph, training: bool) -> None:
        self.training = training
        self.steps: Steps = steps_of(graph, training=training)
        self.work = {n: _work(n, training) for n in graph.nodes if n.op == "call_function"}
        self.total = sum(self.work.values())

    def best(self, found: Iterable[Chain], budget: float) -> Patching | None:
        """The way with the lowest peak, then with the least work, within the budget; None where none lowers the peak."""
        best: Patching | None = None
        pairs = [(self.around(chain), chain) for chain in found]
        for around, chain in sorted(pairs, key=lambda pair: pair[0].least):
            tilings, limit = chain.tilings, _limit(best, self.steps.peak)
            if around.least > limit[0]:
                continue
            rest, times = self.rest(chain)
            samples = around.samples
            for choice in tilings.choices(times, ((1 + budget) * self.total - rest) / samples):
                limit = _limit(best, self.steps.peak)
                if around.during + around.samples * around.width * choice.least > limit[0]:
                    break
                peak = around.peak(tilings, choice.grid)
                work = (rest + samples * choice.flops) / self.total if self.total else 1.0
                if (peak, work) < limit:
                    best = Patching(chain, choice.grid, peak, work)
        return best

    def around(self, chain: Chain) -> Around:
        """What is alive around a chain."""
        gone, last = {n.name for n in chain.nodes}, chain.nodes[-1]
        home = [self.steps.home.get(n.name, n.name) for n in (chain.image, *chain.given)]
        steps = [s for s in self.steps.steps if s.name not in gone or s.name == last.name]
        at = next(i for i, s in enumerate(steps) if s.name == last.name)
        steps[at] = Step(last.name, tuple(home), ((last.name, fake(last).nbytes),))
        flows = self.training and any(map(_flows, (chain.image, *chain.given)))
        kept = self.steps.returned.union(
            home if flows else (), *(names for name, names in self.steps.saves.items() if name not in gone)
        )
        given, alive, backward = self.steps.given_bytes, curve(steps, kept), 0
        if flows:
            earlier = sum(i.bytes for i in lifetimes(steps[:at], kept) if i.name in kept)
            backward = given + earlier + fake(last).nbytes + _flows(chain.image) * fake(chain.image).nbytes
        value = fake(chain.image)
        return Around(given + max(alive), given + alive[at], backward, value.shape[0], value.element_size())

    def rest(self, chain: Chain) -> tuple[float, dict[int, float]]:
        """Work of the model without a chain, and how often each convolution of the chain is computed."""
        flowing = [self.training and _flows(n) for n in (chain.image, *chain.given)]
        return self.total - sum(self.work[n] for n in chain.nodes), chain.tilings.times(flowing)


def _limit(best: Patching | None, before: int) -> tuple[int, float]:
    """Peak and work that a better way is below: those of the best one, at first the peak of the graph as it is."""
    return (best.peak, best.work) if best is not None else (before, 0.0)


def _work(node: fx.Node, training: bool) -> float:
    """FLOPs of a product; every operand that takes a gradient is one more of its size."""
    names, args, kwargs = operands_of(node)
    nodes: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: nodes.append(n))
    shapes, value = [tuple(fake(n).shape) for n in nodes if is_tensor(fake(n))], fake(node)
    if len(shapes) != len(names) or not is_tensor(value):
        return 0.0
    rule = instantiate(target_name(node.target), args, kwargs, shapes, [tuple(value.shape)])
    if rule is None or rule.kind not in FLOPS_KINDS:
        return 0.0
    return rule.flops * (1 + (training and sum(_flows(n) for n in nodes[:2])))


def _flows(node: fx.Node) -> bool:
    return node.meta.get("differentiable") is True


@dataclass(frozen=True)
class PatchPrefix(Contract):
    """The widest part of a network on images, patch by patch; `budget` is the work that may come on top, over the model's."""

    name: str = "patches"
    requires: tuple[str, ...] = ("simple",)
    budget: float = 0.25

    def apply(self, program: Program) -> Program:
        found = patching(program.graph, self.budget)
        if found is not None:
            patch(program.graph, found.chain, found.grid)
        return program


def patching(graph: fx.Graph, budget: float = 0.25) -> Patching | None:
    """The best way for a graph, None where none lowers its peak; a graph with a gradient anywhere is one that trains."""
    found = list(chains(graph))
    return Search(graph, trains(graph)).best(found, budget) if found else None


def patch(graph: fx.Graph, chain: Chain, grid: Grid) -> None:
    """Make a chain one call of `shardwright::patched` on a grid."""
    last = chain.nodes[-1]
    with graph.inserting_before(last):
        made = emit(graph, patched, (chain.image, list(chain.given), chain.program, list(grid)), like=last)
    made.meta["differentiable"] = differentiable(made)
    last.replace_all_uses_with(made)
    for node in reversed(chain.nodes):
        graph.erase_node(node)
