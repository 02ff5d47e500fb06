"""Tokenised rows survive the disk unchanged and are never taken for rows of something else."""

import json
import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from rlhf.data.spec import DataError
from rlhf.data.token_cache import cached_tokens, record_key_parts, tokenizer_fingerprint
from rlhf.data.tokenize import TokenReport
from rlhf.models.tiny_base import train_tokenizer
from rlhf.types import (
    LabelledRecord,
    PreferenceRecord,
    PromptRecord,
    RankedRecord,
    ResponseRecord,
    TokenizedLabel,
    TokenizedPrompt,
    TokenizedRanking,
    TokenizedResponse,
)

REPORT = TokenReport(rows=2, truncated_prompts=1)
ROWS = {
    "prompt": [TokenizedPrompt("a", (1, 2, 99999), "가나", "law"), TokenizedPrompt("b", (3,), "\ud55c\n", "")],
    "response": [TokenizedResponse("a", (1, 2, 3), 2, "law"), TokenizedResponse("b", (4,), 0)],
    "ranking": [
        TokenizedRanking("a", (TokenizedResponse("a", (1, 2), 1), TokenizedResponse("a", (1, 3, 4), 1)), (0, 1), 0.3),
        TokenizedRanking("b", tuple(TokenizedResponse("b", (5,) * n, 1, "x") for n in (3, 2, 1)), (1, 0, 1), 0.0, "x"),
    ],
    "label": [
        TokenizedLabel(TokenizedResponse("a", (1, 2, 3), 2, "law"), True),
        TokenizedLabel(TokenizedResponse("b", (4, 5), 1), False),
    ],
    "none": [],
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_come_back_equal_and_are_made_once(kind, tmp_path):
    calls = []

    def make():
        calls.append(kind)
        return ROWS[kind], REPORT

    for _ in range(2):
        rows, report = cached_tokens("key", ["more"], cache_dir=tmp_path / "new", make=make)
        assert (rows, report.as_dict()) == (ROWS[kind], REPORT.as_dict())
        assert report.key and report.key in next((tmp_path / "new").iterdir()).name
    assert calls == [kind]
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".safetensors"]


@pytest.mark.parametrize(
    "other", [("key", "more"), ("keymore",), ("key", ["more", ""]), ("key", ["mo", "re"]), ("key",)]
)
def test_every_difference_of_the_key_counts(other, tmp_path):
    cached_tokens("key", ["more"], cache_dir=tmp_path, make=lambda: (ROWS["prompt"], REPORT))
    if other == ("key", "more"):  # one text and a list of one text say the same
        other = ("key", "other")
    rows, _ = cached_tokens(*other, cache_dir=tmp_path, make=lambda: (ROWS["response"], REPORT))
    assert rows == ROWS["response"]


def test_record_keys_tell_every_field_and_kind_apart():
    records = [
        PromptRecord("a", "p"),
        PromptRecord("b", "p"),
        PromptRecord("a", "p", {"category": "law"}),
        ResponseRecord("a", "p", "r"),
        PreferenceRecord("a", "p", "r", "s"),
        PreferenceRecord("a", "p", "s", "r"),
        PreferenceRecord("a", "p", "r", "s", 0.5),
        RankedRecord("a", "p", ("r", "s"), (0, 1)),
        RankedRecord("a", "p", ("r", "s"), (1, 0)),
        LabelledRecord("a", "p", "r", True),
        LabelledRecord("a", "p", "r", False),
    ]
    assert len(set(record_key_parts(records))) == len(records)
    assert list(record_key_parts(records)) == list(record_key_parts(records))


def test_fingerprint_follows_the_tokenizer_and_not_its_use():
    first, second = train_tokenizer(["가나다 라마바"] * 3, 270), train_tokenizer(["가나다 라마바"] * 3, 270)
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)
    second(["가", "가나다"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)
    assert tokenizer_fingerprint(first) != tokenizer_fingerprint(train_tokenizer(["라마바"] * 3, 270))
    second.eos_token = "<|pad|>"
    assert tokenizer_fingerprint(first) != tokenizer_fingerprint(second)


def test_a_tokenizer_without_a_fast_backend_is_known_by_its_vocabulary():
    class Slow:
        special_tokens_map = {"eos_token": "b"}

        def __init__(self, vocabulary):
            self.get_vocab = lambda: vocabulary

    assert tokenizer_fingerprint(Slow({"a": 0, "b": 1})) == tokenizer_fingerprint(Slow({"b": 1, "a": 0}))
    assert tokenizer_fingerprint(Slow({"a": 0, "b": 1})) != tokenizer_fingerprint(Slow({"a": 1, "b": 0}))


@pytest.mark.parametrize("damage", ["cut", "pickle", "missing"])
def test_a_damaged_or_foreign_file_is_an_error_and_never_executed(damage, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    cached_tokens("key", cache_dir=tmp_path, make=lambda: (ROWS["prompt"], REPORT))
    (path,) = tmp_path.iterdir()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        save_file({name: array for name, array in load_file(path).items() if name != "tokens"}, path)
    with pytest.raises(DataError, match="is damaged .*delete it"):
        cached_tokens("key", cache_dir=tmp_path, make=lambda: (ROWS["prompt"], REPORT))
    assert not (tmp_path / "executed").exists()


def test_ids_are_plain_integers_that_share_memory(tmp_path):
    rows, _ = cached_tokens("k", cache_dir=tmp_path, make=lambda: ([TokenizedPrompt("a", (70000, 70000), "")], REPORT))
    first, second = rows[0].input_ids
    assert type(first) is int and first is second


def test_failure_leaves_no_file(tmp_path):
    def make():
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        cached_tokens("key", cache_dir=tmp_path, make=make)
    assert [path.suffix for path in tmp_path.iterdir()] == [".failed"]
    rows, _ = cached_tokens("key", cache_dir=tmp_path, make=lambda: (ROWS["prompt"], REPORT))
    assert rows == ROWS["prompt"]


def _run_rank(rank, cache_dir, results):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.is_initialized = lambda: False  # an earlier test may have made a world of one
    made = []

    def make():
        made.append(rank)
        return ROWS["ranking"], REPORT

    rows, _ = cached_tokens("key", cache_dir=cache_dir, make=make)
    results.put((rank, made, rows == ROWS["ranking"]))


def test_other_ranks_wait_for_rank_zero(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    waiting = context.Process(target=_run_rank, args=(1, tmp_path, results))
    waiting.start()
    waiting.join(timeout=0.5)
    assert waiting.is_alive()  # nothing to load yet
    making = context.Process(target=_run_rank, args=(0, tmp_path, results))
    making.start()
    assert sorted(results.get(timeout=30) for _ in range(2)) == [(0, [0], True), (1, [], True)]
    for process in (waiting, making):
        process.join(timeout=10)


def test_tokens_are_stored_compactly(tmp_path):
    cached_tokens("k", cache_dir=tmp_path, make=lambda: (ROWS["response"], REPORT))
    (path,) = tmp_path.iterdir()
    arrays = load_file(path)
    assert arrays["tokens"].dtype == np.int32 and arrays["tokens"].tolist() == [1, 2, 3, 4]
    assert json.loads(arrays["facts"].tobytes())["report"]["truncated_prompts"] == 1
