"""`rlhf base`: a base model from text files, and what it says of texts that make none."""

import argparse
import json

from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.cli import base
from rlhf.cli.__main__ import main
from rlhf.models.own_base import check_recipe
from rlhf.models.tiny_base import recipe_tokenizer, untrained_model, weight_count

SENTENCES = [
    f"{who} {what} 먹어요." for who in ("저는", "동생은", "우리는") for what in ("밥을", "빵을", "국수를", "떡을")
]
SMALL = [
    *("--vocabulary_size", "330", "--hidden_size", "32", "--layers", "1", "--heads", "2", "--max_positions", "64"),
    *("--row_tokens", "32", "--rows_per_step", "4", "--steps", "4", "--threads", "1", "--eval_fraction", "0.3"),
]


def texts(tmp_path):
    one, other = tmp_path / "one.txt", tmp_path / "other.md"
    one.write_text("\n".join(SENTENCES * 2), encoding="utf-8")
    other.write_text("\n".join(f"# {sentence}\n끝." for sentence in SENTENCES), encoding="utf-8")
    return [str(one), json.dumps({"path": str(other), "weight": 2})]


def test_it_writes_a_model_and_its_held_out_loss(tmp_path, capsys):
    directory = tmp_path / "base"
    assert main(["base", str(directory), "--texts", *texts(tmp_path), *SMALL]) == 0
    model, tokenizer = (kind.from_pretrained(directory) for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.hidden_size == 32 and model.config.intermediate_size == 128
    assert len(tokenizer) <= 330 and tokenizer.decode(tokenizer("밥을 먹어요.")["input_ids"]) == "밥을 먹어요."
    report = json.loads((directory / "base.json").read_text(encoding="utf-8"))
    assert [(text["cut"], text["documents"]) for text in report["texts"]] == [("lines", 24), ("sections", 12)]
    second = report["texts"][1]
    assert second["training_documents"] == 2 * (12 - second["held_out_documents"])
    said = capsys.readouterr().out
    assert "one.txt: 24 documents (lines)" in said and "nats per character" in said
    after = report["held_out"]["all"]["after"]["nats_per_token"]
    assert f"-> {after:.3f}" in said and f"--base_model {directory}" in said


def test_its_default_is_a_model_of_8_to_15_million_weights():
    parser = argparse.ArgumentParser()
    base.add_arguments(parser)
    recipe = base._recipe(parser.parse_args(["directory", "--texts", "a.txt"]))
    check_recipe(recipe)
    model = untrained_model(recipe, recipe_tokenizer(SENTENCES, recipe))
    embeddings = 2 * (model.config.vocab_size * recipe.hidden_size)
    whole = weight_count(model) - embeddings + 2 * recipe.vocabulary_size * recipe.hidden_size
    assert 8e6 < whole < 15e6


def refused(capsys, *words):
    assert main(["base", *words]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_used_is_said_with_status_2(tmp_path, capsys):
    directory, good = str(tmp_path / "base"), texts(tmp_path)
    assert refused(capsys, directory, "--texts", str(tmp_path / "no.txt"), *SMALL).startswith("error: no such file: ")
    (tmp_path / "korean.txt").write_bytes("한글".encode("cp949"))
    assert "korean.txt:1: not UTF-8" in refused(capsys, directory, "--texts", str(tmp_path / "korean.txt"), *SMALL)
    assert "heads=5" in refused(capsys, directory, "--texts", *good, *SMALL, "--heads", "5")
    long_rows = ("--max_positions", "4096", "--row_tokens", "4096")
    assert "at least one row of 4096" in refused(capsys, directory, "--texts", *good, *SMALL, *long_rows)
    assert "is there and not empty" in refused(capsys, str(tmp_path), "--texts", *good, *SMALL)
    assert "error: " in refused(capsys, str(tmp_path / "one.txt" / "base"), "--texts", *good, *SMALL)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["korean.txt", "one.txt", "other.md"]
