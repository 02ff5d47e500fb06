"""A base from one's own texts: the embedded base's training, measured on documents it does not see."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.config import ConfigError
from rlhf.data.spec import DataError
from rlhf.data.texts import Documents
from rlhf.models.own_base import REPORT, HeldOut, build_own_base, check_recipe, held_out_losses
from rlhf.models.tiny_base import TinyRecipe, build_tiny_base

SMALL = TinyRecipe(
    vocabulary_size=330,
    hidden_size=32,
    layers=1,
    heads=2,
    intermediate_size=64,
    max_positions=64,
    row_tokens=32,
    rows_per_step=4,
    steps=40,
    learning_rate=1e-2,
    warmup_steps=5,
    threads=1,
)
SENTENCES = [
    f"{who} {what} 먹어요." for who in ("저는", "동생은", "우리는") for what in ("밥을", "빵을", "국수를", "떡을")
]


def documents(train, held_out=(), path="a.txt"):
    return Documents(path, "lines", 1.0, len(train) + len(held_out), tuple(train), tuple(held_out))


def test_it_learns_what_is_held_out_and_says_so(tmp_path):
    sources = [documents(SENTENCES[:10] * 3, SENTENCES[10:]), documents(["고마워요."] * 9, ["안녕, 친구야."], "b.txt")]
    report = build_own_base(sources, tmp_path / "base", SMALL, progress=False)
    assert json.loads((tmp_path / "base" / REPORT).read_text(encoding="utf-8")) == report
    losses = report["held_out"]
    assert list(losses) == ["all", "a.txt", "b.txt"]
    assert losses["all"]["before"]["nats_per_token"] == pytest.approx(math.log(384), abs=0.3)
    assert losses["a.txt"]["after"]["nats_per_token"] < 2 < 4 < losses["b.txt"]["after"]["nats_per_token"]
    characters = sum(map(len, [*SENTENCES[10:], "안녕, 친구야."]))
    assert report["held_out_characters"] == characters
    for when in ("before", "after"):
        loss = losses["all"][when]
        expected = loss["nats_per_token"] * report["held_out_tokens"] / characters
        assert loss["nats_per_character"] == pytest.approx(expected, rel=1e-3)
    assert report["tokens_seen"] == 40 * 4 * 32 and report["seed"] == 0 and report["recipe"]["hidden_size"] == 32


def test_the_training_loss_is_that_of_the_first_step_and_of_the_last_twenty(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.models.own_base.fit", lambda *_, **__: [8.0] + [float(n) for n in range(29)])
    report = build_own_base([documents(SENTENCES)], tmp_path / "base", SMALL, progress=False)
    assert report["training_loss"] == {"first": 8.0, "last_20": sum(range(9, 29)) / 20}


def test_the_held_out_loss_is_that_of_transformers_row_by_row(tmp_path):
    build_own_base([documents(SENTENCES)], tmp_path / "base", SMALL, progress=False)
    model, tokenizer = (kind.from_pretrained(tmp_path / "base") for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in SENTENCES * 30]
    stream = sum(ids, [])
    nats, predicted = 0.0, 0
    for start in range(0, len(stream), 32):
        row = torch.tensor([stream[start : start + 32]])
        logprobs = torch.log_softmax(model(input_ids=row).logits[0, :-1].detach().double(), dim=-1)
        nats -= float(logprobs.gather(1, row[0, 1:, None]).sum())
        predicted += row.shape[1] - 1
    assert len(stream) % 32 > 1 and len(stream) > 17 * 32
    loss = held_out_losses(model, [HeldOut("a.txt", ids, 1000)], SMALL)["a.txt"]
    assert loss.nats_per_token == pytest.approx(nats / predicted, abs=1e-4)
    assert loss.nats_per_character == pytest.approx(nats / predicted * len(stream) / 1000, abs=2e-3)


def test_without_held_out_documents_it_trains_the_embedded_base(tmp_path):
    texts = SENTENCES * 2
    tiny = build_tiny_base(texts, tmp_path / "cache", seed=3, progress=False, recipe=SMALL)
    report = build_own_base([documents(texts)], tmp_path / "base", SMALL, seed=3, progress=False)
    assert report["held_out"] == {}
    written = {file.name: file.read_bytes() for file in (tmp_path / "base").iterdir() if file.name != REPORT}
    assert written == {file.name: file.read_bytes() for file in tiny.iterdir()}


def test_bfloat16_trains_float32_weights(tmp_path):
    sources = [documents(SENTENCES[:10] * 3, SENTENCES[10:])]
    reports = [
        build_own_base(sources, tmp_path / str(bfloat16), SMALL, bfloat16=bfloat16, progress=False)
        for bfloat16 in (False, True)
    ]
    whole, half = (report["held_out"]["all"]["after"]["nats_per_token"] for report in reports)
    assert whole != half and half == pytest.approx(whole, abs=0.2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "True", dtype="auto")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_what_lies_in_the_directory_stays(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is there and not empty; name another directory"):
        build_own_base([documents(SENTENCES)], tmp_path, SMALL, progress=False)
    with pytest.raises(ConfigError, match="is there and not empty"):
        build_own_base([documents(SENTENCES)], tmp_path / "mine.txt", SMALL, progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_too_little_text_leaves_nothing_behind(tmp_path):
    with pytest.raises(DataError, match=r"the texts have \d+ tokens; training needs at least one row of 32"):
        build_own_base([documents(["짧다"])], tmp_path / "base", SMALL, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 36, "heads": 4}, "hidden_size=36 must be an even number for each of heads=4: a multiple of 8"),
        ({"row_tokens": 65}, "row_tokens=65 is more than max_positions=64"),
        ({"vocabulary_size": 257}, "vocabulary_size"),
        ({"layers": 0}, "layers"),
        ({"row_tokens": 1}, "row_tokens"),
        ({"threads": 0}, "threads"),
    ],
)
def test_sizes_that_make_no_model_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        check_recipe(replace(SMALL, **sizes))
