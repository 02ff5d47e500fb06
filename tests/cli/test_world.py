"""`rlhf world` writes what `sample:` reads, and worlds with other annotators."""

import json

from rlhf.cli.__main__ import main
from rlhf.data.world.datasets import DATASETS, World

FEW = [f"{name}=12" for name in (*DATASETS, "base")]


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_without_options_it_writes_what_sample_reads(tmp_path, capsys):
    assert main(["world", str(tmp_path), "--rows", *FEW]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}.jsonl" for name in (*DATASETS, "base"))
    for name in DATASETS:
        assert rows(tmp_path / f"{name}.jsonl") == list(World().rows(name, 12))
    assert all("\n" in row["text"] for row in rows(tmp_path / "base.jsonl"))
    assert f"{tmp_path / 'sft_train.jsonl'}: 12 rows" in capsys.readouterr().out


def test_a_biased_annotator_compares_the_same_answers_otherwise(tmp_path):
    for name, words in (("plain", []), ("long", ["--length_bias", "5"])):
        assert main(["world", str(tmp_path / name), "--rows", *FEW, "preference_train=200", *words]) == 0
    plain, long = (rows(tmp_path / name / "preference_train.jsonl") for name in ("plain", "long"))
    assert [{row["chosen"], row["rejected"]} for row in plain] == [{row["chosen"], row["rejected"]} for row in long]
    longer = [sum(len(row["chosen"]) >= len(row["rejected"]) for row in rows) for rows in (plain, long)]
    assert longer[1] > 160 > 130 > longer[0]


def test_wrong_numbers_of_rows_are_named(tmp_path, capsys):
    for word in ("sft=3", "sft_train=0", "sft_train=x", "sft_train"):
        assert main(["world", str(tmp_path), "--rows", word]) == 2
        assert f"--rows {word}: needed is NAME=N" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_said(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["world", str(tmp_path / "file"), "--rows", *FEW]) == 2
    assert capsys.readouterr().err.startswith("error: ")
