"""Bytes alive at every time point of one assignment: those of its ops (planner/lanes.py), and those between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate

from .lanes import BESIDE, LANES, Lanes
from .memory import CAUSES, Point, local_bytes


class Timeline(Lanes):
    """One assignment's memory over its time points."""

    def points(self) -> tuple[dict[Point, float], Callable[[Point], dict[str, int]]]:
        """(bytes by point, function giving the causes at a point)."""
        base, points = self.base(), self.changing()
        fixed = sum(base.values())
        totals = {p: fixed + sum(c.values()) for p, c in points.items()}

        def causes(point: Point) -> dict[str, int]:
            found = {c: float(base.get(c, 0)) for c in CAUSES}
            for cause, amount in points[point].items():
                found[cause] += amount
            return {c: round(x) for c, x in found.items()}

        return totals, causes

    def base(self) -> dict[str, float]:
        """What is there all the time, by cause."""
        return {
            "parameters": sum(h.stored for h in self.held.values()),
            "optimizer": sum(h.moments for h in self.held.values()),
            "buffers": sum(self.facts.given.values()),
            "reserve": self.setting.reserve,
        }

    def changing(self) -> dict[Point, dict[str, float]]:
        """Bytes by cause at every time point, beside what is there all the time."""
        (self._training if self.training else self._inference)()
        known = {cause: list(accumulate(lane))[: self.count] for cause, lane in self.lanes.items()}
        lanes = {cause: known[cause] for cause in LANES}
        points: dict[Point, dict[str, float]] = {}
        for v in range(self.count):
            points["op", v] = {c: lanes[c][v] for c in lanes}
            points["op", v]["temporaries"] += max(self.moment[v], self.making[v], self._turning(v, known["saved"]))
            for lane, cause in BESIDE.items():
                points["op", v][cause] += known[lane][v]
        if self.training:
            self._reductions(points, known)
            self._updates(points, known) if self.setting.early else self._steps(points)
        return points

    def backward(self) -> float:
        """The most saved and temporary bytes at once, over the backward pass of all ops."""
        self._saved()
        self._temporaries()
        saved, held = (list(accumulate(self.lanes[cause])) for cause in ("saved", "temporaries"))
        return max((saved[v] + held[v] + self.moment[v] for v in range(self.count)), default=0.0)

    def passing(self) -> float:
        """The most bytes of activations at once in the forward pass, each alive from its op to its last use."""
        lane = [0.0] * (self.count + 2)
        for span in self.facts.spans:
            amount = local_bytes(self.tensors[span.root], self.uses.produced[span.root], self.sizes)
            lane[span.start] += amount
            lane[min(span.end, self.count) + 1] -= amount
        return max(accumulate(lane), default=0.0)

    # -- other time points

    def _reductions(self, points: dict[Point, dict[str, float]], lanes: Mapping[str, list[float]]) -> None:
        found = self.facts
        for g, group in enumerate(self.groups):
            if self.assignment.storage[group[0]].zero == 3 and group[0] in self.regathered:
                points["gather", g] = self._arriving(group, lanes)
            bucket = sum(self.held[t].bucket for t in group)
            if self.looped and not self.each(group[0]):
                points["finish", g] = {"gradients": self._around(group), "reserve": sum(map(self._reducing, group))}
                continue
            v = found.low[group[0]]
            before = {c: lanes[c][v - 1] if v else 0.0 for c in ("saved", "temporaries")}
            now = {c: lanes[c][v] for c in ("gradients", "gathered")}
            # All that backward needs of the group is done.
            now["gathered"] -= sum(self.held[t].gathered for t in group if not self.fine or self._needs(t, v))
            if self.fine and not self.looped:
                now["gathered"] -= sum(self.held[t].copy for t in group if self._needs(t, v))
            now["gathered"] += lanes["ahead"][v]
            if self.m > 1 and self.setting.reductions:
                now["gradients"] += self._summed_last(v)
            points["reduce", g] = {"reserve": bucket, **now, **before}

    def _needs(self, name: str, v: int) -> bool:
        """Whether the backward pass of op `v` needs a parameter."""
        return v in self.needing.ops_of.get(name, ())

    def _arriving(self, group: Sequence[str], lanes: Mapping[str, list[float]]) -> dict[str, float]:
        """Bytes where a group is gathered for the backward pass; what it does not need goes at once."""
        at = self.needing.asked(group) if self.fine else self.facts.high[group[0]]
        unneeded = (t for t in group if self.fine and t not in self.needing.ops_of)
        reserve = sum(self.held[t].arrival for t in group) + sum(self.held[t].gathered for t in unneeded)
        return {"reserve": reserve, **{c: lanes[c][at] for c in LANES}}

    def _summed_last(self, at: int) -> float:
        """Bytes of the sums of the group that was reduced before the one at `at`: they are added to what accumulates after it."""
        low = self.facts.low
        later = [g for g in self.groups if low[g[0]] > at and self._early(g[0])]
        return sum(self.held[t].final for t in min(later, key=lambda g: low[g[0]], default=()))

    @cached_property
    def once(self) -> list[str]:
        """The parameters whose gradients are reduced once a step."""
        return [t for t in self.assignment.storage if not self.each(t)]

    @property
    def waiting(self) -> float:
        """Bytes of the gradients that are reduced once a step, before they are."""
        return sum(self.accumulating(t) for t in self.once)

    def _around(self, group: Sequence[str]) -> float:
        """Bytes of gradients while those of `group` are reduced: those used after it are, those before it wait.

        Of its region instance both count, as that may have several groups.
        """
        low, now, own = self.facts.low, self.facts.low[group[0]], frozenset(group)
        total = sum(h.final for t, h in self.held.items() if t not in own) - sum(
            self.held[t].final for t in self.once if low[t] < now
        )
        return total + sum(self.accumulating(t) for t in self.once if low[t] <= now)

    def _reducing(self, name: str) -> float:
        """Bytes of a parameter's gradients while they are reduced once a step, beyond those that have gathered.

        Not reduced ones are copied; of several reduced ones, each is there with its part of the sum.
        """
        h, more = self.held[name], max(len(self.uses.reduced.get(name, ())) - 1, 0)
        turned = self.uses.turned.get(name, 0) * h.whole
        return turned + (h.bucket if self.assignment.storage[name].zero else h.final * (1 + 2 * more))

    def _updates(self, points: dict[Point, dict[str, float]], lanes: Mapping[str, list[float]]) -> None:
        """Updates in the backward pass, each after the op that completes a gradient: what that op itself held is gone."""
        for i, p in enumerate(self.outline.parameters):
            h = self.held[p.tensor]
            if h.step and self.facts.uses[p.tensor]:
                v = self.facts.complete(p.tensor, self.sizes)
                before = {c: lanes[c][v - 1] if v else 0.0 for c in ("saved", "temporaries")}
                points["step", i] = {**before, **{c: lanes[c][v] for c in ("gradients", "gathered")}}
                points["step", i]["temporaries"] += h.step

    def _steps(self, points: dict[Point, dict[str, float]]) -> None:
        final = sum(h.final for h in self.held.values())
        if self.setting.foreach:
            points["step", 0] = {"gradients": final, "temporaries": sum(h.step for h in self.held.values())}
            return
        for i, p in enumerate(self.outline.parameters):
            if self.held[p.tensor].step:
                points["step", i] = {"gradients": final, "temporaries": self.held[p.tensor].step}
