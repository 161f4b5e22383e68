"""Run the stages of a pipeline: the action lists of planner/schedules.py, with messages between ranks.

In grad mode the whole schedule runs inside the call, as with microbatches on one stage (runtime/step.py): every stage has its loop
(parameters gathered once before, gradients reduced once after, as its ZeRO level says), a forward keeps its graph until the
backward of its microbatch, and what crosses is a leaf on the reader's side whose gradient travels back. Where the schedule splits
the backward pass, I makes what travels back and W the gradients of parameters (runtime/halves.py). Gradients of parameters that
several ranks hold are then summed over them, and the loss becomes known everywhere.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.profiler import record_function

from ..passes.stages import Border
from ..planner.exchanges import Message, Receive, Send
from ..planner.schedules import Action
from . import collectives
from .halves import Halves
from .mesh import Mesh
from .offload.engine import OffloadEmit
from .p2p import Arriving, Link
from .staged import Staged
from .step import Body, Buckets, Held, Loop, Results, Values, loss_gradient

Context = Callable[[], contextlib.AbstractContextManager[object]]


def train(
    staged: Staged,
    bodies: Mapping[int, Body],
    mesh: Mesh,
    values: Values,
    microbatches: int,
    buckets: Buckets,
    regather: Context,
    offload: OffloadEmit | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward and backward of all microbatches through all stages.

    Returns the whole loss, differentiable in `values.parameters`, and the results beside it.
    """
    assert staged.loss is not None
    if offload is not None:
        offload.begin()
    names = list(values.parameters)
    leaves = {n: p.detach().requires_grad_(p.requires_grad) for n, p in values.parameters.items()}
    inner = Values(leaves, values.whole, values.seed)
    with torch.enable_grad():
        loops = {s: Loop(lowered, inner, microbatches, buckets) for s, lowered in staged.own.items()}
        run = _Run(staged, bodies, Link(mesh), regather, lambda s, i, taken: loops[s].feeds(i, taken), mesh.sizes)
        with contextlib.ExitStack() as stack:
            for loop in loops.values():
                stack.enter_context(loop)
            run.play()
        for loop in loops.values():
            loop.close()
        for loop in loops.values():
            loop.finish()
        own = run.wholes()
        found = run.known(own, mesh.device)
    _sum_ties(staged, leaves, offload)
    total = torch.zeros(staged.loss.shape, dtype=staged.loss.dtype, device=mesh.device)
    if staged.loss_stage in staged.own:
        total = own[staged.own[staged.loss_stage].loss]
    assert mesh.pipeline_mesh is not None
    total = collectives.all_reduce(total, mesh.pipeline_mesh.get_group("pp").group_name)
    anchor = torch.zeros(
        (), device=mesh.device, requires_grad=True
    )  # stages without trained parameters call backward(), too
    held = [*(leaves[n].grad if offload is None else offload.end(n, leaves[n].grad) for n in names), None]
    result: Tensor = Held.apply(total.detach(), held, *[values.parameters[n] for n in names], anchor)
    return result, found


def evaluate(
    staged: Staged, bodies: Mapping[int, Body], mesh: Mesh, values: Values, regather: Context
) -> dict[str, Tensor]:
    """One forward pass of the whole batch through all stages, without gradients; every result, whole on every rank."""
    link = Link(mesh)

    def feeds(stage: int, _: int, taken: Mapping[str, Tensor]) -> list[Tensor]:
        return [taken[f.tensor] if f.kind == "taken" else values.of(f) for f in staged.own[stage].body_feeds]

    run = _Run(staged, bodies, link, regather, feeds, mesh.sizes)
    with torch.no_grad():
        run.play()
        return run.known(run.wholes(), mesh.device)


def _sum_ties(staged: Staged, leaves: Mapping[str, Tensor], offload: OffloadEmit | None) -> None:
    """Gradients of parameters that several pipeline ranks hold, summed over them."""
    for name, group in staged.ties:
        if group:
            leaf, total = leaves[name], functools.partial(collectives.all_reduce, group=group)
            if offload is not None and offload.is_away(name):
                leaf.grad = offload.summed(name, leaf.grad, total)
            else:
                leaf.grad = total(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf))


@dataclass
class _Passed:
    """What the backward of a stage and microbatch needs of its forward."""

    taken: Mapping[str, Tensor]
    gives: Mapping[str, Tensor]
    loss: Tensor | None
    halves: Halves


@dataclass
class _Run:
    """One pass over a rank's steps. `inbox` has what came for a stage, by message, and `outbox` what waits for its send.

    `passed` has forwards by (stage, microbatch), `owed` the gradients of parameters that wait for their W.
    """

    staged: Staged
    bodies: Mapping[int, Body]
    link: Link
    regather: Context
    feeds: Callable[[int, int, Mapping[str, Tensor]], list[Tensor]]
    sizes: tuple[int, ...]
    results: dict[int, Results] = field(default_factory=dict)
    inbox: dict[Message, tuple[Tensor, ...] | Arriving] = field(default_factory=dict)
    outbox: dict[Message, tuple[Tensor, ...]] = field(default_factory=dict)
    passed: dict[tuple[int, int], _Passed] = field(default_factory=dict)
    owed: dict[tuple[int, int], Halves] = field(default_factory=dict)

    def play(self) -> None:
        """Everything, in order."""
        act = {"F": self.forward, "B": self.backward, "I": self.inputs, "W": self.weights}
        for step in self.staged.steps:
            if isinstance(step, Action):
                act[step.kind](step.stage, step.microbatch)
            elif isinstance(step, Send):
                message = step.message
                self.link.send(self.outbox.pop(message), self.staged.rank_of[message.target])
            else:
                assert isinstance(step, Receive)
                message = step.message
                rank = self.staged.rank_of[message.source]
                self.inbox[message] = self.link.receive(self._borders(message), rank)
        self.link.finish()

    def wholes(self) -> dict[str, Tensor]:
        """The loss and the results of this rank's stages, whole on their mesh."""
        return {name: value for _, results in sorted(self.results.items()) for name, value in results.wholes().items()}

    def known(self, own: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Every result, made known on every rank; `own` are those of this one."""
        found = {}
        for name, result in self.staged.results.items():
            value = own.get(name)
            if value is None:
                value = torch.empty(result.shape, dtype=result.dtype, device=device)
            found[name] = self.link.broadcast(value.contiguous(), result.rank)
        return found

    def forward(self, stage: int, microbatch: int) -> None:
        """One microbatch through one stage."""
        taken: dict[str, Tensor] = {}
        for source in self.staged.sources(stage):
            message = Message(source, stage, microbatch)
            for border, value in zip(self._borders(message), self._came(message), strict=True):
                taken[border.tensor] = value.requires_grad_(border.differentiable and torch.is_grad_enabled())
        halves = Halves()
        with record_function(str(Action("F", stage, microbatch))), self.regather(), halves:
            made = self.bodies[stage](*self.feeds(stage, microbatch, taken))
        names = self.staged.gives[stage]
        gives, rest = dict(zip(names, made[: len(names)], strict=True)), made[len(names) :]
        self.results.setdefault(stage, Results(self.staged.own[stage])).add(microbatch, rest)
        loss = rest[0] if stage == self.staged.loss_stage else None
        if torch.is_grad_enabled():
            self.passed[stage, microbatch] = _Passed(taken, gives, loss, halves)
        for target in self.staged.targets(stage):
            message = Message(stage, target, microbatch)
            self._hand(message, tuple(gives[b.tensor].detach() for b in self._borders(message)))

    def backward(self, stage: int, microbatch: int) -> None:
        """The gradients of one microbatch through one stage: to its parameters, and to the stages it read from."""
        self.passed[stage, microbatch].halves.whole = True
        self.inputs(stage, microbatch)
        self.owed.pop((stage, microbatch)).finish()

    def weights(self, stage: int, microbatch: int) -> None:
        """What the gradients through a stage left to do for its parameters; nothing where its body is not divided."""
        with record_function(str(Action("W", stage, microbatch))):
            self.owed.pop((stage, microbatch)).finish()

    def inputs(self, stage: int, microbatch: int) -> None:
        """The gradients of one microbatch through one stage; those of its parameters as far as its body is not divided."""
        passed = self.passed.pop((stage, microbatch))
        self.owed[stage, microbatch] = passed.halves
        gradients: dict[str, Tensor] = {}
        for target in self.staged.targets(stage):
            wanted = self.staged.borders.returning(stage, target)
            if wanted:
                back = Message(target, stage, microbatch, back=True)
                for border, grad in zip(wanted, self._came(back), strict=True):
                    known = gradients.get(border.tensor)
                    gradients[border.tensor] = grad if known is None else known + grad
        roots = [(passed.gives[name], grad) for name, grad in gradients.items() if passed.gives[name].requires_grad]
        if passed.loss is not None and passed.loss.requires_grad:
            scale = loss_gradient(self.staged.own[stage], self.sizes)
            roots.append((passed.loss, torch.full_like(passed.loss, scale)))
        if roots:
            with record_function(str(Action("B" if passed.halves.whole else "I", stage, microbatch))):
                torch.autograd.backward([r for r, _ in roots], [g for _, g in roots])
        for source in self.staged.sources(stage):
            wanted = self.staged.borders.returning(source, stage)
            if wanted:
                leaves = [passed.taken[b.tensor] for b in wanted]
                grads = tuple(x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves)
                self._hand(Message(stage, source, microbatch, back=True), grads)

    def _borders(self, message: Message) -> tuple[Border, ...]:
        """What a message consists of."""
        if message.back:
            return self.staged.borders.returning(message.target, message.source)
        return self.staged.borders.edges[message.source, message.target]

    def _hand(self, message: Message, tensors: tuple[Tensor, ...]) -> None:
        """To a stage of this rank at once, else with the send that follows."""
        here = self.staged.rank_of[message.source] == self.staged.rank_of[message.target]
        (self.inbox if here else self.outbox)[message] = tensors

    def _came(self, message: Message) -> tuple[Tensor, ...]:
        came = self.inbox.pop(message)
        return came.wait() if isinstance(came, Arriving) else tuple(x.detach() for x in came)
