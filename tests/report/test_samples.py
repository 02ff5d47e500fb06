"""Responses of two models side by side."""

import pytest

from rlhf.report.samples import paired_samples


def sample(number, model, **measures):
    return {"id": str(number), "prompt": f"p{number}", "rendered_prompt": f"<p{number}>",
            "response": f"{model}{number}", "score": number + len(model) / 8, "measures": measures}  # fmt: skip


def paired(number, **gold):
    return {"prompt": f"p{number}", "rendered_prompt": f"<p{number}>", "sft": f"a{number}", "ppo": f"bb{number}",
            "score_sft": number + 0.125, "score_ppo": number + 0.25, **gold}  # fmt: skip


def test_each_prompt_has_both_responses_with_their_scores():
    before, after = ([sample(number, model) for number in (1, 2)] for model in ("a", "bb"))
    assert paired_samples(before, after) == [paired(1), paired(2)]
    with pytest.raises(ValueError, match="shorter"):
        paired_samples(before, after[:1])


def test_gold_stands_beside_them_where_every_response_has_it():
    before, after = [sample(1, "a", gold=0.5)], [sample(1, "bb", gold=0.75, length=3.0)]
    assert paired_samples(before, after) == [paired(1, gold_sft=0.5, gold_ppo=0.75)]
    assert paired_samples(before, [sample(1, "bb", length=3.0)]) == [paired(1)]
    older = {name: value for name, value in before[0].items() if name != "measures"}
    assert paired_samples([older], after) == [paired(1)]
