"""Files and directories are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.checkpoint.atomic import remove_leftovers, replaced_directory, replaced_file, write_json
from tests.support.state_directory_worker import kill_self, on_operation


def write_file(path: Path, text: str) -> None:
    with replaced_file(path) as part:
        part.write_text(text)


def write_directory(path: Path, text: str) -> None:
    with replaced_directory(path) as part:
        (part / "deep").mkdir()
        (part / "deep" / "file").write_text(text)
        (part / text).write_text(text)


def content(path: Path) -> str | None:
    """What the two functions above wrote; fails for half of it."""
    if not path.is_dir():
        return path.read_text() if path.exists() else None
    text = (path / "deep" / "file").read_text()
    assert (
        sorted(entry.name for entry in path.iterdir()) == sorted(["deep", text]) and (path / text).read_text() == text
    )
    return text


both = pytest.mark.parametrize("write", [write_file, write_directory])


@both
def test_a_reader_never_sees_a_part(write, tmp_path, monkeypatch):
    seen = []
    write_text = Path.write_text

    def looked_at(path: Path, *arguments: str) -> int:
        count = write_text(path, *arguments)
        seen.append(content(tmp_path / "not" / "there" / "out"))
        return count

    monkeypatch.setattr(Path, "write_text", looked_at)
    write(tmp_path / "not" / "there" / "out", "first")
    write(tmp_path / "not" / "there" / "out", "second")
    assert set(seen[: len(seen) // 2]) == {None} and set(seen[len(seen) // 2 :]) == {"first"}
    assert content(tmp_path / "not" / "there" / "out") == "second"
    assert [entry.name for entry in (tmp_path / "not" / "there").iterdir()] == ["out"]


@pytest.mark.parametrize("replaced", [replaced_file, replaced_directory])
def test_an_error_leaves_what_was_there(replaced, tmp_path):
    write = write_file if replaced is replaced_file else write_directory
    write(tmp_path / "out", "first")
    with pytest.raises(ZeroDivisionError), replaced(tmp_path / "out") as part:
        (part if replaced is replaced_file else part / "half").write_text("half")
        1 / 0  # noqa: B018
    assert content(tmp_path / "out") == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_rename_that_fails_brings_the_old_directory_back(tmp_path, monkeypatch):
    write_directory(tmp_path / "out", "first")
    rename = Path.rename

    def fails_for_the_new_one(self: Path, target: Path) -> Path:
        if ".part-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new_one)
    with pytest.raises(OSError, match="Input/output error"):
        write_directory(tmp_path / "out", "second")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert content(tmp_path / "out") == "first"


@both
def test_everything_is_on_the_disk_before_it_has_its_name(write, tmp_path, monkeypatch):
    journal: list[str] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def synced(descriptor: int) -> None:
        path = Path(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        journal.append(str(path.relative_to(tmp_path)))
        fsync(descriptor)

    def named(move: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def moved(path: Path, target: Path) -> Path:
            journal.append(f"{path.name} is {target.name}")
            return move(path, target)

        return moved

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", named(replace))
    monkeypatch.setattr(Path, "rename", named(rename))
    write(tmp_path / "out", "first")
    place = next(index for index, entry in enumerate(journal) if entry.endswith(" is out"))
    part = journal[place].removesuffix(" is out")
    inside = [""] if write is write_file else ["", "/deep", "/deep/file", "/first"]
    assert {f"{part}{name}" for name in inside} == set(journal[:place])
    assert journal[place + 1 :] == ["."]


@both
def test_a_process_killed_at_any_moment_leaves_the_old_or_the_new(write, tmp_path):
    """Before each file operation in turn; the new one is there for good once the write has returned."""
    left_behind = 0
    for number in range(1, 100):
        directory = tmp_path / str(number)
        write(directory / "out", "first")
        child = os.fork()
        if child == 0:
            on_operation(number, kill_self)
            write(directory / "out", "second")
            os._exit(0)
        ended_well = os.waitpid(child, 0)[1] == 0
        left_behind += len(list(directory.iterdir())) > 1
        remove_leftovers(directory)
        assert [entry.name for entry in directory.iterdir()] == ["out"]
        assert content(directory / "out") in (["second"] if ended_well else ["first", "second"])
        if ended_well:
            break
    assert ended_well and number > 4 and left_behind >= 2


def test_leftovers_are_told_from_what_belongs_to_others(tmp_path):
    keep = ["model", ".lock", ".ranks", "a.part-12345678", ".notes.part", ".model.replaced-by"]
    for name in [*keep, ".model.replaced-01234567", ".model.part-4711", ".b.removed-00000000"]:
        (tmp_path / name).mkdir()
    (tmp_path / ".result.json.part-89abcdef").write_text("{")
    (tmp_path / ".best.replaced-01234567").mkdir()
    (tmp_path / ".best.replaced-01234567" / "weights").write_text("whole")
    remove_leftovers(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*keep, "best"])
    assert (tmp_path / "best" / "weights").read_text() == "whole"
    remove_leftovers(tmp_path / "not there")


def test_json_files_keep_korean_readable(tmp_path):
    path = tmp_path / "a" / "b" / "result.json"
    write_json(path, {"답": [1, "가"]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"답": [1, "가"]}
    assert path.read_text(encoding="utf-8") == '{\n  "답": [\n    1,\n    "가"\n  ]\n}\n'
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"답": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"답": [1, "가"]}
