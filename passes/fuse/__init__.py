"""Passes that a plan may choose: rewrites of the cleaned graph that keep the function and pay on some devices.

`PASSES` has them in the order in which they run, by name. What pays is decided by price (passes/gain.py) when a plan is made;
the plan lists the names, and whoever applies it runs just those.
"""

from __future__ import annotations

from ..base import Pass, Program
from .gelu import FuseGelu
from .patch import PatchPrefix
from .reorder import Reorder

PASSES: dict[str, Pass[Program]] = {step.name: step for step in (FuseGelu(), PatchPrefix(), Reorder())}
