"""`ParallelModule`: looks like the user's module, runs as the plan says.

Same call, same parameter names, attributes and methods forwarded. Parameters are DTensors, so torch's optimizers,
`clip_grad_norm_` and checkpointing see the global tensors.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..passes.skeleton import Tree, grow, like, part_of, put
from ..planner.plan import Plan
from ..planner.updates import why_not_in_backward
from . import norms, parameters, pipeline
from .checkpoint.buffers import recomputed
from .inbackward import InBackward
from .mesh import Mesh
from .offload.engine import Offloader
from .outputs import beside_loss, by_name, rebuild, update_buffers
from .programs import Program, Programs
from .stagestate import wholes
from .step import Values, run_microbatches, run_once
from .torch_compat import StageGradient


class ParallelModule(Tree):
    """The planned model on this rank. Made by `apply_plan` or `auto_parallelize`.

    `forward` takes what the original takes: the global batch on every rank (or this rank's part, with data="local").
    In grad mode it returns the model's output type with the global loss; other outputs only with `outputs=True`, as
    reading them otherwise raises. `plan`, `data_rank`, `data_size` describe the run.
    """

    _core: _Core

    @staticmethod
    def of(model: nn.Module, programs: Programs, mesh: Mesh, *, seed: int) -> ParallelModule:
        """The planned `model`; an instance of its class too."""
        made = like(ParallelModule, type(model))
        made._core = _Core(programs, mesh, seed)
        grow(made, programs.model)
        _adopt(made, model, programs, mesh)
        for name, module in model.named_modules():
            part_of(made, name).training = module.training
        return made

    def forward(self, *args: Any, outputs: bool = False, **kwargs: Any) -> Any:
        """Run the plan. Raises UsageError for shapes the plan cannot divide and for calls out of order."""
        core = self._core
        core.check_filled()
        args, kwargs = core.programs.cast(args, kwargs)
        program = core.programs.get(args, kwargs, train=self.training, grad=torch.is_grad_enabled(), outputs=outputs)
        values = Values(
            {name: core.slice_of(core.parameter(self, fqn)) for name, fqn in program.parameters.items()},
            program.whole(args, kwargs, self),
            core.next_seed(),
        )
        if program.staged is not None:
            return self._through_stages(program, values)
        if not program.training:
            with torch.no_grad():
                flat = run_once(program.lowered, program.body, values, program.regather())
            update_buffers(program, by_name(program, flat), self)
            return rebuild(program, flat)
        core.check_order()
        if program.microbatches > 1:
            sizes = core.mesh.sizes
            flat = run_microbatches(
                program.lowered, program.body, values, program.microbatches, program.buckets, sizes, program.regather,
                program.emit.offload,
            )  # fmt: skip
        else:
            flat = run_once(program.lowered, program.body, values, program.regather())
        known = by_name(program, flat)
        update_buffers(program, known, self)
        return rebuild(program, [core.watch(flat[0]), *beside_loss(program, known)])

    def _through_stages(self, program: Program, values: Values) -> Any:
        """A call of a module whose plan has a pipeline."""
        staged, core = program.staged, self._core
        assert staged is not None
        if not program.training:
            found = pipeline.evaluate(staged, program.bodies, core.mesh, values, program.regather)
            update_buffers(program, found, self)
            return rebuild(program, [found[name] for name in program.lowered.outputs])
        core.check_order()
        loss, found = pipeline.train(
            staged, program.bodies, core.mesh, values, program.microbatches, program.buckets, program.regather,
            program.emit.offload,
        )  # fmt: skip
        update_buffers(program, found, self)
        return rebuild(program, [core.watch(loss), *beside_loss(program, found)])

    @property
    def plan(self) -> Plan:
        """The plan this module runs."""
        return self._core.programs.plan

    @property
    def data_rank(self) -> int:
        """This rank's index among the data-parallel parts of the batch."""
        return self._core.data_position()[0]

    @property
    def data_size(self) -> int:
        """Number of data-parallel parts of the batch."""
        return self._core.data_position()[1]

    @property
    def device_of_run(self) -> torch.device:
        """The device this rank computes on."""
        return self._core.mesh.device

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> Any:
        """DistributedDataParallel asks for it first, also when a trainer wraps the module unasked."""
        raise UsageError(
            "this module already runs in parallel under its plan: do not wrap it in DistributedDataParallel. Trainers that wrap "
            "every distributed model (Hugging Face's among them) work on one process; on several, write the loop yourself"
        )

    @property
    def offload(self) -> Offloader | None:
        """What the plan keeps behind the device; None where it keeps all on it."""
        return self._core.programs.offload

    @property
    def constants(self) -> list[Tensor]:
        """Tensors of its graphs on the device that are neither parameters nor buffers."""
        return self._core.programs.constants

    @property
    def axis_names(self) -> dict[str, str]:
        """Mesh axis by process group name, for a `CommLedger`."""
        return self._core.mesh.axis_of_group()

    def program(self, *args: Any, train: bool = True, **kwargs: Any) -> Program:
        """The lowered program for these inputs: `.lowered.body.print_readable()` shows what this rank runs."""
        return self._core.programs.get(args, kwargs, train=train, grad=train, outputs=False)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale all gradients so that their global norm is at most `max_norm`; returns the norm before, on every rank.

        Right for every placement and order; `torch.nn.utils.clip_grad_norm_` is too, but for the infinity norm.
        """
        core = self._core
        if core.in_backward is not None:
            raise UsageError(
                "parameters are updated in the backward pass, where no gradient is left to clip; plan with update=step to clip"
            )
        if core.mesh.stages == 1:
            return norms.clip_grad_norm_(self.parameters(), max_norm, norm_type)
        counted = {id(p) for n, p in self.named_parameters() if core.first_holder(n)}
        return norms.clip_grad_norm_(self.parameters(), max_norm, norm_type, counted=counted, device=core.mesh.device)

    def update_in_backward(self, optimizer: torch.optim.Optimizer | None) -> None:
        """From now on update each parameter as soon as its gradient is complete, and free that; None ends it.

        The loop stays as it is: `optimizer.step()` then finds nothing left to do and marks the step's end, `zero_grad()` nothing to
        clear. Clipping by the global norm, a scaled loss and accumulation over several backward passes are impossible: the first
        raises in `clip_grad_norm_` of this module (torch's own function sees no gradients), the others in `backward()`. Raises
        UsageError where the plan or the optimizer does not allow it.
        """
        core = self._core
        problem = why_not_in_backward(self.plan)
        if problem or core.programs.compile:
            raise UsageError(
                f"update in the backward pass: {problem or 'a compiled graph hands out all gradients at once'}"
            )
        if core.in_backward is not None:
            core.in_backward.close()
        core.in_backward = InBackward(optimizer, dict(self.named_parameters())) if optimizer is not None else None

    def wholes(self, pick: Callable[[Tensor], Tensor | None]) -> Iterator[tuple[str, Tensor | None]]:
        """`pick(parameter)`, made whole, of every parameter of the original by name; None where no rank has one.

        A collective: every rank iterates to the end.
        """
        own = {n: v for n, p in self.named_parameters() if (v := pick(p)) is not None}
        return wholes(self._core.mesh, own, [n for n, _ in self._core.programs.model.named_parameters()])

    def full_state_dict(self) -> dict[str, Tensor]:
        """The original's state_dict: plain whole tensors under the original names, on every rank."""
        own = self.state_dict()
        names = own if self._core.mesh.stages == 1 else self._core.programs.model.state_dict()
        return {name: value for name, value in wholes(self._core.mesh, own, names) if value is not None}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load whole tensors (each rank takes its part) or DTensors placed as here, under the original names.

        A pipeline rank takes what its stages hold and passes over what others hold.
        """
        if assign:
            raise UsageError("load_state_dict(assign=True) is not supported: the plan decides where parameters live")
        own = self.state_dict()
        if self._core.mesh.stages > 1:
            elsewhere = self._core.programs.model.state_dict().keys() - own.keys()
            state_dict = {name: value for name, value in state_dict.items() if name not in elsewhere}
        converted = {
            name: parameters.like(own[name], value) if name in own else value for name, value in state_dict.items()
        }
        result = nn.Module.load_state_dict(self, converted, strict=strict)
        tensors = self.state_dict(keep_vars=True)
        self._core.loaded(tensors, [value for name, value in tensors.items() if name in converted])
        return result


class _Core:
    """What a ParallelModule keeps beside parameters and buffers."""

    def __init__(self, programs: Programs, mesh: Mesh, seed: int) -> None:
        self.programs, self.mesh, self._seed = programs, mesh, seed
        self._calls = 0
        self.unfilled: set[str] = set()
        self.in_backward: InBackward | None = None
        self._pending: weakref.ref[Tensor] | None = None
        self._holders: dict[str, tuple[dict[str, nn.Parameter | None], str]] = {}

    def parameter(self, tree: nn.Module, name: str) -> Tensor:
        """The parameter of the module; where it is held is looked up once (paths cost more than small ops)."""
        if name not in self._holders:
            path, _, last = name.rpartition(".")
            self._holders[name] = part_of(tree, path)._parameters, last
        held, last = self._holders[name]
        found = held[last]
        assert found is not None
        return found

    def slice_of(self, parameter: Tensor) -> Tensor:
        """This rank's slice, as a call computes with it."""
        if self.in_backward is not None and torch.is_grad_enabled():
            return self.in_backward.leaf(parameter)
        return parameters.local(parameter)

    def first_holder(self, name: str) -> bool:
        """Whether this is the first pipeline rank that holds a parameter."""
        stages = self.programs.stages
        return stages is None or stages.ranks_of(name)[0] == self.mesh.stage

    def next_seed(self) -> Tensor:
        """A seed for this call's random ops, equal on all ranks; microbatches add their index."""
        self._calls += 1
        return torch.tensor((self._seed * 1_000_003 + self._calls * 65_536) % (1 << 62), dtype=torch.int64)

    def random_state(self) -> tuple[int, int]:
        """The seed and the number of calls that drew from it: with them a run goes on drawing what it would have drawn."""
        return self._seed, self._calls

    def set_random_state(self, seed: int, calls: int) -> None:
        """Go on where `random_state` was taken."""
        self._seed, self._calls = seed, calls

    def loaded(self, tensors: Mapping[str, Tensor], values: Iterable[Tensor]) -> None:
        """Some of the module's `tensors` were written to from outside of training."""
        if self.programs.offload is not None:
            for name in tensors:
                self.programs.offload.written(name)
        written = {id(value) for value in values}
        self.unfilled -= {name for name in self.unfilled if id(tensors[name]) in written}

    def check_filled(self) -> None:
        """Parameters of a model that was built on the meta device have memory here, and no values until they are loaded."""
        if self.unfilled:
            first, more = min(self.unfilled), len(self.unfilled) - 1
            raise UsageError(
                f"{first}{f' and {more} more' if more else ''} have no values (built on the meta device); load them first: "
                "load_safetensors(pm, folder), load_checkpoint or load_state_dict"
            )

    def check_order(self) -> None:
        """Two grad-mode calls before one backward would mix two steps' held gradients."""
        if self._waiting() and gc.collect() >= 0 and self._waiting():  # a dropped loss may sit in a reference cycle
            raise UsageError(
                "called again in grad mode before loss.backward() of the call before; "
                "call backward() first, or evaluate under torch.no_grad()"
            )

    def _waiting(self) -> bool:
        return self._pending is not None and self._pending() is not None

    def watch(self, loss: Tensor) -> Tensor:
        """Remember that `loss` waits for its backward."""
        if not loss.requires_grad:
            return loss
        if self.in_backward is not None:
            loss.register_hook(self.in_backward.begins)
        loss.register_hook(self._done)
        self._pending = weakref.ref(loss)
        return loss

    def _done(self, _: Tensor) -> None:
        self._pending = None

    def data_position(self) -> tuple[int, int]:
        names = [a.name for a in self.mesh.axes if a.role == "data"]
        return (self.mesh.position(*names), self.mesh.size(*names)) if names else (0, 1)


def _adopt(tree: ParallelModule, model: nn.Module, programs: Programs, mesh: Mesh) -> None:
    """Register the model's parameters as DTensors and its buffers, under the original names, ties kept."""
    made: dict[int, nn.Parameter] = {}
    placed = {name: p for p in programs.summary.outline.parameters for name in p.names}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if programs.stages is not None and mesh.stage not in programs.stages.ranks_of(name):
            continue
        if id(parameter) not in made:
            tree._core.unfilled |= {name} if parameter.is_meta else set()
            made[id(parameter)] = programs.distribute(parameter, placed.get(name), mesh)
            if mesh.stages > 1:
                StageGradient.mark(made[id(parameter)])
        put(tree, name, made[id(parameter)])
    kept = set(model.state_dict(keep_vars=True))
    computed = recomputed(model)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if buffer.is_meta:
            tree._core.unfilled |= {name} & kept
            buffer = computed.get(name, torch.empty_like(buffer, device=mesh.device))
        put(tree, name, programs.widened(buffer).to(mesh.device), persistent=name in kept)
