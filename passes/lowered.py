"""What lowering makes (graphs and their placeholders) and what it needs from the runtime (`Emit`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx

from ..planner.placement import Dims, Placement, Step

Emitted = tuple[Callable[..., Any], tuple[Any, ...]]
"""A callable and the arguments that follow the tensor(s)."""
CallForm = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
"""A callable with all its arguments; `Operand(i)` stands where tensor i goes."""


class Emit(Protocol):
    """The ops that communicate or draw random numbers, with their constants for one rank; supplied by the runtime."""

    device: torch.device

    def apart(self) -> Emit:
        """The same for another graph of the program: what comes in ahead within one graph does not reach into the next."""

    def transition(self, step: Step, dims: Dims) -> Emitted:
        """One change of placement of a tensor with global factor sizes `dims`."""

    def gather(
        self, shapes: Sequence[tuple[int, ...]], axes: tuple[int, ...], *, keep: bool, trainable: bool
    ) -> Emitted:
        """Chunks of a parameter group -> tensors of `shapes`; `keep` False frees them after use and gathers again."""

    def fetched(self, group: Sequence[str], gather: Emitted | None) -> Emitted | None:
        """How a parameter group comes in that lies behind the device, in place of `gather`; `gather` where it does not."""

    def streams(self, group: Sequence[str]) -> bool:
        """Whether a group is fetched for every pass, not once a step."""

    def reduce(self, axes: tuple[int, ...]) -> Emitted:
        """A list of tensors, R -> V on these axes: forward nothing, backward one bucketed all-reduce over all of them."""

    def cast(self) -> Emitted | None:
        """Stored tensors of a group -> the dtype they are computed with; None where they are the same."""

    def implementation(self, name: str, axis: int, form: CallForm) -> CallForm:
        """The op `form` (on local shapes) as the implementation that splitting on `axis` needs."""

    def random(self, form: CallForm, salt: int) -> Callable[[fx.Node], CallForm] | None:
        """How to run `form` under a seed tensor and `salt`; None if it draws no random numbers."""

    def shard_index(self, axes: Sequence[int]) -> int:
        """This rank's index among the shards made by the given axes."""


@dataclass(frozen=True)
class Feed:
    """One placeholder. `kind`: "step" (from entry), "chunk" (stored parameter), "whole" (input, buffer, constant), "cut", "seed",
    or "taken" (what another graph made, of this microbatch).

    A "cut" feed is a tensor of the prologue; where `place` is (dim, blocks of the dim before it) it is cut there into
    microbatches, where it is None every microbatch gets it whole.
    """

    node: str
    kind: str
    tensor: str = ""
    placement: Placement = ()
    place: tuple[int, int] | None = None


@dataclass(frozen=True)
class Share:
    """What a graph of some of the ops takes from the others and gives to them: (tensor, placement, microbatch axis last).

    `gives` are returned before the loss. `order` numbers all ops of the whole graph (random numbers depend on it); `looped` asks
    for entry and prologue graphs with one microbatch, too.
    """

    takes: tuple[tuple[str, Placement], ...]
    gives: tuple[tuple[str, Placement], ...]
    order: Mapping[str, int]
    looped: bool


@dataclass(frozen=True)
class After:
    """How a result is made of those of all microbatches: they are joined at `place` (as of a feed) or, without one, added up;
    then `steps` make it whole."""

    steps: tuple[Emitted, ...]
    place: tuple[int, int] | None = None


@dataclass
class Lowered:
    """The graphs of one rank, with their placeholders in order.

    `body` returns what it gives to other graphs, the loss (if it has one) and then `outputs`. With microbatches the loss is
    partial, in `loss_placement`, and `after` says how it and outputs that differ between microbatches become whole.
    `entry_outputs` are the step feeds of the body.
    """

    body: fx.GraphModule
    body_feeds: tuple[Feed, ...]
    loss: str = ""
    outputs: tuple[str, ...] = ()
    entry: fx.GraphModule | None = None
    entry_feeds: tuple[Feed, ...] = ()
    entry_outputs: tuple[tuple[str, Placement], ...] = ()
    prologue: fx.GraphModule | None = None
    prologue_feeds: tuple[Feed, ...] = ()
    loss_placement: Placement = ()
    after: dict[str, After] = field(default_factory=dict)
