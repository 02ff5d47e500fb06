"""Scores over HTTP: what is asked, every way in which an endpoint may misbehave, and what becomes of it."""

from __future__ import annotations

import time

import pytest
import torch

import rlhf.rewards.http
from rlhf.config import ConfigError
from rlhf.distributed.place import free_port
from rlhf.rewards.reward import RewardError, prefetch, prefetches
from rlhf.rewards.table import NO_SOURCES, RewardSpec, build_reward, check_rewards
from rlhf.types import Responses, Rollout, TokenizedPrompt
from tests.support.reward_endpoint import Endpoint, served


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(rlhf.rewards.http, "BACKOFF_SECONDS", 0.01)


def responses(*texts: str) -> Responses:
    """Responses to prompts p0, p1, ... of which the first did not end."""
    count = len(texts)
    ids = torch.ones(count, 2, dtype=torch.long)
    prompts = [
        TokenizedPrompt(
            f"p{row}", (1,), f"### {row} ->", messages=({"role": "user", "content": f"Q{row}"},), columns={"level": row}
        )
        for row in range(count)
    ]
    ended = torch.tensor([row > 0 for row in range(count)])
    return Responses(Rollout(ids, ids.bool(), ids, ids.bool(), torch.zeros(count, 2)), prompts, texts, ended)


def reward(url: str, **options):
    """The reward of a configuration's entry, with little patience."""
    import json

    entry = {"name": "http", "url": url, "timeout_seconds": 10, "request_seconds": 5, "retries": 2, **options}
    return build_reward([RewardSpec.parse(json.dumps(entry))], NO_SOURCES)


def test_it_sends_what_the_protocol_says_and_returns_the_scores():
    endpoint = Endpoint()
    with served(endpoint) as url:
        output = reward(url).score(responses("a", "bbb"))
    assert output.scores.tolist() == [1.0, 3.0] and output.per_token is None
    assert endpoint.requests == [
        {
            "protocol": 1, "prompts": ["Q0", "Q1"], "responses": ["a", "bbb"], "response_ids": [[1, 1], [1, 1]],
            "messages": [[{"role": "user", "content": "Q0"}], [{"role": "user", "content": "Q1"}]],
            "rendered_prompts": ["### 0 ->", "### 1 ->"], "ended": [False, True], "ids": ["p0", "p1"],
            "columns": {"level": [0, 1]},
        }
    ]  # fmt: skip


def test_lists_are_rewards_of_the_single_tokens():
    with served(Endpoint([[[0.5, 1], [2, -3.5]]])) as url:
        output = reward(url).score(responses("a", "bbb"))
    assert output.per_token.tolist() == [[0.5, 1.0], [2.0, -3.5]] and output.scores.tolist() == [0.0, 0.0]
    assert output.parts["tokens"].tolist() == [1.5, -1.5]


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        ([[0.5, 1], [2]], "prompt 'p1': it gave 1 numbers for the 2 tokens of the response, its end included"),
        ([[0.5, None], [2, 3]], "prompt 'p0': it gave nan, and needed is a finite number"),
        ([[0.5, "x"], [2, 3]], "prompt 'p0': it gave 'x' as a score, and needed is a number"),
        ([[0.5, 1], 2.0], "gave numbers for some responses and lists for others"),
    ],
)
def test_lists_that_are_no_rewards_of_tokens_are_refused(scores, told):
    with served(Endpoint([scores])) as url, pytest.raises(RewardError) as error:
        reward(url).score(responses("a", "bbb"))
    assert told in str(error.value)


def test_a_fallback_leaves_the_other_responses_their_rewards_of_tokens():
    with served(Endpoint([[[0.5, 1], [2]]])) as url:
        output = reward(url, fallback=-2.0).score(responses("a", "bbb"))
    assert output.per_token.tolist() == [[0.5, 1.0], [0.0, 0.0]] and output.scores.tolist() == [0.0, -2.0]
    assert output.parts["fallback"].tolist() == [0.0, 1.0]


def test_a_text_that_no_encoding_knows_is_sent_too():
    endpoint = Endpoint()
    with served(endpoint) as url:
        assert reward(url).score(responses("a\ud800", "가")).scores.tolist() == [2.0, 1.0]


def test_an_address_alone_is_an_entry():
    endpoint = Endpoint()
    with served(endpoint) as url:
        assert build_reward([RewardSpec.parse(url)], NO_SOURCES).score(responses("ab")).scores.tolist() == [2.0]
    assert RewardSpec.parse(url).label == "http"


def test_it_asks_in_batches_of_which_no_more_than_told_are_open():
    endpoint = Endpoint(seconds=0.1)
    with served(endpoint) as url:
        made = reward(url, batch_size=2, concurrency=3)
        output = made.score(responses(*("x" * length for length in range(1, 14))))
    assert output.scores.tolist() == [float(length) for length in range(1, 14)]
    assert sorted(len(request["responses"]) for request in endpoint.requests) == [1, 2, 2, 2, 2, 2, 2]
    assert endpoint.most_at_once == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_asked_again(status):
    endpoint = Endpoint([status, status])
    with served(endpoint) as url:
        assert reward(url).score(responses("ab")).scores.tolist() == [2.0]
    assert len(endpoint.requests) == 3 and endpoint.requests[0] == endpoint.requests[2]


def test_it_waits_as_long_as_it_is_told_to():
    endpoint = Endpoint([429], retry_after="1")
    with served(endpoint) as url:
        assert reward(url).score(responses("ab")).scores.tolist() == [2.0]
    assert endpoint.times[1] - endpoint.times[0] > 0.9


def test_a_request_that_is_too_slow_is_sent_again():
    endpoint = Endpoint([{"seconds": 3.0}])
    with served(endpoint) as url:
        assert reward(url, request_seconds=0.5).score(responses("ab")).scores.tolist() == [2.0]
    assert len(endpoint.requests) == 2


MISBEHAVIOURS = [
    ([500] * 3, 3, "it answered 500: ", "01"),
    ([429] * 3, 3, "it answered 429: ", "01"),
    ([404], 1, "it answered 404: ", "01"),
    (["{not json"], 1, "it answered '{not json', which is no ", "01"),
    (['{"score": [1, 2]}'], 1, 'which is no {"scores": [...]}', "01"),
    (["[1, 2]"], 1, "which is no ", "01"),
    ([[1.0]], 1, "it gave 1 scores for 2 responses", "01"),
    ([[1.0, "good"]], 1, "it gave 'good' as a score", "01"),
    ([[1.0, True]], 1, "it gave True as a score", "01"),
    (['{"scores": [1.0, NaN]}'], 1, "no score for 1 of 2 responses, the first to prompt 'p1': it gave nan", "1"),
    (['{"scores": [Infinity, 2.0]}'], 1, "the first to prompt 'p0': it gave inf", "0"),
    ([[1.0, None]], 1, "the first to prompt 'p1': it gave nan", "1"),
]
"""What is answered, how often it is asked, what is said, and the rows without a score."""


@pytest.mark.parametrize(("behaviours", "requests", "told", "lost"), MISBEHAVIOURS)
def test_what_is_no_score_is_an_error_with_the_prompt(behaviours, requests, told, lost):
    endpoint = Endpoint(behaviours)
    with served(endpoint) as url, pytest.raises(RewardError) as error:
        reward(url).score(responses("a", "bb"))
    assert told in str(error.value) and f"prompt 'p{lost[0]}'" in str(error.value) and "\n" not in str(error.value)
    assert len(endpoint.requests) == requests


@pytest.mark.parametrize(("behaviours", "requests", "told", "lost"), MISBEHAVIOURS)
def test_with_a_fallback_it_costs_those_responses_their_score(behaviours, requests, told, lost, caplog):
    endpoint = Endpoint(behaviours)
    with served(endpoint) as url:
        output = reward(url, fallback=-2.5).score(responses("a", "bb"))
    assert output.parts["fallback"].tolist() == [float(str(row) in lost) for row in range(2)]
    expected = {0: 1.0, 1: 2.0} | {int(row): -2.5 for row in lost}
    assert output.scores.tolist() == list(expected.values())
    assert told in caplog.text and f"{len(lost)} responses get the fallback, -2.5" in caplog.text


def test_one_lost_request_leaves_the_scores_of_the_others():
    endpoint = Endpoint(["broken"])
    with served(endpoint) as url:
        made = reward(url, fallback=0, batch_size=2, concurrency=1)
        output = made.score(responses("a", "bb", "ccc", "dddd", "eeeee"))
    assert output.scores.tolist() == [0.0, 0.0, 3.0, 4.0, 5.0]
    assert output.parts["fallback"].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_nobody_waits_longer_than_the_stated_time():
    endpoint = Endpoint([{"seconds": 30.0}] * 10)
    with served(endpoint) as url:
        started = time.monotonic()
        with pytest.raises(RewardError, match="no answer within timeout_seconds=0.5"):
            reward(url, timeout_seconds=0.5, request_seconds=60, concurrency=1, batch_size=1).score(responses("a", "b"))
        assert time.monotonic() - started < 5


def test_a_dead_endpoint_is_told_before_training():
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ConfigError, match=f"reward http {url}: no answer .*refused.*rlhf serve-reward"):
        check_rewards([RewardSpec.parse(url)], [])
    endpoint = Endpoint(["<html>"])
    with served(endpoint) as url, pytest.raises(ConfigError, match="it answered '<html>'"):
        check_rewards([RewardSpec.parse(url)], [])
    endpoint = Endpoint()
    with served(endpoint) as url:
        check_rewards([RewardSpec.parse(url)], [])
    assert endpoint.requests == [{"protocol": 1, "prompts": [], "responses": []}]


def test_the_token_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    endpoint = Endpoint()
    with served(endpoint) as url:
        reward(url, token_variable="JUDGE_TOKEN").score(responses("a"))
    assert endpoint.headers[0]["authorization"] == "Bearer secret"
    with pytest.raises(ConfigError, match="token_variable=NO_SUCH"):
        reward(url, token_variable="NO_SUCH")


@pytest.mark.parametrize(
    ("options", "told"),
    [({"url": "localhost:80"}, "is no address"), ({"batch_size": 0}, "batch_size=0"), ({"retries": -1}, "retries=-1"),
     ({"concurrency": 1.5}, "concurrency=1.5"), ({"timeout_seconds": 0}, "timeout_seconds=0"),
     ({"request_seconds": "5"}, "request_seconds='5'"), ({"fallback": "bad"}, "fallback of http is 'bad'")],
)  # fmt: skip
def test_wrong_options_are_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        reward(**{"url": "http://127.0.0.1:1", **options})


# ------------------------------------------------------------------------------------------------ told in advance


def test_rows_told_early_are_asked_once_and_answered_whatever_their_order():
    endpoint = Endpoint()
    with served(endpoint) as url:
        made = reward(url, batch_size=2)
        early, late = responses("a", "bb", "ccc"), responses("a", "bb", "ccc", "dddd")
        prefetch(made, early, more=True)
        until = time.monotonic() + 5
        while not endpoint.requests and time.monotonic() < until:
            time.sleep(0.01)
        assert [request["responses"] for request in endpoint.requests] == [["a", "bb"]], "a whole batch goes at once"
        assert made.score(late).scores.tolist() == [1.0, 2.0, 3.0, 4.0]
        assert [request["responses"] for request in endpoint.requests] == [["a", "bb"], ["ccc", "dddd"]]
        assert made.score(early).scores.tolist() == [1.0, 2.0, 3.0]
        assert len(endpoint.requests) == 4, "what was answered is not kept"


def test_the_last_rows_told_do_not_wait_for_a_whole_batch():
    endpoint = Endpoint()
    with served(endpoint) as url:
        made = reward(url, batch_size=8)
        prefetch(made, responses("a", "bb"), more=False)
        until = time.monotonic() + 5
        while not endpoint.requests and time.monotonic() < until:
            time.sleep(0.01)
        assert len(endpoint.requests) == 1


def test_equal_responses_to_one_prompt_are_each_asked_for():
    endpoint = Endpoint([[1.0, 5.0]])
    with served(endpoint) as url:
        twice = responses("a", "a")
        twice = Responses(twice.rollout, [twice.prompts[0]] * 2, twice.texts, torch.tensor([True, True]))
        made = reward(url)
        prefetch(made, twice, more=False)
        assert made.score(twice).scores.tolist() == [1.0, 5.0]
    assert len(endpoint.requests) == 1


def test_a_sum_passes_on_what_it_is_told():
    endpoint = Endpoint()
    with served(endpoint) as url:
        specs = [RewardSpec.parse(url), RewardSpec.parse('{"name": "ends", "weight": 10}')]
        made = build_reward(specs, NO_SOURCES)
        assert prefetches(made) and not prefetches(build_reward(specs[1:], NO_SOURCES))
        prefetch(made, responses("a", "bb"), more=False)
        output = made.score(responses("a", "bb"))
    assert output.scores.tolist() == [1.0, 12.0] and len(endpoint.requests) == 1
