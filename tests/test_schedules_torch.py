"""Our action lists are those of `torch.distributed.pipelining`, action by action."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

schedules = pytest.importorskip("torch.distributed.pipelining.schedules")

from shardwright.planner.schedules import actions, fault, parse_action, stage_rank  # noqa: E402

CLASSES = {
    "gpipe": ("ScheduleGPipe", (1,)),
    "1f1b": ("Schedule1F1B", (1,)),
    "interleaved": ("ScheduleInterleaved1F1B", (2, 3, 4)),
    "zb-h1": ("ScheduleInterleavedZeroBubble", (1, 2, 3)),
    "zbv": ("ScheduleZBVZeroBubble", (2,)),
    "dualpipev": ("ScheduleDualPipeV", (2,)),
}


def torch_lists(name: str, ranks: int, chunks: int, m: int) -> list[list[str]]:
    """The compute order of torch's class, without its idle slots; an overlapped pair is its two actions."""
    schedule = getattr(schedules, CLASSES[name][0])
    # The list makers read these attributes only; a whole schedule object would need one process per rank.
    numbers = SimpleNamespace(
        pp_group_size=ranks, n_local_stages=chunks, num_stages=ranks * chunks, _num_stages=ranks * chunks,
        _n_microbatches=m, microbatches_per_round=m // max(1, m // ranks),
    )  # fmt: skip
    if name in ("gpipe", "1f1b"):
        order = schedule._get_pipeline_order(numbers)
    else:
        order = {r: schedule._calculate_single_rank_operations(numbers, r) for r in range(ranks)}
    return [[str(a) for whole in order[r] for a in computed(whole)] for r in range(ranks)]


def computed(action: Any) -> list[Any]:
    if action is None or action.computation_type.value == "REDUCE_GRAD":
        return []
    return list(action.sub_actions or (action,))


@pytest.mark.parametrize("name", CLASSES)
def test_lists_are_torchs(name: str) -> None:
    compared = 0
    for ranks in (1, 2, 3, 4, 8):
        for m in range(1, 21):
            for chunks in CLASSES[name][1]:
                # torch's printed 1F1B order starts the last rank at microbatch 1, and warms up with more microbatches than
                # there are; what its runtime executes does neither. test_1f1b_is_what_torch_executes has those.
                if fault(name, ranks, chunks, m) or (name == "1f1b" and m < ranks):
                    continue
                ours = [[str(a) for a in one] for one in actions(name, ranks, chunks, m)]
                theirs = torch_lists(name, ranks, chunks, m)
                checked = ranks - 1 if name == "1f1b" else ranks
                assert ours[:checked] == theirs[:checked], (name, ranks, chunks, m)
                compared += 1
    assert compared > 15


def test_1f1b_is_what_torch_executes() -> None:
    """`Schedule1F1B._step_microbatches`: min(m, stages - stage) forwards, then a backward and a forward in turn."""
    for ranks in (1, 2, 4, 5):
        for m in (1, 2, 3, 7):
            for rank, ours in enumerate(actions("1f1b", ranks, 1, m)):
                warm = min(m, ranks - rank)
                order = [f"{rank}F{i}" for i in range(warm)]
                for i in range(m):
                    order += [f"{rank}B{i}", *([f"{rank}F{warm + i}"] if warm + i < m else [])]
                assert [str(a) for a in ours] == order


@pytest.mark.parametrize("name", CLASSES)
def test_torch_accepts_our_lists(name: str) -> None:
    """Its own check of a list, and its sends and receives, accept ours."""
    for ranks, chunks, m in ((1, CLASSES[name][1][0], 4), (3, CLASSES[name][1][-1], 6), (4, CLASSES[name][1][0], 10)):
        placement = stage_rank(name, ranks, chunks)
        parse = schedules._Action.from_str
        lists = {r: [parse(str(a)) for a in one] for r, one in enumerate(actions(name, ranks, chunks, m))}
        found = schedules._validate_schedule(lists, ranks, len(placement), m)
        assert tuple(found[s] for s in range(len(placement))) == placement
        sent = schedules._add_send_recv(lists, lambda s, at=placement: at[s], len(placement))
        assert all(str(parse_action(str(a))) == str(a) for one in sent.values() for a in one)


def test_v_placement_is_torchs() -> None:
    utils = pytest.importorskip("torch.distributed.pipelining._utils")
    for ranks in (1, 2, 5):
        wanted = utils.generate_stage_to_rank_mapping(ranks, 2 * ranks, style="v")
        assert stage_rank("zbv", ranks, 2) == tuple(wanted[s] for s in range(2 * ranks))
        looped = utils.generate_stage_to_rank_mapping(ranks, 3 * ranks, style="loop")
        assert stage_rank("interleaved", ranks, 3) == tuple(looped[s] for s in range(3 * ranks))
