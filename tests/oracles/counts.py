"""Other formulations of the stage problem: how many units take which option, and a knapsack walked unit by unit."""

from __future__ import annotations

from collections.abc import Sequence

from shardwright.planner.paths import makespan
from shardwright.planner.program import INFINITE, Program
from shardwright.planner.schedules import actions, stage_rank
from shardwright.planner.stages import StageProblem


class CountProgram:
    """One region, one layout, one chunk a rank, the same seconds of a send everywhere: n[stage, option] units.

    minimise T subject to sum n = units, sum over options of n[s] >= 1, bytes, and T >= the rows of a 1F1B pipeline in closed
    form (planners.md 12, LB3) or of GPipe's, then critical paths of the simulator until the value of a division is T.
    """

    def __init__(self, problem: StageProblem) -> None:
        self.problem, self.p = problem, problem.pipeline
        (self.options,) = problem.options
        self.units = len(problem.line)
        self.send = problem.send(1, "R") if self.units > 1 else (0.0, 0.0)
        self.program = Program()
        self.time = self.program.add(1.0, upper=INFINITE)
        self.n = [
            [self.program.add(upper=float(self.units), whole=True) for _ in self.options] for _ in range(self.p.stages)
        ]
        self.program.row([(v, 1.0) for mine in self.n for v in mine], float(self.units), float(self.units))
        for s, mine in enumerate(self.n):
            self.program.row([(v, 1.0) for v in mine], low=1.0)
            self._memory(s, mine)
        for rank in range(self.p.ranks):
            self._closed(rank)

    def _memory(self, stage: int, mine: Sequence[int]) -> None:
        p, cap = self.p, self.problem.memory.cap_bytes
        live = min(p.microbatches, p.ranks - stage) if p.schedule == "1f1b" else p.microbatches
        work = self.program.add(upper=INFINITE)
        once = p.stages == p.microbatches == 1
        for o, v in zip(self.options, mine, strict=True):
            used = self.program.add(whole=True)
            self.program.row([(v, 1.0), (used, -float(self.units))], high=0.0)
            self.program.row([(work, 1.0), (used, -o.work / cap)], low=0.0)
        held = [o.static + (0.0 if once else o.gradient) + live * o.saved for o in self.options]
        self.program.row([(work, 1.0), *((v, h / cap) for v, h in zip(mine, held, strict=True))], high=1.0)
        stepping = [o.static + o.gradient + o.step for o in self.options]
        self.program.row([(v, h / cap) for v, h in zip(mine, stepping, strict=True)], high=1.0)
        host = self.problem.memory.host_bytes
        if host < INFINITE:
            away = [o.host + live * o.host_saved for o in self.options]
            self.program.row([(v, h / max(host, 1.0)) for v, h in zip(mine, away, strict=True)], high=min(host, 1.0))

    def _terms(self, stage: int, forward: float, backward: float, finish: float = 0.0) -> list[tuple[int, float]]:
        return [
            (v, -(forward * o.forward + backward * o.backward + finish * o.finish))
            for o, v in zip(self.options, self.n[stage], strict=True)
        ]

    def _closed(self, rank: int) -> None:
        """T >= ramp to the rank, its own microbatches, and what is left of the first one's round trip; to its end and back."""
        m, send = float(self.p.microbatches), sum(self.send)
        own = [t for s in range(rank) for t in self._terms(s, 1.0, 1.0)]
        self.program.row([(self.time, 1.0), *own, *self._terms(rank, m, m)], low=rank * send)
        ahead = [t for s in range(rank) for t in self._terms(s, 1.0, 0.0)]
        self.program.row([(self.time, 1.0), *ahead, *self._terms(rank, m, m, 1.0)], low=rank * self.send[0])
        if self.p.schedule == "1f1b":
            alive = min(self.p.microbatches, self.p.ranks - rank)
            trips = (self.p.microbatches - 1) // alive + 1
            rest = [t for s in range(rank, self.p.ranks) for t in self._terms(s, float(trips), float(trips))]
            hops = trips * (self.p.ranks - 1 - rank) * send
            self.program.row([(self.time, 1.0), *own, *rest], low=rank * send + hops)

    def solve(self) -> float | None:
        """The least step time; None where nothing fits."""
        lists = actions(self.p.schedule, self.p.ranks, 1, self.p.microbatches)
        placement = stage_rank(self.p.schedule, self.p.ranks, 1)
        best = INFINITE
        for _ in range(60):
            answer = self.program.solve(gap=1e-9)
            if not answer.values:
                return None
            counts = [[round(answer.values[v]) for v in mine] for mine in self.n]
            held = [[n * x for n, x in zip(mine, part, strict=True)] for mine in counts for part in self._parts()]
            sums = [[sum(held[s * 3 + k]) for s in range(self.p.stages)] for k in range(3)]
            ahead = [self.send[0]] * (self.p.stages - 1) + [0.0]
            back = [0.0] + [self.send[1]] * (self.p.stages - 1)
            seconds, path = makespan(lists, placement, sums[0], sums[1], [0.0] * self.p.stages, ahead, back, sums[2])
            best = min(best, seconds)
            if best <= answer.bound * (1 + 1e-9):
                return best
            known: dict[str, list[float]] = {"send_forward": ahead, "send_backward": back}
            constant = sum(n * known[part][s] for (s, part), n in path.counts.items() if part in known)
            terms = [(self.time, 1.0)]
            for (s, part), n in path.counts.items():
                if part not in known:
                    terms += self._terms(
                        s, *(float(n) * (part.startswith(name)) for name in ("forward", "back", "finish"))
                    )
            self.program.row(terms, low=constant)
        raise AssertionError("the paths do not end")

    def _parts(self) -> list[list[float]]:
        return [[o.forward for o in self.options], [o.backward for o in self.options], [o.finish for o in self.options]]


def knapsack(problem: StageProblem) -> float | None:
    """The least step of one stage with whole bytes: per working memory, seconds by (layout, bytes) walked unit by unit.

    Takes several microbatches, and options without step, host or disk bytes.
    """
    m, cap = problem.pipeline.microbatches, problem.memory.cap_bytes
    best: float | None = None
    for work in sorted({o.work for group in problem.options for o in group}):
        here: dict[tuple[str, int], float] = {}
        for position, region in enumerate(problem.line.regions):
            there: dict[tuple[str, int], float] = {}
            for o in problem.options[region]:
                if o.work > work:
                    continue
                held = int(o.static + o.gradient + o.saved)
                mine = m * (o.forward + o.backward) + o.finish
                before = here.items() if position else [((o.entry, 0), 0.0)]
                for (layout, used), seconds in before:
                    cost = (0.0, 0.0) if layout == o.entry else problem.change.get((layout, o.entry))
                    if cost is None or used + held + work > cap:
                        continue
                    key, total = (o.exit, used + held), seconds + mine + m * sum(cost)
                    if total < there.get(key, INFINITE):
                        there[key] = total
            here = there
        if here and (best is None or min(here.values()) < best):
            best = min(here.values())
    return best
