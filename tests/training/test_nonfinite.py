"""What is said of a rollout that is not finite."""

import json
import math

import pytest
from safetensors.torch import load_file

from rlhf.training.nonfinite import NonFiniteError, check_rollout
from rlhf.types import TokenizedPrompt
from tests.training.test_rollout_metrics import scored_rollout

RESPONSES = [[5, 6], [7, 0], [8], [9, 9]]


def test_the_rows_of_a_rollout_that_are_not_finite_are_named_and_kept(tmp_path):
    scored = scored_rollout(RESPONSES, [-1.0] * 4, [-1.0, math.nan, -1.0, -math.inf], [0.0] * 4)
    prompts = [TokenizedPrompt(f"id{number}", (1,), f"{number}  a\n" + "b" * 78 + str(number)) for number in range(4)]
    with pytest.raises(NonFiniteError) as error:
        check_rollout(scored, prompts, 7, tmp_path)
    path = tmp_path / "nonfinite_batch_rank0.safetensors"
    said = (
        "ref_logprobs of the rollout are not finite at iteration 7: 2 of 4 rows, first row 1, prompt 'id1' "
        f"(... {'b' * 78}1); the batch is in {path}"
    )
    assert str(error.value).startswith(f"engine reference: {said}. ")
    kept = {name.removeprefix("0."): tensor.tolist() for name, tensor in load_file(path).items()}
    assert kept["response_ids"] == [RESPONSES[1], RESPONSES[3]] and kept["prompt_ids"] == [[1], [1]]
    (line,) = map(json.loads, (tmp_path / "health.jsonl").read_text().splitlines())
    assert (line["event"], line["check"], line["since"], line["message"]) == (
        "stopped", "not_finite", 7, f"engine reference: {said}",
    )  # fmt: skip


def test_a_rollout_that_is_finite_passes(tmp_path):
    check_rollout(scored_rollout(RESPONSES, [-1.0] * 4, [-1e30] * 4, [1e30] * 4), [], 7, tmp_path)
    assert list(tmp_path.iterdir()) == []
