"""Rewards that are rules, on responses worked by hand."""

from __future__ import annotations

import pytest
import torch

from rlhf.config import ConfigError
from rlhf.rewards.table import NO_SOURCES, REWARDS, RewardSpec, build_reward
from rlhf.types import Responses, Rollout, TokenizedPrompt


def responses(texts=("", "", ""), *, tokens=(2, 5, 8), ids=None, ended=None, columns=()) -> Responses:
    """Responses of so many tokens, all different unless `ids` says more."""
    width = max(tokens)
    mask = torch.arange(width) < torch.tensor(tokens).unsqueeze(1)
    said = torch.arange(width).repeat(len(tokens), 1) if ids is None else torch.tensor(ids)
    rollout = Rollout(said, mask, said, mask, torch.zeros(mask.shape))
    rows = columns or [{}] * len(tokens)
    prompts = [TokenizedPrompt(f"p{row}", (1,), "", columns=each) for row, each in enumerate(rows)]
    return Responses(rollout, prompts, texts, torch.tensor([True] * len(tokens) if ended is None else ended))


def scores(entry: dict, given: Responses) -> list[float]:
    return (
        REWARDS[entry["name"]]
        .build(NO_SOURCES, **{k: v for k, v in entry.items() if k != "name"})
        .score(given)
        .scores.tolist()
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"minimum": 3, "maximum": 6}, [0, 1, 0]),
        ({"minimum": 3, "maximum": 6, "margin": 4}, [0.75, 1, 0.5]),
        ({"maximum": 1, "margin": 2}, [0.5, 0, 0]),
        ({"minimum": 8, "maximum": 8, "margin": 12}, [0.5, 0.75, 1]),
    ],
)
def test_a_window_of_lengths(options, expected):
    assert scores({"name": "length_window", **options}, responses()) == expected


def test_overlong_is_dapos_formula():
    assert scores({"name": "overlong", "max_tokens": 8, "buffer_tokens": 4}, responses()) == [0, -0.25, -1]


def test_repetition_counts_the_ngrams_of_each_response_by_itself():
    given = responses(tokens=(2, 5, 5), ids=[[1, 2, 9, 9, 9], [1, 2, 1, 2, 1], [3, 3, 3, 3, 3]])
    assert scores({"name": "repetition", "n": 2}, given) == pytest.approx([0, -2 / 4, -3 / 4])
    assert scores({"name": "repetition", "n": 5}, given) == [0, 0, 0]
    assert scores({"name": "repetition", "n": 9}, given) == [0, 0, 0]


def test_an_end_is_the_end_token_and_not_the_limit():
    assert scores({"name": "ends"}, responses(ended=[True, False, True])) == [1, 0, 1]


def test_the_share_of_hangul_is_that_of_the_letters():
    texts = ("안녕, Kim! 12", "hello", "1234 ...")
    assert scores({"name": "hangul_share"}, responses(texts)) == pytest.approx([2 / 5, 0, 0])
    decomposed = "\u1112\u1161\u11ab\u1100\u1173\u11af ab"  # 한글 written as letters
    texts = (decomposed, "ㅋㅋ", "漢字 한")
    assert scores({"name": "hangul_share"}, responses(texts)) == pytest.approx([0.5, 1, 1 / 3])


def test_a_pattern_is_found_anywhere_or_is_the_whole_response():
    texts = ("답: 42", " 42 \n", "none")
    assert scores({"name": "matches", "pattern": r"\d+"}, responses(texts)) == [1, 1, 0]
    assert scores({"name": "matches", "pattern": r"\d+", "whole": True}, responses(texts)) == [0, 1, 0]
    assert scores({"name": "matches", "pattern": "a.b"}, responses(("a\nb", "ab", ""))) == [1, 0, 0], (
        "a dot is a line's end too"
    )


def test_words_are_found_with_particles_and_in_any_case(tmp_path):
    texts = ("계약서를 쓰고 Deposit을 냅니다", "계약서", "없음")
    entry = {"name": "keywords", "words": ["계약서", "DEPOSIT"]}
    assert scores(entry, responses(texts)) == [1, 0.5, 0]
    assert scores({**entry, "name": "forbidden_words"}, responses(texts)) == [-1, -1, 0]
    file = tmp_path / "words.txt"
    file.write_text("계약서\n\n  deposit \n", encoding="utf-8")
    assert scores({"name": "keywords", "file": str(file)}, responses(texts)) == [1, 0.5, 0]


def test_words_of_a_column_are_those_of_the_prompts_own_row():
    given = responses(("서울", "부산과 대구", "x"), columns=[{"key": "서울"}, {"key": ["부산", "대전"]}, {"key": "y"}])
    assert scores({"name": "keywords", "column": "key"}, given) == [1, 0.5, 0]
    rule = REWARDS["keywords"].build(NO_SOURCES, column="key")
    rule.check(given.prompts)
    for wrong in ({}, {"key": 3}, {"key": " "}, {"key": []}):
        with pytest.raises(ConfigError, match="keywords: prompt 'p0' has no text in the column key; its columns"):
            rule.check(responses(columns=[wrong, {}, {}]).prompts)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"name": "length_window", "minimum": 5, "maximum": 3}, "needed is 0 <= minimum <= maximum"),
        ({"name": "length_window", "maximum": "many"}, "length_window: maximum='many' must be a whole number"),
        ({"name": "overlong", "max_tokens": 5, "buffer_tokens": 6}, "buffer_tokens=6 must be at least 1 and at most"),
        ({"name": "repetition", "n": 0}, "n=0 must be at least 1"),
        ({"name": "repetition", "n": 2.5}, "n=2.5 must be a whole number"),
        ({"name": "overlong", "max_tokens": 5, "buffer_tokens": True}, "buffer_tokens=True must be a whole number"),
        ({"name": "matches", "pattern": "("}, r"'\(' is no regular expression: missing \)"),
        ({"name": "matches", "pattern": 3}, "pattern=3 must be a text"),
        ({"name": "keywords"}, "keywords: give one of words"),
        ({"name": "keywords", "words": ["a"], "column": "b"}, "keywords: give one of words"),
        ({"name": "forbidden_words", "words": "abc"}, "forbidden_words: words='abc' must be a list of texts"),
        ({"name": "forbidden_words", "file": "no.txt"}, "forbidden_words: no such file: no.txt .looked in"),
    ],
)
def test_options_that_make_no_rule_are_refused(entry, told):
    with pytest.raises(ConfigError, match=told):
        scores(entry, responses())


def test_an_empty_file_of_words_is_refused(tmp_path):
    (tmp_path / "words.txt").write_text("\n")
    with pytest.raises(ConfigError, match="words.txt has no words"):
        REWARDS["keywords"].build(NO_SOURCES, file=str(tmp_path / "words.txt"))


def test_rules_add_up_beside_each_other_with_their_names():
    entries = ['{"name": "ends", "weight": 0.5}', '{"name": "length_window", "maximum": 5}', "hangul_share"]
    output = build_reward([RewardSpec.parse(entry) for entry in entries], NO_SOURCES).score(responses(("가", "a", "")))
    assert output.scores.tolist() == [2.5, 1.5, 0.5] and set(output.parts) == {"ends", "length_window", "hangul_share"}
