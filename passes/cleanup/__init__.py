"""The cleanup passes, in order: numerics-preserving rewrites of a captured graph into the form that rules are written for."""

from __future__ import annotations

from ..base import Pass, Program
from .bias import SplitBias
from .check import CheckSupported
from .fold import FoldConstants
from .functionalize import Functionalize
from .losses import SplitLosses
from .merge import MergeEqual
from .simplify import Simplify
from .sweep import Sweep


def first_passes() -> tuple[Pass[Program], ...]:
    """The passes that find problems; the others need a graph without any."""
    return CheckSupported(), Functionalize()


def cleanup_passes() -> tuple[Pass[Program], ...]:
    """The passes that turn a functional graph into a clean one."""
    from ..masks import RecogniseMasks

    return (
        Simplify(), Sweep(), RecogniseMasks(), FoldConstants(), SplitLosses(), SplitBias(), MergeEqual(), Sweep(),
    )  # fmt: skip
