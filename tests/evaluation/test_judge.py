"""`rlhf judge` against a real server over loopback that answers as it is told, also badly."""

from __future__ import annotations

import json
import math
import random
import re

import pytest
import torch

import rlhf.evaluation.judge.client
from rlhf.cli.__main__ import main as command
from rlhf.config import ConfigError
from rlhf.data.spec import DataError
from rlhf.evaluation.judge.answers import answered, compared
from rlhf.evaluation.judge.client import JudgeClient, JudgeError, JudgeSettings, Question, UnreadableError
from rlhf.evaluation.judge.criteria import (
    CRITERIA,
    comparing_question,
    percent,
    read_scores,
    read_verdict,
    scoring_question,
)
from rlhf.evaluation.judge.verdicts import Answered, Compared, length_controlled, score_answers, win_rate
from tests.support.reward_endpoint import served


@pytest.fixture(autouse=True)
def judge_environment(monkeypatch):
    monkeypatch.setattr(rlhf.evaluation.judge.client, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setenv("JUDGE_KEY", "secret")


class Judge:
    """A chat server: `say` makes an answer of the last message, or gives a status, or broken text as bytes."""

    def __init__(self, say):
        self.say = say
        self.requests: list[dict] = []
        self.keys: list[str] = []

    async def __call__(self, scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        request = json.loads(body)
        self.requests.append(request)
        self.keys.append(dict(scope["headers"]).get(b"authorization", b"").decode())
        assert scope["path"] == "/v1/chat/completions"
        said = self.say(request["messages"], len(self.requests))
        status, content = 200, b""
        if isinstance(said, int):
            status, content = said, b'{"error": {"message": "no"}}'
        elif isinstance(said, bytes):
            content = said
        else:
            choices = [{"message": {"role": "assistant", "content": said}}]
            usage = {"prompt_tokens": 10, "completion_tokens": 3}
            content = json.dumps({"choices": choices, "usage": usage}).encode()
        await send(
            {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]}
        )
        await send({"type": "http.response.body", "body": content})


def client_of(url, tmp_path, **options):
    settings = {"key_variable": "JUDGE_KEY", "retries": 2, "request_seconds": 10, **options}
    return JudgeClient(JudgeSettings(f"{url}/v1", "tiny-judge", tmp_path / "judge.sqlite", **settings))


def scores(**values):
    return "이유. " + json.dumps(
        {each.name: values.get(each.name, each.high) for each in CRITERIA["kullm"]}, ensure_ascii=False
    )


def prefers(text):
    """A judge that likes the answer with `text`, wherever it stands."""

    def say(messages, _):
        first, second = re.search(r"\[답변 A\]\n(.*?)\n\n\[답변 B\]\n(.*?)\n\n", messages[0]["content"], re.S).groups()
        return "판정: 무승부" if (text in first) == (text in second) else f"판정: {'A' if text in first else 'B'}"

    return say


# -------------------------------------------------------------------------------------------------------- scores


def test_scores_are_read_from_the_last_json_and_off_scale_ones_are_not():
    criteria = CRITERIA["kullm"]
    said = scores(자연스러움=2)
    assert read_scores(f'처음엔 {{"자연스러움": 1}}\n{said}', criteria)["자연스러움"] == 2
    for wrong, told in (
        ("점수는 3점", "점수 JSON이 없습니다"),
        (scores(자연스러움=9), "`자연스러움`은 1에서 3까지"),
        (scores(자연스러움="2"), "`자연스러움`의 정수 점수가 없습니다"),
        (scores(자연스러움=2.5), "정수 점수가 없습니다"),
        (scores(자연스러움=True), "정수 점수가 없습니다"),
        ('{"이해 가능성": 1}', "`자연스러움`의 정수 점수가 없습니다"),
    ):
        with pytest.raises(UnreadableError, match=told):
            read_scores(wrong, criteria)
    given = {"이해 가능성": 1, "자연스러움": 2, "맥락 유지": 1, "흥미롭기": 3, "지시어 사용": 0, "전반적인 품질": 4}
    assert list(percent(given, criteria).values()) == [100, 50, 0, 100, 0, 75]


def test_the_criteria_are_those_of_the_recipes():
    assert [(each.low, each.high) for each in CRITERIA["kullm"]] == [(0, 1), (1, 3), (1, 3), (1, 3), (0, 1), (1, 5)]
    assert all((each.low, each.high) == (1, 5) for each in CRITERIA["kullm_rlhf_facts"])
    assert (len(CRITERIA["kullm_rlhf"]), len(CRITERIA["kullm_rlhf_facts"])) == (6, 7)
    asked = scoring_question("묻기", "답하기", CRITERIA["kullm"]).messages[0]["content"]
    assert all(f"{each.name} ({each.low}-{each.high})" in asked for each in CRITERIA["kullm"])
    assert "[질문]\n묻기" in asked and "[답변]\n답하기" in asked


def test_answers_are_scored_each_in_a_call_of_its_own(tmp_path):
    judge = Judge(lambda messages, _: scores(자연스러움=1 if "나쁜" in messages[0]["content"] else 3))
    rows = [Answered("q1", "나쁜 답", "a"), Answered("q2", "좋은 답", "b"), Answered("q3", "좋은 답", "b")]
    with served(judge) as url:
        client = client_of(url, tmp_path)
        found = score_answers(client, rows, CRITERIA["kullm"])
    assert len(judge.requests) == 3 and set(judge.keys) == {"Bearer secret"}
    assert all(request["model"] == "tiny-judge" and request["temperature"] == 0.0 for request in judge.requests)
    assert found["score"] == pytest.approx((500 / 6 + 100 + 100) / 3)
    assert found["by_category"] == pytest.approx({"a": 500 / 6, "b": 100}) and found["by_criterion"][
        "자연스러움"
    ] == pytest.approx(200 / 3)
    assert found["low"] < found["score"] < found["high"] and found["unreadable"] == 0
    assert client.usage.content() == {
        "calls": 3, "cached": 0, "prompt_tokens": 30, "completion_tokens": 9, "asked_again": 0, "unreadable": 0,
    }  # fmt: skip


def test_what_cannot_be_read_is_asked_again_with_what_was_missing_and_never_counts_as_0(tmp_path):
    def say(messages, _):
        if "고집" in messages[0]["content"]:
            return "싫어요"
        return "글쎄요" if len(messages) == 1 else scores()

    judge = Judge(say)
    rows = [Answered("q1", "보통 답"), Answered("q2", "고집 센 답")]
    with served(judge) as url:
        client = client_of(url, tmp_path, concurrency=1, rereads=2)
        found = score_answers(client, rows, CRITERIA["kullm"])
    assert found["score"] == 100 and found["unreadable"] == 1 and found["rows"][1] is None
    assert client.usage.content()["asked_again"] == 2 and client.usage.content()["unreadable"] == 1
    again = judge.requests[1]["messages"]
    assert [each["role"] for each in again] == ["user", "assistant", "user"]
    assert again[1]["content"] == "글쎄요" and "점수 JSON이 없습니다" in again[2]["content"]
    assert len(judge.requests) == 2 + 3


def test_no_answer_that_could_be_read_is_no_score(tmp_path):
    with served(Judge(lambda *_: "?")) as url:
        found = score_answers(client_of(url, tmp_path, rereads=0), [Answered("q", "a")], CRITERIA["kullm"])
    assert found["score"] is None and found["by_criterion"] == {} and found["unreadable"] == 1


# ----------------------------------------------------------------------------------------------------- misbehaving


@pytest.mark.parametrize("bad", [429, 500, 503])
def test_what_may_pass_is_asked_again(bad, tmp_path):
    judge = Judge(lambda _, count: bad if count == 1 else scores())
    with served(judge) as url:
        assert score_answers(client_of(url, tmp_path), [Answered("q", "a")], CRITERIA["kullm"])["score"] == 100
    assert len(judge.requests) == 2


@pytest.mark.parametrize(
    ("bad", "told", "requests"),
    [
        (401, "it answered 401", 1),
        (500, "it answered 500", 3),
        (b"<html>", "which is no chat completion", 1),
        (b'{"choices": []}', "which is no chat completion", 1),
        (b"[1]", "which is no chat completion", 1),
    ],
)
def test_what_does_not_pass_is_one_sentence(bad, told, requests, tmp_path):
    judge = Judge(lambda *_: bad)
    with served(judge) as url, pytest.raises(JudgeError, match=told):
        client_of(url, tmp_path).ask([scoring_question("q", "a", CRITERIA["kullm"])])
    assert len(judge.requests) == requests


def test_a_stopped_judgement_goes_on_and_asks_nothing_twice(tmp_path):
    rows = [Answered(f"q{number}", "a") for number in range(6)]
    failing = Judge(lambda _, count: scores() if count <= 3 else 400)
    with served(failing) as url, pytest.raises(JudgeError):
        score_answers(client_of(url, tmp_path, concurrency=1), rows, CRITERIA["kullm"])
    judge = Judge(lambda *_: scores())
    with served(judge) as url:
        client = client_of(url, tmp_path, concurrency=1)
        assert score_answers(client, rows, CRITERIA["kullm"])["score"] == 100
    assert len(judge.requests) == 3 and client.usage.content()["cached"] == 3, "another address, the same judge"
    with served(Judge(lambda *_: 500)) as url:
        assert score_answers(client_of(url, tmp_path), rows, CRITERIA["kullm"])["score"] == 100
        with pytest.raises(JudgeError):
            client_of(url, tmp_path, temperature=1.0).ask([scoring_question("q0", "a", CRITERIA["kullm"])])


def test_only_so_many_questions_are_open_at_a_time(tmp_path):
    import threading
    import time

    open_now, most, lock = 0, 0, threading.Lock()

    def say(*_):
        nonlocal open_now, most
        with lock:
            open_now += 1
            most = max(most, open_now)
        time.sleep(0.05)
        with lock:
            open_now -= 1
        return "ok"

    class Threaded(Judge):
        async def __call__(self, scope, receive, send):
            from starlette.concurrency import run_in_threadpool

            said = await run_in_threadpool(say)
            self.say = lambda *_: said
            await super().__call__(scope, receive, send)

    questions = [Question([{"role": "user", "content": str(number)}], str) for number in range(12)]
    with served(Threaded(None)) as url:
        assert client_of(url, tmp_path, concurrency=3).ask(questions) == ["ok"] * 12
    assert 1 < most <= 3


# ---------------------------------------------------------------------------------------------------------- pairs


def test_verdicts_are_read_in_any_dress():
    dresses = ("판정: A", "길게\n**판정: B**", "판정：무승부", "판정: [A]\n다시 보니 판정: `B`")
    assert [read_verdict(said) for said in dresses] == ["A", "B", "무승부", "B"]
    with pytest.raises(UnreadableError, match="판정이 없습니다"):
        read_verdict("A가 더 낫습니다")
    assert "[답변 A]\n하나\n\n[답변 B]\n둘" in comparing_question("q", "하나", "둘").messages[0]["content"]


def test_a_pair_is_judged_in_both_orders(tmp_path):
    rows = [
        Compared("q1", "좋은 답", "그냥", "a"),
        Compared("q2", "그냥 긴 답입니다", "좋은 답", "a"),
        Compared("q3", "x", "y", "b"),
    ]
    judge = Judge(prefers("좋은"))
    with served(judge) as url:
        found = win_rate(client_of(url, tmp_path), rows)
    assert len(judge.requests) == 6 and found["rows"] == [1.0, 0.0, 0.5]
    assert (found["wins"], found["losses"], found["ties"]) == (1, 1, 1) and found["win_rate"] == 0.5
    assert (
        found["by_category"] == {"a": 0.5, "b": 0.5} and found["order_decides"] == 0.0 and found["first_chosen"] == 0.5
    )
    assert found["longer"] == pytest.approx((1 + 1 + 0.5) / 3)


def test_a_judge_that_takes_the_first_one_is_seen_and_decides_nothing(tmp_path):
    with served(Judge(lambda *_: "판정: A")) as url:
        found = win_rate(client_of(url, tmp_path), [Compared(f"q{number}", "x", "y") for number in range(4)])
    assert found["win_rate"] == 0.5 and found["order_decides"] == 1.0 and found["first_chosen"] == 1.0
    assert found["ties"] == 4 and found["length_controlled"] == pytest.approx(0.5, abs=1e-3)


def test_a_pair_with_an_unreadable_verdict_does_not_count(tmp_path):
    def say(messages, _):
        return "?" if "[답변 A]\nodd" in messages[0]["content"] else prefers("good")(messages, _)

    rows = [Compared("q1", "good", "bad"), Compared("q2", "odd", "bad")]
    with served(Judge(say)) as url:
        found = win_rate(client_of(url, tmp_path, rereads=0), rows)
    assert found["win_rate"] == 1.0 and found["unreadable"] == 1 and found["rows"] == [1.0, None]
    assert found["length_controlled"] is None, "no loss: nothing to fit"


def test_a_length_controlled_win_rate_takes_out_what_length_alone_wins():
    """Worths drawn from the model itself, sigmoid(0.4 + 1.5 tanh(d / spread)): its constant is found again; and beside
    the same likelihood maximised by Newton's steps."""
    chance = random.Random(3)
    lengths = [chance.gauss(60, 100) for _ in range(4000)]
    mean = sum(lengths) / len(lengths)
    spread = math.sqrt(sum((each - mean) ** 2 for each in lengths) / len(lengths))
    features = [math.tanh(each / spread) for each in lengths]
    worth = [float(chance.random() < 1 / (1 + math.exp(-(0.4 + 1.5 * each)))) for each in features]
    found = length_controlled(worth, lengths)
    assert found == pytest.approx(1 / (1 + math.exp(-0.4)), abs=0.03)
    assert sum(worth) / len(worth) > found + 0.05, "the longer answers won by their length"
    design = torch.tensor([[1.0, each] for each in features], dtype=torch.float64)
    won, weights = torch.tensor(worth, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for _ in range(30):
        share = torch.sigmoid(design @ weights)
        curvature = design.T @ (design * (share * (1 - share))[:, None])
        weights += torch.linalg.solve(curvature, design.T @ (won - share))
    a = float(weights[0])
    assert found == pytest.approx(1 / (1 + math.exp(-a)), abs=1e-3)
    assert length_controlled([1.0, 0.0, 0.5], [0, 0, 0]) == pytest.approx(0.5, abs=1e-6)
    assert length_controlled([1.0, 1.0], [3, 4]) is None


# -------------------------------------------------------------------------------------------------- where from, how


def test_answers_come_from_data_sets_evaluations_and_runs(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "q1", "response": "a1", "category": "c"}\n{"prompt": "q2", "response": "a2"}\n')
    assert answered(str(rows)) == [Answered("q1", "a1", "c"), Answered("q2", "a2", "")]
    written = tmp_path / "eval.json"
    written.write_text(json.dumps({"generation": {"answers": [{"prompt": "q2", "response": "other", "ended": True}]}}))
    assert compared(str(rows), str(written)) == [Compared("q2", "a2", "other", "")]
    assert len(answered(str(rows), limit=1)) == 1 and answered(str(rows), limit=1) == answered(str(rows), limit=1)
    (tmp_path / "run" / "ppo").mkdir(parents=True)
    sample = {"prompt": "q", "sft": "before", "ppo": "after", "score_sft": 0, "score_ppo": 1}
    (tmp_path / "run" / "ppo" / "samples.json").write_text(json.dumps({"samples": [sample]}))
    assert compared(str(tmp_path / "run"), None) == [Compared("q", "after", "before")]
    with pytest.raises(DataError, match="no prompt in common"):
        compared(str(tmp_path / "run"), str(rows))
    with pytest.raises(DataError, match="holds no held-out answers"):
        compared(str(tmp_path), None)


def test_the_command_judges_prints_and_keeps(tmp_path, capsys):
    rows, others = tmp_path / "rows.jsonl", tmp_path / "others.jsonl"
    rows.write_text('{"prompt": "q1", "response": "좋은 답"}\n{"prompt": "q2", "response": "그냥"}\n')
    others.write_text('{"prompt": "q1", "response": "그냥"}\n{"prompt": "q2", "response": "좋은 답"}\n')
    shared = ["--judge", "tiny", "--key_variable", "JUDGE_KEY", "--cache", str(tmp_path / "c.sqlite")]
    with served(Judge(prefers("좋은"))) as url:
        words = ["judge", str(rows), "--against", str(others), "--url", f"{url}/v1", *shared, "--prices", "1.0", "10.0"]
        assert command([*words, "--output", str(tmp_path / "found.json")]) == 0
    shown, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    assert found["win_rate"] == 0.5 and found["cost"] == pytest.approx((40 * 1.0 + 12 * 10.0) / 1e6)
    assert "win rate" in shown and "wins 1, ties 0, losses 1" in shown and "4 calls, 0 from the cache" in shown
    with served(Judge(lambda *_: scores())) as url:
        assert command(["judge", str(rows), "--url", f"{url}/v1", "--criteria", "kullm", *shared]) == 0
    assert "score, 0 to 100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["--url", "nowhere", "--key_variable", ""], 2, "is no address"),
        (["--url", "http://127.0.0.1:9/v1", "--key_variable", "NO_SUCH_KEY"], 2, "the judge's key is missing"),
        (["--url", "http://127.0.0.1:9/v1", "--key_variable", "", "--retries", "0"], 1, "no answer"),
        (["--url", "http://127.0.0.1:9/v1", "--key_variable", "", "--criteria", "mine"], 2, "choose from kullm"),
        (["--url", "http://127.0.0.1:9/v1", "--key_variable", "", "--concurrency", "0"], 2, "concurrency=0"),
    ],
)
def test_mistakes_are_told_in_a_sentence(words, status, told, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "q1", "response": "a"}\n')
    assert command(["judge", str(rows), "--judge", "tiny", "--cache", str(tmp_path / "c.sqlite"), *words]) == status
    assert told in capsys.readouterr().err


def test_a_cache_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "judge.sqlite").write_text("not a database, and long enough to be told from an empty one " * 20)
    with pytest.raises(ConfigError, match="cannot be used"):
        client_of("http://127.0.0.1:9", tmp_path)
