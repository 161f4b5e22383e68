"""Configurations of other tools read back as pins: `plan ... --like FILE`, and `pins_of` in Python."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from ...errors import UsageError
from ...planner.planfile import parse_plan
from . import deepspeed, hf, megatron, script, torchtitan
from .base import Reading, Target
from .facts import facts_of

TARGETS: Mapping[str, Target] = {
    target.name: target for target in (hf.TARGET, torchtitan.TARGET, megatron.TARGET, deepspeed.TARGET, script.TARGET)
}


def pins_of(text: str, form: str) -> Reading:
    """What a configuration of the tool `form` (a key of `TARGETS`) says; raises UsageError for a text that is none."""
    try:
        return TARGETS[form].reading(text)
    except (ValueError, SyntaxError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"not a configuration of {TARGETS[form].title}: {error}") from None


def form_of(text: str) -> str:
    """Whose configuration a text is: JSON of Transformers or DeepSpeed, TOML, a Python program, else an argument list."""
    try:
        document = json.loads(text)
    except ValueError:
        pass
    else:
        return "hf" if isinstance(document, dict) and "distributed_config" in document else "deepspeed"
    if script.MARK in text:
        return "script"
    return "megatron" if re.search(r"^\s*--[a-z]|\s--[a-z-]+-size\b", text, re.MULTILINE) else "torchtitan"


def _plan(text: str) -> Reading | None:
    """What a plan file of our own says; None for a text that is none."""
    try:
        document = json.loads(text)
    except ValueError:
        return None
    if not isinstance(document, dict) or not {"regions", "pipeline"} <= set(document):
        return None
    facts = facts_of(parse_plan(text))
    return Reading(facts.pins, facts.batch, facts.plan.source.seq)


def read_like(path: Path) -> Reading:
    """The reading of a file; raises UsageError naming it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot read: {getattr(error, 'strerror', None) or error}") from None
    try:
        return _plan(text) or pins_of(text, form_of(text))
    except UsageError as error:
        raise UsageError(
            f"{path}: {error}; expected what `shardwright export` writes, or its tool's own file"
        ) from None
