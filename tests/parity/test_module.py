"""`ParallelModule` as its users see it: the loop, the calls, the modes, the state, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from running import TIGHT, eager, local_data, parallel, plan_of, same, whole_gradients
from shardwright.errors import UsageError
from shardwright.planner.plan import Plan
from shardwright.runtime import parameters
from shardwright.runtime.losses import loss_of
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# -- the loop


def unmodified_loop(plan: Plan) -> None:
    model, _, batch = eager("tied")
    reference = copy.deepcopy(model)

    def train(model: nn.Module) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(**batch)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            losses.append(loss.item())
        return losses

    import shardwright

    pm = shardwright.auto_parallelize(model, batch, plan=plan)
    torch.testing.assert_close(train(pm), train(reference), **TIGHT)
    same(pm.full_state_dict(), reference.state_dict())
    assert pm.plan.graph == plan.graph


@pytest.mark.parametrize("pins", ["dp=2 tp=2", "dp=2 tp=2 zero=2 micro_batch=2", "dp=4 zero=3"])
def test_unmodified_loop(pins: str, ranks4: Pool) -> None:
    ranks4.run(unmodified_loop, plan_of("tied", pins, 4))


def looks_like_the_original(plan: Plan) -> None:
    case, pm = parallel("gpt2", plan)
    model = case.model
    assert [n for n, _ in pm.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert set(pm.state_dict()) == set(model.state_dict())
    assert isinstance(pm, nn.Module)
    assert all(isinstance(p, DTensor) for p in pm.parameters())
    assert [p.shape for p in pm.parameters()] == [p.shape for p in model.parameters()]
    assert pm.config is not None
    assert pm.config.n_layer == model.config.n_layer
    assert pm.num_parameters() == model.num_parameters()  # a method of the original
    assert pm.transformer.wte.weight is pm.lm_head.weight
    output = pm(**case.kwargs)
    assert type(output) is type(model(**case.kwargs))
    assert (pm.data_rank, pm.data_size) == (dist.get_rank(), 2)
    assert isinstance(pm, type(model))
    assert len(pm.transformer.h) == 2
    assert [block.ln_1.weight for block in pm.transformer.h][1] is pm.transformer.h[1].ln_1.weight
    assert pm.transformer.h[1].attn.num_heads == model.transformer.h[1].attn.num_heads
    with pytest.raises(UsageError, match="whole module"):
        pm.transformer(case.kwargs["input_ids"])
    with pytest.raises(AttributeError, match="nonsense"):
        _ = pm.nonsense


def test_looks_like_the_original(ranks2: Pool) -> None:
    ranks2.run(looks_like_the_original, plan_of("gpt2", "dp=2 zero=3", 2))


class Named(nn.Module):
    """Submodules are called like methods of a planned module."""

    def __init__(self) -> None:
        super().__init__()
        self.grow, self.put = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.plan, self.wholes = nn.ModuleDict({"program": nn.Linear(8, 4)}), nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return ((self.wholes(self.plan["program"](self.put(self.grow(x)).relu())) - y) ** 2).mean()


def test_submodules_may_have_the_names_of_methods() -> None:
    import shardwright

    model = Named().double()
    batch = {"x": torch.randn(6, 4, dtype=torch.float64), "y": torch.randn(6, 2, dtype=torch.float64)}
    plan = shardwright.make_plan(model, batch, "cpu:1")
    pm = shardwright.apply_plan(copy.deepcopy(model), batch, plan)
    model(**batch).backward()
    pm(**batch).backward()
    same(whole_gradients(pm), {n: p.grad for n, p in model.named_parameters()})
    same(pm.full_state_dict(), model.state_dict())
    other = shardwright.apply_plan(Named().double(), batch, plan)
    other.load_state_dict(model.state_dict())
    same(other.full_state_dict(), model.state_dict())
    assert pm.plan.graph == plan.graph


# -- calls


def modes(name: str, plan: Plan) -> None:
    model, args, batch = eager(name)
    _, pm = parallel(name, plan)
    model.eval()
    pm.eval()
    assert not pm.training
    labelled = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        wanted, found = model(*args, **batch), pm(*args, **batch)
        torch.testing.assert_close(found["logits"], wanted["logits"], **TIGHT)
        torch.testing.assert_close(found["loss"], wanted["loss"], **TIGHT)
        assert not found["logits"].requires_grad
        torch.testing.assert_close(pm(*args, **labelled)["logits"], wanted["logits"], **TIGHT)
        for rows, columns in ((4, 16), (8, 8), (2, 12)):
            cut = {k: v[:rows, :columns] for k, v in batch.items()}
            torch.testing.assert_close(pm(**cut)["logits"], model(**cut)["logits"], **TIGHT)
            torch.testing.assert_close(pm(**cut)["loss"], model(**cut)["loss"], **TIGHT)
    pm.train()
    model.train()
    for rows, columns in ((4, 16), (8, 8)):  # other shapes train as well
        cut = {k: v[:rows, :columns] for k, v in batch.items()}
        for module in (model, pm):
            module.zero_grad()
            loss_of(module(**cut)).backward()
        same(whole_gradients(pm), {n: p.grad for n, p in model.named_parameters()})


@pytest.mark.parametrize("pins", ["dp=2 zero=3 micro_batch=2", "tp=2"])
def test_other_modes_and_shapes(pins: str, ranks2: Pool) -> None:
    ranks2.run(modes, "tied", plan_of("tied", pins, 2))


def refused_shapes(plan: Plan) -> None:
    _, _, batch = eager("tied")
    _, pm = parallel("tied", plan)
    three = {k: torch.cat([v, v])[:6] for k, v in batch.items()}
    with pytest.raises(UsageError, match=r"batch of 6 .* 4"):
        pm(**three)
    with pytest.raises(UsageError, match="batch"):
        pm(**{k: v[:5] for k, v in batch.items()})
    loss_of(pm(**batch)).backward()  # a refused call leaves the module usable


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_does(ranks2: Pool) -> None:
    ranks2.run(refused_shapes, plan_of("tied", "dp=2 micro_batch=2", 2))


def asked_outputs(plan: Plan) -> None:
    model, _, batch = eager("tied")
    _, pm = parallel("tied", plan)
    output = pm(**batch)
    with pytest.raises(UsageError, match="outputs=True"):
        output["logits"].argmax(-1)
    with pytest.raises(UsageError, match="outputs=True"):
        torch.argmax(output["logits"])
    output["loss"].backward()
    output = pm(**batch, outputs=True)
    torch.testing.assert_close(output["logits"], model(**batch)["logits"], **TIGHT)
    with pytest.raises(UsageError, match="not the loss"):
        (output["loss"] + output["logits"].sum()).backward()
    del output
    pm.zero_grad()
    pm(**batch, outputs=True)["loss"].backward()
    model(**batch)["loss"].backward()
    same(whole_gradients(pm), {n: p.grad for n, p in model.named_parameters()})


@pytest.mark.parametrize("pins", ["dp=2", "tp=2", "dp=2 micro_batch=1", "tp=2 sequence_parallel=on micro_batch=2"])
def test_outputs_beside_the_loss_only_when_asked_for(pins: str, ranks2: Pool) -> None:
    ranks2.run(asked_outputs, plan_of("tied", pins, 2))


def called_twice(plan: Plan) -> None:
    _, _, batch = eager("tied")
    _, pm = parallel("tied", plan)
    loss = pm(**batch)["loss"]
    with pytest.raises(UsageError, match="backward"):
        pm(**batch)
    with torch.no_grad():
        pm(**batch)
    loss.backward()
    pm(**batch)["loss"].backward()
    del loss
    pm(**batch)  # its loss is dropped: nothing waits for a backward
    pm(**batch)["loss"].backward()


@pytest.mark.parametrize("pins", ["dp=2", "dp=2 micro_batch=1"])
def test_two_calls_before_one_backward_are_refused(pins: str, ranks2: Pool) -> None:
    ranks2.run(called_twice, plan_of("tied", pins, 2))


def scaled_and_accumulated(name: str, plan: Plan) -> None:
    model, args, batch = eager(name)
    _, pm = parallel(name, plan)
    for module in (model, pm):
        (loss_of(module(*args, **batch)) * 0.5).backward()
        (loss_of(module(*args, **batch)) / 3).backward()
    same(whole_gradients(pm), {n: p.grad for n, p in model.named_parameters()})


@pytest.mark.parametrize(
    "pins", ["dp=2 zero=3 micro_batch=1", "dp=2 zero=2 micro_batch=2", "dp=2 zero=0 micro_batch=1", "tp=2"]
)
def test_scaled_losses_and_accumulation(pins: str, ranks2: Pool) -> None:
    ranks2.run(scaled_and_accumulated, "tied", plan_of("tied", pins, 2))


def clipped(plan: Plan) -> None:
    model, _, batch = eager("tied")
    _, pm = parallel("tied", plan)
    for module in (model, pm):
        module(**batch)["loss"].backward()
    wanted = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    found = torch.nn.utils.clip_grad_norm_(pm.parameters(), 0.01)
    torch.testing.assert_close(found.full_tensor() if isinstance(found, DTensor) else found, wanted, **TIGHT)
    same(whole_gradients(pm), {n: p.grad for n, p in model.named_parameters()})
    for norm in (1.0, 2.0, float("inf")):
        own = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()], norm)
        torch.testing.assert_close(pm.clip_grad_norm_(1e9, norm), own, **TIGHT)


@pytest.mark.parametrize("pins", ["dp=2 tp=2", "dp=2 tp=2 zero=3", "dp=4 zero=1"])
def test_the_global_norm_is_that_of_the_original(pins: str, ranks4: Pool) -> None:
    ranks4.run(clipped, plan_of("tied", pins, 4))


# -- state


def state(plan: Plan) -> None:
    case, pm = parallel("gpt2", plan)
    original = {k: v.double() if v.is_floating_point() else v for k, v in case.model.state_dict().items()}
    same(pm.full_state_dict(), original)
    other = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in original.items()}
    other["lm_head.weight"] = other["transformer.wte.weight"]
    torch.manual_seed(5)
    for value in other.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            dist.broadcast(value, 0)
    result = pm.load_state_dict(other)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    same(pm.full_state_dict(), other)
    pm.load_state_dict({k: v.clone() for k, v in pm.state_dict().items()})  # sharded, as saved
    same(pm.full_state_dict(), other)
    with pytest.raises(RuntimeError, match="Missing key"):
        pm.load_state_dict({})
    reference = case.model.double()
    reference.load_state_dict(other)
    with torch.no_grad():
        torch.testing.assert_close(
            pm.eval()(**case.kwargs).loss, reference.eval()(**case.kwargs).loss, atol=1e-6, rtol=1e-6
        )


@pytest.mark.parametrize("pins", ["dp=2 tp=2 zero=3", "tp=4"])
def test_state_dicts_are_the_originals(pins: str, ranks4: Pool) -> None:
    ranks4.run(state, plan_of("gpt2", pins, 4))


def frozen_parts(plan: Plan) -> None:
    model, _, batch = eager("adapter")
    _, pm = parallel("adapter", plan)
    trained = [p for p in pm.parameters() if p.requires_grad]
    assert len(trained) == 4
    optimizer = torch.optim.AdamW(trained)
    loss = pm(**batch)["loss"]
    loss.backward()
    optimizer.step()
    wanted = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in pm.named_parameters() if p.grad is not None} == wanted
    assert len(optimizer.state) == 4
    kept = sum(
        s.to_local().numel() for v in optimizer.state.values() for s in v.values() if isinstance(s, DTensor) and s.dim()
    )
    assert kept == 2 * sum(p.to_local().numel() for p in trained)
    assert pm.embed.weight is pm.head.weight
    before = dict(model.named_parameters())
    for name, parameter in pm.named_parameters():
        if name not in wanted:
            assert torch.equal(parameters.full(parameter), before[name])


@pytest.mark.parametrize("pins", ["dp=2 zero=3 micro_batch=2", "tp=2"])
def test_frozen_parameters_have_no_gradient_and_no_optimizer_state(pins: str, ranks2: Pool) -> None:
    plan = plan_of("adapter", pins, 2)
    assert plan.predicted.memory["gradients"] < plan.predicted.memory["parameters"]
    ranks2.run(frozen_parts, plan)


def only_what_eager_trains(plan: Plan) -> None:
    model, args, _ = eager("teacher")
    _, pm = parallel("teacher", plan)
    for module in (model, pm):
        loss_of(module(*args)).backward()
    same(whole_gradients(pm), {n: p.grad for n, p in model.named_parameters()})
    assert pm.teacher[0].weight.requires_grad
    assert pm.teacher[0].weight.grad is None
    assert pm.spare.weight.grad is None


@pytest.mark.parametrize("pins", ["dp=2 zero=0", "dp=2 zero=3 micro_batch=2", "tp=2"])
def test_parameters_get_a_gradient_where_eager_gives_one(pins: str, ranks2: Pool) -> None:
    ranks2.run(only_what_eager_trains, plan_of("teacher", pins, 2))


# -- data


@pytest.mark.parametrize("pins", ["dp=2 tp=2", "dp=2 tp=2 micro_batch=1"])
def test_each_data_rank_may_pass_its_own_part(pins: str, ranks4: Pool) -> None:
    ranks4.run(local_data, plan_of("tied", pins, 4))


# -- dropout


def dropped(plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Which elements of ones survive dropout, on this rank, in two calls; and the mean of many."""
    _, pm = parallel("dropout", plan)
    x = torch.ones(8, 64, 32, dtype=torch.float64)
    kept = []
    for _ in range(20):
        output = pm(x, outputs=True)
        output[0].backward()
        kept.append((output[1] != 0).double())
        # What is dropped forward is dropped backward: the gradient of the scale is the sum of what survived.
        torch.testing.assert_close(parameters.full(pm.scale.grad), output[1].sum(), **TIGHT)
        pm.zero_grad()
    return kept[0], kept[1], torch.stack(kept).mean()


@pytest.mark.parametrize("pins", ["dp=2", "tp=2"])
def test_dropout(pins: str, ranks2: Pool) -> None:
    answers = ranks2.run(dropped, plan_of("dropout", pins, 2))
    first, second, mean = answers[0]
    assert torch.equal(first, answers[1][0])  # the output is whole and the same on both ranks
    assert not torch.equal(first, second)  # another call draws others
    halves = first.chunk(2)
    assert not torch.equal(*halves)  # what two ranks drew is not the same
    overlap = (halves[0] * halves[1]).mean().item()
    assert abs(overlap - 0.7 * 0.7) < 0.03  # and is independent
    assert abs(mean.item() - 0.7) < 0.005


# -- generation and libraries


def generated(plan: Plan) -> list[int]:
    case, pm = parallel("llama", plan)
    model = case.model.double().eval()
    ids = case.kwargs["input_ids"][:2, :5]
    pm.eval()
    options = {"max_new_tokens": 3, "do_sample": False, "use_cache": False, "pad_token_id": 0}
    wanted = model.generate(ids, **options)
    found = pm.generate(ids, **options)
    assert torch.equal(found, wanted)
    return found.flatten().tolist()


@pytest.mark.parametrize("pins", ["dp=2 zero=3", "tp=2"])
def test_generate(pins: str, ranks2: Pool) -> None:
    answers = ranks2.run(generated, plan_of("llama", pins, 2))
    assert answers[0] == answers[1]


def wrapped_again(plan: Plan) -> None:
    _, pm = parallel("mlp", plan)
    with pytest.raises(UsageError, match="already runs in parallel"):
        nn.parallel.DistributedDataParallel(pm)


def test_wrapping_in_ddp_is_refused(ranks2: Pool) -> None:
    ranks2.run(wrapped_again, plan_of("mlp", "dp=2", 2))


def test_hugging_face_trainer_on_one_process(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    case, pm = parallel("llama", plan_of("llama", "dtype=fp32", 1))
    rows = [{k: v[i] for k, v in case.kwargs.items()} for i in range(8)]
    options = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=3, per_device_train_batch_size=8, report_to=[], save_strategy="no",
        logging_steps=1, disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    trainer = Trainer(model=pm, args=options, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
