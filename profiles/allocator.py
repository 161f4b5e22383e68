"""What the allocator keeps beyond what tensors use, and what a process takes on its device before any.

Tensors of a training step's kinds of sizes are made and freed in a fixed pseudo-random order, up to a known number of live bytes.
On a GPU the caching allocator's reserved bytes are compared with them, on a CPU the growth of the resident memory.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import torch

from .timing import device

LIVE_BYTES = 192 << 20
ROUNDS = 400
SIZES = tuple(1 << k for k in range(16, 25))


def measure_allocator() -> dict[str, float]:
    """`reserve`: bytes kept over bytes used at the peak (1: none to spare); on a GPU `context_bytes`, outside the allocator."""
    on = device() if not torch.cuda.is_available() else torch.device("cuda", torch.cuda.current_device())
    if on.type == "cuda":
        return _cuda(on)
    before = resident_bytes()
    peak, most = _churn(on)
    return {"reserve": round(max(1.0, (most - before) / peak), 4)} if before else {}


def _cuda(on: torch.device) -> dict[str, float]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(on)
    _churn(on)
    reserved, used = torch.cuda.max_memory_reserved(on), torch.cuda.max_memory_allocated(on)
    free, total = torch.cuda.mem_get_info(on)
    # Whatever else is on the device counts as context: nothing here can tell it apart.
    context = total - free - torch.cuda.memory_reserved(on)
    return {"reserve": round(max(1.0, reserved / max(used, 1)), 4), "context_bytes": float(max(context, 0))}


def _churn(on: torch.device) -> tuple[int, int]:
    """Make and free tensors; (most live bytes, most resident bytes seen)."""
    draw, held = random.Random(0), list[torch.Tensor]()
    live = peak = most = 0
    for _ in range(ROUNDS):
        size = draw.choice(SIZES) + 4096 * draw.randrange(8)
        while held and live + size > LIVE_BYTES:
            live -= held.pop(draw.randrange(len(held))).nbytes
        held.append(torch.ones(size, dtype=torch.uint8, device=on))
        live += size
        peak, most = max(peak, live), max(most, resident_bytes())
    return peak, most


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
