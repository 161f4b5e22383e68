"""A mixed-integer program built row by row from plain lists, and its solution by HiGHS through OR-Tools' MathOpt."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ..errors import ShardwrightError

INFINITE = float("inf")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the solver returned. `values` is empty where nothing is feasible; `bound` is proven.

    `duals` are those of the rows of a relaxed program, in their order.
    """

    values: Sequence[float]
    objective: float
    bound: float
    duals: Sequence[float] = ()


class Program:
    """minimise cost x  subject to  low <= A x <= high,  lower <= x <= upper,  some x whole."""

    def __init__(self) -> None:
        self._lower: list[float] = []
        self._upper: list[float] = []
        self._whole: list[bool] = []
        self.cost: list[float] = []
        self._low: list[float] = []
        self._high: list[float] = []
        self._rows: list[int] = []
        self._columns: list[int] = []
        self._values: list[float] = []

    def add(self, cost: float = 0.0, lower: float = 0.0, upper: float = 1.0, *, whole: bool = False) -> int:
        """A variable; returns its index."""
        self.cost.append(cost)
        self._lower.append(lower)
        self._upper.append(upper)
        self._whole.append(whole)
        return len(self.cost) - 1

    def row(self, terms: Iterable[tuple[int, float]], low: float = -INFINITE, high: float = INFINITE) -> int:
        """A row; terms of one variable add up. Returns its index."""
        index = len(self._low)
        self._low.append(low)
        self._high.append(high)
        total: dict[int, float] = {}
        for variable, coefficient in terms:
            total[variable] = total.get(variable, 0.0) + coefficient
        for variable in sorted(total):
            if total[variable]:
                self._rows.append(index)
                self._columns.append(variable)
                self._values.append(total[variable])
        return index

    def bounds(self, row: int, low: float, high: float) -> None:
        """Replace the sides of a row."""
        self._low[row], self._high[row] = low, high

    def limit(self, variable: int, upper: float) -> None:
        """Replace the upper bound of a variable."""
        self._upper[variable] = upper

    def solve(
        self, *, gap: float = 1e-6, nodes: int | None = None, relaxed: bool = False, fixed: Mapping[int, float] | None = None
    ) -> Answer:  # fmt: skip
        """Solve to a relative `gap`, or until so many `nodes`; `relaxed` drops integrality, `fixed` pins some variables.

        Raises ShardwrightError where the solver ends without an answer.
        """
        from ortools.math_opt.python import mathopt

        model = mathopt.Model.from_model_proto(self._proto(relaxed, fixed or {}))
        parameters = mathopt.SolveParameters(
            relative_gap_tolerance=gap, absolute_gap_tolerance=1e-9, enable_output=False, node_limit=nodes
        )
        with quiet():
            result = mathopt.solve(model, mathopt.SolverType.HIGHS, params=parameters)
        reason, reasons = result.termination.reason, mathopt.TerminationReason
        if reason in (reasons.INFEASIBLE, reasons.INFEASIBLE_OR_UNBOUNDED):
            return Answer((), INFINITE, INFINITE)
        bound = result.termination.objective_bounds.dual_bound
        if not result.has_primal_feasible_solution():
            if reason == reasons.NO_SOLUTION_FOUND:
                return Answer((), INFINITE, bound)
            raise ShardwrightError(
                f"the solver stopped without an answer: {reason.name.lower()} {result.termination.detail}"
            )
        found = result.variable_values()
        values = [found[v] for v in sorted(found, key=lambda v: v.id)]
        objective = result.objective_value()
        duals = result.dual_values() if relaxed and result.has_dual_feasible_solution() else {}
        return Answer(values, objective, min(bound, objective), [duals[r] for r in sorted(duals, key=lambda r: r.id)])

    def _proto(self, relaxed: bool, fixed: Mapping[int, float]):  # type: ignore[no-untyped-def]
        from ortools.math_opt import model_pb2

        proto, count = model_pb2.ModelProto(), len(self.cost)
        variables = proto.variables
        variables.ids.extend(range(count))
        variables.lower_bounds.extend(_with(self._lower, fixed))
        variables.upper_bounds.extend(_with(self._upper, fixed))
        variables.integers.extend([False] * count if relaxed else self._whole)
        paid = [i for i, c in enumerate(self.cost) if c]
        proto.objective.linear_coefficients.ids.extend(paid)
        proto.objective.linear_coefficients.values.extend([self.cost[i] for i in paid])
        rows = proto.linear_constraints
        rows.ids.extend(range(len(self._low)))
        rows.lower_bounds.extend(self._low)
        rows.upper_bounds.extend(self._high)
        matrix = proto.linear_constraint_matrix
        matrix.row_ids.extend(self._rows)
        matrix.column_ids.extend(self._columns)
        matrix.coefficients.extend(self._values)
        return proto


def _with(values: list[float], fixed: Mapping[int, float]) -> list[float]:
    return [fixed.get(i, value) for i, value in enumerate(values)] if fixed else values


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps what the solver prints (a library of its own, to file descriptor 1) out of the result of a command."""
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    try:
        kept = os.dup(1)
    except OSError:  # no standard output to protect
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
