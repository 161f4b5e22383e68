"""A module with pipeline stages as its users see it: the loop, the calls, the modes, the state, what it sends and refuses."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from running import TIGHT, eager, local_data, parallel, plan_of, same
from shardwright.errors import UsageError
from shardwright.planner.plan import Plan
from shardwright.runtime.collectives import CommLedger
from shardwright.runtime.losses import loss_of
from shardwright.runtime.module import ParallelModule
from test_pipeline import KEPT, staged_plan
from torch import Tensor, nn

ONE = "pp=2 schedule=1f1b micro_batch=2"


def gradients(pm: ParallelModule) -> dict[str, Tensor | None]:
    """Every gradient, whole, on every rank."""
    return dict(pm.wholes(lambda p: p.grad))


def originals(model: nn.Module) -> dict[str, Tensor | None]:
    return {n: p.grad for n, p in model.named_parameters()}


def unmodified_loop(plan: Plan) -> None:
    model, _, batch = eager("tied")
    reference = copy.deepcopy(model)
    _, pm = parallel("tied", plan)

    def train(model: nn.Module) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        clip = getattr(model, "clip_grad_norm_", None)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(**batch)["loss"]
            loss.backward()
            norm = clip(0.5) if clip else nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            losses += [loss.item(), float(norm)]
        return losses

    torch.testing.assert_close(train(pm), train(reference), **TIGHT)
    same(pm.full_state_dict(), reference.state_dict())
    for norm in (1.0, float("inf")):
        wanted = nn.utils.get_total_norm([p.grad for p in reference.parameters()], norm)
        torch.testing.assert_close(pm.clip_grad_norm_(1e9, norm), wanted, **TIGHT)
    with pytest.raises(UsageError, match=r"pm.clip_grad_norm_"):
        nn.utils.clip_grad_norm_(pm.parameters(), 0.5)


@pytest.mark.parametrize("pins", [ONE, "pp=2 dp=2 zero=1 schedule=1f1b micro_batch=1"])
def test_unmodified_loop(pins: str, pools: dict[int, Pool]) -> None:
    """The embedding stands in both stages: its gradients are summed, and counted once in the norm."""
    world = 4 if "dp=2" in pins else 2
    pools[world].run(unmodified_loop, staged_plan("tied", pins, world))


def calls(plan: Plan) -> None:
    model, _, batch = eager("tied")
    _, pm = parallel("tied", plan)
    for module in (model, pm):
        (loss_of(module(**batch)) * 0.5).backward()
        (loss_of(module(**batch)) / 3).backward()
    same(gradients(pm), originals(model))
    for module in (model, pm):  # another batch and length
        module.zero_grad()
        loss_of(module(**{k: v[:4, :12] for k, v in batch.items()})).backward()
    same(gradients(pm), originals(model))
    with pytest.raises(UsageError, match="outputs=True"):
        pm(**batch)["logits"].argmax(-1)
    asked = pm(**batch, outputs=True)
    torch.testing.assert_close(asked["logits"], model(**batch)["logits"], **TIGHT)
    with pytest.raises(UsageError, match="not the loss"):
        (asked["loss"] + asked["logits"].sum()).backward()
    del asked
    with pytest.raises(UsageError, match=r"batch of 5 .* 4"):
        pm(**{k: v[:5] for k, v in batch.items()})
    loss_of(pm(**batch)).backward()  # refused calls leave the module usable
    model.eval()
    pm.eval()
    labelled = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        wanted, found = model(**batch), pm(**batch)
        torch.testing.assert_close(found["logits"], wanted["logits"], **TIGHT)
        torch.testing.assert_close(found["loss"], wanted["loss"], **TIGHT)
        torch.testing.assert_close(pm(**labelled)["logits"], wanted["logits"], **TIGHT)
        cut = {k: v[:2, :7] for k, v in batch.items()}
        torch.testing.assert_close(pm(**cut)["loss"], model(**cut)["loss"], **TIGHT)


def test_calls_and_modes(ranks2: Pool) -> None:
    ranks2.run(calls, staged_plan("tied", ONE, 2))


def state(plan: Plan) -> set[str]:
    case, pm = parallel("gpt2", plan)
    original = case.model.double().state_dict()
    same(pm.full_state_dict(), original)
    own = pm.state_dict()
    assert set(own) < set(original)
    assert {n for n, _ in pm.named_parameters()} <= set(own)
    other = {k: v + 1.0 if v.is_floating_point() else v for k, v in original.items()}
    result = pm.load_state_dict(other)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    same(pm.full_state_dict(), other)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        pm.load_state_dict({**other, "nonsense": torch.zeros(1)})
    assert pm.num_parameters() <= case.model.num_parameters()
    return set(own)


def test_a_rank_has_the_parameters_of_its_stages(ranks2: Pool) -> None:
    first, second = ranks2.run(state, staged_plan("gpt2", ONE, 2))
    assert {"transformer.wte.weight", "lm_head.weight"} <= first & second
    assert "transformer.h.0.ln_1.weight" in first - second
    assert "transformer.h.1.ln_1.weight" in second - first


def sent(name: str, plan: Plan) -> tuple[int, int, int, int]:
    """(sends, bytes) that ran, and that the borders of this rank's stages say."""
    case, pm = parallel(name, plan)
    with CommLedger(pm.axis_names) as ledger:
        loss_of(pm(*case.args, **case.kwargs)).backward()
    found = [r.bytes for r in ledger.records if r.collective == "send"]
    assert all(r.axis == "pp" for r in ledger.records if r.collective == "send")
    staged = pm.program(*case.args, **case.kwargs).staged
    assert staged is not None
    said = []
    for (source, target), held in staged.borders.edges.items():
        if staged.rank_of[source] == staged.rank_of[target]:
            continue
        said += [b.bytes for b in held] if source in staged.own else []
        said += [b.bytes for b in held if b.differentiable] if target in staged.own else []
    m = plan.pipeline.microbatches
    return len(found), sum(found), len(said) * m, sum(said) * m


@pytest.mark.parametrize(
    ("name", "pins"), [("llama", ONE), ("llama", "pp=2 tp=2 sequence_parallel=on schedule=gpipe micro_batch=2")]
)
def test_what_is_sent_is_what_the_borders_say(name: str, pins: str, pools: dict[int, Pool]) -> None:
    world = 4 if "tp=2" in pins else 2
    plan = staged_plan(name, pins, world)
    answers = pools[world].run(sent, name, plan)
    assert all((count, size) == (n, total) and count for count, size, n, total in answers)
    predicted = {t.collective: (t.count, t.bytes) for t in plan.predicted.traffic}["send"]
    assert max(size for _, size, _, _ in answers) == predicted[1]


def dropped(name: str, plan: Plan) -> tuple[float, dict[str, Tensor | None]]:
    case, pm = parallel(name, plan)
    losses = []
    for _ in range(2):
        loss = loss_of(pm(*case.args, **case.kwargs))
        loss.backward()
        losses.append(loss.item())
    assert losses[0] != losses[1]  # another call draws others
    return sum(losses), gradients(pm)


def test_dropout_draws_what_one_stage_draws(ranks2: Pool) -> None:
    assert not dist.is_initialized()
    loss, grads = dropped("gpt2-dropout", plan_of("gpt2-dropout", f"micro_batch=2 {KEPT}", 1))
    for found, held in ranks2.run(dropped, "gpt2-dropout", staged_plan("gpt2-dropout", ONE, 2)):
        assert abs(found - loss) < 1e-11
        same(held, grads)


def test_each_data_rank_may_pass_its_own_part(ranks4: Pool) -> None:
    ranks4.run(local_data, staged_plan("tied", "pp=2 dp=2 zero=2 schedule=1f1b micro_batch=1", 4), gradients)


def uneven_rounds(plan: Plan) -> None:
    case, pm = parallel("llama-deep", plan)
    ten = {k: torch.cat([v, v])[:10] for k, v in case.kwargs.items()}
    with pytest.raises(UsageError, match=r"batch of 10 makes 5 microbatches: .* take 4 or 6 microbatches"):
        pm(**ten)
    loss_of(pm(**case.kwargs)).backward()


def test_a_batch_that_the_schedule_cannot_take_is_refused(ranks2: Pool) -> None:
    ranks2.run(uneven_rounds, staged_plan("llama-deep", "pp=2 vpp=2 schedule=interleaved micro_batch=2", 2))
