"""What the search says while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """One line of progress: the phase ("front", "bound", "solve", "fit"), a short text, and the best step so far in seconds."""

    phase: str
    text: str
    best_seconds: float | None = None


Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """Says nothing."""
