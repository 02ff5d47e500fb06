"""`rlhf serve-reward`: what it serves, to our own client and others, and what it says of requests it cannot score."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
import urllib3

from rlhf.checkpoint.export import export_scalar_model
from rlhf.config import ConfigError
from rlhf.distributed.place import free_port
from rlhf.models.scalar import ScalarModel
from rlhf.rewards.reward import RewardError
from rlhf.rewards.table import NO_SOURCES, RewardSpec, build_reward
from rlhf.serving.reward_server import ServedReward, create_app
from rlhf.types import Responses, Rollout, TokenizedPrompt
from tests.support.on_policy import reward_of
from tests.support.reward_endpoint import served

FUNCTION = """
def score(prompts, responses, ended, answer=None):
    if "fail" in responses:
        raise KeyError("no such thing")
    return [len(response) + 10 * end + 100 * (answer or [None] * len(prompts)).count(response)
            for response, end in zip(responses, ended)]
"""


def post(url: str, content, **headers):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    answer = urllib3.request("POST", url, body=body, headers=headers, retries=False)
    return answer.status, json.loads(answer.data)


def asked(url: str):
    """Our own client of a server."""
    return build_reward([RewardSpec.parse(url)], NO_SOURCES)


@pytest.fixture
def function(tmp_path) -> str:
    file = tmp_path / "rules.py"
    file.write_text(FUNCTION)
    return f"{file}:score"


@pytest.fixture(scope="module")
def reward_directory(tiny_models, tokenizer, tmp_path_factory):
    model = ScalarModel.from_base(tiny_models["gpt_neox"], dtype=torch.float32, seed=3)
    model.set_normalisation(0.1, 0.01)
    directory = tmp_path_factory.mktemp("served") / "reward"
    export_scalar_model(model, tokenizer, directory)
    return directory


def test_a_reward_model_says_over_http_what_it_says_in_the_run(reward_directory, tokenizer):
    prompts = [
        TokenizedPrompt(str(row), tuple(tokenizer(text)["input_ids"]), text)
        for row, text in enumerate(("ab", "cdefg", "h"))
    ]
    texts, ended = ["xyz", "w", "uvst"], [True, False, True]
    said = [
        [*tokenizer(text)["input_ids"], *([tokenizer.eos_token_id] if end else [])]
        for text, end in zip(texts, ended, strict=True)
    ]
    ids, mask = torch.zeros(3, 5, dtype=torch.long), torch.zeros(3, 5, dtype=torch.bool)
    prompt_ids, prompt_mask = torch.zeros(3, 5, dtype=torch.long), torch.zeros(3, 5, dtype=torch.bool)
    for row in range(3):
        ids[row, : len(said[row])], mask[row, : len(said[row])] = torch.tensor(said[row]), True
        given = prompts[row].input_ids
        prompt_ids[row, 5 - len(given) :], prompt_mask[row, 5 - len(given) :] = torch.tensor(given), True
    responses = Responses(
        Rollout(prompt_ids, prompt_mask, ids, mask, torch.zeros(3, 5)), prompts, texts, torch.tensor(ended)
    )
    expected = reward_of(ScalarModel.from_pretrained(reward_directory, dtype=torch.float32), tokenizer).score(responses)
    assert expected.scores.std() > 0.1
    with served(create_app(ServedReward.load(str(reward_directory)))) as url:
        found = asked(url).score(responses)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=1e-5)


def test_many_responses_are_read_a_few_at_a_time_and_in_order(reward_directory, monkeypatch):
    reward = ServedReward.load(str(reward_directory))
    texts = [chr(97 + row % 20) * (1 + row % 5) for row in range(37)]
    request = {"prompts": ["q"] * 37, "rendered_prompts": ["q"] * 37, "responses": texts}
    together = reward.scores(request)
    alone = [
        reward.scores({**request, **{key: [value[row]] for key, value in request.items()}})[0] for row in range(37)
    ]
    assert together == pytest.approx(alone, abs=1e-4) and len(set(together)) > 10


def test_a_function_is_given_what_the_request_has(function):
    with served(create_app(ServedReward.load(function))) as url:
        status, answer = post(url, {"prompts": ["a", "b"], "responses": ["x", "yy"], "ended": [True, False]})
        assert (status, answer) == (200, {"scores": [11.0, 2.0]})
        answer = post(url, {"prompts": ["a"], "responses": ["x"], "columns": {"answer": ["x"], "more": [1]}})[1]
        assert answer == {"scores": [111.0]}
        assert post(url, {"prompts": [], "responses": []}) == (200, {"scores": []})
        assert json.loads(urllib3.request("GET", f"{url}/health").data) == {"status": "ok", "reward": "score"}


@pytest.mark.parametrize(
    ("content", "status", "told"),
    [
        (b"{", 400, "no JSON"),
        ([1], 422, "needed is an object"),
        ({"prompts": ["a"]}, 422, "responses must be a list of texts"),
        ({"prompts": "a", "responses": ["a"]}, 422, "prompts must be a list of texts"),
        ({"prompts": ["a"], "responses": ["a", "b"]}, 422, "1 prompts and 2 responses"),
        ({"prompts": ["a"], "responses": ["b"], "ended": []}, 200, None),
        ({"prompts": ["a"], "responses": ["b"], "ended": [True, True]}, 422, "ended must be a list of 1"),
        ({"prompts": ["a"], "responses": ["b"], "columns": {"x": []}}, 422, "columns must be lists of 1"),
        ({"prompts": ["a"], "responses": ["b"], "response_ids": [[1], [2]]}, 422, "response_ids must be a list of 1"),
        ({"prompts": ["a"], "responses": ["b"], "response_ids": [[True]]}, 422, "whole numbers of at least 0"),
        ({"prompts": ["a"], "responses": ["b"], "response_ids": [[2**31]]}, 422, "whole numbers of at least 0"),
        ({"prompts": ["a"], "responses": ["b"], "messages": [[], []]}, 422, "messages must be a list of 1"),
        (
            {"prompts": ["a"], "responses": ["b"], "messages": [[{"role": "user"}]]},
            422,
            "messages must be lists of turns",
        ),
        ({"prompts": ["a"], "responses": ["b"], "messages": ["x"]}, 422, "messages must be lists of turns"),
        ({"prompts": ["a"], "responses": ["b"], "ids": ["1", "2"]}, 422, "2 ids for 1 prompts"),
        ({"prompts": ["a"] * 4097, "responses": ["b"] * 4097}, 422, "a request may have 4096"),
        (
            {"prompts": ["a"], "responses": ["fail"]},
            422,
            "failed on 1 responses, the first to prompt 'row 0': KeyError",
        ),
    ],
)
def test_a_request_that_cannot_be_scored_is_told_why(function, content, status, told):
    with served(create_app(ServedReward.load(function))) as url:
        found, answer = post(url, content)
    assert found == status and (told is None or told in answer["error"])


def test_the_error_of_the_server_reaches_the_run(function):
    ids = torch.ones(1, 1, dtype=torch.long)
    rollout = Rollout(ids, ids.bool(), ids, ids.bool(), torch.zeros(1, 1))
    responses = Responses(rollout, [TokenizedPrompt("p7", (1,), "q")], ["fail"], torch.tensor([True]))
    app, told = create_app(ServedReward.load(function)), "prompt 'p7': it answered 422: .*KeyError"
    with served(app) as url, pytest.raises(RewardError, match=told):
        asked(url).score(responses)


def test_a_function_says_of_every_token_over_http_what_it_says_in_the_run(tmp_path):
    """Three responses of 3, 1 and 2 tokens; the server knows no tokenizer, and is told the ids."""
    file = tmp_path / "by_token.py"
    file.write_text(
        "def score(prompts, responses):\n"
        "    return [[row + place / 10 for place in range(tokens)] for row, tokens in enumerate((3, 1, 2))]\n"
    )
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    ids = torch.tensor([[5, 6, 0], [0, 9, 9], [7, 0, 9]])
    prompts = [TokenizedPrompt(f"p{row}", (1,), "q") for row in range(3)]
    responses = Responses(Rollout(ids, mask, ids, mask, torch.zeros(3, 3)), prompts, ["a", "b", "c"], mask[:, 1])
    expected = build_reward([RewardSpec.parse(f"{file}:score")], NO_SOURCES).score(responses)
    assert expected.per_token is not None
    assert expected.per_token.tolist() == [pytest.approx(row) for row in ([0, 0.1, 0.2], [1, 0, 0], [2, 2.1, 0])]
    with served(create_app(ServedReward.load(f"{file}:score"))) as url:
        found = asked(url).score(responses)
        told = "gave 3 numbers for the 2 tokens"
        request = {"prompts": ["q"] * 3, "responses": ["a", "b", "c"], "response_ids": [[5, 6], [0], [7, 0]]}
        status, answer = post(url, request)
        assert status == 422 and told in answer["error"]
    assert torch.equal(found.per_token, expected.per_token) and torch.equal(found.scores, expected.scores)
    assert torch.equal(found.parts["tokens"], expected.parts["tokens"])


def test_a_token_is_asked_for(function):
    request = {"prompts": ["a"], "responses": ["x"]}
    with served(create_app(ServedReward.load(function), token="secret")) as url:
        assert post(url, request)[0] == 401
        assert post(url, request, Authorization="Bearer wrong")[0] == 401
        assert post(url, request, Authorization="Bearer secret") == (200, {"scores": [11.0]})


def test_what_can_not_be_served_is_told(function, tiny_models, tmp_path):
    for given, told in (
        ("reward_model", "name the reward model's directory"),
        ("overlong_typo", "is not a reward"),
        ('{"name": "overlong", "max_tokens": 8, "buffer_tokens": 2}', "counts tokens: name the actor's directory"),
        (json.dumps({"name": "function", "path": function, "normalize": "fixed"}), "belong to the run that asks"),
        (str(tiny_models["gpt_neox"]), "classifier"),
    ):
        with pytest.raises(ConfigError, match=told):
            ServedReward.load(given)


def test_rules_that_count_tokens_are_given_a_tokenizer(tiny_models, tokenizer):
    rule = '{"name": "length_window", "minimum": 3, "maximum": 3}'
    reward = ServedReward.load(rule, tokenizer=str(tiny_models["gpt_neox"]))
    request = {"prompts": ["a", "b"], "rendered_prompts": ["a", "b"], "responses": ["xy", "xy"], "ended": [True, False]}
    assert reward.scores(request) == [1.0, 0.0], "the end is a token"


def test_prompts_are_rendered_with_the_template_where_none_are_rendered(reward_directory):
    plain = ServedReward.load(str(reward_directory))
    with pytest.raises(ValueError, match="rendered_prompts are missing"):
        plain.scores({"prompts": ["hi"], "responses": ["x"]})
    rendering = ServedReward.load(str(reward_directory), template="kullm")
    text = rendering.template.render("hi")
    expected = plain.scores({"prompts": ["hi"], "rendered_prompts": [text], "responses": ["x"]})
    assert rendering.scores({"prompts": ["hi"], "responses": ["x"]}) == expected
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two"},
    ]
    assert rendering.scores({"prompts": ["two"], "messages": [turns], "responses": ["x"]}) != expected


def test_the_command_serves_until_it_is_interrupted(function):
    port = free_port()
    command = [sys.executable, "-m", "rlhf.cli", "serve-reward", function, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until, url = time.monotonic() + 60, f"http://127.0.0.1:{port}"
    while True:
        try:
            assert post(url, {"prompts": ["a"], "responses": ["x"]}) == (200, {"scores": [11.0]})
            break
        except urllib3.exceptions.HTTPError:
            assert process.poll() is None and time.monotonic() < until, process.communicate()
            time.sleep(0.1)
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2 and "address already in use" in again.stdout + again.stderr
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and output.startswith(f"serving score at {url}"), output
    assert "Traceback" not in output
