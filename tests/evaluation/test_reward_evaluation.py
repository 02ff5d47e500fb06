"""What `rlhf eval` says of a reward model, against tables by hand and other computations of the same."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from rlhf.algorithms.ranking_metrics import RowNames, ScoredRows
from rlhf.checkpoint.export import export_scalar_model
from rlhf.cli.__main__ import main as rlhf
from rlhf.data.spec import DataError, Row
from rlhf.evaluation.reward_accuracy import agreement, baselines, reward_metrics
from rlhf.evaluation.rewardbench import BenchRow, bench_row, bench_scores, best_of, ties_score
from rlhf.models.scalar import ScalarModel
from rlhf.numerics.intervals import bootstrap_interval


def pairs(chosen, rejected, *, prompts=None, lengths=None):
    """Rankings of two with these scores."""
    count = len(chosen)
    scores = torch.tensor([score for pair in zip(chosen, rejected, strict=True) for score in pair])
    numbers = torch.arange(count).repeat_interleave(2)
    none = torch.zeros(2 * count, dtype=torch.long)
    return ScoredRows(
        scores=scores.float(),
        groups=numbers,
        prompts=numbers if prompts is None else torch.tensor(prompts).repeat_interleave(2),
        ranks=torch.tensor([0, 1] * count),
        lengths=torch.tensor([5] * 2 * count if lengths is None else lengths),
        categories=none,
        sources=none,
        openings=none - 1,
    )


def test_a_bootstrap_interval_is_that_of_the_resampled_means():
    """Beside a resampling by Python's own random numbers, of groups of one, two and three values."""
    chance = random.Random(5)
    groups = [number for number in range(60) for _ in range(1 + number % 3)]
    values = [float(chance.random() < 0.7) for _ in groups]
    low, high = bootstrap_interval(torch.tensor(values), torch.tensor(groups), resamples=4000)
    by_group = {
        each: [value for value, group in zip(values, groups, strict=True) if group == each] for each in set(groups)
    }
    means = []
    for _ in range(4000):
        drawn = [value for _ in by_group for value in by_group[chance.randrange(60)]]
        means.append(sum(drawn) / len(drawn))
    means.sort()
    assert low == pytest.approx(means[100], abs=0.015) and high == pytest.approx(means[3900], abs=0.015)
    assert (low, high) == bootstrap_interval(torch.tensor(values), torch.tensor(groups), resamples=4000)
    together = bootstrap_interval(torch.tensor(values), torch.tensor(groups))
    apart = bootstrap_interval(torch.tensor(values), torch.arange(len(values)))
    assert together[1] - together[0] > 0 and apart != together
    with pytest.raises(ValueError, match="no value"):
        bootstrap_interval(torch.tensor([]), torch.tensor([]))


def test_accuracy_by_length_and_what_the_outside_alone_gets():
    lengths = [2, 4, 10, 20, 3, 3, 40, 30]
    rows = pairs([1.0, 0.0, 2.0, 1.0], [0.0, 1.0, 1.0, 0.0], lengths=lengths)
    texts = ["a.", "a b c", "a a", "b c", "x?", "x", "one\ntwo", "one two"]
    found = reward_metrics(rows, RowNames([""]), texts)
    assert found["eval_accuracy"] == 0.75 and found["bootstrap"][0] < 0.75 < found["bootstrap"][1]
    buckets = [(each["shortest"], each["longest"], each["accuracy"], each["pairs"]) for each in found["by_length"]]
    assert buckets == [(3.0, 3.0, 1.0, 1), (3.0, 3.0, 1.0, 1), (15.0, 15.0, 0.0, 1), (35.0, 35.0, 1.0, 1)]
    by_outside = found["baselines"]
    assert by_outside["longer"] == {"accuracy": 0.5, "reversed": False}, "2<5, 3=3 (half), 2>1, 7=7 (half)"
    assert by_outside["more lines"] == {"accuracy": 0.625, "reversed": False}
    assert by_outside["ends with a full stop"] == {"accuracy": 0.75, "reversed": False}
    assert by_outside["more varied words"] == {"accuracy": 0.625, "reversed": True}
    accuracies = [each["accuracy"] for each in by_outside.values()]
    assert accuracies == sorted(accuracies, reverse=True)


def test_a_baseline_of_no_pair_that_differs_is_chance():
    found = baselines(torch.tensor([0]), torch.tensor([1]), ["same", "same"])
    assert {each["accuracy"] for each in found.values()} == {0.5}


def test_agreement_of_two_models():
    """Right on 3 of 4 and on 2 of 4, alike on 3: chance 0.75 * 0.5 + 0.25 * 0.5 = 0.5."""
    first = pairs([1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0])
    second = pairs([2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 2.0])
    found = agreement(first, second)
    assert found["agreement"] == 0.75 and found["kappa"] == pytest.approx(0.5) and found["pairs"] == 4
    margins = torch.tensor([[1.0, 1.0, 1.0, -1.0], [2.0, 2.0, -1.0, -2.0]])
    assert found["margin_correlation"] == pytest.approx(float(torch.corrcoef(margins)[0, 1]), abs=1e-6)
    assert agreement(first, first)["kappa"] == 1.0
    tied = agreement(first, pairs([1.0] * 4, [1.0] * 4))
    assert tied["agreement"] == 0.5 and tied["kappa"] == pytest.approx(0.0)


# ------------------------------------------------------------------------------------------------- RewardBench 2


def bench(number, subset="Math", right=1, wrong=3, kind=""):
    return BenchRow(f"{kind}{number}", subset, "Q", tuple("r" * right), tuple("w" * wrong))


@pytest.mark.parametrize(
    ("scores", "credit"),
    [
        ([3.0, 1, 2, 0], 1.0),
        ([3.0, 3, 2, 0], 0.5),
        ([3.0, 3, 3, 3], 0.25),
        ([2.0, 3, 1, 1], 0.0),
        ([2.0, 3, 3, 2], 0.0),
    ],
)
def test_best_of_four_shares_its_credit(scores, credit):
    assert best_of(bench(1), scores) == credit


def test_ties_by_hand():
    """Two prompts, both in both forms.

    1: tied right 5, 4 and wrong 1: spread 1, margin 3; ref right 5 and wrong 1, 0: margin 4. Preferred, and hard.
    2: tied right 5, 2 and wrong 1: spread 3, margin 1; ref right 2 and wrong 3: margin -1. Neither; ref is wrong.
    """
    rows = [bench(1, "Ties", 2, 1, "tied:"), bench(1, "Ties", 1, 2, "ref:"),
            bench(2, "Ties", 2, 1, "tied:"), bench(2, "Ties", 1, 1, "ref:")]  # fmt: skip
    found = ties_score(rows, [[5.0, 4, 1], [5.0, 1, 0], [5.0, 2, 1], [2.0, 3]])
    assert (found["tied_accuracy"], found["ref_accuracy"]) == (1.0, 0.5)
    assert (found["preferred"], found["preferred_hard"]) == (0.5, 0.5)
    margin = (math.tanh(min(4, 3) / 1 - 1) + math.tanh(-1 / 3 - 1)) / 2
    assert found["margin"] == pytest.approx(margin)
    assert found["score"] == pytest.approx(0.3 + 0.15 + 0.1 + 0.1 + 0.01 * margin)


def test_ties_without_spread_and_without_a_partner():
    alike = ties_score([bench(1, "Ties", 2, 1, "tied:"), bench(1, "Ties", 1, 1, "ref:")], [[2.0, 2, 1], [2.0, 1]])
    assert alike["margin"] == 1.0 and alike["preferred"] == 1.0
    alone = ties_score([bench(1, "Ties", 2, 1, "tied:")], [[2.0, 2, 1]])
    assert alone["score"] == pytest.approx(0.3) and alone["preferred"] == 0.0
    with pytest.raises(DataError, match="ref:N or tied:N"):
        ties_score([bench(1, "Ties")], [[1.0, 0, 0, 0]])


def test_the_score_is_the_mean_of_the_subsets():
    rows = [bench(1), bench(2), bench(3, "Safety"), bench(1, "Ties", 2, 1, "tied:")]
    found = bench_scores(rows, [[1.0, 0, 0, 0], [0.0, 1, 0, 0], [1.0, 0, 0, 0], [2.0, 2, 1]])
    assert {name: each["score"] for name, each in found["subsets"].items()} == {
        "Math": 0.5,
        "Safety": 1.0,
        "Ties": pytest.approx(0.3),
    }
    assert found["score"] == pytest.approx((0.5 + 1.0 + 0.3) / 3)
    assert found["subsets"]["Math"]["low"] == 0.0 and found["subsets"]["Math"]["high"] == 1.0
    with pytest.raises(DataError, match="only Ties may"):
        bench_scores([bench(1, right=2)], [[1.0, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": ["b"], "subset": "s", "id": 1}, "lists of responses"),
        ({"prompt": "q"}, "this one has prompt"),
        ({"prompt": "q", "chosen": [], "rejected": ["b"], "subset": "s", "id": 1}, "0 chosen and 1 rejected"),
    ],
)
def test_a_row_of_another_shape_is_refused_with_its_line(values, told):
    with pytest.raises(DataError, match=rf"f.jsonl:7: .*{told}"):
        bench_row(Row(values, "f.jsonl", 7))


# --------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def reward_model(tiny_models, tokenizer, tmp_path_factory):
    """Saved with normalised scores: raw ones have mean 0.1 and standard deviation 0.02."""
    model = ScalarModel.from_base(tiny_models["gpt_neox"], dtype=torch.float32, seed=3)
    model.set_normalisation(0.1, 0.02)
    model.set_score_range(torch.tensor([-1.0, 1.0]))
    directory = tmp_path_factory.mktemp("eval") / "reward"
    export_scalar_model(model, tokenizer, directory)
    return directory


def say(prompt, response, tokenizer):
    return [*tokenizer(f"{prompt}")["input_ids"], *tokenizer(response)["input_ids"], tokenizer.eos_token_id]


def test_a_reward_model_is_judged_by_its_raw_scores(reward_model, tokenizer, tiny_models, tmp_path, capsys):
    """Accuracy, loss and margins equal what the model says of each text alone, in the units it was trained in."""
    rows = [
        {"prompt": f"ask {number}", "chosen": "ab" * (1 + number % 4), "rejected": "c" * (1 + number % 5)}
        for number in range(20)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "found.json"
    words = [
        "eval",
        str(reward_model),
        "--data",
        str(data),
        "--template",
        "none",
        "--cache_dir",
        str(tmp_path / "cache"),
    ]
    assert rlhf([*words, "--output", str(output), "--second", str(reward_model)]) == 0
    found, shown = json.loads(output.read_text()), capsys.readouterr().out
    raw = ScalarModel.from_base(tiny_models["gpt_neox"], dtype=torch.float32, seed=3).eval()

    def score(prompt, response):
        ids = torch.tensor([say(prompt, response, tokenizer)])
        with torch.no_grad():
            return float(raw(ids, torch.ones_like(ids, dtype=torch.bool))[0, -1])

    margins = [score(row["prompt"], row["chosen"]) - score(row["prompt"], row["rejected"]) for row in rows]
    assert found["eval_accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / len(margins), abs=0.026)
    assert found["eval_margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-5)
    loss = sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)
    assert found["eval_loss"] == pytest.approx(loss, abs=1e-5)
    assert found["second"]["agreement"] == 1.0 and "agreement" in shown and "95%" in shown
    assert f"written to {output}" in shown


def test_files_of_rewardbench_2_are_scored_as_it_does(reward_model, tmp_path, capsys):
    rows = [
        {"id": str(number), "subset": "Math", "prompt": f"ask {number}", "chosen": ["ab"],
         "rejected": ["c", "de", "f" * number],
         "num_correct": 1, "num_incorrect": 3}
        for number in range(1, 6)
    ]  # fmt: skip
    rows.append({"id": "tied:1", "subset": "Ties", "prompt": "ask", "chosen": ["a", "b"], "rejected": ["c"]})
    data = tmp_path / "bench.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "eval",
        str(reward_model),
        "--data",
        str(data),
        "--template",
        "none",
        "--cache_dir",
        str(tmp_path / "cache"),
    ]
    assert rlhf([*words, "--output", str(tmp_path / "out.json"), "--second", str(reward_model)]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    found = written["rewardbench"]
    assert written["second"]["rewardbench"] == found, "the same model"
    assert found["subsets"]["Math"]["prompts"] == 5 and found["subsets"]["Ties"]["prompts"] == 1
    assert "RewardBench 2" in capsys.readouterr().out
    assert found["score"] == pytest.approx(sum(each["score"] for each in found["subsets"].values()) / 2)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{reward}"], "name the preferences to judge it by with --data"),
        (["{reward}", "--data", "{pairs}", "--prompts", "{pairs}"], "answers no prompts"),
        (["{reward}", "--data", "{pairs}", "--second", "{actor}"], "is no reward model's directory"),
        (["{actor}"], "nothing to evaluate on"),
        (["{actor}", "--second", "{reward}", "--data", "{pairs}"], "leave it out"),
        (["{reward}", "--data", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["{actor}", "--prompts", "{pairs}", "--samples", "0"], "samples=0"),
        (["{actor}", "--prompts", "{pairs}", "--temperature", "0"], "temperature=0 must be above 0"),
    ],
)
def test_mistakes_are_told_in_a_sentence(words, told, reward_model, tiny_models, tmp_path, capsys):
    pairs_file = tmp_path / "pairs.jsonl"
    pairs_file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    places = {"reward": reward_model, "actor": tiny_models["gpt_neox"], "pairs": pairs_file}
    given = [word.format(**places) for word in words]
    assert rlhf(["eval", *given, "--template", "none", "--cache_dir", str(tmp_path / "cache")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and "Traceback" not in error
