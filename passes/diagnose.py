"""Why a model cannot be traced: every place that depends on data, or the user's line that raised."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

from .torch_compat import DATA_DEPENDENT, mode_of, quiet

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)


def explain(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> list[str]:
    """Every problem of one trace: the model is run once more on fake tensors, noting data-dependent ops and going on.

    `args` and `kwargs` hold the fake inputs. Falls back to `error` where the second run finds nothing.
    """
    watch = _Watch()
    try:
        with quiet(), watch, torch.enable_grad():
            model(*args, **kwargs)
    except Exception as raised:
        # After a stand-in value, a failure may be its consequence: it is reported only when nothing else was found.
        if not watch.problems:
            watch.problems.append(_raised(raised))
    return list(dict.fromkeys(watch.problems)) or [_raised(error)]


class _Watch(TorchFunctionMode):
    """Runs ops; one that needs data is noted and answered with a stand-in, so that later ones are found too."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _VALUES:
            self._note(func)
            return _VALUES[name](args[0])
        try:
            result = func(*args, **(kwargs or {}))
        except DATA_DEPENDENT:
            self._note(func)
            raise
        if _unknown_size(result):
            self._note(func)
            return _sized(result)
        return result

    def _note(self, func: Callable[..., Any]) -> None:
        name = (resolve_name(func) or getattr(func, "__name__", str(func))).removeprefix("torch.")
        self.problems.append(f"{name} depends on the data: {user_line(traceback.extract_stack())}")


_VALUES: Mapping[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: torch.zeros((), dtype=x.dtype).item(),
    "tolist": lambda x: torch.zeros(x.shape, dtype=x.dtype).tolist(),
    "__bool__": lambda x: True,
    "__int__": lambda x: 0,
    "__index__": lambda x: 0,
    "__float__": lambda x: 0.0,
    "equal": lambda x: True,
    "allclose": lambda x: True,
    "numpy": lambda x: torch.zeros(x.shape, dtype=x.dtype).numpy(),
}
"""Calls that turn a tensor into a Python value, and their stand-ins."""


def _unknown_size(result: Any) -> bool:
    found = result if isinstance(result, tuple | list) else (result,)
    return any(isinstance(s, torch.SymInt) for t in found if isinstance(t, torch.Tensor) for s in t.shape)


def _sized(result: Any) -> Any:
    """The same tensors with one element where the size is unknown."""
    if isinstance(result, tuple | list):
        return tuple(_sized(r) for r in result)
    shape = [1 if isinstance(s, torch.SymInt) else s for s in result.shape]
    with mode_of(result):
        return torch.zeros(shape, dtype=result.dtype)


def _raised(error: BaseException) -> str:
    """One line for an exception: its type and text, and the user's line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 400 else text[:400] + " ..."
    line = user_line(traceback.extract_tb(error.__traceback__))
    return f"{type(error).__name__}: {text}" + (f" at {line}" if line else "")


def user_line(frames: Iterable[traceback.FrameSummary]) -> str:
    """The innermost frame outside torch and this package, as `file:line: code`; "" where there is none."""
    outside = [f for f in frames if not in_torch(f.filename)]
    if not outside:
        return ""
    frame = outside[-1]
    return f"{frame.filename}:{frame.lineno}: {frame.line or frame.name}"


def in_torch(file: str) -> bool:
    """Whether a source file belongs to torch or to this package's tracing, so that no user wrote it."""
    return file.startswith((_TORCH, _HERE, "<"))
