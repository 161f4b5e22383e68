"""Pipeline schedules: spelling, what can be made, that every list runs, and the microbatches alive under it."""

from __future__ import annotations

import random

import pytest
from shardwright.errors import PinError, PlanError
from shardwright.planner.engine import ScheduleError, compile_lists
from shardwright.planner.live import _greatest, live_vectors, local_chunks
from shardwright.planner.schedules import SCHEDULES, Action, actions, fault, parse_action, stage_rank

GRID = [
    (name, ranks, chunks, m)
    for name in SCHEDULES
    for ranks in (1, 2, 3, 4, 6)
    for chunks in (1, 2, 3)
    for m in (1, 2, 3, 4, 6, 7, 8, 12, 13)
    if not fault(name, ranks, chunks, m)
]


def test_actions_are_spelled_as_torch_spells_them() -> None:
    spelled = [
        "2F0",
        "0B13",
        "7I2",
        "7W2",
        "1SEND_F3",
        "2RECV_F3",
        "2SEND_B0",
        "1RECV_B0",
        "3UNSHARD",
        "3RESHARD",
        "0REDUCE_GRAD",
    ]
    for text in spelled:
        assert str(parse_action(text)) == text
    assert parse_action(" 2F10 ") == Action("F", 2, 10)
    assert parse_action("3UNSHARD").microbatch == -1


@pytest.mark.parametrize("text", ["", "F0", "2F", "2X0", "2F0 1F0", "-1F0", "3UNSHARD2", "2f0"])
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match="2F0"):
        parse_action(text)


@pytest.mark.parametrize(
    ("name", "ranks", "chunks", "microbatches", "message"),
    [
        ("2f2b", 2, 1, 2, "choose one of gpipe, 1f1b"),
        ("1f1b", 2, 2, 4, "exactly 1 chunk a rank, not 2"),
        ("interleaved", 2, 1, 4, "at least 2 chunks a rank, not 1"),
        ("interleaved", 4, 2, 9, "take 8 or 10 microbatches"),
        ("zb-h1", 4, 1, 9, "9 microbatches over 4 ranks make 2 rounds of unequal length"),
        ("zbv", 4, 3, 8, "exactly 2 chunks"),
        ("dualpipev", 4, 2, 7, "at least 8 for 4 ranks, not 7"),
        ("none", 2, 1, 4, "take 1f1b"),
        ("gpipe", 2, 1, 0, "at least one rank, chunk and microbatch"),
    ],
)
def test_what_cannot_be_made_is_said(name: str, ranks: int, chunks: int, microbatches: int, message: str) -> None:
    assert message in fault(name, ranks, chunks, microbatches)
    with pytest.raises(PinError, match=message):
        actions(name, ranks, chunks, microbatches)


def test_the_microbatches_proposed_instead_can_be_made() -> None:
    for ranks in range(1, 9):
        for m in range(1, 40):
            problem = fault("interleaved", ranks, 2, m)
            if problem:
                below, above = (int(word) for word in problem.rsplit("take ", 1)[1].split() if word.isdigit())
                assert below < m < above
                assert not fault("interleaved", ranks, 2, below)
                assert not fault("interleaved", ranks, 2, above)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_list_is_complete_and_runs(name: str) -> None:
    """`compile_lists` refuses a missing, repeated or misplaced action and a circle of waits."""
    tried = [(ranks, chunks, m) for other, ranks, chunks, m in GRID if other == name]
    assert tried
    for ranks, chunks, m in tried:
        placement = stage_rank(name, ranks, chunks)
        lists = actions(name, ranks, chunks, m)
        assert compile_lists(lists, placement).microbatches == m
        split = any(a.kind == "W" for one in lists for a in one)
        assert split == SCHEDULES[name].splits_backward


def test_stages_go_round_or_down_and_up() -> None:
    assert stage_rank("interleaved", 3, 2) == (0, 1, 2, 0, 1, 2)
    assert stage_rank("1f1b", 3, 1) == (0, 1, 2)
    assert stage_rank("zbv", 3, 2) == stage_rank("dualpipev", 3, 2) == (0, 1, 2, 2, 1, 0)
    assert local_chunks((0, 1, 2, 2, 1, 0)) == ((0, 5), (1, 4), (2, 3))
    with pytest.raises(PinError, match="choose one of"):
        stage_rank("round", 2, 1)


def test_one_rank_has_the_same_list_under_none_and_1f1b() -> None:
    assert actions("none", 1, 1, 3) == actions("1f1b", 1, 1, 3)
    assert [str(a) for a in actions("none", 1, 1, 2)[0]] == ["0F0", "0B0", "0F1", "0B1"]


# -- microbatches alive: techniques.md F2


def peak(name: str, ranks: int, chunks: int, m: int) -> list[int]:
    """By rank, the most (microbatch, chunk) pairs alive at once."""
    vectors = live_vectors(actions(name, ranks, chunks, m), stage_rank(name, ranks, chunks))
    return [max(map(sum, of_rank)) for of_rank in vectors]


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 1), (4, 2), (4, 4), (4, 16), (8, 5)])
def test_in_flight_of_gpipe_and_1f1b(p: int, m: int) -> None:
    assert peak("gpipe", p, 1, m) == [m] * p
    assert peak("1f1b", p, 1, m) == [min(p - r, m) for r in range(p)]


@pytest.mark.parametrize(("p", "v", "m"), [(4, 2, 8), (4, 2, 16), (2, 3, 6), (8, 2, 32), (4, 4, 8)])
def test_in_flight_of_interleaved(p: int, v: int, m: int) -> None:
    """Megatron-LM: warm-up of 2(p - r - 1) + (v - 1)p forwards, and one more."""
    assert peak("interleaved", p, v, m) == [min(2 * (p - r - 1) + (v - 1) * p + 1, m * v) for r in range(p)]


def test_interleaving_costs_memory_on_the_first_rank() -> None:
    """Narayanan et al. 2021: 1 + (p - 1) / (p v) times the activations of 1F1B; p = 4, v = 2: 11 chunks for 8."""
    assert peak("interleaved", 4, 2, 16)[0] == 11


@pytest.mark.parametrize(("p", "m"), [(2, 8), (4, 8), (4, 16), (8, 24)])
def test_in_flight_of_zero_bubble_schedules(p: int, m: int) -> None:
    """Qi et al. 2023: ZB-H1 and ZB-V keep the activations of 1F1B's first rank; DualPipeV (DeepSeek) p + 1 half-stages more."""
    assert peak("zb-h1", p, 1, m) == [p] * p
    assert peak("zbv", p, 2, m) == [2 * p] * p
    assert peak("dualpipev", p, 2, m) == [2 * p + 1] * p


def test_live_vectors_of_a_small_v() -> None:
    lists, placement = actions("zbv", 2, 2, 4), stage_rank("zbv", 2, 2)
    assert live_vectors(lists, placement) == (((4, 0), (3, 1)), ((3, 1), (2, 2)))
    assert [str(a) for a in lists[1]][-6:] == ["1I2", "2I3", "1I3", "1W2", "2W3", "1W3"]
    second = live_vectors(lists, placement, two_part=True)[1]
    assert second == ((3, 1, 0, 0), (2, 2, 0, 0), (2, 1, 1, 0), (2, 1, 0, 1), (1, 0, 1, 1), (0, 0, 2, 1))


@pytest.mark.parametrize(("name", "ranks", "chunks", "m"), GRID[:: max(1, len(GRID) // 60)])
def test_live_vectors_are_the_greatest_moments(name: str, ranks: int, chunks: int, m: int) -> None:
    """Against a replay that writes down every moment, and compares all with all."""
    lists, placement = actions(name, ranks, chunks, m), stage_rank(name, ranks, chunks)
    for two_part in (False, True):
        found = live_vectors(lists, placement, two_part=two_part)
        for rank, of_rank in enumerate(lists):
            moments = replayed(of_rank, local_chunks(placement)[rank], two_part)
            greatest = {v for v in moments if not any(w != v and covers(w, v) for w in moments)}
            assert set(found[rank]) == greatest
            assert len(found[rank]) == len(greatest)


def replayed(of_rank: tuple[Action, ...], stages: tuple[int, ...], two_part: bool) -> set[tuple[int, ...]]:
    whole: set[tuple[int, int]] = set()
    half: set[tuple[int, int]] = set()
    moments = set()
    training = any(a.kind != "F" for a in of_rank)
    for action in of_rank:
        key = (action.stage, action.microbatch)
        if action.kind == "F":
            whole.add(key)
        counts = [sum(s == stage for s, _ in alive) for alive in (whole, half) for stage in stages]
        both = [a + b for a, b in zip(counts[: len(stages)], counts[len(stages) :], strict=True)]
        moments.add(tuple(counts if two_part else both))
        if action.kind == "I":
            half.add(key)
        if action.kind in "BI" or not training:
            whole.discard(key)
        if action.kind == "W":
            half.discard(key)
    return moments


def covers(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True))


def test_greatest_vectors_of_random_sets() -> None:
    draw = random.Random(3)
    for _ in range(100):
        vectors = {tuple(draw.randrange(4) for _ in range(3)) for _ in range(draw.randrange(1, 20))}
        assert set(_greatest(vectors)) == {v for v in vectors if not any(w != v and covers(w, v) for w in vectors)}


# -- lists that cannot run


def parsed(*ranks: str) -> list[list[Action]]:
    return [[parse_action(word) for word in rank.split()] for rank in ranks]


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (("0F0 0B0", "1B0 1F0"), "rank 1, action 1B0: comes before 1F0"),
        (("0F0 0B0", "1F0"), "rank 1: action 1B0 is missing"),
        (("0F0 0B0 0F1", "1F0 1B0 1F1 1B1"), "rank 0: action 0B1 is missing"),
        (("0F0 0I0 0W0", "1F0 1I0"), "rank 1: action 1W0 is missing"),
        (("0F0 0I0 0W0", "1F0 1W0 1I0"), "rank 1, action 1W0: comes before 1I0"),
        (("0F0 0B0 0B0", "1F0 1B0"), "rank 0, action 0B0: the microbatch has had it already"),
        (("0F0 0B0 0I0", "1F0 1B0"), "rank 0, action 0I0: the microbatch has had it already"),
        (("0F0 1B0", "1F0 0B0"), "rank 0, action 1B0: stage 1 lives on rank 1"),
        (("0F0 0B0 4F0", "1F0 1B0"), "rank 0, action 4F0: no such stage"),
        (("0F0 0SEND_F0 0B0", "1F0 1B0"), "rank 0, action 0SEND_F0: only F, B, I, W"),
        (("0F1 0B1", "1F1 1B1"), "rank 0: action 0F0 is missing"),
        (("", ""), "no forward"),
    ],
)
def test_faulty_lists_are_refused_by_rank_and_action(ranks: tuple[str, ...], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        compile_lists(parsed(*ranks), (0, 1))


def test_a_circle_of_waits_is_shown() -> None:
    lists = parsed("0F0 0B0 0F1 0B1", "1F1 1B1 1F0 1B0")
    with pytest.raises(ScheduleError) as caught:
        compile_lists(lists, (0, 1))
    assert "rank 0, action 0B0 waits for 1B0 of rank 1" in str(caught.value)
    assert "rank 1, action 1F1 waits for 0F1 of rank 0" in str(caught.value)
    with pytest.raises(
        ScheduleError, match=r"rank 0, action 2F0 waits for 1F0 of rank 1; rank 1, action 1F1 waits for 0F1"
    ):
        compile_lists(parsed("0F0 2F0 0F1 2F1", "1F1 1F0"), (0, 1, 0))


def test_a_rank_that_waits_for_itself_is_a_circle() -> None:
    with pytest.raises(ScheduleError, match="rank 0, action 1F0 waits for 0F0 of rank 0"):
        compile_lists(parsed("1F0 0F0"), (0, 0))


def test_large_lists_are_whole() -> None:
    """16 ranks, 8 chunks, 128 microbatches; benchmarks/parts_speed.py times them."""
    lists, placement = actions("interleaved", 16, 8, 128), stage_rank("interleaved", 16, 8)
    assert [len(set(acts)) for acts in lists] == [2 * 8 * 128] * 16
    assert len(live_vectors(lists, placement)) == 16
