"""`split` and `subset` of local files and directories: used where that is certain, else an error, never ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.sources import DataError, DatasetSpec, read_rows
from tests.support.published import published


def folder(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps({"from": name}) + "\n", encoding="utf-8")
    return path


def names(path: Path, **spec: Any) -> list[str]:
    return [row.values["from"] for row in read_rows(DatasetSpec(str(path), **spec))]


SPLIT_FILES = ("data_dev.jsonl", "test.jsonl", "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl")


@pytest.mark.parametrize(
    ("split", "wanted"),
    [
        ("train", SPLIT_FILES[2:]),
        ("test", SPLIT_FILES[1:2]),
        ("dev", SPLIT_FILES[:1]),
        ("validation", SPLIT_FILES[:1]),
        ("train+test", SPLIT_FILES[1:]),
    ],
)
def test_the_files_of_a_split(tmp_path: Path, split: str, wanted: tuple[str, ...]) -> None:
    assert names(folder(tmp_path, *SPLIT_FILES), split=split) == list(wanted)


def test_files_of_several_splits_are_not_merged_in_silence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"splits test, train, validation.*data_dev\.jsonl.*say which"):
        names(folder(tmp_path, *SPLIT_FILES))
    with pytest.raises(DataError, match="no file of the split `extra`; its files: data_dev.jsonl"):
        names(tmp_path, split="extra")
    with pytest.raises(DataError, match="no file of the split `train\\[:1%\\]`"):
        names(tmp_path, split="train[:1%]")
    both = folder(tmp_path / "both", "train_test.jsonl", "train.jsonl")
    with pytest.raises(DataError, match="train_test.jsonl: the name holds several splits"):
        names(both, split="train")
    assert names(folder(tmp_path / "one", "latest.jsonl", "contest_2.jsonl")) == ["contest_2.jsonl", "latest.jsonl"]
    assert names(folder(tmp_path / "two", "train_a.jsonl", "train_b.jsonl")) == ["train_a.jsonl", "train_b.jsonl"]


def test_a_file_of_a_split_beside_one_of_none_is_not_merged_in_silence(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"of the split test and koalpaca\.jsonl of none.*each as a data set of its own"
    ):
        names(folder(tmp_path, "koalpaca.jsonl", "test.jsonl"))
    assert names(tmp_path, split="test") == ["test.jsonl"]


def test_folders_of_splits_and_subsets(tmp_path: Path) -> None:
    folder(tmp_path, "train/a.jsonl", "test/b.jsonl", "ko/train.jsonl", "ko/test.jsonl")
    assert names(tmp_path, split="test") == ["test/b.jsonl"]
    assert names(tmp_path, subset="ko", split="train") == ["ko/train.jsonl"]
    with pytest.raises(DataError, match="no folder for `subset` 'en' in it; there are: ko, test, train"):
        names(tmp_path, subset="en")
    with pytest.raises(DataError, match="no folder for `split` 'dev' in it; there are: ko, test, train"):
        names(tmp_path, split="dev")


@pytest.mark.parametrize("part", [{"split": "test"}, {"subset": "ko"}, {"split": "train"}])
def test_a_file_has_no_parts(tmp_path: Path, part: dict[str, str]) -> None:
    path = folder(tmp_path, "train.jsonl") / "train.jsonl"
    with pytest.raises(DataError, match=r"train\.jsonl: a file has no parts to choose from, but `(split|subset)` '"):
        names(path, **part)
    with pytest.raises(DataError, match="a sample data set has no parts"):
        list(read_rows(DatasetSpec("sample:sft_train", **part)))


def test_a_saved_data_set_is_the_split_it_was(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list([{"from": "x"}], split="test")
    made.save_to_disk(tmp_path / "one")
    assert names(tmp_path / "one") == names(tmp_path / "one", split="test") == ["x"]
    with pytest.raises(DataError, match="one saved data set .split `test`., not `train`"):
        names(tmp_path / "one", split="train")


def test_published_directory() -> None:
    path = str(published("kobest_v1/BoolQ"))
    counts = {split: len(list(read_rows(DatasetSpec(path, split=split)))) for split in ("train", "dev", "test")}
    assert counts == {"train": 3665, "dev": 700, "test": 1404}
    subset = DatasetSpec(str(published("kobest_v1")), subset="BoolQ", split="test")
    assert len(list(read_rows(subset))) == counts["test"]
    with pytest.raises(DataError, match="splits test, train, validation"):
        list(read_rows(DatasetSpec(path)))
