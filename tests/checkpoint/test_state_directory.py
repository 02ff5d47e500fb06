"""Training states on disk: verified, replaced, removed; what is damaged is named (kills: tests/slow)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from rlhf.checkpoint.manifest import MANIFEST, read_manifest
from rlhf.checkpoint.state_directory import StateDirectory
from rlhf.config import ConfigError
from tests.support.state_directory_worker import check_whole, names, save, steps


def test_what_was_saved_comes_back(tmp_path):
    store = StateDirectory(tmp_path / "deep" / "states")
    assert store.newest() is None and store.steps() == []
    content = {"loss": 0.1 + 0.2, "best": float("inf"), "meters": {"가": [1, None, True]}, "tiny": 5e-324}
    assert store.save(120, content, lambda part: (part / "a.bin").write_bytes(b"abc") and None)
    saved = StateDirectory(tmp_path / "deep" / "states").newest()
    assert (saved.step, saved.world_size, saved.content) == (120, 1, content)
    assert saved.path.name == "step-00000120" and (saved.path / "a.bin").read_bytes() == b"abc"
    assert json.loads((saved.path / MANIFEST).read_text())["files"]["a.bin"] == {
        "bytes": 3,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def future(path: Path) -> None:
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format_version": manifest["format_version"] + 1}))


def directory_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [
    ("rank-0.bin", flip, "rank-0.bin does not hold the bytes that were saved"),
    ("engine/rank-0.safetensors", flip, "rank-0.safetensors does not hold the bytes"),
    ("state.json", flip, "state.json does not hold the bytes"),
    ("rank-0.bin", lambda path: os.truncate(path, 99_999), "has 99999 bytes and was saved with 100000"),
    ("rank-0.bin", lambda path: os.truncate(path, 0), "has 0 bytes"),
    ("state.json", lambda path: path.write_text("{}"), "state.json has 2 bytes"),
    ("engine/rank-0.safetensors", Path.unlink, "rank-0.safetensors: No such file"),
    ("engine", shutil.rmtree, "rank-0.safetensors: No such file"),
    ("rank-0.bin", directory_instead, "rank-0.bin: Is a directory"),
    ("state.json", Path.unlink, "state.json: No such file"),
    (MANIFEST, Path.unlink, "manifest.json: No such file"),
    (MANIFEST, lambda path: path.write_text(""), "manifest.json is damaged"),
    (MANIFEST, lambda path: path.write_text("[]"), "manifest.json is damaged"),
    (MANIFEST, lambda path: path.write_bytes(b"\xff\xfe"), "manifest.json is damaged"),
    (MANIFEST, future, "format version is 2 and this release reads 1"),
]


@pytest.mark.parametrize(("name", "harm", "sentence"), DAMAGES)
def test_a_damaged_state_is_named_and_the_one_before_is_used(name, harm, sentence, tmp_path, caplog):
    store = StateDirectory(tmp_path)
    assert save(store, 10) and save(store, 20)
    harm(tmp_path / "step-00000020" / name)
    saved = store.newest()
    assert saved.step == 10
    check_whole(saved)
    assert str(tmp_path / "step-00000020") in caplog.text and sentence in caplog.text
    harm(tmp_path / "step-00000010" / name)
    assert store.newest() is None
    assert "none of the training states" in caplog.text


def test_everything_is_on_the_disk_before_the_state_has_its_name(tmp_path, monkeypatch):
    journal = []
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        journal.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        journal.append(f"renamed {path}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    assert save(StateDirectory(tmp_path / "new" / "states"), 10)
    place = next(index for index, entry in enumerate(journal) if entry.startswith("renamed"))
    part = Path(journal[place].removeprefix("renamed "))
    files = {f"{part}/{name}" for name in ("rank-0.bin", "engine/rank-0.safetensors", "state.json", "manifest.json")}
    before, after = journal[:place], journal[place + 1 :]
    assert {*files, str(part), f"{part}/engine", str(tmp_path), f"{tmp_path}/new"} <= set(before)
    assert before.index(str(part)) > before.index(f"{part}/manifest.json")
    assert after == [str(tmp_path / "new" / "states")]


def test_no_flipped_bit_of_a_manifest_is_believed(tmp_path):
    assert save(StateDirectory(tmp_path), 10)
    path = tmp_path / "step-00000010" / MANIFEST
    content, manifest = path.read_bytes(), read_manifest(path.parent)
    refused = 0
    for position in range(len(content)):
        for bit in (0, 3, 5):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                assert read_manifest(path.parent) == manifest, flipped  # white space
            except ValueError:
                refused += 1
    assert refused > 2 * len(content)


def test_a_state_under_the_name_of_another_step_is_not_used(tmp_path, caplog):
    store = StateDirectory(tmp_path)
    assert save(store, 10)
    shutil.copytree(tmp_path / "step-00000010", tmp_path / "step-00000030")
    assert store.newest().step == 10
    assert "it was saved as that of step 10" in caplog.text


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [(1, 0, [7]), (2, 0, [6, 7]), (3, 0, [5, 6, 7]), (1, 3, [3, 6, 7]), (2, 2, [2, 4, 6, 7]), (20, 1, range(1, 8))],
)
def test_pruning(keep_last, keep_every, left, tmp_path):
    store = StateDirectory(tmp_path, keep_last=keep_last, keep_every=keep_every)
    for step in range(1, 8):
        assert save(store, step)
    assert names(tmp_path) == steps(*left)
    assert store.clear(keep_permanent=True)
    permanent = [step for step in left if keep_every and step % keep_every == 0]
    assert names(tmp_path) == steps(*permanent) if permanent else not tmp_path.exists()
    assert store.clear(keep_permanent=False)
    assert not tmp_path.exists()


def test_other_files_of_the_directory_are_left_alone(tmp_path):
    (tmp_path / "step-note.txt").write_text("mine")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".step-00000001.part-0123abcd").mkdir()  # of a run that died
    store = StateDirectory(tmp_path, keep_last=1)
    assert save(store, 1) and save(store, 2)
    assert names(tmp_path) == [".hidden", "step-00000002", "step-note.txt"]
    assert store.clear(keep_permanent=False)
    assert names(tmp_path) == [".hidden", "step-note.txt"]


@pytest.mark.parametrize("keep_every", [0, 10])
def test_the_only_good_state_outlives_damaged_newer_ones(keep_every, tmp_path):
    """A run that went back from 30 to 10 must not count the damaged one among those it keeps."""
    store = StateDirectory(tmp_path, keep_last=2, keep_every=keep_every)
    assert save(store, 10) and save(store, 30)
    flip(tmp_path / "step-00000030" / "rank-0.bin")
    assert store.newest().step == 10
    assert save(store, 20)
    assert names(tmp_path) == steps(10, 20)
    flip(tmp_path / "step-00000020" / "rank-0.bin")
    assert store.newest().step == 10
    assert save(store, 20)  # again, in the place of the damaged one
    check_whole(store.newest())
    assert names(tmp_path) == steps(10, 20)


def test_a_state_whose_replacement_was_cut_short_gets_its_name_back(tmp_path):
    store = StateDirectory(tmp_path)
    assert save(store, 10)
    (tmp_path / "step-00000010").rename(tmp_path / ".step-00000010.replaced-0123abcd")
    check_whole(store.newest())
    assert names(tmp_path) == steps(10)


def test_other_errors_are_raised_and_leave_no_trace(tmp_path):
    store = StateDirectory(tmp_path)
    assert save(store, 10)

    def wrong(part: Path) -> None:
        (part / "half.bin").write_bytes(b"0")
        raise ValueError("no such engine")

    with pytest.raises(ValueError, match="no such engine"):
        store.save(20, {}, wrong)
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.save(20, {"tensor": object()})
    with pytest.raises(ValueError, match="keep_last=0"):
        StateDirectory(tmp_path, keep_last=0).save(20, {})
    assert names(tmp_path) == steps(10)


def test_every_writer_is_called_after_one_was_refused(tmp_path, caplog):
    store = StateDirectory(tmp_path)
    assert save(store, 10)
    called = []

    def refused(part: Path) -> None:
        (part / "missing" / "file").write_bytes(b"0")

    assert store.save(20, {}, refused, lambda part: called.append(part)) is False
    assert len(called) == 1 and names(tmp_path) == steps(10)
    assert "step 20 was NOT saved" in caplog.text and "No such file or directory" in caplog.text
    assert "the one of step 10 stays" in caplog.text


def test_a_file_where_the_directory_should_be(tmp_path, caplog):
    store = StateDirectory(tmp_path / "states")
    (tmp_path / "states").write_text("x")
    assert store.newest() is None and save(store, 1) is False
    assert "File exists" in caplog.text and "no earlier one" in caplog.text
    (tmp_path / "states").unlink()
    assert save(store, 2)
    check_whole(store.newest())


def test_a_directory_that_cannot_be_listed_is_not_an_empty_one(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(ConfigError, match=r"loop cannot be listed .*--resume never"):
        StateDirectory(loop).newest()
    assert save(StateDirectory(loop), 1) is False
    assert StateDirectory(loop).clear(keep_permanent=False) is False
