"""A module's tensors by name: each once, whatever names tie it, with and without a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ...errors import UsageError
from ..module import ParallelModule


@dataclass(frozen=True)
class Named:
    """Parameters and persistent buffers, each under its first name; `first` gives it for every other name of a tie."""

    tensors: Mapping[str, Tensor]
    first: Mapping[str, str]
    _by_identity: Mapping[int, str]

    def name_of(self, parameter: Tensor) -> str:
        """The first name of a parameter of the module; raises UsageError for another."""
        name = self._by_identity.get(id(parameter))
        if name is None:
            raise UsageError(
                f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that the module does not have"
            )
        return name

    def names_of(self, name: str) -> list[str]:
        """All names of one tensor, the first one first."""
        return [name, *(other for other, first in self.first.items() if first == name)]


def named(module: nn.Module) -> Named:
    """Everything a module's state dict holds, under the original's names."""
    seen: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    first: dict[str, str] = _ties(module)
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise UsageError(f"{name}: a state dict holds tensors here, not a {type(value).__name__}")
        known = seen.setdefault(id(value), first.get(name, name))
        if known != name:
            first[name] = known
        tensors.setdefault(known, value)
    return Named(tensors, first, seen)


def _ties(module: nn.Module) -> dict[str, str]:
    """First name by every other name of tied parameters, as the plan's graph knows them (a rank may hold only one of them)."""
    if not isinstance(module, ParallelModule):
        return {}
    outline = module._core.programs.summary.outline
    return {name: p.names[0] for p in outline.parameters for name in p.names[1:]}


def check_filled(named: Named, missing: Iterable[str], doing: str) -> None:
    """Raise UsageError where a tensor has no values yet (a model that was built on the meta device)."""
    empty = sorted({*missing, *(name for name, value in named.tensors.items() if value.is_meta)})
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise UsageError(f"cannot {doing}: {empty[0]}{more} have no values yet; load them first (load_safetensors)")
