"""Splits by prompt, held-out parts and blends."""

from __future__ import annotations

from collections import Counter

import pytest

from rlhf.data.mixture import blend, drop_leaked, hold_out, split_by_prompt, stage_share
from rlhf.data.sources import DataError
from rlhf.types import PreferenceRecord, PromptRecord

STAGES = ("sft", "reward", "ppo")


def prompts(count: int, start: int = 0) -> list[PromptRecord]:
    return [PromptRecord(str(n), f"t {n}", {"prompt_key": f"질문{n}"}) for n in range(start, start + count)]


def keys(records: list) -> set[str]:
    return {record.meta["prompt_key"] for record in records}


def test_split_follows_the_shares_and_keeps_a_prompt_together() -> None:
    records = prompts(6000) + prompts(6000)
    parts = split_by_prompt(records, (2, 4, 4))
    assert sum(map(len, parts)) == 12000
    for part, share in zip(parts, (0.2, 0.4, 0.4), strict=True):
        assert abs(len(part) / 12000 - share) < 0.02  # about three standard deviations of 6000 draws
        assert set(Counter(record.id for record in part).values()) == {2}
    assert not (keys(parts[0]) & keys(parts[1])) and not (keys(parts[1]) & keys(parts[2]))
    assert [r.id for r in parts[0]] == [r.id for r in records if r in parts[0]]


def test_a_prompt_stays_where_it_is_when_others_come_and_go() -> None:
    few, many = split_by_prompt(prompts(50, start=100), (1, 1)), split_by_prompt(prompts(400), (10, 10))
    assert keys(few[0]) <= keys(many[0]) and keys(few[1]) <= keys(many[1])
    reordered = split_by_prompt(prompts(400)[::-1], (1, 1))
    assert keys(reordered[0]) == keys(many[0])
    assert keys(split_by_prompt(prompts(400), (1, 1), "other")[0]) != keys(many[0])


def test_the_assignment_is_the_same_on_every_machine() -> None:
    # worked out with the shell: the first 12 hex digits of `printf '\0질문3' | sha256sum`, times 3, over 16^12
    parts = split_by_prompt(prompts(12), (1, 1, 1))
    assert [[int(record.id) for record in part] for part in parts] == [[0, 7, 8, 9], [2, 3, 4, 6, 11], [1, 5, 10]]


def test_without_a_key_the_rendered_prompt_counts() -> None:
    records = [PreferenceRecord(str(n), text, "a", "b") for n, text in enumerate(["한 질문", "한질문 ", "한\n질문"])]
    for shares in ((1, 1), (1, 2), (3, 1)):
        assert sorted(map(len, split_by_prompt(records, shares))) == [0, 3]


def test_share_of_zero_and_wrong_shares() -> None:
    assert [len(part) for part in split_by_prompt(prompts(50), (0, 1, 0))] == [0, 50, 0]
    for shares in ((), (0, 0), (-1, 2), (float("nan"), 1)):
        with pytest.raises(DataError, match="shares"):
            split_by_prompt(prompts(2), shares)


def test_stage_share() -> None:
    records = prompts(1000)
    stages = [stage_share(records, "2, 4,4", stage, STAGES) for stage in ("sft", "reward", "ppo")]
    assert sum(map(len, stages)) == 1000 and 150 < len(stages[0]) < 250
    assert not keys(stages[0]) & keys(stages[1]) | keys(stages[1]) & keys(stages[2]) | keys(stages[0]) & keys(stages[2])
    assert len(stage_share(records, "0,1,1", "reward", STAGES)) > 400
    for wrong in ("2,4", "a,b,c", "2,4,4,1", "", "1,-1,1", "nan,1,1"):
        with pytest.raises(DataError, match="3 numbers"):
            stage_share(records, wrong, "sft", STAGES)
    with pytest.raises(DataError, match="leaves nothing to the stage sft"):
        stage_share(records, "0,1,1", "sft", STAGES)
    with pytest.raises(DataError, match="rl.*not one of sft, reward, ppo"):
        stage_share(records, "1,1,1", "rl", STAGES)
    halves = [stage_share(records, "1,1", stage, stages=("sft", "dpo")) for stage in ("sft", "dpo")]
    assert keys(halves[0]) | keys(halves[1]) == keys(records) and not keys(halves[0]) & keys(halves[1])
    with pytest.raises(DataError, match="2 numbers of at least 0 for sft, dpo, such as"):
        stage_share(records, "1,1,1", "dpo", stages=("sft", "dpo"))


def test_hold_out_composes_with_the_stages() -> None:
    records = prompts(4000)
    train, heldout = hold_out(records, 0.1)
    assert abs(len(heldout) / 4000 - 0.1) < 0.015 and len(train) + len(heldout) == 4000
    for stage in ("sft", "reward", "ppo"):
        part = stage_share(records, "1,1,1", stage, STAGES)
        part_train, part_heldout = hold_out(part, 0.1)
        assert keys(part_heldout) == keys(part) & keys(heldout)
        assert abs(len(part_heldout) / len(part) - 0.1) < 0.03  # not emptied by the stage split: independent hashes
    assert keys(hold_out(records, 0.05)[1]) < keys(heldout)  # a larger fraction only adds prompts
    assert hold_out(records, 0) == (records, [])
    for fraction in (1.0, -0.1):
        with pytest.raises(DataError, match="fraction"):
            hold_out(records, fraction)


def test_blend() -> None:
    first, second = prompts(10), prompts(7, start=100)
    assert blend([first, second], [1.0, 1], seed=3) == first + second
    mixed = blend([first, second], [2.5, 0.5], seed=3)
    counts = Counter(record.meta["prompt_key"] for record in mixed)
    assert len(mixed) == 25 + 4  # round(3.5) is 4: halves go up
    assert len(blend([prompts(5)], [0.5], seed=3)) == 3  # and 2.5 is not rounded to even
    assert sorted(counts[key] for key in keys(first)) == [2] * 5 + [3] * 5
    assert max(counts[key] for key in keys(second)) == 1
    assert len({record.id for record in mixed}) == len(mixed)
    assert mixed == blend([first, second], [2.5, 0.5], seed=3)
    assert mixed != blend([first, second], [2.5, 0.5], seed=4)
    assert [r.id for r in mixed] != sorted((r.id for r in mixed), key=lambda id: int(id.split("@")[0]))
    drawn = [keys(blend([first, second], [0.5, 1], seed=seed)) for seed in range(8)]
    assert len({frozenset(draw) for draw in drawn}) > 1
    assert blend([[], second], [2.0, 1.0], seed=0) and blend([], [], seed=0) == []
    for weights in ([1.0], [1.0, 0.0], [1.0, float("inf")]):
        with pytest.raises(DataError, match="weight"):
            blend([first, second], weights, seed=0)


def test_a_blend_with_weights_is_in_no_order_of_its_data_sets() -> None:
    first, second = prompts(60), prompts(30, start=100)
    mixed = [int(record.meta["prompt_key"].removeprefix("질문")) for record in blend([first, second], [1, 2], seed=3)]
    changes = sum((one < 100) != (other < 100) for one, other in zip(mixed, mixed[1:], strict=False))
    assert 40 < changes < 80  # 60 and 60 in a random order change sides 60 times of 119, give or take 5.5


def test_drop_leaked() -> None:
    train, heldout = prompts(10) + prompts(3), prompts(5, start=8)
    kept, dropped = drop_leaked(train, heldout)
    assert dropped == 2 and not keys(kept) & keys(heldout) and len(kept) == 11
