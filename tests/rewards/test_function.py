"""A user's function as a reward: what it is given, what it may give, and what is said of everything else."""

from __future__ import annotations

import json
import linecache
import sys

import numpy as np
import pytest
import torch

from rlhf.config import ConfigError
from rlhf.rewards.reward import RewardError
from rlhf.rewards.table import NO_SOURCES, RewardSpec, build_reward, check_rewards, reward_fingerprints
from rlhf.types import Responses, Rollout, TokenizedPrompt

PROMPTS = [
    TokenizedPrompt(
        "a", (1,), "### Q: one ->", messages=({"role": "user", "content": "one"},), columns={"answer": "x"}
    ),
    TokenizedPrompt("b", (1,), "### Q: two ->", messages=({"role": "user", "content": "two"},), columns={"level": 3}),
]


def responses(texts=("x y", "z")) -> Responses:
    """Responses of 3 and 2 tokens, of which the first one ended."""
    ids = torch.ones(2, 3, dtype=torch.long)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    return Responses(
        Rollout(ids, ids.bool(), ids, mask, torch.zeros(2, 3)), PROMPTS, texts, torch.tensor([True, False])
    )


@pytest.fixture
def reward(tmp_path):
    """The reward that a file's `score` is."""

    def make(source: str):
        file = tmp_path / "rules.py"
        file.write_text(source)
        return build_reward([RewardSpec.parse(f"{file}:score")], NO_SOURCES)

    return make


def test_it_is_given_prompts_responses_and_the_columns_it_names(reward):
    made = reward(
        "def score(prompts, responses, answer=None):\n"
        "    return [float(a in r) if a else -len(p) for p, r, a in zip(prompts, responses, answer)]\n"
    )
    output = made.score(responses())
    assert output.scores.tolist() == [1.0, -3.0] and output.per_token is None


def test_it_is_given_all_columns_and_what_else_it_asks_for(reward):
    made = reward(
        "seen = {}\n"
        "def score(prompts, responses, messages, rendered_prompts, ended, ids, **columns):\n"
        "    seen.update(columns, messages=messages, rendered=rendered_prompts, ended=ended, ids=ids)\n"
        "    return [0, 1]\n"
    )
    assert made.score(responses()).scores.tolist() == [0.0, 1.0]
    seen = made.function.__globals__["seen"]
    assert seen["answer"] == ["x", None] and seen["level"] == [None, 3]
    assert seen["messages"][1] == [{"role": "user", "content": "two"}] and seen["rendered"][0] == "### Q: one ->"
    assert seen["ended"] == [True, False] and seen["ids"] == ["a", "b"]


def test_lists_are_rewards_of_the_single_tokens(reward):
    made = reward("def score(prompts, responses):\n    return [[0.5, 0, 1], (2, 3)]\n")
    output = made.score(responses())
    assert output.per_token.tolist() == [[0.5, 0, 1], [2, 3, 0]] and output.scores.tolist() == [0, 0]
    assert output.parts["tokens"].tolist() == [1.5, 5]


def test_a_fallback_leaves_the_other_responses_their_rewards_of_tokens(tmp_path):
    file = tmp_path / "rules.py"
    file.write_text("def score(prompts, responses):\n    return [[0.5, 0, 1], [2]]\n")
    entry = json.dumps({"name": "function", "path": f"{file}:score", "fallback": -2.0})
    output = build_reward([RewardSpec.parse(entry)], NO_SOURCES).score(responses())
    assert output.per_token.tolist() == [[0.5, 0, 1], [0, 0, 0]] and output.scores.tolist() == [0, -2.0]


@pytest.mark.parametrize("found", [np.array([0.5, 1]), torch.tensor([0.5, 1.0]), (np.float32(0.5), True)])
def test_numbers_of_other_libraries_are_numbers(reward, found):
    made = reward("found = None\ndef score(prompts, responses):\n    return found\n")
    made.function.__globals__["found"] = found
    assert made.score(responses()).scores.tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("return [1.0]", "gave 1 scores for 2 responses"),
        ("return [1.0, float('nan')]", "gave nan for the response to prompt 'b': needed is a finite number"),
        ("return [float('-inf'), 1]", "gave -inf for the response to prompt 'a'"),
        ("return [1.0, None]", "gave None for the response to prompt 'b'"),
        ("return ['1', 2]", "gave '1' for the response to prompt 'a'"),
        ("return 1.0", "gave 1.0: needed is a list of 2 numbers"),
        ("return 'ab'", "gave 'ab': needed is a list of 2 numbers"),
        ("return None", "gave None: needed is a list of 2 numbers"),
        ("return [1.0, [1.0, 2.0]]", "gave numbers for some responses and lists for others"),
        (
            "return [[1.0], [1.0, 2.0]]",
            "gave 1 numbers for the 3 tokens of the response to prompt 'a', its end",
        ),
        ("return {}[0]", r"failed on 2 responses, the first to prompt 'a': KeyError: 0 \(rules.py:2\)"),
    ],
)
def test_what_is_no_score_is_told_with_the_prompt(reward, body, told):
    with pytest.raises(RewardError, match=f"rules.py:score {told}"):
        reward(f"def score(prompts, responses):\n    {body}\n").score(responses())


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("def score(prompts):\n    pass\n", r"is score\(prompts\) and takes no responses: needed is def score\(prom"),
        ("def other(prompts, responses):\n    pass\n", "has no function score; there are other"),
        ("score = 3\n", "has no function score; there are none"),
        ("import no_such_package\n", r"cannot be imported: ModuleNotFoundError: No module .* \(rules.py:1\)"),
        ("def score(:\n", "cannot be imported: SyntaxError"),
    ],
)  # fmt: skip
def test_a_function_that_cannot_be_one_is_refused(reward, source, told):
    with pytest.raises(ConfigError, match=told):
        reward(source)


def test_a_file_or_module_that_is_not_there_is_named(tmp_path):
    for path, told in ((f"{tmp_path}/no.py:f", "no such file: .*no.py .looked in"), ("no_module:f", "No module named")):
        with pytest.raises(ConfigError, match=told):
            build_reward([RewardSpec.parse(path)], NO_SOURCES)
    with pytest.raises(ConfigError, match="needed is file.py:function or module:function"):
        build_reward([RewardSpec.parse('{"name": "function", "path": "rules.py"}')], NO_SOURCES)


def test_a_column_that_no_prompt_has_is_told_before_anything_is_sampled(tmp_path):
    file = tmp_path / "rules.py"
    file.write_text("def score(prompts, responses, reference, ids, level=0):\n    return [0] * len(prompts)\n")
    specs = [RewardSpec.parse("reward_model"), RewardSpec.parse(f"{file}:score")]
    with pytest.raises(ConfigError, match="takes reference, which the prompts have no column for;.*answer, level"):
        check_rewards(specs, PROMPTS)
    file.write_text("def score(prompts, responses, answer):\n    return [0] * len(prompts)\n")
    check_rewards(specs, PROMPTS)


def test_in_the_log_it_has_the_functions_name(tmp_path):
    file = tmp_path / "rules.py"
    file.write_text("def score(prompts, responses):\n    return [1, 2]\n")
    output = build_reward([RewardSpec.parse(entry) for entry in (f"{file}:score", "ends", f"{file}:score")], NO_SOURCES)
    assert {name: part.tolist() for name, part in output.score(responses()).parts.items()} == {
        "score": [1, 2], "ends": [1, 0], "score_2": [1, 2],
    }  # fmt: skip


def test_an_object_that_can_be_called_is_a_function_too(tmp_path):
    """What tells it from another one is its file, never where it lies in memory."""
    file = tmp_path / "rules.py"
    source = "class Score:\n    def __call__(self, prompts, responses):\n        return [1, 2]\nscore = Score()\n"
    file.write_text(source)
    specs = [RewardSpec.parse(f"{file}:score")]
    assert build_reward(specs, NO_SOURCES).score(responses()).scores.tolist() == [1, 2]
    first = reward_fingerprints(specs)
    file.write_text(f"{source}\n")
    changed = reward_fingerprints(specs)
    file.write_text(source)
    assert reward_fingerprints(specs) == first != changed


def test_a_function_of_another_content_is_another_reward(tmp_path):
    file = tmp_path / "rules.py"
    file.write_text("def score(prompts, responses):\n    return [0] * len(prompts)\n")
    specs = [RewardSpec.parse(f"{file}:score"), RewardSpec.parse("ends"), RewardSpec.parse("reward_model")]
    first = reward_fingerprints(specs)
    modules = {id(build_reward(specs[:1], NO_SOURCES).function.__globals__) for _ in range(2)}
    assert len(modules) == 1, "a file is run once"
    assert first[0] and first[1:] == [None, None] and reward_fingerprints(specs) == first
    file.write_text("def score(prompts, responses):\n    return [1] * len(prompts)\n")
    assert reward_fingerprints(specs)[0] != first[0]


def test_a_function_of_a_notebooks_cell_is_a_reward_and_known_by_its_lines(monkeypatch):
    """As IPython does: a cell is compiled under the name of no file, and its lines are kept for tracebacks."""

    def run_cell(number, source):
        name = f"/tmp/ipykernel_1/{number}.py"
        monkeypatch.setitem(linecache.cache, name, (len(source), None, source.splitlines(True), name))
        space = {"__name__": "__main__"}
        exec(compile(source, name, "exec"), space)
        monkeypatch.setattr(sys.modules["__main__"], "cell_score", space["cell_score"], raising=False)
        spec = RewardSpec.parse("__main__:cell_score")
        check_rewards([spec], PROMPTS)
        return build_reward([spec], NO_SOURCES).score(responses()).scores.tolist(), reward_fingerprints([spec])

    source = "def cell_score(prompts, responses, **columns):\n    return [len(each) for each in responses]\n"
    scores, first = run_cell(1, source)
    assert scores == [3.0, 1.0]
    assert run_cell(2, source)[1] == first, "the same lines run again are the same reward"
    scores, other = run_cell(3, source.replace("len(each)", "-len(each)"))
    assert scores == [-3.0, -1.0] and other != first
