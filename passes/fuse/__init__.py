"""Passes that a plan may choose: rewrites of the cleaned graph that keep the function and pay on some devices.

`PASSES` has them in the order in which they run, by name. What pays is decided by price (passes/gain.py) when a plan is made;
the plan lists the names, and whoever applies it runs just those.
"""

from __future__ import annotations

from ..base import Pass, Program
from .adapters import SlimAdapters
from .attention import FuseAttention
from .by_result import KeepResults
from .conv_bn import FoldNorm
from .gated import FuseGated
from .gelu import FuseGelu
from .head_loss import FuseHeadLoss
from .merge_convs import MergeConvs
from .merge_linears import MergeLinears
from .padding import PackPadding
from .pads import FoldPads
from .patch import PatchPrefix
from .reorder import Reorder
from .reparameterize import Reparameterize
from .rms_norm import FuseRmsNorm
from .rotary import FuseRotary

_ORDER: tuple[Pass[Program], ...] = (
    FuseGelu(), FuseGated(), FuseRmsNorm(), FuseRotary(), FuseAttention(), FoldPads(), FoldNorm(), Reparameterize(),
    MergeConvs(), KeepResults(), SlimAdapters(), MergeLinears(), FuseHeadLoss(), PatchPrefix(), PackPadding(), Reorder(),
)  # fmt: skip
PASSES = {step.name: step for step in _ORDER}
