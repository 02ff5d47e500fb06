"""The time that the embedded base model took stands in the result of the stage that had to train it."""

import functools
import json
from pathlib import Path

import pytest

from rlhf.models import tiny_base
from rlhf.pipeline.stage_run import StageRun, stage_main


@stage_main("sft")
def main(stage: StageRun) -> dict:
    """A stage that needs its base model and, the first time that it is told to, dies behind it."""
    stage.base_model()
    if (stage.directory.parent / "fail").exists():
        (stage.directory.parent / "fail").unlink()
        raise MemoryError
    return {"seconds": 1.0}


@pytest.fixture
def words(tmp_path, monkeypatch) -> list[str]:
    small = {"vocabulary_size": 330, "hidden_size": 32, "layers": 1, "heads": 2, "intermediate_size": 64, "steps": 2}
    monkeypatch.setattr(tiny_base, "TinyRecipe", functools.partial(tiny_base.TinyRecipe, **small))
    return ["--output_dir", str(tmp_path), "--cache_dir", str(tmp_path / "cache")]


def result(directory: Path) -> dict:
    return json.loads((directory / "sft" / "result.json").read_text(encoding="utf-8"))


def test_it_is_counted_where_it_was_trained_and_not_again(tmp_path, words):
    found = main(words)
    assert found["base_seconds"] > 0 and result(tmp_path) == found
    assert "base_seconds" not in main([*words, "--overwrite"])
    (tmp_path / "sft" / "result.json").unlink()  # an unfinished run of an earlier day, which had to train it
    (tmp_path / "sft" / "preparation.json").write_text('{"base_seconds": 50.0}', encoding="utf-8")
    assert "base_seconds" not in main([*words, "--resume", "never"])


def test_a_run_that_is_resumed_counts_what_it_took_before(tmp_path, words):
    (tmp_path / "fail").touch()
    with pytest.raises(MemoryError):
        main(words)
    assert main([*words, "--resume", "auto"])["base_seconds"] > 0
