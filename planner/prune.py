"""Options of a unit that no other one makes needless."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .options import Option
from .pareto import best_rows


def undominated(options: Sequence[Option]) -> list[Option]:
    """Options that no other one with the same layouts is no worse than in every figure; the first of equals stays."""
    kept: list[int] = []
    layouts: dict[tuple[str, str], list[int]] = {}
    for i, option in enumerate(options):
        layouts.setdefault((option.entry, option.exit), []).append(i)
    for members in layouts.values():
        figures = np.array([_figures(options[i]) for i in members])
        kept += [members[k] for k in best_rows(figures)]
    return [options[i] for i in sorted(kept)]


def _figures(o: Option) -> tuple[float, ...]:
    return (
        o.forward, o.backward - o.weight, o.weight, o.finish, o.static, o.gradient, o.saved, o.work, o.step, o.host,
        o.host_saved, o.disk,
    )  # fmt: skip
