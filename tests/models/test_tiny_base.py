"""The embedded base model: trained on the spot, reproducible, an ordinary Hugging Face directory."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.distributed import progress
from rlhf.models import tiny_base
from rlhf.models.tiny_base import TinyRecipe, announcement, build_tiny_base, tiny_base_path, train_tokenizer

TEXTS = ["안녕하세요. 오늘은 날씨가 좋아요.", "### 응답:\n네, 산책을 해 보세요.", "고마워요. 내일 또 봐요."] * 4
SMALL = TinyRecipe(
    vocabulary_size=330,
    hidden_size=32,
    layers=1,
    heads=2,
    intermediate_size=64,
    max_positions=64,
    row_tokens=32,
    rows_per_step=4,
    steps=60,
    learning_rate=1e-2,
    warmup_steps=5,
    threads=1,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return build_tiny_base(TEXTS, tmp_path_factory.mktemp("cache"), progress=False, recipe=SMALL)


def content(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def loss_of(directory: Path, text: str) -> float:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    input_ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float(model(input_ids=input_ids, labels=input_ids).loss)


def test_it_learns_its_texts(built, tmp_path):
    barely = TinyRecipe(**{**SMALL.__dict__, "steps": 1, "learning_rate": 0.0, "matrix_learning_rate": 0.0})
    untrained = build_tiny_base(TEXTS, tmp_path, progress=False, recipe=barely)
    assert loss_of(untrained, TEXTS[0]) > 5 > 2 > loss_of(built, TEXTS[0])


def steps_of(recipe: TinyRecipe, place: Path) -> list[dict]:
    """Of each step of an optimizer while the base is trained: the optimizer, its groups, the norm of all gradients."""
    seen: list[dict] = []

    def look(optimizer, *_):
        groups = [
            {**group, "params": [tuple(each.shape) for each in group["params"]]} for group in optimizer.param_groups
        ]
        squares = [float(each.grad.pow(2).sum()) for group in optimizer.param_groups for each in group["params"]]
        seen.append({"kind": type(optimizer), "groups": groups, "squares": sum(squares)})

    handle = register_optimizer_step_pre_hook(look)
    try:
        build_tiny_base(TEXTS, place, progress=False, recipe=recipe)
    finally:
        handle.remove()
    return seen


def test_matrices_of_the_layers_learn_by_muon_and_only_matrices_decay(tmp_path):
    steps = steps_of(replace(SMALL, weight_decay=0.25, steps=1, warmup_steps=0), tmp_path)
    assert [step["kind"] for step in steps] == [torch.optim.Muon, torch.optim.AdamW]
    (layers,), (embeddings, vectors) = (step["groups"] for step in steps)
    assert sorted(layers["params"]) == [(32, 32), (32, 64), (64, 32), (96, 32)]
    assert embeddings["params"] == [(384, 32), (384, 32)], "what tokens become, and what becomes tokens"
    assert all(len(shape) == 1 for shape in vectors["params"]) and len(vectors["params"]) == 10
    assert [group["weight_decay"] for group in (layers, embeddings, vectors)] == [0.25, 0.25, 0.0]
    assert [group["lr"] for group in (layers, embeddings, vectors)] == [2e-2, 1e-2, 1e-2]
    assert embeddings["betas"] == vectors["betas"] == (0.9, 0.95)


def test_the_learning_rate_rises_in_a_line_and_falls_as_a_cosine(tmp_path):
    steps = steps_of(replace(SMALL, steps=6, warmup_steps=2, learning_rate=1.0, matrix_learning_rate=3.0), tmp_path)
    expected = [0.5, 1.0, *(0.5 + 0.5 * math.cos(math.pi * done / 4) for done in range(4))]
    for kind, peak in ((torch.optim.Muon, 3.0), (torch.optim.AdamW, 1.0)):
        rates = [step["groups"][0]["lr"] / peak for step in steps if step["kind"] is kind]
        assert rates == pytest.approx(expected)


def test_gradients_are_clipped_to_the_norm_of_the_recipe(tmp_path):
    for limit in (0.01, 1e6):
        steps = steps_of(replace(SMALL, steps=3, max_grad_norm=limit), tmp_path / str(limit))
        squares = [step["squares"] for step in steps]
        norms = [math.sqrt(squares[place] + squares[place + 1]) for place in (0, 2, 4)]
        assert norms == pytest.approx([0.01] * 3, rel=1e-3) if limit == 0.01 else min(norms) > 0.1


def test_tokenizer_is_lossless_and_padding_is_not_eos(built):
    tokenizer = AutoTokenizer.from_pretrained(built)
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.pad_token == "<|pad|>"
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    for text in ("안녕하세요. 처음 보는 글자 뷁!", " \n\n두 칸  ", "Hello 😀"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids
    assert len(tokenizer("안녕하세요")["input_ids"]) < len("안녕하세요".encode()) / 2


@pytest.mark.parametrize("vocabulary_size", [320, 330])
def test_model_has_more_rows_than_the_tokenizer_has_tokens(vocabulary_size, tmp_path):
    recipe = TinyRecipe(**{**SMALL.__dict__, "vocabulary_size": vocabulary_size, "steps": 1})
    path = build_tiny_base(TEXTS, tmp_path, progress=False, recipe=recipe)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert len(tokenizer) == vocabulary_size and model.config.vocab_size == 384
    assert model.config.eos_token_id == tokenizer.eos_token_id and model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.rope_parameters["partial_rotary_factor"] == 1.0


def test_same_seed_gives_the_same_bytes_whatever_the_caller_did(built, tmp_path):
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    again = build_tiny_base(TEXTS, tmp_path, progress=False, recipe=SMALL)
    assert torch.equal(before, torch.random.get_rng_state())
    assert again.name == built.name
    assert content(again) == content(built)
    other = build_tiny_base(TEXTS, tmp_path, seed=1, progress=False, recipe=SMALL)
    assert content(other)["model.safetensors"] != content(built)["model.safetensors"]


def test_built_once_and_named_after_texts_and_recipe(built):
    stamp = (built / "model.safetensors").stat().st_mtime_ns
    assert build_tiny_base(TEXTS, built.parent, progress=False, recipe=SMALL) == built
    assert (built / "model.safetensors").stat().st_mtime_ns == stamp
    other = build_tiny_base(
        [*TEXTS, "더"], built.parent, progress=False, recipe=TinyRecipe(**{**SMALL.__dict__, "steps": 1})
    )
    assert other != built
    assert all(entry.suffix != ".part" for entry in built.parent.iterdir())


def test_a_base_that_an_earlier_release_trained_is_found_under_its_name():
    assert tiny_base_path(["안녕", "b"], Path("cache"), seed=3, recipe=SMALL) == Path(
        "cache/tiny_base-2ed870f71f7de5c1"
    )
    others = [(["안녕", "b"], 4, SMALL), (["안녕b"], 3, SMALL), (["안녕", "b"], 3, replace(SMALL, steps=61))]
    names = {tiny_base_path(texts, Path("cache"), seed=seed, recipe=recipe) for texts, seed, recipe in others}
    assert len(names) == 3 and Path("cache/tiny_base-2ed870f71f7de5c1") not in names


def test_a_failed_build_leaves_no_model_behind(tmp_path):
    with pytest.raises(ValueError, match="needs at least one row of 32"):
        build_tiny_base(["짧다"], tmp_path, progress=False, recipe=SMALL)
    assert [entry.suffix for entry in tmp_path.iterdir()] == [".failed"]


def test_it_is_announced_once_with_why_how_long_and_where(tmp_path, caplog):
    recipe = TinyRecipe(**{**SMALL.__dict__, "steps": 2})
    with caplog.at_level(logging.INFO, logger="rlhf"):
        path = build_tiny_base(TEXTS, tmp_path, progress=False, recipe=recipe)
        said = len(caplog.messages)
        build_tiny_base(TEXTS, tmp_path, progress=False, recipe=recipe)
    assert path == tiny_base_path(TEXTS, tmp_path, recipe=recipe)
    assert caplog.messages[0] == announcement(recipe, path) and len(caplog.messages) == said
    assert "not there yet" in caplog.messages[0] and "(2 steps)" in caplog.messages[0]
    assert caplog.messages[0].endswith(f"this happens once, it is kept in {path}")
    assert "(2100 steps, four to six minutes on two cores)" in announcement(TinyRecipe(), path)


def test_its_progress_is_shown(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, logger="rlhf"):
        build_tiny_base(TEXTS, tmp_path, recipe=TinyRecipe(**{**SMALL.__dict__, "steps": 3}))
    counted = [message for message in caplog.messages if message.startswith("embedded base model: ")]
    assert [message.partition(",")[0] for message in counted] == [
        *(f"embedded base model: {step} of 3 steps" for step in (1, 2, 3)),
    ]
    assert all("loss " in message for message in counted)


def test_it_says_how_far_the_loss_fell(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="rlhf"):
        build_tiny_base(TEXTS, tmp_path, progress=False, recipe=TinyRecipe(**{**SMALL.__dict__, "steps": 2}))
    assert any("loss" in message and "12 texts" in message for message in caplog.messages)


def test_tokenizer_training_is_deterministic():
    first, second = (train_tokenizer(TEXTS, 330).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_rows_are_full_and_lose_no_token():
    documents = [list(range(10)), list(range(10, 37)), list(range(37, 90))]
    rows = tiny_base._packed_rows(documents, TinyRecipe(row_tokens=30))
    three = [next(rows) for _ in range(3)]
    assert [len(row) for row in three] == [30, 30, 30] and sorted(sum(three, [])) == list(range(90))
