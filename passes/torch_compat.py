"""The private torch APIs that the passes need, each with its reason and the versions tried.

Nothing else under `passes/` imports a private name, so a new torch release is checked here.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.multiprocessing.reductions import StorageWeakRef as StorageRef
from torch.utils import _pytree as pytree

DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
"""What torch raises where a value or a shape depends on data. No public base class exists (tried: 2.11 to 2.13)."""


__all__ = [
    "DATA_DEPENDENT", "FakeTensorMode", "HigherOrderOperator", "OpOverload", "StorageRef", "arguments", "fake_mode",
    "full_name", "has_shapes", "is_graphed", "is_mutable", "is_plain", "is_tracing", "keeps_graph", "lazy_graphs", "mode_of",
    "name_of", "overload_name", "pytree", "quiet", "short_stacks", "storage_key", "watch_autograd_functions",
]  # fmt: skip
"""OpOverload and HigherOrderOperator are the types of call targets in exported graphs; pytree flattens what models take and
return, as export does, Hugging Face outputs included; StorageRef is a weak reference to a storage. None has a public name
(tried: 2.11 to 2.13)."""


def is_tracing() -> bool:
    """Whether code runs to be traced (dynamo, AOTAutograd, fake tensors), not to compute.

    `torch.compiler.is_compiling` misses AOTAutograd called without dynamo; `torch._guards.detect_fake_mode` sees its fake
    mode. Both are needed so that tracing a graph does not look like running it.
    """
    return torch.compiler.is_compiling() or isinstance(detect_fake_mode(), FakeTensorMode)


def is_graphed() -> bool:
    """Whether the calls that run now are written down as a graph of ops (make_fx, AOTAutograd); fake tensors alone write none.

    `get_proxy_mode` is the only way to ask (tried: 2.11 to 2.13).
    """
    return get_proxy_mode() is not None


def keeps_graph() -> bool:
    """Whether the running backward pass leaves its graph for another one (`retain_graph`), which reads what was saved again.

    What a function saved may be overwritten in its backward pass only where this is False; no public call tells (tried: 2.13).
    True where torch cannot tell.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def full_name(target: OpOverload) -> str:
    """The name of an op with its namespace, without its overload: "aten::add". Tried: 2.11 to 2.13."""
    return target._schema.name


def name_of(node: fx.Node) -> str:
    """The name of the aten op a node calls ("add"), "" for anything that is no op; other namespaces stay ("custom::op")."""
    return full_name(node.target).removeprefix("aten::") if isinstance(node.target, OpOverload) else ""


def overload_name(target: OpOverload) -> str:
    """The overload of an op: "Tensor" of aten::add.Tensor. Tried: 2.11 to 2.13."""
    return target._overloadname


def arguments(target: OpOverload) -> list[Any]:
    """The arguments of an op's schema (name, default_value, has_default_value(), alias_info). Tried: 2.11 to 2.13."""
    return list(target._schema.arguments)


def is_mutable(target: OpOverload) -> bool:
    """Whether an op writes to one of its arguments. Tried: 2.11 to 2.13."""
    return bool(target._schema.is_mutable)


def fake_mode(*, symbolic: bool = False) -> FakeTensorMode:
    """A mode under which tensors have shape, dtype, strides and device but no memory.

    Needed to trace and observe models of any size; torch has no public equivalent that keeps the CPU's strides and
    kernels (the meta device takes other kernels). `symbolic` allows sizes that depend on data, so that they can be
    reported. Tried: 2.11 to 2.13.
    """
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv() if symbolic else None)


def mode_of(value: torch.Tensor) -> FakeTensorMode:
    """The mode that made a fake tensor: new values of one graph must come from the same one. Tried: 2.11 to 2.13."""
    return value.fake_mode  # type: ignore[attr-defined, no-any-return]


def has_shapes(value: torch.Tensor) -> bool:
    """Whether a tensor's sizes may depend on data: it is no fake tensor, or one of a mode with symbols. Tried: 2.11 to 2.13."""
    mode = getattr(value, "fake_mode", None)
    return value.device.type != "meta" if mode is None else mode.shape_env is not None


def storage_key(value: torch.Tensor) -> int:
    """Equal for tensors that share memory, fake tensors included (they have no data pointer). Tried: 2.11 to 2.13."""
    return value.untyped_storage()._cdata


def is_plain(value: torch.Tensor) -> bool:
    """Whether a tensor can be replaced by a fake one: no subclass but parameters, buffers and fakes. Tried: 2.11 to 2.13."""
    return type(value) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) or isinstance(value, FakeTensor)


def lazy_graphs() -> contextlib.AbstractContextManager[None]:
    """While active, new graph modules print and compile their code when first called, not at each change.

    Export changes its graph module some thirty times and never calls it: a quarter of its time. Tried: 2.11 to 2.13.
    """
    return _use_lazy_graph_module(True)  # type: ignore[no-any-return]


@contextlib.contextmanager
def short_stacks(inner: Callable[[str], bool]) -> Iterator[None]:
    """While active, a traced node's stack trace is the innermost `forward` in a file that is not `inner`, and no more.

    Export looks up all frames of every node's stack, 80 of them in a layer of a model, and keeps those called `forward`:
    a sixth of its time. Tried: 2.11 to 2.13.
    """
    original = torch.fx.proxy.CapturedTraceback  # type: ignore[attr-defined]

    class Innermost:
        """Stands for the traceback class of torch.fx.proxy: `extract()`, then `summary()`."""

        @staticmethod
        def extract() -> type[Innermost]:
            return Innermost

        @staticmethod
        def summary() -> traceback.StackSummary:
            frame: types.FrameType | None = sys._getframe(1)
            while frame is not None and (frame.f_code.co_name != "forward" or inner(frame.f_code.co_filename)):
                frame = frame.f_back
            if frame is None:
                return traceback.StackSummary()
            code = frame.f_code  # not StackSummary.extract: it looks at the file's date every time
            return traceback.StackSummary.from_list(
                [traceback.FrameSummary(code.co_filename, frame.f_lineno, code.co_name, lookup_line=False)]
            )

    torch.fx.proxy.CapturedTraceback = Innermost  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.fx.proxy.CapturedTraceback = original  # type: ignore[attr-defined]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what export prints and logs about its own failure (graphs, stack traces) from the user, who gets one clear message.

    After a success, everything the model printed goes to stderr: stdout is for results. Tried: 2.11 to 2.13.
    """
    loggers = [logging.getLogger(name) for name in ("torch._subclasses.fake_tensor", "torch.export._trace")]
    before = [logger.disabled for logger in loggers]
    printed = io.StringIO()
    for logger in loggers:
        logger.disabled = True
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="The tensor attributes? .* assigned during export"
            )  # an LSTM's own list
            yield
        sys.stderr.write(printed.getvalue())
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


@contextlib.contextmanager
def watch_autograd_functions(seen: Callable[[type], None]) -> Iterator[None]:
    """Report every custom autograd function that runs.

    Export traces through `Function.apply` and forgets its backward without a word; no hook tells (tried: 2.11 to 2.13).
    """
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        seen(cls)
        return original.__func__(cls, *args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]
