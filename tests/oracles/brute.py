"""Exhaustive search over a stage problem: every division, every option of every unit, timed by the simulator.

Memory is checked action by action with a walk of its own; nothing is shared with the solve but the action lists, the
simulator, and the even division that the solve fixes where a rank holds several chunks.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardwright.planner.options import Option
from shardwright.planner.schedules import Action, actions, stage_rank
from shardwright.planner.simulate import Links, StageCost, simulate
from shardwright.planner.stages import StageProblem, StageSolution, StageSolve

Cuts = tuple[int, ...]
"""Borders of the stages, from 0 to the number of units."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A division, the option of each unit, and what it takes."""

    cuts: Cuts
    options: tuple[Option, ...]
    step_seconds: float


@dataclass(frozen=True, slots=True)
class Stage:
    """Units of one stage under their options."""

    start: int
    end: int
    options: tuple[Option, ...]


def best_plan(problem: StageProblem) -> Plan | None:
    """The fastest plan that fits; None where none does.

    Plans are simulated in the order of a bound (a rank does one thing at a time) until the bound says that no more is needed.
    """
    oracle = Oracle(problem)
    best: Plan | None = None
    for bound, cuts, stages in sorted(oracle.fitting(), key=lambda found: found[0]):
        if best is not None and bound > best.step_seconds:
            break
        seconds = oracle.seconds(stages)
        if best is None or seconds < best.step_seconds:
            best = Plan(cuts, tuple(o for s in stages for o in s.options), seconds)
    return best


def all_plans(problem: StageProblem) -> list[Plan]:
    """Every plan that fits, simulated."""
    oracle = Oracle(problem)
    return [
        Plan(cuts, tuple(o for s in stages for o in s.options), oracle.seconds(stages))
        for _, cuts, stages in oracle.fitting()
    ]


def recomputed(problem: StageProblem, solution: StageSolution) -> float:
    """Seconds of a solution simulated from the options it picked; asserts that it divides the chain, and fits."""
    assert solution.stages is not None
    oracle = Oracle(problem)
    stages = tuple(Stage(held.start, held.end, tuple(solution.flat[p] for p in held.picks)) for held in solution.stages)
    assert [s.start for s in stages] == [0, *(s.end for s in stages[:-1])]
    assert stages[-1].end == len(problem.line)
    for stage, held in zip(stages, solution.stages, strict=True):
        assert [o.region for o in stage.options] == list(problem.line.regions[stage.start : stage.end])
        assert (stage.options[0].entry, stage.options[-1].exit) == (held.entry, held.exit)
        assert oracle.changes(stage.options) is not None
    assert all(a.exit == b.entry for a, b in itertools.pairwise(solution.stages))
    assert oracle.fits(stages)
    return oracle.seconds(stages)


class Oracle:
    """What every plan of one problem takes and holds."""

    def __init__(self, problem: StageProblem) -> None:
        self.problem, self.p = problem, problem.pipeline
        name = self.p.schedule if problem.training else "forward"
        self.lists = actions(name, self.p.ranks, self.p.chunks, self.p.microbatches)
        self.placement = stage_rank(name, self.p.ranks, self.p.chunks)
        self.live = [live_counts(mine, problem.training) for mine in self.lists]
        self.moments = [moments(mine, problem.training) for mine in self.lists]

    def divisions(self) -> Iterator[Cuts]:
        """Every division into stages; only the one the solve fixes where a rank holds several chunks."""
        count, stages = len(self.problem.line), self.p.stages
        if count < stages:
            return
        if self.p.chunks > 1:
            division = StageSolve(self.problem)._even()
            yield (0, *(mine[0][1] for mine in division))
            return
        for inner in itertools.combinations(range(1, count), stages - 1):
            yield (0, *inner, count)

    def fitting(self) -> Iterator[tuple[float, Cuts, tuple[Stage, ...]]]:
        """(lower bound of seconds, division, stages) of every plan whose layouts meet and that fits."""
        for cuts in self.divisions():
            sides = [self._stages(i, j) for i, j in itertools.pairwise(cuts)]
            for stages in self._chains(sides):
                if self.fits(stages):
                    yield self._busy(stages), cuts, stages

    def _stages(self, start: int, end: int) -> list[Stage]:
        groups = [self.problem.options[r] for r in self.problem.line.regions[start:end]]
        made = (Stage(start, end, picked) for picked in itertools.product(*groups))
        return [s for s in made if self.changes(s.options) is not None]

    def _chains(self, sides: Sequence[Sequence[Stage]]) -> Iterator[tuple[Stage, ...]]:
        """Stages one after the other; what crosses between two stands in one layout."""
        if self.p.chunks == 1:
            sides = [[s for s in mine if self._alone(k, s)] for k, mine in enumerate(sides)]
        for stages in itertools.product(*sides):
            if all(a.options[-1].exit == b.options[0].entry for a, b in itertools.pairwise(stages)):
                yield stages

    def changes(self, options: Sequence[Option]) -> tuple[float, float] | None:
        """Seconds of the changes of layout inside a stage; None where one is not possible."""
        forward = backward = 0.0
        for a, b in itertools.pairwise(options):
            if a.exit != b.entry:
                cost = self.problem.change.get((a.exit, b.entry))
                if cost is None:
                    return None
                forward, backward = forward + cost[0], backward + cost[1]
        return forward, backward

    def cost(self, stage: Stage) -> StageCost:
        """Seconds of one stage as the simulator takes them."""
        extra = self.changes(stage.options)
        assert extra is not None
        return StageCost(
            sum(o.forward for o in stage.options) + extra[0],
            sum(o.backward for o in stage.options) + extra[1],
            sum(o.weight for o in stage.options),
            finish=(("compute", sum(o.finish for o in stage.options)),),
        )

    def seconds(self, stages: Sequence[Stage]) -> float:
        """The simulated step."""
        send, count = self.problem.send, len(self.problem.line)
        ahead = [send(s.end, s.options[-1].exit)[0] if s.end < count else 0.0 for s in stages]
        back = [send(s.start, s.options[0].entry)[1] if s.start else 0.0 for s in stages]
        links = Links(tuple(ahead), tuple(back))
        return simulate(self.lists, self.placement, [self.cost(s) for s in stages], links).step_seconds

    def _busy(self, stages: Sequence[Stage]) -> float:
        """Seconds of the busiest rank, a hair less for rounding."""
        busy = [0.0] * self.p.ranks
        for s, stage in enumerate(stages):
            cost = self.cost(stage)
            busy[self.placement[s]] += self.p.microbatches * (cost.forward + cost.backward) + cost.finish[0][1]
        return max(busy) * (1 - 1e-12)

    # -- memory

    def _alone(self, place: int, stage: Stage) -> bool:
        return self._rank_fits(self.placement[place], {place: stage})

    def fits(self, stages: Sequence[Stage]) -> bool:
        """Whether every rank holds its stages at every action, in the step, in the host and on the disk."""
        return all(
            self._rank_fits(rank, {s: stages[s] for s, r in enumerate(self.placement) if r == rank})
            for rank in range(self.p.ranks)
        )

    def _rank_fits(self, rank: int, held: dict[int, Stage]) -> bool:
        units = [(s, o) for s, stage in held.items() for o in stage.options]
        memory = self.problem.memory
        once = self.p.microbatches == 1 and self.p.stages == 1
        fixed = sum(o.static for _, o in units)
        gradient = sum(o.gradient for _, o in units)
        work = max(o.work for _, o in units)
        saved = {s: sum(o.saved for o in stage.options) for s, stage in held.items()}
        for counts in self.moments[rank]:
            alive = sum(counts.get(s, 0) * saved[s] for s in held)
            if fixed + (0.0 if once else gradient) + alive + work > memory.cap_bytes:
                return False
        most = self.live[rank]
        host = sum(o.host + most[s] * o.host_saved for s, o in units)
        return (
            fixed + gradient + sum(o.step for _, o in units) <= memory.cap_bytes
            and host <= memory.host_bytes
            and sum(o.disk for _, o in units) <= memory.disk_bytes
        )


def moments(mine: Sequence[Action], training: bool) -> list[dict[int, int]]:
    """Live microbatches by stage while each action of a rank runs (a forward pass alone keeps only its own)."""
    counts: dict[int, int] = {}
    found: list[dict[int, int]] = []
    for action in mine:
        if action.kind == "F":
            counts[action.stage] = counts.get(action.stage, 0) + 1
        if dict(counts) not in found:
            found.append(dict(counts))
        if action.kind in "BW" or not training:
            counts[action.stage] -= 1
    assert not any(counts.values())
    return found


def live_counts(mine: Sequence[Action], training: bool) -> dict[int, int]:
    """The most microbatches of each stage that are alive at once."""
    most: dict[int, int] = {}
    for counts in moments(mine, training):
        for stage, count in counts.items():
            most[stage] = max(most.get(stage, 0), count)
    return most


def random_plans(problem: StageProblem, count: int, seed: int) -> list[Plan]:
    """Up to `count` plans drawn at random that fit, for chains too long for exhaustive search."""
    oracle, rng, found = Oracle(problem), random.Random(seed), list[Plan]()
    divisions = list(oracle.divisions())
    for _ in range(20 * count if divisions else 0):
        cuts = rng.choice(divisions)
        picked = tuple(rng.choice(problem.options[r]) for r in problem.line.regions)
        stages = tuple(Stage(i, j, picked[i:j]) for i, j in itertools.pairwise(cuts))
        meets = all(a.options[-1].exit == b.options[0].entry for a, b in itertools.pairwise(stages))
        if meets and all(oracle.changes(s.options) is not None for s in stages) and oracle.fits(stages):
            found.append(Plan(cuts, picked, oracle.seconds(stages)))
            if len(found) == count:
                break
    return found
