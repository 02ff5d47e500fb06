"""A stage over what an earlier one left in its directory."""

from pathlib import Path

import pytest

from rlhf.config import ConfigError
from rlhf.pipeline.stage_run import StageRun, stage_main
from tests.support.results import write_results

SEEN: list[list[str]] = []


@stage_main("sft")
def main(stage: StageRun) -> dict:
    """A stage that only looks at what lies in its directory once it may start."""
    assert (stage.directory / ".lock").exists(), "what the run holds itself stays"
    SEEN.append(visible(stage.directory))
    return {"seconds": 1.0}


def visible(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("[!.]*") if ".ranks" not in path.parts)


@pytest.fixture
def finished(tmp_path) -> Path:
    """A finished run of one stage, beside a summary and a later stage."""
    write_results(tmp_path, {"sft": {"seconds": 1.0, "seed": 1}, "ppo": {"seed": 1}})
    for name in ("summary.json", "report.html"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    (tmp_path / "sft" / "model").mkdir()
    (tmp_path / "sft" / "model" / "weights").write_text("old", encoding="utf-8")
    (tmp_path / "sft" / "states" / "step-00000004").mkdir(parents=True)  # one that keep_every keeps for good
    SEEN.clear()
    return tmp_path


@pytest.mark.parametrize("words", [[], ["--resume", "never"]])
def test_a_finished_stage_is_refused_and_kept(finished, words):
    before = visible(finished)
    with pytest.raises(ConfigError) as refused:
        main(["--output_dir", str(finished), *words])
    message = str(refused.value)
    assert message.startswith(f"{finished}/sft holds a finished run") and "(model, result.json, states)" in message
    assert all(way in message for way in ("--overwrite", "--resume auto", "another --output_dir"))
    assert SEEN == [] and visible(finished) == before


def test_overwrite_removes_it_whole_before_the_stage_starts(finished):
    main(["--output_dir", str(finished), "--overwrite"])
    assert SEEN == [[]], "nothing of the earlier run is left when the new one starts"
    for name in ("summary.json", "report.html"):
        assert not (finished / name).exists(), "it described a model that is gone"
    assert (finished / "ppo" / "result.json").exists()
    assert visible(finished / "sft") == ["config.yaml", "result.json"]
    assert "overwrite: true" not in (finished / "sft" / "config.yaml").read_text(encoding="utf-8")


def test_overwrite_removes_an_unfinished_run_too(finished):
    (finished / "sft" / "result.json").unlink()
    with pytest.raises(ConfigError, match="unfinished run"):
        main(["--output_dir", str(finished)])
    main(["--output_dir", str(finished), "--overwrite"])
    assert SEEN == [[]]


def test_a_finished_stage_that_is_resumed_stays_with_its_summary(finished):
    before = visible(finished)
    assert main(["--output_dir", str(finished), "--resume", "auto"]) == {"seconds": 1.0, "seed": 1}
    assert SEEN == [] and visible(finished) == before


def test_a_damaged_result_takes_the_summary_with_it(finished):
    """The stage runs again: the summary is of a result that nobody can read."""
    (finished / "sft" / "result.json").write_text("{", encoding="utf-8")
    main(["--output_dir", str(finished), "--resume", "auto"])
    assert SEEN and not (finished / "summary.json").exists()


def test_a_link_to_another_disk_stays_a_link(finished, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("disk") / "sft"
    (finished / "sft").rename(elsewhere)
    (finished / "sft").symlink_to(elsewhere)
    main(["--output_dir", str(finished), "--overwrite"])
    assert SEEN == [[]] and (elsewhere / "result.json").exists()


def test_overwriting_and_resuming_contradict_each_other(finished):
    with pytest.raises(ConfigError, match="contradict"):
        main(["--output_dir", str(finished), "--overwrite", "--resume", "auto"])
    main(
        ["--output_dir", str(finished), "--overwrite", "--resume", "auto", "--overwrite", "false"]
    )  # run_all's restart
    assert SEEN == []
