"""Vectors that no other one is below in every entry."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

BLOCK = 256
"""Rows compared at once."""


def best_rows(vectors: Floats) -> npt.NDArray[np.intp]:
    """Indices of rows that no other row is below or equal to in every column (the first of equal rows stays)."""
    if len(vectors) <= 1 or not vectors.shape[1]:
        return np.arange(min(len(vectors), 1))
    # In this order only an earlier row can be below a later one.
    order = np.lexsort(vectors.T[::-1])
    ranked = vectors[order]
    kept: list[npt.NDArray[np.intp]] = []
    front = np.empty((0, vectors.shape[1]))
    for low in range(0, len(ranked), BLOCK):
        mine, index = ranked[low : low + BLOCK], np.arange(low, min(low + BLOCK, len(ranked)))
        alive = np.logical_not(_below(front, mine))
        mine, index = mine[alive], index[alive]
        beaten = _matrix(mine, mine)
        alive = np.logical_not(np.tril(beaten, -1).any(axis=1))
        mine, index = mine[alive], index[alive]
        front = np.vstack([front, mine])
        kept.append(index)
    return np.sort(order[np.concatenate(kept)])


def _matrix(front: Floats, rows: Floats) -> npt.NDArray[np.bool_]:
    """[i, j]: whether row j of `front` is below or equal to row i of `rows` in every column."""
    found = np.ones((len(rows), len(front)), dtype=bool)
    for column in range(rows.shape[1]):
        found &= front[None, :, column] <= rows[:, column, None]
    return found


def _below(front: Floats, rows: Floats) -> npt.NDArray[np.bool_]:
    return np.asarray(_matrix(front, rows).any(axis=1), dtype=np.bool_)
