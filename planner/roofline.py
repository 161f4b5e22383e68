"""Seconds of an op from its device's figures, where nothing was measured:

    seconds = overhead * kernels + max(flops / (peak * efficiency), bytes / (bandwidth * efficiency)) + bytes beside / bandwidth

A matmul's efficiency falls with its shape: output tiles fill the compute units in whole waves, and a short contraction does not
fill its pipeline (k / (k + contraction_half)); each of its two backward matmuls is priced at its own shape.

Products in 8 bits (`products`) run at that dtype's peak; their operands are read, cast and written again, once as they are and
once transposed, as a matmul of 8 bits contracts over rows of both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .cluster import Device
from .outline import DTYPE_BYTES
from .work import FLOPS_KINDS, Work

TILES = ((256, 128, 1.0), (128, 128, 0.95), (128, 64, 0.8), (64, 64, 0.6))
"""Output tile shapes of dense matmul kernels with their rate relative to the best one (CUTLASS-style kernels)."""

CAST_BYTES = 2.0 + 1.0 + 1.0
"""Bytes moved per element of an operand of a product in 8 bits: 16 bits read, 8 written twice."""


CAUSAL_HALF = 450.0
WHOLE_HALF = 180.0
"""Keys at which fused attention reaches half of its best rate, with and without a causal mask: read off the forward and backward
rates by length in FlashAttention-2 (arXiv 2307.08691, figures 4 to 6, A100: 512 to 16,384 positions)."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """Prices work on one device at one compute dtype; `products` is the dtype of products with parameters ("": the same).

    `attention` is the kind whose efficiency fused attention reaches: its generation.
    """

    device: Device
    compute: str
    products: str = ""
    attention: str = "attention"

    def seconds(self, work: Work, sizes: tuple[float, ...]) -> tuple[float, float]:
        """(forward, backward) seconds of the device; the latter 0 without a gradient."""
        device, narrow = self.device, self.narrow(work)
        ahead, back = self._streamed(work, sizes)
        if work.kind in FLOPS_KINDS:
            done, undone = self._computed(work, sizes, narrow)
            ahead, back = max(ahead, done), max(back, undone)
        beside = device.memory_bytes_per_second * device.efficiency("elementwise")
        ahead += sum(term.at(sizes) for term in work.beside[0]) / beside
        back += sum(term.at(sizes) for term in work.beside[1]) / beside
        if narrow:
            width = DTYPE_BYTES[self.compute]
            ahead += sum(term.at(sizes) for term in work.forward[: len(work.shapes)]) / width * CAST_BYTES / beside
            back += sum(term.at(sizes) for term in work.forward[len(work.shapes) :]) / width * CAST_BYTES / beside
        ahead += device.kernel_overhead_seconds * work.launched[0]
        if not work.differentiable or back == 0.0:
            return ahead, 0.0
        return ahead, back + device.kernel_overhead_seconds * work.launched[1]

    def narrow(self, work: Work) -> bool:
        """Whether it runs at the dtype of products."""
        return bool(self.products) and work.weighted and work.kind in ("matmul", "experts")

    def _streamed(self, work: Work, sizes: tuple[float, ...]) -> tuple[float, float]:
        device = self.device
        kind = "memory" if work.kind in FLOPS_KINDS else work.kind
        rate = device.memory_bytes_per_second * device.efficiency(kind)
        return work.forward_bytes(sizes) / rate, work.backward_bytes(sizes) / rate

    def _computed(self, work: Work, sizes: tuple[float, ...], narrow: bool) -> tuple[float, float]:
        device = self.device
        named = {
            "experts": "matmul",
            "head_loss": "matmul",
            "patches": "conv",
            "packed": "matmul",
            "attention": self.attention,
        }
        kind = named.get(work.kind, work.kind)
        if narrow:
            best = best_back = device.peak(self.products) * device.efficiency(f"matmul_{self.products}")
        else:
            peak = device.peak(self.compute)
            best = peak * device.efficiency(kind)
            best_back = peak * device.efficiency(f"{kind}_backward" if kind != "matmul" else kind)
        done, undone = work.flops(sizes)
        if work.keys:
            short = 1.0 + (CAUSAL_HALF if work.causal else WHOLE_HALF) / math.prod(sizes[f] for f in work.keys)
            return done * short / best, undone * short / best_back
        shape = work.shape(sizes)
        parts = work.gradients if shape is not None else (1,)
        rates = [best_back * self._shape_factor(shape, part) for part in parts]
        ahead = sum(done / len(work.ahead) / (best * self._shape_factor(shape, part)) for part in work.ahead)
        return ahead, sum(undone / len(parts) / rate for rate in rates)

    def _shape_factor(self, shape: tuple[float, float, float, float] | None, which: int) -> float:
        """How much of the best rate a matmul of `shape` (batch, m, n, k) reaches: 0 forward, 1 input and 2 weight gradient."""
        device = self.device
        if shape is None or not device.compute_units:
            return 1.0
        batch, m, n, k = shape
        rows, columns, contracted = ((m, n, k), (m, k, n), (k, n, m))[which]
        filled = contracted / (contracted + device.contraction_half)
        return filled * wave_factor(batch, rows, columns, device.compute_units)


def wave_factor(batch: float, rows: float, columns: float, units: int) -> float:
    """The share of the best matmul rate left after cutting the output into tiles and those into whole waves over `units`."""
    best = 0.0
    for high, wide, rate in TILES:
        tiles = batch * math.ceil(rows / high) * math.ceil(columns / wide)
        waves = math.ceil(tiles / units)
        best = max(best, rate * batch * rows * columns / (waves * units * high * wide))
    return max(best, 1e-3)
