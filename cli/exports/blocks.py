"""Which modules of a split model belong together: a column split, what lies between, and the row split that ends it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ...errors import UsageError
from .facts import Facts, starred
from .modules import Split

if TYPE_CHECKING:
    from torch import nn


def styles_of(facts: Facts, split: Split, model: nn.Module) -> dict[str, str]:
    """The styles of the program (a key of `known` in its `split`) by module pattern; {} without tensor parallelism.

    Raises UsageError for models whose parts do not end what they begin within a layer.
    """
    if not split.styles:
        return {}
    layer = f"{split.layers}.*" if split.layers else ""
    blocks = {name: block for name in split.styles if (block := _block(name, split.styles, layer))}
    on = facts.pins.get("sequence_parallel") == "on"
    found = {name: _style(style, name in blocks, on) for name, style in split.styles.items()}
    whole = list(_whole(model, split, layer))
    for name, width in whole:
        for block in set(blocks.values()):
            widths = {
                model.get_submodule(_first(c)).in_features
                for c, b in blocks.items()
                if b == block and split.styles[c] == "colwise"
            }
            if name.startswith(f"{block}.") and (block != layer or width not in widths):
                raise UsageError(
                    f"{name} works between the split products of {block}, for which the program has no style; plan with --pin tp=1"
                )
    if not on:
        return found
    loose = sorted({layer} & set(blocks.values())) or [
        n for n in found if layer and n.startswith(f"{layer}.") and n not in blocks
    ]
    linear = [n for n, _ in whole if type(model.get_submodule(_first(n))).__name__ == "Linear"]
    if loose or linear or not layer:
        raise UsageError(
            f"{(loose or linear or ['the model'])[0]} cannot be given split positions; plan with --pin sequence_parallel=off"
        )
    return found | {n: "norm" for n, _ in whole} | {block: "block" for block in blocks.values()}


def _style(style: str, inside: bool, positions: bool) -> str:
    if style == "rowwise" and inside:
        return "rowwise, scattered" if positions else style
    return {"colwise": "colwise, gathered", "rowwise": "rowwise, sliced"}.get(style, style) if not inside else style


def _block(name: str, styles: Mapping[str, str], layer: str) -> str:
    """The innermost module, at most the layer, with `name` and a split of the other kind (column, row); "" without."""
    wanted = {"colwise": "rowwise", "rowwise": "colwise"}.get(styles[name])
    if wanted is None or not layer or not name.startswith(f"{layer}."):
        return ""
    path = name.rpartition(".")[0]
    while path.startswith(layer):
        if any(other.startswith(f"{path}.") and style == wanted for other, style in styles.items()):
            return path
        path = path.rpartition(".")[0]
    return ""


def _whole(model: nn.Module, split: Split, layer: str) -> Iterator[tuple[str, int]]:
    """(module pattern, elements of its largest parameter) of modules in layers that own parameters and are not split."""
    seen: set[str] = set()
    for name, module in model.named_modules():
        pattern, owned = starred(name), [p.numel() for p in module.parameters(recurse=False)]
        if layer and pattern.startswith(f"{layer}.") and owned and pattern not in split.styles and pattern not in seen:
            seen.add(pattern)
            yield pattern, max(owned)


def _first(pattern: str) -> str:
    """The module that a pattern means in the first layer."""
    return pattern.replace("*", "0", 1)
