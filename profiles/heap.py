"""One heap for training and for timing on a CPU: pages once used stay with the process.

glibc hands the memory of large tensors back to the system after each use and is given new pages, zeroed one by one, for the next:
a tensor of megabytes then costs more than its op, and how often it happens depends on what else lies on the heap (counted: none to
33,000 faults a step of a 12M-parameter GPT-2 on two ranks, a tenth of its time). With `keep_pages` a process frees pages when it
ends. Measuring ranks and `shardwright run` both keep them, so that what is timed is what runs.
"""

from __future__ import annotations

import ctypes

# <malloc.h>: never give back the end of the heap, make no mappings for single blocks, one heap for all threads (memory that one
# thread frees serves another).
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8
SETTINGS = ((TRIM_THRESHOLD, -1), (TOP_PAD, 256 << 20), (MMAP_MAX, 0), (ARENA_MAX, 1))


def keep_pages() -> bool:
    """Make this process keep the pages it has used; False where its C library has no such settings (only glibc has)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return all([mallopt(setting, value) == 1 for setting, value in SETTINGS])
