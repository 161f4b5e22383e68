"""The heap of a process that has been training for a while.

A fresh process hands the memory of large tensors back to the system after each use and is given new pages, zeroed one by one, for
the next: a tensor of megabytes then costs more than its op. A training process has freed hundreds of megabytes that lie below
something still in use, and takes its tensors from there. What is timed alone must find such a heap, or it is timed with faults that
a step does not have (900 to 1,250 of them for a 5.8 MB result: a seventh of its matmul's time).
"""

from __future__ import annotations

import torch

LARGEST_KEPT = 30 << 20
"""glibc serves blocks of up to 32 MiB from the heap once one of that size was freed; larger ones are new pages in training too."""
HEAP_BYTES = 256 << 20
PIECE = 1 << 20


def warm_heap(most_bytes: int = HEAP_BYTES) -> torch.Tensor:
    """Make this process's heap one with `most_bytes` of free pages in it, for as long as the result is kept."""
    torch.ones(LARGEST_KEPT, dtype=torch.uint8)  # made and freed: moves glibc's own limits
    pieces = [torch.ones(PIECE, dtype=torch.uint8) for _ in range(most_bytes // PIECE)]
    lid = torch.ones(2 * PIECE, dtype=torch.uint8)
    pieces.clear()
    return lid
