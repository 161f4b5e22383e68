"""Judging passes that make room: what lowers the peak of live bytes stays, if it does not slow a step down by too much.

A pass may keep no fewer bytes for the backward pass and still lower the peak (patches of an image, another order of calls), which
prices by op do not show (gain.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from .base import Pass, Program, Verdict
from .gain import Paying
from .steps import steps_of, trains


@dataclass(frozen=True)
class Roomier:
    """A `weigh` for `run_passes`: a pass stays that lowers the peak and costs no more than `slower` of a step's seconds.

    What does not lower the peak is judged by `paying` alone.
    """

    paying: Paying
    slower: float = 0.25

    def __call__(self, step: Pass[Program], before: fx.Graph, after: fx.Graph) -> Verdict:
        verdict = self.paying(step, before, after)
        seen = self.paying.observer
        was, now = (steps_of(g, training=trains(g), observer=seen).peak for g in (before, after))
        if verdict.stays or now >= was:
            return verdict
        step_seconds = self.paying.cost([n for n in before.nodes if n.op == "call_function"]).seconds
        lost = -(verdict.seconds or 0.0)
        stays = lost <= self.slower * step_seconds
        why = (
            ""
            if stays
            else f"it would take {lost:.3g} s a step more ({step_seconds:.3g} s) for {was - now:,} bytes less"
        )
        return Verdict(stays, why, verdict.seconds, verdict.saved_bytes)
