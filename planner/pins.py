"""Pins: parts of the plan the user fixes (`K=V`) or forbids (`K!=V`), parsed and checked before anything is searched.

Every key of the command line is known from the start. A dimension that is not built accepts its neutral value and refuses
others by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ..errors import PinError
from .precision import DTYPES, RECIPES, find_optimizer

Value = int | str | bool


@dataclass(frozen=True, slots=True)
class Pins:
    """Parsed pins; None where nothing was said. `forbidden` are the `K!=V` ones, `texts` all of them as written."""

    tp: int | None = None
    dp: int | None = None
    zero: int | None = None
    micro_batch: int | None = None
    sequence_parallel: bool | None = None
    dtype: str | None = None
    precision: str | None = None
    optimizer: str | None = None
    attention: str | None = None
    kernels: str | None = None
    loss: str | None = None
    tp_overlap: bool | None = None
    pp: int | None = None
    cp: int | None = None
    ep: int | None = None
    vpp: int | None = None
    recompute: str | None = None
    schedule: str | None = None
    offload: str | None = None
    passes: str | None = None
    lowering: str | None = None
    update: str | None = None
    forbidden: tuple[tuple[str, Value], ...] = ()
    texts: tuple[str, ...] = ()

    def forbids(self, key: str, value: Value) -> bool:
        """Whether `key!=value` was pinned."""
        return (key, value) in self.forbidden

    def check(self, key: str, value: Value) -> None:
        """Raise PinError when a value chosen elsewhere (a default, a flag) is a forbidden one."""
        if self.forbids(key, value):
            raise PinError(f"{key}={value} is what would be used, but {key}!={value} is pinned; pin another {key}")


@dataclass(frozen=True, slots=True)
class Key:
    """One key: how its values are read, and which of them can be planned (empty: all that can be read)."""

    read: Callable[[str, str], Value]
    built: tuple[Value, ...] = ()


def _count(key: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise PinError(f"{key}={text}: {key} is a number of at least 1")
    return int(text)


def _one_of(*values: str) -> Callable[[str, str], str]:
    def read(key: str, text: str) -> str:
        if text not in values:
            raise PinError(f"{key}={text}: {key} is one of {', '.join(values)}")
        return text

    return read


def _level(key: str, text: str) -> int:
    if text not in ("0", "1", "2", "3"):
        raise PinError(f"{key}={text}: {key} is one of 0, 1, 2, 3")
    return int(text)


def _switch(key: str, text: str) -> bool:
    if text not in ("on", "off"):
        raise PinError(f"{key}={text}: {key} is on or off")
    return text == "on"


def _names(key: str, text: str) -> str:
    names = [name.strip() for name in text.split(",")]
    if not all(name.replace("_", "").isalnum() for name in names) or (len(names) > 1 and {"auto", "none"} & set(names)):
        raise PinError(f"{key}={text}: {key} is auto, none, or names of passes with commas between")
    return ",".join(sorted(set(names)))


def _optimizer(key: str, text: str) -> str:
    return find_optimizer(text).name


KEYS: Mapping[str, Key] = MappingProxyType(
    {
        "tp": Key(_count),
        "dp": Key(_count),
        "pp": Key(_count),
        "cp": Key(_count),
        "ep": Key(_count),
        "vpp": Key(_count),
        "zero": Key(_level),
        "micro_batch": Key(_count),
        "recompute": Key(_one_of("none", "selective", "full")),
        "sequence_parallel": Key(_switch),
        "schedule": Key(_one_of("none", "gpipe", "1f1b", "interleaved", "zb-h1", "zbv", "dualpipev", "branches")),
        "offload": Key(_one_of("none", "optimizer", "params", "activations")),
        "dtype": Key(_one_of(*DTYPES)),
        "precision": Key(_one_of(*RECIPES)),
        "optimizer": Key(_optimizer),
        "attention": Key(_one_of("flash", "flash1", "flash3", "math")),
        "kernels": Key(_one_of("eager", "fused")),
        "loss": Key(_one_of("float", "compute", "fused")),
        "tp_overlap": Key(_switch),
        "passes": Key(_names),
        "lowering": Key(_one_of("torch", "liger")),
        "update": Key(_one_of("step", "backward")),
    }
)
"""All keys of the command line. With one stage (pp=1) gpipe and 1f1b are the plain loop over microbatches."""

_FIELDS = (
    "tp",
    "dp",
    "zero",
    "micro_batch",
    "sequence_parallel",
    "dtype",
    "precision",
    "optimizer",
    "attention",
    "kernels",
    "loss",
    "tp_overlap",
    "pp",
    "cp",
    "ep",
    "vpp",
    "recompute",
    "schedule",
    "offload",
    "passes",
    "lowering",
    "update",
)


@dataclass
class _Reading:
    values: dict[str, Value] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)
    forbidden: list[tuple[str, Value]] = field(default_factory=list)


def parse_pins(texts: Iterable[str]) -> Pins:
    """Parse `K=V` and `K!=V`; raises PinError for unknown keys, bad values, what is not built, and contradictions."""
    reading, kept = _Reading(), tuple(texts)
    for text in kept:
        key, sign, value = text.partition("!=")
        if not sign:
            key, sign, value = text.partition("=")
        key, value = key.strip(), value.strip()
        if not sign or not key or not value:
            raise PinError(f"pin {text!r} is not K=V or K!=V")
        _read(reading, text, key, value, forbid=sign == "!=")
    for key, wanted in reading.forbidden:
        if reading.values.get(key) == wanted:
            raise PinError(f"pins contradict each other: {reading.said[key]} and {key}!={spelled(wanted)}")
    known = {key: reading.values.get(key) for key in _FIELDS}
    return Pins(**known, forbidden=tuple(sorted(set(reading.forbidden), key=str)), texts=kept)  # type: ignore[arg-type]


def _read(reading: _Reading, text: str, key: str, value: str, *, forbid: bool) -> None:
    if key not in KEYS:
        close = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.6)
        hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(KEYS)}"
        raise PinError(f"unknown pin {key!r} in {text!r}{hint}")
    spec = KEYS[key]
    read = spec.read(key, value)
    if forbid:
        if spec.built and all(v == read for v in spec.built):
            raise PinError(f"{text}: {key}={value} is the only value supported so far")
        reading.forbidden.append((key, read))
        return
    if spec.built and read not in spec.built:
        raise PinError(f"{text} is not supported yet; {key}={spelled(spec.built[0])} is the only value built")
    if key in reading.values and reading.values[key] != read:
        raise PinError(f"pins contradict each other: {reading.said[key]} and {text}")
    reading.values[key], reading.said[key] = read, text


def spelled(value: Value) -> str:
    """A value as the command line spells it."""
    return ("on" if value else "off") if isinstance(value, bool) else str(value)
