"""Context parallelism on captured models: each family splits its positions, or says what stands in the way."""

from __future__ import annotations

import functools

import models
import pytest
import torch
from shardwright.passes.prepare import prepare
from shardwright.planner.choices import states
from shardwright.planner.context import ContextCut, context_choices
from shardwright.planner.outline import Outline
from torch import Tensor, nn


@functools.cache
def outline(family: str) -> Outline:
    case = models.build(family, 2 if family == "vit-197" else 4)
    return prepare(case.model, case.args, case.kwargs, "float32", loss_fn=case.loss_fn).outline


def sent(found: Outline, cut: ContextCut) -> list[str]:
    """Tensors with a gradient that change state between ops: what is communicated besides rings."""
    moved = []
    for op in found.ops:
        for use, want in zip(op.operands, states(op, dict(found.tensors), cut.choice[op.name])[0], strict=True):
            tensor = found.tensors[use.tensor]
            if tensor.role == "activation" and tensor.differentiable and cut.states[use.tensor] != want:
                moved.append(use.tensor)
    return moved


@pytest.mark.parametrize(
    ("family", "rings"), [("gpt2", 2), ("llama", 2), ("bert", 2), ("t5", 9), ("bart", 6), ("mistral", 2)]
)
def test_families_split_their_positions(family: str, rings: int) -> None:
    found = outline(family)
    cut = context_choices(found, 2)
    assert cut.blockers == ()
    assert len(cut.rings) == rings  # cross attention is a ring as well
    assert sent(found, cut) == []
    assert str(cut.states[found.loss]) == "P"
    dense = [op for op in found.ops if op.projection]
    names = {f.name for op in dense for f in op.factors if f.token and not f.batch}
    assert dense
    assert all(cut.choice[op.name] in names for op in dense)


def test_positions_that_do_not_divide_are_named() -> None:
    found = outline("gpt2")  # 16 positions, causal
    assert context_choices(found, 8).blockers == ()
    (words,) = context_choices(found, 16).blockers
    assert words.startswith("16 positions do not divide by 32 (twice 16: the mask is causal): ")
    bert = outline("bert")
    assert context_choices(bert, 16).blockers == ()


def test_a_class_token_stands_in_the_way() -> None:
    (words,) = context_choices(outline("vit-197"), 4).blockers
    assert words.startswith("197 positions do not divide by 4: ")
    assert "aten.add" in words


class Convolved(nn.Module):
    """A convolution over positions between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(32, 8), nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 32)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def test_convolutions_over_positions_stand_in_the_way() -> None:
    ids = torch.zeros(4, 16, dtype=torch.long)
    found = prepare(Convolved(), (ids, ids), {}, "float32").outline
    (words,) = context_choices(found, 2).blockers
    assert words.startswith("mixes positions without being attention: conv1d (aten.conv1d)")


def test_a_model_may_end_in_one_position() -> None:
    found = outline("bert-classify")
    cut = context_choices(found, 2)
    assert cut.blockers == ()
    assert len(sent(found, cut)) == 1  # the sequence is gathered once, for the pooler
