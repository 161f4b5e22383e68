"""The integer program of one mesh shape: which strategy every op takes and how every parameter is stored.

    minimise   seconds of one optimizer step on one rank
    variables  x[v,s]   op class v runs by strategy s                                 binary, sum over s = 1
               z[w,o]   parameter class w is stored by option o                       binary, sum over o = 1
               y[e,p,q] along edge e the producer makes p and the consumer wants q    0..1
               u        "any of these": a transition, bucket or saved buffer that several users share, paid once
    rows       sum_q y[e,p,q] = sum of x (or z) that makes p,   sum_p y[e,p,q] = sum of x that wants q
               u >= each of its users
               memory at a time point <= limit                                        (added where a solution breaks one)

An edge joins *states* (placements), not strategies: equal columns are merged, and the flow equalities on both sides make the
relaxation nearly integral. Edges of one (producer, consumer) pair are shared by all tensor classes between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ShardwrightError
from .placement import Placement, R
from .program import quiet
from .space import Space

Key = tuple[Any, ...]
"""("x", v, s); ("z", w, o); ("e", w, o, q): parameter class w stored by o is used as q; ("y", edge, p, q): an edge goes from p
to q; ("any", groups of such keys): whether any holds; ("more", w, o, wants): how many of these uses beyond one there are."""
Terms = Sequence[tuple[Any, float]]
"""Solver variables with coefficients."""


@dataclass(frozen=True, slots=True)
class Form:
    """A linear form over keys, for memory rows."""

    constant: float
    terms: Mapping[Key, float]


@dataclass(frozen=True, slots=True)
class Choice:
    """A point of the space: the strategy of every op class and the option of every parameter class, by index."""

    strategies: tuple[int, ...]
    options: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Solution:
    """What the solver returned: the point, its objective (seconds, or bytes of the peak) and the proven bound.

    `choice` is None where nothing is feasible.
    """

    choice: Choice | None
    seconds: float
    bound: float


class RegionProgram:
    """The program of one space; memory rows are added between solves."""

    def __init__(self, space: Space, *, gap: float = 1e-5) -> None:
        from ortools.math_opt.python import mathopt

        self._mathopt = mathopt
        self.space, self.gap, self.m = space, gap, space.template.microbatches
        self.model = mathopt.Model()
        self._cost: dict[Any, float] = {}
        self._offset = 0.0
        self._any: dict[Key, Any] = {}
        self._peak: Any = None
        self._edges: dict[Key, dict[tuple[Any, Placement], Terms]] = {}
        self.x = [self._pick(len(found)) for found in space.strategies]
        self.z = [self._pick(len(found)) for found in space.options]
        self.e: dict[tuple[int, int, Placement], Terms] = {}
        self._ops()
        self._tensors()
        self._parameters()
        self._scale = self._objective()

    # -- building blocks

    def _pick(self, count: int) -> list[Any]:
        found = [self.model.add_binary_variable() for _ in range(count)]
        self._row([(v, 1.0) for v in found], 1.0, 1.0)
        return found

    def _row(self, terms: Iterable[tuple[Any, float]], low: float, high: float) -> None:
        row = self.model.add_linear_constraint(lb=low, ub=high)
        total: dict[Any, float] = {}
        for variable, coefficient in terms:
            total[variable] = total.get(variable, 0.0) + coefficient
        for variable, coefficient in total.items():
            row.set_coefficient(variable, coefficient)

    def _pay(self, terms: Terms, seconds: float) -> None:
        if seconds:
            for variable, coefficient in terms:
                self._cost[variable] = self._cost.get(variable, 0.0) + seconds * coefficient

    def _shared(self, users: Sequence[Terms]) -> Terms:
        """1 when any user is: the user itself when there is one, else a variable above all of them."""
        if len(users) == 1:
            return users[0]
        above = self.model.add_variable(lb=0.0, ub=1.0)
        for user in users:
            self._row([(above, 1.0), *((v, -c) for v, c in user)], 0.0, float("inf"))
        return [(above, 1.0)]

    def _edge(
        self,
        key: Key,
        makers: Mapping[Any, Terms],
        wanters: Mapping[Placement, Terms],
        legal: Mapping[tuple[Any, Placement], bool],
    ) -> dict[tuple[Any, Placement], Terms]:
        """Flow variables between what is made and what is wanted, with equalities on both sides."""
        if key in self._edges:
            return self._edges[key]
        found: dict[tuple[Any, Placement], Terms] = {}
        if len(makers) == 1 or len(wanters) == 1:
            for p, made in makers.items():
                for q, wanted in wanters.items():
                    found[p, q] = wanted if len(makers) == 1 else made
            for pair, flow in list(found.items()):
                if not legal[pair]:
                    self._row(flow, 0.0, 0.0)
                    del found[pair]
        else:
            for pair, allowed in legal.items():
                if allowed:
                    found[pair] = [(self.model.add_variable(lb=0.0, ub=1.0), 1.0)]
            for p, made in makers.items():
                flows = [t for (a, _), ts in found.items() if a == p for t in ts]
                self._row([*flows, *((v, -c) for v, c in made)], 0.0, 0.0)
            for q, wanted in wanters.items():
                flows = [t for (_, b), ts in found.items() if b == q for t in ts]
                self._row([*flows, *((v, -c) for v, c in wanted)], 0.0, 0.0)
        self._edges[key] = found
        return found

    # -- the parts of the objective

    def _ops(self) -> None:
        for v, item in enumerate(self.space.template.ops):
            runs = item.count * (1 if item.once else self.m)
            for s, strategy in enumerate(self.space.strategies[v]):
                self._pay([(self.x[v][s], 1.0)], runs * strategy.seconds)

    def _sides(self, v: int, index: int, *, result: bool) -> dict[Placement, list[tuple[Any, float]]]:
        found: dict[Placement, list[tuple[Any, float]]] = {}
        for s, strategy in enumerate(self.space.strategies[v]):
            placement = strategy.results[index] if result else strategy.operands[index]
            found.setdefault(placement, []).append((self.x[v][s], 1.0))
        return found

    def _tensors(self) -> None:
        whole = (R,) * len(self.space.shape.axes)
        for item in self.space.template.classes:
            if item.parameter is not None:
                continue
            if item.producer is None:
                one = self.model.add_variable(lb=1.0, ub=1.0)
                makers: Mapping[Placement, Terms] = {whole: [(one, 1.0)]}
            else:
                makers = self._sides(*item.producer, result=True)
            users: dict[tuple[Any, Placement], list[Terms]] = {}
            for v, i in item.consumers:
                wanters = self._sides(v, i, result=False)
                legal = {(p, q): self.space.costs.chain(item.tensor, p, q) is not None for p in makers for q in wanters}
                key = (item.producer or ("outside", v, i), v, i)
                for pair, flow in self._edge(key, makers, wanters, legal).items():
                    users.setdefault(pair, []).append(flow)
            runs = item.count * (1 if item.once else self.m)
            for (p, q), flows in users.items():
                self._transition(item.tensor, p, q, flows, runs)
            if item.sink:
                for p, made in makers.items():
                    self._transition(item.tensor, p, whole, [made], item.count)

    def _transition(self, tensor: Any, p: Placement, q: Placement, flows: list[Terms], runs: int) -> None:
        chain = self.space.costs.chain(tensor, p, q)
        if chain is None:
            for flow in flows:
                self._row(flow, 0.0, 0.0)
        elif chain.seconds:
            self._pay(self._shared(flows), runs * chain.seconds)

    def _parameters(self) -> None:
        groups: dict[Key, list[Terms]] = {}
        fixed: dict[Key, float] = {}
        users: dict[tuple[int, int, Placement], list[Terms]] = {}
        for item in self.space.template.classes:
            if item.parameter is None:
                continue
            w = item.parameter
            makers = {o: [(z, 1.0)] for o, z in enumerate(self.z[w])}
            for v, i in item.consumers:
                wanters = self._sides(v, i, result=False)
                legal = {(o, q): self.space.entry(w, o, q) is not None for o in makers for q in wanters}
                for (o, q), flow in self._edge(("parameter", w, v, i), makers, wanters, legal).items():
                    users.setdefault((w, o, q), []).append(flow)
        for (w, o, q), flows in users.items():
            self.e[w, o, q] = self._shared(flows)
            self._entry(w, o, q, groups, fixed)
        for w in range(len(self.z)):
            for o in range(len(self.z[w])):
                self._store(w, o, groups, fixed)
        for key, members in groups.items():
            if fixed[key]:
                self._pay(self._shared(members), fixed[key])

    def _entry(self, w: int, o: int, q: Placement, groups: dict[Key, list[Terms]], fixed: dict[Key, float]) -> None:
        space, item = self.space, self.space.template.parameters[w]
        option, entry = space.options[w][o], space.entry(w, o, q)
        assert entry is not None
        often = space.times(w, option)
        seconds = entry.chain.times(often.forward, often.backward)
        for axis in entry.reduced:
            bucket = space.bucket("all_reduce", item.region, (axis,))
            seconds += often.backward * bucket.slope * space.used_bytes(w, option)
            key = ("reduce", *space.group(w, option), axis)
            groups.setdefault(key, []).append(self.e[w, o, q])
            fixed[key] = item.count * often.backward * bucket.fixed
        self._pay(self.e[w, o, q], item.count * seconds)

    def _store(self, w: int, o: int, groups: dict[Key, list[Terms]], fixed: dict[Key, float]) -> None:
        space, item = self.space, self.space.template.parameters[w]
        option = space.options[w][o]
        often = space.times(w, option)
        seconds = 0.0
        if space.training and item.parameter.trainable:
            seconds = space.costs.prices.optimizer_seconds(
                space.stored_elements(w, option), space.optimizer, space.precision
            )
        if option.zero:
            gather = space.bucket("all_gather", item.region, option.zero_axes)
            scatter = space.bucket("reduce_scatter", item.region, option.zero_axes)
            seconds += space.used_bytes(w, option) * (often.gather * gather.slope + often.scatter * scatter.slope)
            key = ("gather", *space.group(w, option))
            groups.setdefault(key, []).append([(self.z[w][o], 1.0)])
            fixed[key] = item.count * (often.gather * gather.fixed + often.scatter * scatter.fixed)
        self._pay([(self.z[w][o], 1.0)], item.count * seconds)

    def _objective(self) -> float:
        """Set the objective in units that make the smallest op total about 1e4, and return the unit."""
        floor = sum(
            c.count * min(s.seconds for s in found)
            for c, found in zip(self.space.template.ops, self.space.strategies, strict=True)
        )
        scale = 1e4 / (floor * self.m) if floor > 0 else 1e6
        for variable, seconds in self._cost.items():
            self.model.objective.set_linear_coefficient(variable, seconds * scale)
        return scale

    # -- memory

    def variables(self, key: Key) -> Terms:
        """Solver terms of a key."""
        if key[0] == "x":
            return [(self.x[key[1]][key[2]], 1.0)]
        if key[0] == "z":
            return [(self.z[key[1]][key[2]], 1.0)]
        if key[0] == "e":
            return self.e.get((key[1], key[2], key[3]), [])
        if key[0] == "y":
            return self._edges.get(key[1], {}).get((key[2], key[3]), [])
        if key not in self._any and key[0] == "more":
            above = self.model.add_variable(lb=0.0)
            users = [t for want in key[3] for t in self.e.get((key[1], key[2], want), [])]
            self._row([(above, 1.0), (self.z[key[1]][key[2]], 1.0), *((v, -c) for v, c in users)], 0.0, float("inf"))
            self._any[key] = [(above, 1.0)]
        if key not in self._any:
            self._any[key] = self._shared([[t for k in group for t in self.variables(k)] for group in key[1]])
        return self._any[key]  # type: ignore[no-any-return]

    def limit(self, form: Form, limit_bytes: int) -> None:
        """Add the row form <= limit_bytes."""
        unit = max(1.0, limit_bytes / 1e5)
        terms = [(v, c * b / unit) for key, b in form.terms.items() for v, c in self.variables(key)]
        self._row(terms, -float("inf"), (limit_bytes - form.constant) / unit)

    def minimise_peak(self, forms: Sequence[Form]) -> None:
        """Make the largest of `forms`, in bytes, the objective; a later call adds more of them."""
        if self._peak is None:
            self._peak = self.model.add_variable(lb=0.0)
            largest = max((f.constant + sum(f.terms.values()) for f in forms), default=1.0)
            self._scale = 1.0 / max(1.0, largest / 1e5)
            for variable in self._cost:
                self.model.objective.set_linear_coefficient(variable, 0.0)
            self.model.objective.set_linear_coefficient(self._peak, 1.0)
        for form in forms:
            terms = [(v, -c * b * self._scale) for key, b in form.terms.items() for v, c in self.variables(key)]
            self._row([(self._peak, 1.0), *terms], form.constant * self._scale, float("inf"))

    # -- solving

    def solve(self) -> Solution:
        """Solve to the gap; raises ShardwrightError when the solver ends without proving optimality or infeasibility."""
        mathopt = self._mathopt
        parameters = mathopt.SolveParameters(
            relative_gap_tolerance=self.gap, absolute_gap_tolerance=1e-9, enable_output=False
        )
        with quiet():
            result = mathopt.solve(self.model, mathopt.SolverType.HIGHS, params=parameters)
        reason = result.termination.reason
        if reason in (mathopt.TerminationReason.INFEASIBLE, mathopt.TerminationReason.INFEASIBLE_OR_UNBOUNDED):
            return Solution(None, float("inf"), float("inf"))
        if reason != mathopt.TerminationReason.OPTIMAL or not result.has_primal_feasible_solution():
            raise ShardwrightError(
                f"the solver stopped without an answer: {reason.name.lower()} {result.termination.detail}"
            )
        values = result.variable_values()
        picked = [[max(range(len(row)), key=lambda i: values[row[i]]) for row in rows] for rows in (self.x, self.z)]
        bound = min(result.termination.objective_bounds.dual_bound, result.objective_value())
        choice = Choice(tuple(picked[0]), tuple(picked[1]))
        return Solution(choice, result.objective_value() / self._scale, bound / self._scale)
