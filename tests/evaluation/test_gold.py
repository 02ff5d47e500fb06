"""Gold of responses, and of two models on the same prompts."""

import pytest
import torch

from rlhf.data.world.judge import WEIGHTS, judge
from rlhf.evaluation.gold import gold_before_and_after, measure_gold
from rlhf.types import Responses, Rollout, TokenizedPrompt

STAIN = "셔츠에 커피가 묻었어요. 내일 입거나 써야 해요. 어떻게 지우나요?"
WHOLE = "네, 도와드릴게요. 셔츠에 묻은 커피는 식초로 지우세요. 셔츠는 뒤집어서 말리세요."


def responses(prompts, texts, ended):
    empty = torch.zeros(len(texts), 1, dtype=torch.long)
    rollout = Rollout(empty, empty.bool(), empty, empty.bool(), empty.float())
    return Responses(rollout, prompts, texts, torch.tensor(ended))


def prompt(text, rendered="### 명령어:\n{}\n\n### 응답:\n"):
    return TokenizedPrompt("1", (1,), rendered.format(text), messages=({"role": "user", "content": text},))


def test_every_response_is_judged_by_what_was_asked_whatever_the_template():
    texts, ended = [WHOLE, WHOLE, "커피 얼룩은 잘 빼야 해"], [True, False, True]
    found = measure_gold(responses([prompt(STAIN)] * 3, texts, ended))
    golds = [judge(STAIN, text, ended=end) for text, end in zip(texts, ended, strict=True)]
    assert found["gold"].tolist() == pytest.approx([gold.total for gold in golds])
    for name in WEIGHTS:
        assert found[f"gold/{name}"].tolist() == pytest.approx([gold.parts()[name] for gold in golds])
    assert found["gold"][0] == 1 > found["gold"][1] > found["gold"][2]
    assert found["well_formed_responses"].tolist() == [1, 1, 0]


def test_prompts_of_another_world_are_not_measured():
    assert measure_gold(responses([prompt(STAIN), prompt("안녕?")], [WHOLE, "네."], [True, True])) == {}
    assert measure_gold(responses([], [], [])) == {}


def evaluation(golds):
    mean = sum(golds) / len(golds)
    parts = {f"gold/{name}": mean for name in WEIGHTS}
    return {"gold": mean, **parts, "well_formed_responses": mean / 2, "prompt_measures": {"gold": golds}}


def test_wins_are_counted_by_prompt_and_ties_count_half():
    found = gold_before_and_after(evaluation([0.5, 0.5, 0.5, 0.5]), evaluation([0.9, 0.8, 0.5, 0.1]))
    assert found["win_rate"] == pytest.approx(2.5 / 4) and found["prompts"] == 4
    assert (found["before"], found["after"]) == pytest.approx((0.5, 0.575))
    assert (found["well_formed_before"], found["well_formed_after"]) == pytest.approx((0.25, 0.2875))
    assert set(found["parts_before"]) == set(found["parts_after"]) == set(WEIGHTS)
    assert found["parts_after"]["concrete"] == pytest.approx(0.575)


def test_what_was_not_measured_is_none():
    assert gold_before_and_after({"score": 1.0}, {"score": 2.0}) is None
    assert gold_before_and_after({}, evaluation([0.5])) is None
