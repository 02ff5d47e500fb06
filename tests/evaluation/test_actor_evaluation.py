"""What `rlhf eval` says of an actor: perplexity by a loop over tokens, and what its responses are like."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rlhf.cli.__main__ import main as rlhf
from rlhf.evaluation.generations import distinct, generation_statistics
from rlhf.models.loading import load_causal_lm


def test_statistics_of_responses_by_hand():
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4], [5, 6, 7, 0, 0, 0, 0, 0]])
    mask = torch.tensor([[True] * 8, [True] * 3 + [False] * 5])
    found = generation_statistics(["가 나 ab", " 가  나 ab"], ids, mask, torch.tensor([True, False]))
    assert found["responses"] == 2 and found["eos_rate"] == 0.5
    assert (found["tokens_mean"], found["tokens_median"], found["tokens_max"]) == (5.5, 5.5, 8.0)
    assert found["repeated_4grams"] == pytest.approx((1 / 5 + 0) / 2)
    assert found["hangul_share"] == 0.5 and found["empty"] == 0.0 and found["repeated_responses"] == 0.5
    assert (found["distinct_1"], found["distinct_2"], found["distinct_3"]) == (0.5, 0.5, 0.5)
    assert distinct(["a b a b"], 2) == pytest.approx(2 / 3) and distinct(["a"], 2) == 0.0
    with pytest.raises(ValueError, match="no responses"):
        generation_statistics([], ids, mask, torch.tensor([]))


def test_perplexity_is_that_of_the_responses_tokens(tiny_models, tokenizer, tmp_path, capsys):
    rows = [
        {
            "prompt": f"ask {number}",
            "response": "abcd"[: 1 + number % 4],
            "category": "even" if number % 2 == 0 else "odd",
        }
        for number in range(9)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "found.json"
    words = ["eval", str(tiny_models["gpt_neox"]), "--data", str(data), "--prompts", str(data), "--template", "none"]
    words += ["--cache_dir", str(tmp_path / "cache"), "--max_response_tokens", "6", "--samples", "2"]
    assert rlhf([*words, "--output", str(output)]) == 0
    found, shown = json.loads(output.read_text()), capsys.readouterr().out
    model = load_causal_lm(tiny_models["gpt_neox"], dtype=torch.float32).eval()
    losses = {"even": [], "odd": []}
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([[*prompt, *tokenizer(row["response"])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        for place in range(len(prompt), ids.shape[1]):
            losses[row["category"]].append(-float(logprobs[place - 1, ids[0, place]]))
    everything = losses["even"] + losses["odd"]
    of = found["perplexity"]
    assert of["perplexity"] == pytest.approx(math.exp(sum(everything) / len(everything)), rel=1e-4)
    assert of["tokens"] == len(everything) and of["rows"] == 9
    for name, values in losses.items():
        assert of["by_category"][name] == pytest.approx(math.exp(sum(values) / len(values)), rel=1e-4)
    generation = found["generation"]
    assert generation["prompts"] == 9 and generation["responses"] == 18 and len(generation["answers"]) == 18
    assert generation["answers"][0]["prompt"] == generation["answers"][1]["prompt"] == "ask 0"
    assert generation["tokens_max"] <= 6 and "perplexity" in shown and "eos rate" in shown


def test_the_same_seed_gives_the_same_answers_whatever_the_slots(tiny_models, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"ask {number}"}) + "\n" for number in range(5)))
    answers = []
    for number, slots in enumerate(("64", "2")):
        output = tmp_path / f"{number}.json"
        words = ["eval", str(tiny_models["gpt_neox"]), "--prompts", str(data), "--template", "none", "--rows", slots]
        assert rlhf([*words, "--max_response_tokens", "5", "--output", str(output), "--cache_dir", str(tmp_path)]) == 0
        answers.append(json.loads(output.read_text())["generation"]["answers"])
    assert answers[0] == answers[1]
