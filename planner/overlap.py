"""Communication that runs under compute: what of it sticks out.

One rule for everything that may hide: collectives of stored parameters under their unit, the sends of ring attention under its
blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cluster import Device


@dataclass(frozen=True, slots=True)
class Overlap:
    """What a device hides: at most `fraction` of a stretch of compute hides anything, and both take `slowdown` as long then."""

    fraction: float = 0.0
    slowdown: float = 1.0

    @staticmethod
    def of(device: Device) -> Overlap:
        """The rule of a device."""
        return Overlap(device.overlap_fraction, device.overlap_slowdown)

    def exposed(self, compute: float, talk: float) -> float:
        """Seconds that `talk` seconds of communication add to `compute` seconds it need not wait for.

        What sticks out, and the slowdown of what does not: talk - inside + (slowdown - 1) * inside.
        """
        inside = min(talk, self.fraction * compute)
        return talk - inside + (self.slowdown - 1.0) * inside


NONE = Overlap()
"""Nothing hides."""
