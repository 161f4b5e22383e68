"""Collectives beside those of placements: passing a buffer round a ring, and exchanging uneven numbers of rows.

Both are all-to-alls of `torch.ops._c10d_functional`, which take the sizes sent to and received from every rank: a ring's pass
sends all to the next rank and nothing to the others. So they run on gloo and NCCL alike, and in groups of any shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from . import collectives


def pass_on(x: Tensor, ways: int, index: int, part_of: tuple[str, int], group: str) -> Callable[[], Tensor]:
    """Send the flat `x` to the next rank of the ring; the call that is returned waits for what the rank before sent.

    Sizes are equal on all ranks. Nothing is recorded here: a ring is recorded as the collective it runs as, `part_of`.
    """
    sent, received = [0] * ways, [0] * ways
    sent[(index + 1) % ways] = received[(index - 1) % ways] = x.numel()
    return collectives.start_exchange(x, sent, received, 0, group, part_of)


def exchange(x: Tensor, sent: Sequence[int], received: Sequence[int], group: str) -> Tensor:
    """Rows of x to the ranks of the group, `sent[r]` to rank r; returns the `received[r]` rows of every rank r, by rank.

    Recorded as one all-to-all of the rows that this rank sends, times the ranks.
    """
    full = len(sent) * sum(sent) * math.prod(x.shape[1:]) * x.element_size()
    return collectives.start_exchange(x, sent, received, full, group)()
