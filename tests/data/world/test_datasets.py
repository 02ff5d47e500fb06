"""The data sets: deterministic by seed, of mixed quality, compared by annotators who err, and no shortcut in them."""

import hashlib
import json
import math
import random
from collections import Counter
from itertools import combinations

import pytest

from rlhf.data.world.annotator import Annotator
from rlhf.data.world.datasets import DATASETS, RANKED_ANSWERS, World, base_texts
from rlhf.data.world.judge import judge, judge_response
from rlhf.data.world.situations import CATEGORIES, draw_situation, read_situation
from rlhf.data.world.writer import SFT_MIX, WHOLE, write_answer


def gold(prompt, answer):
    return judge(prompt, answer, ended=True).total


def pairs(world, count=2000):
    return list(world.rows("preference_train", count))


def share(values):
    found = list(values)
    return sum(found) / len(found)


def longer(rows):
    """How often the chosen one is the longer one; a tie counts half."""
    lengths = [(len(row["chosen"]), len(row["rejected"])) for row in rows]
    return share((chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in lengths)


@pytest.mark.parametrize("name", DATASETS)
def test_rows_are_those_of_their_seed_and_name(name):
    first, again, other = (list(World(seed).rows(name, 40)) for seed in (1, 1, 2))
    assert first == again != other
    assert first[:10] == list(World(1).rows(name, 10))
    assert {row["category"] for row in first} == set(CATEGORIES)
    assert len({row["id"] for row in first}) == 40
    prompts = [row.get("prompt", row.get("instruction")) for row in first]
    assert len(set(prompts)) == 40
    assert all(read_situation(prompt).held_out == name.endswith("heldout") for prompt in prompts)


SAME_ROWS = {
    "sft_train": "d2d4b404d41145f0",
    "sft_heldout": "0843d66b30b99a2d",
    "preference_train": "b616fc92915bc9fc",
    "preference_heldout": "b16cac86ed739d31",
    "ranked_train": "b694088ea7e8288f",
    "ranked_heldout": "f146c81f389713a0",
    "prompts_train": "86375bb79f8c1f14",
    "prompts_heldout": "0478a0f2b281f9e0",
    "base": "fd11018a3bed61b7",
    "liking": "b4e4fbc5d79abd6f",
}


def test_the_rows_are_those_that_the_published_figures_were_measured_on():
    """Whoever means to change the world measures the tables of docs/ again, and then writes the new digests here."""
    world, liking = World(), World(7, Annotator(sharpness=8.0, length_bias=0.5, agreement_bias=2.0))
    rows = {name: list(world.rows(name, 200)) for name in DATASETS}
    found = {**rows, "base": base_texts(1000), "liking": list(liking.rows("preference_train", 100))}
    digests = {name: hashlib.sha256(json.dumps(each, ensure_ascii=False).encode()) for name, each in found.items()}
    assert {name: each.hexdigest()[:16] for name, each in digests.items()} == SAME_ROWS


def test_the_base_text_is_that_of_its_seed():
    assert base_texts(50, seed=1) == base_texts(50, seed=1) != base_texts(50, seed=2)


def test_sft_answers_are_of_mixed_quality_and_whole_korean():
    rows = list(World().rows("sft_train", 1500))
    golds = [gold(row["instruction"], row["output"]) for row in rows]
    assert 0.6 < share(golds) < 0.75
    assert share(value > 0.99 for value in golds) > 0.03
    assert share(value < 0.5 for value in golds) > 0.1
    formed = [judge(row["instruction"], row["output"], ended=True).well_formed == 1 for row in rows]
    assert 0.97 < share(formed) < 1


def test_the_default_annotator_errs_in_a_tenth_and_length_says_nothing():
    rows = pairs(World(), 4000)
    assert (
        0.10 <= share(gold(row["prompt"], row["rejected"]) > gold(row["prompt"], row["chosen"]) for row in rows) <= 0.15
    )
    assert 0.45 <= longer(rows) <= 0.55
    for category in CATEGORIES:
        assert 0.42 <= longer([row for row in rows if row["category"] == category]) <= 0.58, category


def test_a_learner_that_sees_only_length_reaches_chance_by_gold():
    rows = pairs(World(), 4000)
    right = [
        (len(a) > len(b)) == (gold(row["prompt"], a) > gold(row["prompt"], b))
        for row in rows
        for a, b in [(row["chosen"], row["rejected"])]
        if len(a) != len(b)
    ]
    assert 0.45 <= share(right) <= 0.55


def test_annotators_with_a_liking_follow_it():
    plain, long, flattered = (
        pairs(World(annotator=annotator))
        for annotator in (Annotator(), Annotator(length_bias=1.0), Annotator(agreement_bias=4.0))
    )
    assert longer(long) > longer(plain) + 0.15
    assert longer(pairs(World(annotator=Annotator(length_bias=-1.0)))) < longer(plain) - 0.15

    def flatters(rows):
        from rlhf.data.world.phrases import AGREEMENTS

        found = [[any(text in row[side] for text in AGREEMENTS) for side in ("chosen", "rejected")] for row in rows]
        return share(chosen for chosen, rejected in found if chosen != rejected)

    assert 0.4 < flatters(plain) < 0.6 and flatters(flattered) > 0.75


def test_pairs_are_drawn_as_bradley_and_terry_say():
    """Over many draws the share of wins is sigmoid(utility difference)."""
    chance, annotator = random.Random(5), Annotator(sharpness=4.0)
    situation = draw_situation(chance, held_out=False, category="law")
    good, bad = write_answer(situation, chance, WHOLE), "그건 그때그때 달라요."
    golds = {answer: judge_response(situation, answer, ended=True).total for answer in (bad, good)}
    difference = 4.0 * (golds[good] - golds[bad])
    wins = share(annotator.ranks(golds, chance)[1] == 0 for _ in range(6000))
    assert wins == pytest.approx(1 / (1 + 2.718281828**-difference), abs=0.02)


def test_rankings_are_drawn_as_plackett_and_luce_say():
    """The first place goes to an answer with probability softmax(utilities): Gumbel's noise, and not its mirror."""
    chance, annotator = random.Random(6), Annotator(sharpness=4.0)
    situation = draw_situation(chance, held_out=False, category="law")
    answers = [write_answer(situation, chance, WHOLE), "그건 그때그때 달라요.", "잘 알아보시면 될 거예요.", "한심하다."]
    golds = {answer: judge_response(situation, answer, ended=True).total for answer in answers}
    seen = [math.exp(annotator.utility(answer, gold)) for answer, gold in golds.items()]
    firsts = Counter(annotator.ranks(golds, chance).index(0) for _ in range(20_000))
    shares = [firsts[place] / 20_000 for place in range(4)]
    assert shares == pytest.approx([value / sum(seen) for value in seen], abs=0.012)


def test_rankings_are_whole_and_agree_with_gold_mostly():
    agree = Counter()
    for row in World().rows("ranked_train", 200):
        assert sorted(row["ranks"]) == list(range(RANKED_ANSWERS)) and len(set(row["responses"])) == RANKED_ANSWERS
        golds = [gold(row["prompt"], answer) for answer in row["responses"]]
        for a, b in combinations(range(RANKED_ANSWERS), 2):
            agree[(row["ranks"][a] < row["ranks"][b]) == (golds[a] > golds[b])] += 1
    assert 0.8 < agree[True] / agree.total() < 0.95


def test_every_fault_that_the_mix_names_occurs():
    chance = random.Random(2)
    parts = Counter()
    for _ in range(3000):
        situation = draw_situation(chance, held_out=False)
        found = judge_response(situation, write_answer(situation, chance, SFT_MIX), ended=True).parts()
        parts.update(name for name, value in found.items() if value < 1)
    assert all(parts[name] > 10 for name in ("on_topic", "friendly", "harmless", "concrete", "well_formed", "ends"))
    assert parts["no_repetition"] > 50
