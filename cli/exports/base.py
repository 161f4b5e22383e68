"""What an export is: rows of a target's names, a text, and sentences on what the target cannot express.

Nothing is dropped in silence: a text is read back as soon as it is made, and every pin of the plan that does not come back
becomes a sentence. What would run as something else is refused before that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import UsageError
from .facts import STACK_PINS, Facts

Document = dict[str, Any]
"""Values by dotted name of the target."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a file of another tool says: pins, and the global batch and sequence length where it has them."""

    pins: Mapping[str, str] = field(default_factory=dict)
    batch: int | None = None
    seq: int | None = None


@dataclass(frozen=True, slots=True)
class Export:
    """A text, and what it does not say of the plan."""

    text: str
    losses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One setting of a target. `of` is its value for a plan (None: not written); `says` reads pins out of a value."""

    name: str
    of: Callable[[Facts], Any]
    says: Callable[[Any, Document], Mapping[str, str]] = lambda value, document: {}


def number(name: str, key: str) -> Row:
    """A row that is a pin with a number for value."""
    return Row(name, lambda f: f.count(key), lambda value, document: {key: str(value)} if whole(value) else {})


def chosen(name: str, key: str, words: Mapping[str, Any]) -> Row:
    """A row whose values stand for those of a pin (`words`: pin -> value); others are not written and say nothing."""
    return Row(name, lambda f: words.get(f.pins.get(key, "")), lambda value, document: spelled_by(key, words, value))


def spelled_by(key: str, words: Mapping[str, Any], value: Any) -> dict[str, str]:
    """The pin that a value stands for: the first word of `words` with it; {} without one."""
    found = next((word for word, own in words.items() if own == value and isinstance(own, type(value))), None)
    return {} if found is None else {key: found}


def whole(value: Any) -> bool:
    """Whether a value of a document is a number of at least 1 ("auto" and -1 are not)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True, slots=True)
class Refused:
    """A plan that a target cannot run: `when` it is one, what it is, and the smallest fix."""

    when: Callable[[Facts], bool]
    what: Callable[[Facts], str]
    fix: str


@dataclass(frozen=True, slots=True)
class Target:
    """A tool that a plan can be written for.

    `write` makes the text from facts and losses, `read` is what a text says. `instead` says, by pin, what the tool does in place of
    what it cannot express; `implied` are pins that follow from the number of ranks, `silent` what a text without a word on them
    means.
    """

    name: str
    title: str
    write: Callable[[Facts, tuple[str, ...]], str]
    read: Callable[[str], Reading]
    refused: tuple[Refused, ...] = ()
    instead: Mapping[str, str] = field(default_factory=dict)
    notes: Callable[[Facts], tuple[str, ...]] = lambda facts: ()
    implied: frozenset[str] = frozenset()
    silent: Mapping[str, str] = field(default_factory=dict)

    def reading(self, text: str) -> Reading:
        """What a text of the tool says, silence included; raises UsageError for one that says nothing."""
        found = self.read(text)
        if not found.pins:
            raise UsageError("it says nothing that can be pinned")
        return Reading({**self.silent, **found.pins}, found.batch, found.seq)


def export(target: Target, facts: Facts) -> Export:
    """The text of a plan for a target; raises UsageError for what the target cannot run."""
    for one in target.refused:
        if one.when(facts):
            raise UsageError(f"{target.title} cannot run this plan: {one.what(facts)}; {one.fix}")
    back = target.reading(target.write(facts, ()))
    carried = {key: word for key, word in facts.pins.items() if key not in target.implied}
    lost = [key for key, word in carried.items() if back.pins.get(key, NEUTRAL.get(key)) != word]
    losses = [_sentence(target, key, facts.pins[key], back.pins.get(key)) for key in lost]
    losses += [*facts.beyond, *target.notes(facts)]
    return Export(target.write(facts, tuple(losses)), tuple(losses))


NEUTRAL: Mapping[str, str] = {
    "ep": "1",
    "cp": "1",
    "pp": "1",
    "tp": "1",
    "vpp": "1",
    "offload": "none",
    "recompute": "none",
}
"""What needs no word, whether or not the tool could say it."""


def _sentence(target: Target, key: str, word: str, found: str | None) -> str:
    """What becomes of a pin that a target does not carry."""
    if key in target.instead:
        return f"{key}={word}: {target.instead[key]}"
    if key in STACK_PINS:
        return f"{key}={word} is about kernels and graph passes: {target.title} uses its own"
    if found is not None:
        return f"{key}={word} has no setting in {target.title}; the nearest is {key}={found}"
    return f"{key}={word} has no setting in {target.title}; set it in the training script"


def values(rows: tuple[Row, ...], facts: Facts) -> Document:
    """The settings of a plan by dotted name, in the order of the rows."""
    found = {row.name: row.of(facts) for row in rows}
    return {name: value for name, value in found.items() if value is not None}


def pins_in(rows: tuple[Row, ...], document: Document) -> dict[str, str]:
    """The pins that a document's settings say."""
    found: dict[str, str] = {}
    for row in rows:
        if row.name in document:
            found |= row.says(document[row.name], document)
    return found


def nested(document: Document) -> dict[str, Any]:
    """Dotted names as nested tables."""
    made: dict[str, Any] = {}
    for name, value in document.items():
        *path, last = name.split(".")
        place = made
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return made


def flat(value: Mapping[str, Any], prefix: str = "") -> Document:
    """The inverse of `nested`; tables are also there as such, under their own names."""
    found: Document = {}
    for name, each in value.items():
        found[f"{prefix}{name}"] = each
        if isinstance(each, dict):
            found |= flat(each, f"{prefix}{name}.")
    return found
