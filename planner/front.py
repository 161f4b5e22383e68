"""The region program: how one unit may run on the model axis, and what of it is kept for the backward pass.

    minimise   forward + backward seconds of one microbatch: compute, exposed communication, what is run again
    variables  x[v,s]    op v runs by strategy s                                        binary, sum over s = 1
               q[v,s]    ... and is run again in the backward pass                      binary, q <= x
               y[e,p,q]  along edge e the producer makes p and the consumer wants q     0..1
               b[t,p]    storage t, made in state p, is kept                            0..1
               k[t,q]    the copy of t in state q that a transition made is kept        0..1
               g[t,p,q]  ... or the transition runs again                               0..1
    rows       sum_q y = sum of x that makes p,  sum_p y = sum of x that wants q        (flow on both sides)
               what a kept op saved, and all operands of one that runs again, is there in the backward pass
               bytes kept <= budget

Solved without a budget, for the least bytes, and for budgets between the two, it traces the unit's front between time and
memory (planners.md 12, L0). Edges join states, not strategies, so that the relaxation is nearly integral.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .choices import choices, states
from .costs import Costs
from .memory import buffer, local_bytes, new_bytes
from .outline import Op, Tensor
from .part import Part
from .pins import Pins
from .placement import Placement, R, State, V, split
from .plan import MeshAxis
from .program import INFINITE, Program
from .saves import saves
from .space import restrict

Regathered = tuple[str, str]
"""A storage, and the state (as text) of the copy of it that is made again in the backward pass."""

TIE = 1e-3
"""Weight of kept bytes beside time, in thousandths of the whole: breaks ties towards keeping less."""


@dataclass(frozen=True, slots=True)
class Design:
    """One way to run a unit on the model axis: choice per op, ops and transitions that run again in the backward pass.

    `entry` and `exit` are layouts: what state the tensors that cross its borders stand in.
    """

    entry: str
    exit: str
    choices: tuple[str, ...]
    again: frozenset[str]
    regather: frozenset[Regathered]


@dataclass(frozen=True, slots=True)
class Way:
    """One strategy of an op on the model axis."""

    choice: str
    operands: tuple[State, ...]
    results: tuple[State, ...]
    forward: float
    backward: float


def crossing_state(tensor: Tensor, layout: str, places: Sequence[tuple[int, int]], ways: int) -> State:
    """The state of a border tensor under a layout: "S" splits its positions where they divide, "R" keeps it whole."""
    if layout == "S" and ways > 1:
        for dim, factor in places:
            if tensor.dims[dim][factor] % ways == 0:
                return split(dim, factor)
    return R


def crossing_placement(
    maker: Op, name: str, tensors: Mapping[str, Tensor], choice: Sequence[str], axes: Sequence[MeshAxis], layout: str
) -> Placement:
    """How a tensor of `maker`, which runs as `choice` says (by axis), crosses to another stage.

    As it is made, and on the model axis in the layout of the border.
    """
    index = next(i for i, use in enumerate(maker.results) if use.tensor == name)
    use, known = maker.results[index], dict(tensors)
    places = [
        (d, i)
        for d, members in enumerate(use.factors)
        for i, f in enumerate(members)
        if maker.factors[f].token and not maker.factors[f].batch
    ]
    return tuple(
        crossing_state(tensors[name], layout, places, axis.size)
        if axis.role == "model"
        else states(maker, known, mine)[1][index]
        for axis, mine in zip(axes, choice, strict=True)
    )


def ways_of(op: Op, tensors: Mapping[str, Tensor], costs: Costs, pins: Pins, residual: frozenset[str]) -> list[Way]:
    """Strategies of `op` on the one axis of `costs` that the pins leave, one per distinct states, the fastest."""
    n = costs.shape.sizes[0]
    known = dict(tensors)
    if n == 1:
        legal: tuple[str, ...] = ("R",)
    else:
        batch = {f.name for f in op.factors if f.batch}
        legal = tuple(c for c in choices(op, known, n) if c not in batch)
        legal = restrict(op, known, legal, n, pins, residual) or ("R",)
    found: dict[tuple[object, ...], Way] = {}
    for choice in legal:
        run = costs.run(op, known, (choice,))
        if run is None:
            continue
        operands, results = states(op, known, choice)
        way = Way(choice, operands, results, run.forward + run.inside, run.backward)
        kept = found.get((operands, results))
        if kept is None or way.forward + way.backward < kept.forward + kept.backward:
            found[operands, results] = way
    return list(found.values())


class FrontProgram:
    """The program of one part on one model axis, under layouts of its entry and exit tensors."""

    def __init__(
        self, part: Part, ways: Mapping[str, Sequence[Way]], costs: Costs, entry: Mapping[str, State], leave: Mapping[str, State]
    ) -> None:  # fmt: skip
        self.part, self.ways, self.costs = part, ways, costs
        self.entry, self.leave = entry, leave
        self.tensors = part.outline.tensors
        self.program = Program()
        self.kept: list[tuple[int, float]] = []
        self.x: dict[str, list[int]] = {}
        self.q: dict[str, list[int]] = {}
        self._flows: dict[tuple[str, str, int], dict[tuple[State, State], list[tuple[int, float]]]] = {}
        self._made: dict[str, dict[State, list[tuple[int, float]]]] = {}
        self._again: dict[str, dict[State, list[tuple[int, float]]]] = {}
        self.k: dict[tuple[str, State], int] = {}
        self.g: dict[tuple[str, State, State], int] = {}
        self.b: dict[tuple[str, State], int] = {}
        self._there: dict[tuple[str, State], int] = {}
        self._shared: dict[tuple[str, State, State], list[list[tuple[int, float]]]] = defaultdict(list)
        self._ops()
        self._edges()
        if part.outline.training:
            self._backward()
        most = max((abs(b) for _, b in self.kept), default=1.0)
        self._budget = self.program.row([(v, amount / most) for v, amount in self.kept])

    # -- what runs

    def _ops(self) -> None:
        one = self.program.add(lower=1.0)
        for name, state in self.entry.items():
            self._made[name] = {state: [(one, 1.0)]}
        for op in self.part.outline.ops:
            found = self.ways[op.name]
            self.x[op.name] = [self.program.add(w.forward + w.backward, whole=True) for w in found]
            self.program.row([(v, 1.0) for v in self.x[op.name]], 1.0, 1.0)
            again = [self.program.add(w.forward, whole=True) for w in found] if self.part.outline.training else []
            self.q[op.name] = again
            for x, q in zip(self.x[op.name], again, strict=False):
                self.program.row([(q, 1.0), (x, -1.0)], high=0.0)
            for i, use in enumerate(op.results):
                made: dict[State, list[tuple[int, float]]] = defaultdict(list)
                rerun: dict[State, list[tuple[int, float]]] = defaultdict(list)
                for s, way in enumerate(found):
                    made[way.results[i]].append((self.x[op.name][s], 1.0))
                    if again:
                        rerun[way.results[i]].append((again[s], 1.0))
                self._made[use.tensor] = dict(made)
                self._again[use.tensor] = dict(rerun)
        self._one = one

    def _makers(self, name: str) -> dict[State, list[tuple[int, float]]]:
        return self._made.get(name) or {R: [(self._one, 1.0)]}

    def _edges(self) -> None:
        for op in self.part.outline.ops:
            for i, use in enumerate(op.operands):
                if self.tensors[use.tensor].role == "parameter":
                    continue
                wants: dict[State, list[tuple[int, float]]] = defaultdict(list)
                for s, way in enumerate(self.ways[op.name]):
                    wants[way.operands[i]].append((self.x[op.name][s], 1.0))
                self._flows[use.tensor, op.name, i] = self._edge(use.tensor, dict(wants))
        for name, state in self.leave.items():
            self._flows[name, "", 0] = self._edge(name, {state: [(self._one, 1.0)]})
        if self.part.outline.loss:
            self._flows[self.part.outline.loss, "", 0] = self._edge(self.part.outline.loss, {R: [(self._one, 1.0)]})
        for (name, p, q), flows in self._shared.items():
            chain = self.costs.chain(self.tensors[name], (p,), (q,))
            assert chain is not None
            if chain.seconds:
                if len(flows) == 1:
                    for v, c in flows[0]:
                        self.program.cost[v] += c * chain.seconds
                    continue
                above = self.program.add(chain.seconds)
                for flow in flows:
                    self.program.row([(above, 1.0), *((v, -c) for v, c in flow)], low=0.0)

    def _edge(
        self, name: str, wants: dict[State, list[tuple[int, float]]]
    ) -> dict[tuple[State, State], list[tuple[int, float]]]:
        made, found = self._makers(name), {}
        legal = [(p, q) for p in made for q in wants if self.costs.chain(self.tensors[name], (p,), (q,)) is not None]
        if len(made) == 1 or len(wants) == 1:
            for p, q in legal:
                found[p, q] = wants[q] if len(made) == 1 else made[p]
            for p in made:
                for q in wants:
                    if (p, q) not in found:
                        self.program.row(wants[q] if len(made) == 1 else made[p], high=0.0)
        else:
            found = {pair: [(self.program.add(), 1.0)] for pair in legal}
            for p, terms in made.items():
                flow = [t for (a, _), ts in found.items() if a == p for t in ts]
                self.program.row([*flow, *((v, -c) for v, c in terms)], 0.0, 0.0)
            for q, terms in wants.items():
                flow = [t for (_, b), ts in found.items() if b == q for t in ts]
                self.program.row([*flow, *((v, -c) for v, c in terms)], 0.0, 0.0)
        for (p, q), flow in found.items():
            if p != q:
                self._shared[name, p, q].append(flow)
        return found

    # -- what is there in the backward pass

    def _backward(self) -> None:
        for op in self.part.outline.ops:
            ran, kept = self.x[op.name], self.q[op.name]
            saved = [saves(op, (way.choice,), self.tensors) for way in self.ways[op.name]]
            operands = [{item.index for item in items if item.source == "operand"} for items in saved]
            for i, use in enumerate(op.operands):
                if self._matters(use.tensor):
                    self._need(use.tensor, op, i, [ran[s] if i in own else kept[s] for s, own in enumerate(operands)])
            for s, (way, items) in enumerate(zip(self.ways[op.name], saved, strict=True)):
                for item in items:
                    if item.source == "result":
                        root, state = self._canon(op.results[item.index].tensor, way.results[item.index])
                        self._row(root, state, [(ran[s], 1.0)])
                    elif item.source == "new":
                        amount = new_bytes(op, item, (way.choice,), self.costs.shape.sizes)
                        self.kept += [(ran[s], amount), (kept[s], -amount)]

    def _matters(self, name: str) -> bool:
        """Whether a saved copy of the tensor takes memory of its own: activations, not inputs, tables or parameters."""
        root = self.part.facts.aliases[name].root
        return self.tensors[root].role == "activation" and root in self._made

    def _canon(self, name: str, state: State) -> tuple[str, State]:
        root, placement = buffer(self.part.facts, name, (state,))
        return root, placement[0]

    def _need(self, name: str, op: Op, i: int, users: Sequence[int]) -> None:
        by_want: dict[State, list[tuple[int, float]]] = defaultdict(list)
        for s, way in enumerate(self.ways[op.name]):
            by_want[way.operands[i]].append((users[s], 1.0))
        for want, terms in by_want.items():
            root, state = self._canon(name, want)
            self._row(root, state, terms)

    def _row(self, root: str, state: State, users: list[tuple[int, float]]) -> None:
        """Where any user is taken, the buffer is there."""
        there = self._available(root, state)
        self.program.row([(there, 1.0), *((v, -c) for v, c in users)], low=0.0)

    def _available(self, root: str, state: State) -> int:
        key = (root, state)
        if key in self._there:
            return self._there[key]
        there = self._there[key] = self.program.add()
        sources: list[tuple[int, float]] = []
        for p in self._makers(root):
            if self._same(p) == state:
                sources += self._base(root, p)
                continue
            chain = self.costs.chain(self.tensors[root], (p,), (state,))
            if chain is None:
                continue
            again = self.g[root, p, state] = self.program.add(chain.forward + chain.copies_forward)
            self.program.row([(again, 1.0), *((v, -c) for v, c in self._base(root, p))], high=0.0)
            sources.append((again, 1.0))
        if not any(self._same(p) == state for p in self._makers(root)) or len(self._makers(root)) > 1:
            copy = self.k[key] = self.program.add()
            self.kept.append((copy, local_bytes(self.tensors[root], (state,), self.costs.shape.sizes)))
            sources.append((copy, 1.0))
        self.program.row([(there, 1.0), *((v, -c) for v, c in sources)], high=0.0)
        return there

    def _same(self, state: State) -> State:
        return R if state == V else state

    def _base(self, root: str, p: State) -> list[tuple[int, float]]:
        """The storage as it was made: kept, or made again by running its op again."""
        key = (root, p)
        if key not in self.b:
            keep = self.b[key] = self.program.add()
            self.kept.append((keep, local_bytes(self.tensors[root], (p,), self.costs.shape.sizes)))
            self.program.row([(keep, 1.0), *((v, -c) for v, c in self._makers(root)[p])], high=0.0)
        return [(self.b[key], 1.0), *self._again.get(root, {}).get(p, [])]

    # -- solving

    def solve(
        self, budget_bytes: float = INFINITE, *, least: bool = False, like: Design | None = None, nodes: int | None = None
    ) -> tuple[Design, float] | None:  # fmt: skip
        """The fastest design within `budget_bytes` kept (`least`: the one that keeps least), and the bytes it keeps.

        `like` fixes every op's choice to that of another design, so that only what runs again is left open. None where
        nothing fits, or nothing was found within `nodes`.
        """
        program, cost = self.program, self.program.cost
        seconds, most = sum(cost) or 1.0, max((abs(b) for _, b in self.kept), default=1.0)
        on_time, on_bytes = (1e-6, 1.0) if least else (1e3, TIE)
        program.cost = [on_time * c / seconds for c in cost]
        for variable, amount in self.kept:
            program.cost[variable] += on_bytes * amount / most
        program.bounds(self._budget, -INFINITE, budget_bytes / most)
        fixed = self._fixed(like) if like is not None else {}
        answer = program.solve(gap=1e-4, nodes=nodes, fixed=fixed)
        program.cost = cost
        if not answer.values:
            return None
        return self._design(answer.values), sum(answer.values[v] * amount for v, amount in self.kept)

    def _fixed(self, like: Design) -> dict[int, float]:
        found: dict[int, float] = {}
        for op, choice in zip(self.part.outline.ops, like.choices, strict=True):
            for variable, way in zip(self.x[op.name], self.ways[op.name], strict=True):
                found[variable] = float(way.choice == choice)
        return found

    def _design(self, values: Sequence[float]) -> Design:
        picks = {}
        for op in self.part.outline.ops:
            row = self.x[op.name]
            picks[op.name] = max(range(len(row)), key=lambda s: values[row[s]])
        again = frozenset(n for n, row in self.q.items() if row and sum(values[v] for v in row) > 0.5)
        ways = {op.name: self.ways[op.name][picks[op.name]] for op in self.part.outline.ops}
        regather = frozenset((root, str(q)) for (root, _, q), v in self.g.items() if values[v] > 0.5)
        return Design("", "", tuple(way.choice for way in ways.values()), again, regather & self._taken(ways))

    def _taken(self, ways: Mapping[str, Way]) -> frozenset[Regathered]:
        """Copies that an op takes: one that costs nothing may be set in the program without a taker."""
        found = (
            self._canon(use.tensor, state)
            for op in self.part.outline.ops
            for use, state in zip(op.operands, ways[op.name].operands, strict=True)
        )
        return frozenset((root, str(state)) for root, state in found)
