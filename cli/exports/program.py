"""The program that `export --to script` writes, less what a plan does not use.

A line `# [name` begins what only plans with `name` need, `# name]` ends it; the values of the constants are the plan's.
"""

# [program
from __future__ import annotations

import argparse

# [function
import importlib.util
import inspect

# function]
import os

# [tp
import re

# tp]
from typing import Any

import torch
import torch.distributed as dist

# [hf
import transformers

# hf]
from torch import nn

# [recompute
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

# recompute]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# [data
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

# data]
# [pp
from torch.distributed.pipelining import PipelineStage, schedules

# pp]
from torch.distributed.tensor import DTensor, Replicate, Shard

# [tp
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

# tp]
# [positions
from torch.distributed.tensor.parallel import SequenceParallel

# positions]

PLAN: dict[str, Any] = {}
CONFIG: dict[str, Any] = {}
CLASS: str = ""
INPUTS: dict[str, Any] = {}
STYLES: dict[str, str] = {}
TIED: list[list[str]] = []
LAYERS: str = ""
NAMES: dict[str, str] = {}
CUTS: list[int] = []
RECOMPUTE: list[int] = []


def build(device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model with random weights, the same on all ranks, and one global batch of random inputs."""
    torch.manual_seed(PLAN["seed"])
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # [hf
        kind = transformers.CONFIG_MAPPING[CONFIG["model_type"]]
        config = kind.from_dict({k: v for k, v in CONFIG.items() if k not in ("dtype", "torch_dtype")})
        config.use_cache = False
        model: nn.Module = getattr(transformers, CLASS)(config)
        generator = torch.Generator().manual_seed(PLAN["seed"])
        args: tuple[Any, ...] = ()
        inputs: Any = {}
        for name, given in INPUTS.items():
            if isinstance(given, str):
                inputs[name] = inputs[given].clone()
            else:
                shape, high = given
                inputs[name] = torch.randint(high, shape, generator=generator) if high else torch.randn(shape, generator=generator)
        # hf]
        # [function
        spec = importlib.util.spec_from_file_location("planned_model", CONFIG["file"])
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        make = getattr(module, CONFIG["function"])
        sizes = {k: PLAN[k] for k in ("batch", "seq") if k in inspect.signature(make).parameters and PLAN[k] is not None}
        model, inputs = make(**sizes)
        args, inputs = ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
        # function]
    finally:
        torch.set_default_dtype(before)
    return model.to(device), tuple(a.to(device) for a in args), {k: v.to(device) for k, v in inputs.items()}


def loss_of(output: Any) -> torch.Tensor:
    """The loss a model returns: `.loss`, `["loss"]`, or its first scalar."""
    if isinstance(output, dict) or hasattr(output, "loss"):
        return output["loss"] if isinstance(output, dict) else output.loss
    found = output if isinstance(output, (tuple, list)) else (output,)
    return next(value for value in found if isinstance(value, torch.Tensor) and value.ndim == 0)


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The list of layers."""
    return model.get_submodule(LAYERS)  # type: ignore[return-value]


# [positions
class Stream(ParallelStyle):
    """Brings what flows into or out of a module, (batch, positions, hidden), from one layout to another."""

    def __init__(self, before: Any = None, after: Any = None, local: bool = True) -> None:
        self.before, self.after, self.local = before, after, local

    def _moved(self, value: Any, layouts: Any, mesh: DeviceMesh) -> Any:
        there, wanted = layouts
        moved = DTensor.from_local(value, mesh, (there,), run_check=False).redistribute(placements=(wanted,))
        return moved.to_local() if self.local else moved

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def into(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (self._moved(args[0], self.before, device_mesh), *args[1:]), kwargs
            name = next(k for k, v in kwargs.items() if isinstance(v, torch.Tensor) and v.ndim == 3)
            return args, {**kwargs, name: self._moved(kwargs[name], self.before, device_mesh)}

        def out(_: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (self._moved(output[0], self.after, device_mesh), *output[1:])
            return self._moved(output, self.after, device_mesh)

        if self.before is not None:
            module.register_forward_pre_hook(into, with_kwargs=True)
        if self.after is not None:
            module.register_forward_hook(out)
        return module


# positions]
# [tp
def split(model: nn.Module, mesh: DeviceMesh) -> None:
    """Tensor parallelism: the modules of STYLES are split along `mesh`."""
    whole, positions = Replicate(), Shard(1)
    known: dict[str, ParallelStyle] = {
        "colwise": ColwiseParallel(),
        "colwise, gathered": ColwiseParallel(output_layouts=whole),
        "rowwise": RowwiseParallel(),
        "rowwise, sliced": RowwiseParallel(input_layouts=whole),
        "vocabulary": RowwiseParallel(input_layouts=whole),
        "hidden": ColwiseParallel(output_layouts=whole),
        # [positions
        "rowwise, scattered": RowwiseParallel(output_layouts=positions),
        "norm": SequenceParallel(use_local_output=True),
        "block": Stream(before=(positions, whole), local=False),
        # positions]
    }
    names = [name for name, module in model.named_modules() if list(module.parameters())]
    for pattern, style in STYLES.items():
        meant = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        parallelize_module(model, mesh, {name: known[style] for name in names if meant.fullmatch(name)})
    # [positions
    layers = [layer for layer in layers_of(model) if list(layer.parameters())]
    parallelize_module(layers[0], mesh, Stream(before=(whole, positions)))
    parallelize_module(layers[-1], mesh, Stream(after=(positions, whole)))
    # positions]
    for first, *others in TIED:
        for other in others:
            path, _, name = other.rpartition(".")
            setattr(model.get_submodule(path), name, model.get_parameter(first))


# tp]
# [pp
class Through(nn.Module):
    """A layer that another stage has."""

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden


class Stage(nn.Module):
    """The layers of one stage in a model whose others are left out: ids or hidden values in, hidden values or logits out."""

    def __init__(self, model: nn.Module, index: int) -> None:
        super().__init__()
        first, last = index == 0, index == len(CUTS) - 1
        begin = sum(CUTS[:index])
        layers = layers_of(model)
        for i in range(len(layers)):
            if not begin <= i < begin + CUTS[index]:
                layers[i] = Through()
        for name, mine in ((NAMES["embedding"], first), (NAMES["norm"], last), (NAMES["head"], last)):
            if not mine:
                model.set_submodule(name, nn.Identity())
        self.model, self.takes = model, "input_ids" if first else "inputs_embeds"

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.model(**{self.takes: given}).logits  # type: ignore[no-any-return]


SCHEDULES = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "Interleaved1F1B"}
# pp]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


class Parallel:
    """The model of one rank, parallel as PLAN says; `parts` are its stages (one without a pipeline)."""

    def __init__(self, device: torch.device, *, exact: bool = False) -> None:
        replicas, shards = (PLAN["dp"], 1) if PLAN["zero"] == 0 else (1, PLAN["dp"])
        sizes, names = (PLAN["pp"], replicas, shards, PLAN["tp"]), ("pp", "replicate", "shard", "tp")
        self.mesh, self.device, self.exact = init_device_mesh(device.type, sizes, mesh_dim_names=names), device, exact
        self.dtype = torch.float64 if exact else DTYPES[PLAN["parameter"]]
        self.data_rank = max(self.mesh["replicate"].get_local_rank(), self.mesh["shard"].get_local_rank())
        self.parts: list[nn.Module] = []
        # [one
        model, self.args, self.inputs = build(device, self.dtype)
        self.parts.append(self.parallel(model.eval() if exact else model.train(), model))
        # one]
        # [pp
        rank, stages = self.mesh["pp"].get_local_rank(), []
        for index in range(rank, len(CUTS), PLAN["pp"]):
            model, _, self.inputs = build(device, self.dtype)
            self.loss_function, self.vocabulary = model.loss_function, model.config.get_text_config().vocab_size
            part = self.parallel(Stage(model.eval() if exact else model.train(), index), model)
            group = self.mesh["pp"].get_group()
            stages.append(PipelineStage(part, index, len(CUTS), device, group=group))
            self.parts.append(part)
        self.last = rank == (len(CUTS) - 1) % PLAN["pp"]
        make = schedules.get_schedule_class(SCHEDULES[PLAN["schedule"]])
        self.schedule = make(stages if len(stages) > 1 else stages[0], PLAN["microbatches"], loss_fn=self.loss)
        # pp]

    def parallel(self, part: nn.Module, model: nn.Module) -> nn.Module:
        """Tensor parallelism, then recompute, then data parallelism; `part` is `model`, or the stage that holds it."""
        # [tp
        split(model, self.mesh["tp"])
        # tp]
        # [recompute
        layers = layers_of(model)
        for i in RECOMPUTE:
            if list(layers[i].parameters()):
                layers[i] = checkpoint_wrapper(layers[i], checkpoint_impl=CheckpointImpl.NO_REENTRANT)
        # recompute]
        # [data
        data = self.mesh["replicate", "shard"] if PLAN["zero"] == 0 else self.mesh["shard"]
        low = DTYPES[PLAN["compute"]] if PLAN["compute"] != PLAN["parameter"] and not self.exact else None
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=DTYPES[PLAN["gradient"]] if low else None)
        for unit in [*(m for m in (layers_of(model) if LAYERS else ()) if list(m.parameters())), part]:
            fully_shard(unit, mesh=data, reshard_after_forward=PLAN["zero"] == 3, mp_policy=policy)
        # data]
        return part

    def rows(self, value: torch.Tensor) -> torch.Tensor:
        """The samples of this data-parallel rank."""
        return value.chunk(PLAN["dp"])[self.data_rank]

    def pieces(self, value: torch.Tensor) -> list[torch.Tensor]:
        """The microbatches of this rank; what has no samples goes with every one of them."""
        count = PLAN["microbatches"]
        sampled = value.ndim > 0 and value.shape[0] == PLAN["batch"]
        return list(self.rows(value).chunk(count)) if sampled else [value] * count

    # [one
    def step(self) -> torch.Tensor:
        """One forward and backward pass over the batch; the loss of all ranks."""
        total = torch.zeros((), device=self.device, dtype=self.dtype)
        count, (model,) = PLAN["microbatches"], self.parts
        pieces = [self.pieces(a) for a in self.args]
        named = {name: self.pieces(value) for name, value in self.inputs.items()}
        for i in range(count):
            # [data
            if PLAN["zero"] < 2 and isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(i == count - 1)
            # data]
            loss = loss_of(model(*(p[i] for p in pieces), **{k: v[i] for k, v in named.items()})) / count
            loss.backward()
            total += loss.detach()
        return self.mean(total)

    # one]
    # [pp
    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The model's own loss of a microbatch."""
        return self.loss_function(logits=logits, labels=labels, vocab_size=self.vocabulary)  # type: ignore[no-any-return]

    def step(self) -> torch.Tensor:
        """One forward and backward pass over the batch; the loss of all ranks."""
        losses: list[torch.Tensor] = []
        ids, labels = (self.rows(self.inputs[name]) for name in ("input_ids", "labels"))
        given = (ids,) if self.mesh["pp"].get_local_rank() == 0 else ()
        self.schedule.step(*given, target=labels if self.last else None, losses=losses)
        total = torch.stack(losses).mean().detach() if self.last else torch.zeros((), device=self.device)
        total = total.to(self.dtype)
        dist.all_reduce(total, group=self.mesh["pp"].get_group())
        return self.mean(total)

    # pp]
    def mean(self, loss: torch.Tensor) -> torch.Tensor:
        """The mean over data-parallel ranks, whose parts are of one size."""
        for name in ("replicate", "shard"):
            dist.all_reduce(loss, group=self.mesh[name].get_group())
        return loss / PLAN["dp"]

    def gradients(self) -> dict[str, torch.Tensor]:
        """Whole gradients of the parameters of this rank's stages, by the names of the original model."""
        found: dict[str, torch.Tensor] = {}
        for part in self.parts:
            for name, parameter in part.named_parameters():
                gradient = parameter.grad
                if gradient is not None:
                    whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                    name = name.replace("_checkpoint_wrapped_module.", "")
                    found[name.removeprefix("model.") if PLAN["pp"] > 1 else name] = whole
        return found


def check(parallel: Parallel) -> bool:
    """Whether loss and every gradient are those of the original model, in float64 and without dropout."""
    model, args, inputs = build(parallel.device, torch.float64)
    expected = loss_of(model.eval()(*args, **inputs))
    expected.backward()
    value = float(expected.detach())
    found = parallel.step()
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    differences = {
        name: float((gradient - own[name]).abs().max() / own[name].abs().max().clamp(min=1e-12))
        for name, gradient in parallel.gradients().items()
    }
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, differences)
    missing = sorted(set(own) - {name for each in seen for name in each})
    worst = max(difference for each in seen for difference in each.values())
    if dist.get_rank() == 0:
        print(f"loss {float(found):.12g}, original {value:.12g}")
        print(f"{len(own)} gradients differ by at most {worst:.2e} of their largest element; missing: {missing}")
    return abs(float(found) - value) <= 1e-6 * abs(value) and worst <= 1e-5 and not missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare loss and gradients with the original model")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate")
    given = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        parallel = Parallel(device, exact=given.check)
        if given.check:
            raise SystemExit(0 if check(parallel) else 1)
        parameters = [p for part in parallel.parts for p in part.parameters() if p.requires_grad]
        optimizer = getattr(torch.optim, PLAN["optimizer"])(parameters, lr=given.rate)
        for step in range(given.steps):
            loss = parallel.step()
            optimizer.step()
            optimizer.zero_grad()
            if dist.get_rank() == 0:
                print(f"step {step}: loss {float(loss):.6f}", flush=True)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
