"""Why a region of a plan runs as it does, in sentences and as plain facts: what binds it, and what its other choices cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .figures import bytes_text, count_text, percent_text, seconds_text
from .stages import away_text

if TYPE_CHECKING:
    from ..job import Say
    from ..planner.alternatives import RegionWays, Way
    from ..planner.plan import Plan, RegionPlan

SHOWN = 4
"""Ways that differ in one dimension which are told of a region, of each dimension; `--json` has all."""

SEVERAL = 3
"""Ways that differ in several dimensions which are told."""

SAME = 1e-5
"""Share of a step below which two steps are told as one."""

MOVED = 1e-3
"""Share of a step from which on prices are no longer those of the plan."""

PLAIN = (
    "The plan is of one plain stage: ZeRO levels and layouts of a region are priced here, over the whole graph. What running "
    "something again or moving it off the device costs, ask with --why-not recompute=full or --why-not offload=optimizer."
)

CAUSES = {
    "compute": "computing", "activation_communication": "communicating activations",
    "parameter_communication": "communicating parameters and gradients", "recompute": "running ops again",
    "offload": "copying to and from the host", "optimizer": "the optimizer", "bubble": "waiting in the pipeline",
}  # fmt: skip
"""The planner's short names of what takes time, in words."""

_TALKS = {"activation_communication": ("model", "context"), "parameter_communication": ("data", "context")}
_AGAIN = {
    "none": "nothing run again", "full": "all run again (full)", "selective": "attention run again (selective)",
}  # fmt: skip


def chosen(plan: Plan, name: str) -> list[RegionPlan]:
    """The entries that a region's name stands for; raises UsageError for an unknown one."""
    found = [entry for entry in plan.regions if name in (entry.name, entry.region)]
    if not found:
        names = dict.fromkeys(word for entry in plan.regions for word in (entry.region, entry.name) if word)
        raise UsageError(f"the plan has no region {name!r}; its regions are {', '.join(names)}")
    return found


def ways_of(plan: Plan, entries: Sequence[RegionPlan], say: Say) -> list[RegionWays]:
    """The other ways of some entries, from prices of the model captured again.

    Raises PlanMismatch or UsageError where the plan's model is not there as it was.
    """
    from ..planner.alternatives import JointWays
    from ..planner.plainways import PlainWays
    from .edited import captured

    given = captured(plan, say)
    say("prices of the plan")
    made = JointWays(plan, *given) if plan.stages else PlainWays(plan, *given)
    found = []
    for entry in entries:
        say(f"region {entry.name}")
        found.append(made.of(entry))
    return found


def region_facts(plan: Plan, found: RegionWays) -> dict[str, Any]:
    """What is told of a region, as plain values."""
    return {
        "region": found.entry.name, "repeats": found.entry.repeats, "modules": modules_text(found.entry),
        "binds": _binds(plan, found)[0], "seconds": dict(found.seconds), "step_seconds": found.step_seconds,
        "peak_bytes_per_device": found.peak_bytes, "memory_limit_bytes": found.limit_bytes,
        "alternatives": [
            {
                "changes": {name: {"from": old, "to": new} for name, (old, new) in way.changes.items()},
                "step_seconds": way.step_seconds, "seconds_change": way.step_seconds - found.step_seconds,
                "peak_bytes_per_device": way.peak_bytes, "bytes_change": way.peak_bytes - found.peak_bytes,
                "fits": way.fits, "against": list(way.against), **({"why": way.refused} if way.refused else {}),
            }
            for way in found.ways
        ],
    }  # fmt: skip


def does_text(entry: RegionPlan) -> str:
    """ "Region r1 (transformer.h.0 and 5 like it): layout tensor; parameters whole." """
    stored = sorted({p.zero for p in entry.parameters})
    parts = [f"layout {entry.style}"] if entry.style not in ("", "single") else []
    parts += [f"parameters {' and '.join(f'in ZeRO-{n}' if n else 'whole' for n in stored)}"] if stored else []
    if entry.recompute:
        policy = f" ({entry.policy})" if entry.policy else ""
        parts.append(f"{count_text(len(entry.recompute))} ops run again{policy}")
    parts += [f"off the device: {away_text(entry.offload)}"] if entry.offload else []
    named = modules_text(entry)
    return f"Region {entry.name}{f' ({named})' if named else ''}: {'; '.join(parts) or 'nothing to decide'}."


def modules_text(entry: RegionPlan) -> str:
    """Which modules a region is of, by the names of its parameters."""
    owners = list(dict.fromkeys(p.names[0].rpartition(".")[0] or p.names[0] for p in entry.parameters))
    if not owners:
        return f"{entry.repeats} times" if entry.repeats > 1 else ""
    more = f" and {entry.repeats - 1} like it" if entry.repeats > 1 else ""
    if entry.region:  # an entry of some of a region's instances is spelled as the first of all
        return f"{entry.repeats} of those like {_shared_by(owners)}"
    if not more and len(owners) <= 2:
        return ", ".join(owners)
    return _shared_by(owners) + more


def _shared_by(owners: Sequence[str]) -> str:
    """The module that holds all of some modules; the first where none does."""
    split = [owner.split(".") for owner in owners]
    shared = itertools.takewhile(lambda words: len(set(words)) == 1, zip(*split, strict=False))
    return ".".join(words[0] for words in shared) or owners[0]


def reasons(plan: Plan, found: RegionWays) -> str:
    """What a region does, what binds it, and its runner-up, on one line."""
    told = [does_text(found.entry), _binds(plan, found)[1], _runner_up(found)]
    return " ".join(text for text in told if text)


def moved_text(plan: Plan, found: Sequence[RegionWays]) -> list[str]:
    """What is said where prices are no longer those that the plan was made with."""
    was, now = plan.predicted.step_seconds, found[0].step_seconds if found else plan.predicted.step_seconds
    if math.isclose(was, now, rel_tol=MOVED):
        return []
    return [
        f"At the prices of today the step takes {seconds_text(now)}, and it is from there that choices are compared."
    ]


def details(found: RegionWays) -> list[str]:
    """Every other choice of a region that differs in one thing, then the quickest that differ in several."""
    one = {tuple(way.changes.items()): way for way in reversed(found.ways) if len(way.changes) == 1}
    told: list[Way] = []
    for dimension in ("layout", "recompute", "zero", "offload"):
        mine = [way for key, way in one.items() if key[0][0] == dimension]
        mine.sort(key=lambda way: (way.step_seconds, way.peak_bytes))
        named = [way for way in mine if way.changes[dimension][1] in _AGAIN]
        told += [way for way in mine if way in named or way in [w for w in mine if w not in named][:SHOWN]]
    several = [way for way in found.ways if len(way.changes) > 1]
    told += [way for way in several if way.fits and not way.against][:SEVERAL]
    return [f"{_capital(way_text(way.changes))}: {_cost_text(way, found)}." for way in told]


def way_text(changes: Mapping[str, tuple[str, str]]) -> str:
    """ "ZeRO-3 instead of ZeRO-1, nothing run again"."""
    return ", ".join(_WORDS[name](old, new) for name, (old, new) in changes.items())


def _zero(old: str, new: str) -> str:
    def level(text: str) -> str:
        return " and ".join(f"ZeRO-{n}" if n != "0" else "whole parameters" for n in text.split(" and "))

    return f"{level(new)} instead of {level(old)}"


def _recompute(old: str, new: str) -> str:
    return _AGAIN.get(new, f"{new} run again" if new != "1 ops" else "1 op run again")


def _layout(old: str, new: str) -> str:
    return f"layout {new}" + (f" instead of {old}" if old != "as it is" else "")


def _offload(old: str, new: str) -> str:
    *most, last = [away_text([word]) for word in new.split("+")]
    kept = f"{', '.join(most)} and {last}" if most else last
    return "nothing off the device" if new == "none" else f"{kept} off the device"


_WORDS: Mapping[str, Callable[[str, str], str]] = {
    "zero": _zero, "recompute": _recompute, "layout": _layout, "offload": _offload,
}  # fmt: skip


def _cost_text(way: Way, found: RegionWays) -> str:
    """ "a step 1.2 ms longer (+0.5 %), the peak 2 GiB lower"."""
    change, size, ratio = way.step_seconds - found.step_seconds, way.peak_bytes - found.peak_bytes, _ratio(way, found)
    told = "the same step"
    if abs(ratio) > SAME:
        told = (
            f"a step {seconds_text(abs(change))} {'longer' if change > 0 else 'shorter'} ({percent_text(abs(ratio))})"
        )
    told += f", the peak {bytes_text(abs(size))} {'higher' if size > 0 else 'lower'}" if size else ", the same peak"
    if not way.fits:
        told += f"; it does not fit: {way.refused or f'{bytes_text(way.peak_bytes - way.limit_bytes)} above the limit'}"
    return f"{told}; against the pin {' and '.join(way.against)}" if way.against else told


def _runner_up(found: RegionWays) -> str:
    """The quickest other way that fits, keeps the pins and makes a difference."""
    fits = [way for way in found.ways if way.fits and not way.against]
    quicker = [way for way in fits if _ratio(way, found) < -SAME]
    if quicker:
        text = f"{way_text(quicker[0].changes)}, {_cost_text(quicker[0], found)}"
        return f"Quicker at these prices, and missed by the search within its gap: {text}."
    best = next((way for way in fits if _ratio(way, found) > SAME), next(iter(fits), None))
    if best is None:
        return "No other choice of it fits." if found.ways else "It has no other choice here."
    return f"Next best: {way_text(best.changes)}, {_cost_text(best, found)}."


def _ratio(way: Way, found: RegionWays) -> float:
    """By which share of the plan's step a way takes longer."""
    return way.step_seconds / found.step_seconds - 1 if found.step_seconds else 0.0


def _binds(plan: Plan, found: RegionWays) -> tuple[dict[str, Any], str]:
    """What keeps a region from being quicker: as facts, and as a sentence."""
    quicker = [way for way in found.ways if _ratio(way, found) < -SAME]
    barred = [way for way in quicker if not way.fits and not way.against]
    pinned = [way for way in quicker if way.fits and way.against]
    if pinned and not barred:
        pin = " and ".join(pinned[0].against)
        change = f"{way_text(pinned[0].changes)} would make {_cost_text(replace(pinned[0], against=()), found)}"
        return {"by": "pin", "pin": pin}, f"The pin {pin} binds it: {change}."
    if barred:
        least = min(barred, key=lambda way: (way.peak_bytes, way.step_seconds))
        facts: dict[str, Any] = {"by": "memory", "saves_seconds": found.step_seconds - least.step_seconds}
        return facts, f"Memory binds it: {way_text(least.changes)} would make {_cost_text(least, found)}."
    if not found.seconds:
        return {"by": "time"}, "Memory does not bind it: none of its choices that is quicker is barred by the limit."
    total = math.fsum(found.seconds.values())
    cause = max(found.seconds, key=lambda c: found.seconds[c])
    share = found.seconds[cause] / total if total else 0.0
    by, where = "compute", ""
    if cause in _TALKS:
        links = [a.link for a in plan.mesh if a.role in _TALKS[cause] and a.size > 1]
        by, where = "link", f" ({', '.join(dict.fromkeys(links))})" if links else ""
    elif cause == "offload":
        by, where = "link", " (the host's)"
    facts = {"by": by, "cause": cause, "share": share}
    binder = "Compute binds it" if by == "compute" else f"The link{where} binds it"
    return facts, f"{binder}: {CAUSES.get(cause, cause)} takes {percent_text(share)} of its seconds."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
