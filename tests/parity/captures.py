"""One capture of a named case for all plans that are tried on it in one process: most of a parity case's time was capturing again.

Only models that `models.build` has tagged are looked up, by everything that a capture depends on. What it gives is frozen, so that
the cases that share it cannot disturb each other; capture itself has tests of its own (test_capture.py, test_cleanup.py).
"""

from __future__ import annotations

import functools
from typing import Any

from shardwright.passes import prepare
from shardwright.passes.summarize import Summary
from shardwright.planner import rules
from shardwright.runtime import apply, programs
from torch import nn

TAG = "_case_of_a_test"
MOST = 48
"""Captures that are kept."""


@functools.cache
def share() -> None:
    """From here on captures of tagged models in this process are shared."""
    known: dict[Any, Summary] = {}
    anew = prepare.prepare_bare

    @functools.wraps(anew)
    def shared(bare: nn.Module, args: Any, kwargs: Any, **options: Any) -> Summary:
        if TAG not in vars(bare):
            return anew(bare, args, kwargs, **options)
        called = programs.signature(args, kwargs, train=bare.training, grad=options.get("train", True))
        key = (
            vars(bare)[TAG],
            *_state(bare),
            called,
            frozenset((k, getattr(v, "names", v)) for k, v in options.items()),
            tuple(rule.line for rule in rules.RULES.values()),
        )
        if key not in known:
            if len(known) == MOST:
                del known[next(iter(known))]
            known[key] = anew(bare, args, kwargs, **options)
        return known[key]

    for module in (prepare, apply, programs):
        module.prepare_bare = shared  # type: ignore[attr-defined]


def _state(model: nn.Module) -> tuple[Any, ...]:
    """Every tensor's name, dtype, shape, whether it is trained and what it is tied to, and every module's mode."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    ties: dict[int, int] = {}
    held = tuple((n, t.dtype, t.shape, t.requires_grad, ties.setdefault(id(t), len(ties))) for n, t in tensors)
    return held, tuple(m.training for m in model.modules())
