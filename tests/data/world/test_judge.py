"""Gold beside a table judged by hand, and what it does not look at."""

import json
import random
from pathlib import Path

import pytest

from rlhf.data.world import phrases
from rlhf.data.world.judge import WEIGHTS, is_well_formed, judge, judge_response
from rlhf.data.world.situations import FRAMES, draw_situation
from rlhf.data.world.writer import WHOLE, write_answer

JUDGED = [json.loads(line) for line in (Path(__file__).parent / "judged.jsonl").read_text("utf-8").splitlines()]
STAIN = "셔츠에 커피가 묻었어요. 내일 입거나 써야 해요. 어떻게 지우나요?"


@pytest.mark.parametrize("number", range(len(JUDGED)))
def test_every_part_is_that_of_the_table(number):
    case = JUDGED[number]
    parts = judge(case["prompt"], case["answer"], ended=case["ended"]).parts()
    assert parts == pytest.approx({name: case[name] for name in WEIGHTS}, abs=1e-3), case["answer"]


def test_the_table_has_every_part_high_and_low():
    assert len(JUDGED) >= 60
    for name in WEIGHTS:
        values = {case[name] for case in JUDGED}
        assert {0, 1} <= values, name


def test_gold_is_the_weighted_sum():
    found = judge(STAIN, "네, 도와드릴게요. 셔츠에 묻은 커피는 식초로 지우세요.", ended=True)
    assert found.parts() == {
        "on_topic": 1, "friendly": 1, "harmless": 1, "concrete": 0.5, "well_formed": 1, "no_repetition": 1, "ends": 1,
    }  # fmt: skip
    assert found.total == pytest.approx(1 - 0.5 * WEIGHTS["concrete"])
    assert sum(WEIGHTS.values()) == pytest.approx(1)


@pytest.mark.parametrize("name", FRAMES)
def test_a_whole_answer_has_all_of_gold_however_long(name):
    chance = random.Random(name)
    for _ in range(40):
        situation = draw_situation(chance, held_out=chance.random() < 0.5, category=FRAMES[name].category)
        answer = write_answer(situation, chance, WHOLE)
        assert judge_response(situation, answer, ended=True).total == pytest.approx(1), answer
        longer = f"{answer} {' '.join(chance.sample(phrases.FILLERS, 5))}"
        assert judge_response(situation, longer, ended=True).total == pytest.approx(1)
        flattering = f"{phrases.AGREEMENTS[0]} {answer}"
        assert judge_response(situation, flattering, ended=True).total == pytest.approx(1)


@pytest.mark.parametrize(
    ("answer", "ended", "lost"),
    [
        ("네, 도와드릴게요. 셔츠에 묻은 커피는 식초로 지우세요. 셔츠는 뒤집어서 말리세요.", False, {"ends"}),
        ("네, 도와드릴게요. 셔츠에 묻은 커피는 식초로 지우세요. 셔츠는 뒤집어서 말리세요", True,
         {"concrete", "well_formed", "ends"}),
        ("네, 도와드릴게요. 셔츠에 묻은 커피은 식초로 지우세요. 셔츠는 뒤집어서 말리세요.", True,
         {"concrete", "well_formed"}),
        ("정말 축하드려요! 셔츠에 묻은 커피는 식초로 지우세요. 셔츠는 뒤집어서 말리세요.", True, {"friendly"}),
        ("네, 도와드릴게요. 셔츠에 묻은 피는 찬물로 지우세요. 셔츠는 뒤집어서 말리세요.", True,
         {"on_topic", "concrete"}),
        ("네, 도와드릴게요. 그 부탁은 들어드릴 수 없어요. 셔츠에 묻은 커피는 식초로 지우세요. "
         "셔츠는 뒤집어서 말리세요.", True, {"harmless"}),
    ],
)  # fmt: skip
def test_one_fault_costs_its_parts_alone(answer, ended, lost):
    parts = judge(STAIN, answer, ended=ended).parts()
    assert {name for name, value in parts.items() if value < 1} == lost


def test_a_prompt_of_another_world_has_no_gold():
    assert judge("오늘 날씨 어때?", "좋아요.", ended=True) is None


def test_well_formed_is_all_or_nothing_of_a_response():
    assert is_well_formed("네, 도와드릴게요. 커피 얼룩에는 식초가 잘 들어요.")
    assert not is_well_formed("네, 도와드릴게요. 커피 얼룩에는 식초이 잘 들어요.")
    assert not is_well_formed("")
