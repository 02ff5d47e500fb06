"""`rlhf watch` and `rlhf samples`: a run as it goes, and the responses of its rollouts."""

from __future__ import annotations

import fcntl
import io
import json
import shutil

import pytest
from rich.console import Console

from rlhf.cli.__main__ import SUBCOMMANDS
from rlhf.cli.__main__ import main as rlhf
from rlhf.cli.watch import _ended
from rlhf.pipeline.stages import STAGES
from rlhf.report.rollouts import KeptResponses, NoRolloutsError
from rlhf.report.run_record import read_run
from rlhf.report.watching import duration, progress, remaining_seconds, sparkline, watched
from tests.support.results import made_up_results, write_results


def kept(directory, iterations=3, each=2):
    lines = [
        {"iteration": iteration, "prompt": f"묻기 {iteration}", "response": f"답 {iteration}.{row}",
         "score": row - iteration / 10, "tokens": 4, "ended": row > 0, "kl": 0.5, "parts": {"ends": 1.0}}
        for iteration in range(1, iterations + 1)
        for row in range(each)
    ]  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (directory / "rollouts.jsonl").write_text(text + '{"iteration": 4, "pro', encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    """One whose first stage is finished and whose PPO is at iteration 4 of 10, three seconds an iteration."""
    write_results(tmp_path, {"sft": made_up_results()["sft"]})
    (tmp_path / "sft" / "metrics.jsonl").write_text('{"step": 7, "loss": 1.0}\n')
    kept(tmp_path / "ppo")
    lines = [{"step": step, "seconds": 3.0 * step, "score": step / 4, "eval_score": 0.5} for step in range(1, 5)]
    (tmp_path / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "ppo" / "plan.json").write_text('{"unit": "iteration", "planned": 10}')
    return tmp_path


def test_the_remaining_time_is_that_of_the_steps_that_are_left(run):
    record = read_run(run, STAGES.values()).stage("ppo")
    assert progress(record) == (4, 10) and remaining_seconds(record) == pytest.approx(18.0)
    assert remaining_seconds(read_run(run, STAGES.values()).stage("sft")) is None


def test_it_shows_how_far_the_run_is_its_figures_responses_and_findings(run):
    console = Console(file=io.StringIO(), width=120)
    console.print(watched(read_run(run, STAGES.values())))
    shown = console.file.getvalue()
    for part in ("SFT", "finished", "4 of 10", "score", "0.25", "▁▃▆█", "iteration 3, best: +0.70", "답 3.1",
                 "iteration 3, worst: -0.30", "답 3.0"):  # fmt: skip
        assert part in shown, part
    assert "incomplete" in shown, "nothing holds its lock"


def test_looking_once_tells_how_the_run_is(run, tmp_path, capsys):
    assert rlhf(["watch", str(run), "--once"]) == 3
    assert "4 of 10" in capsys.readouterr().out
    (run / "ppo" / "result.json").write_text(json.dumps(made_up_results()["ppo"]))
    assert rlhf(["watch", str(run)]) == 0, "a finished run ends it"
    assert rlhf(["watch", str(tmp_path / "nowhere")]) == 2


def test_it_goes_on_between_two_stages_of_a_pipeline(run):
    """SFT is finished, the reward model has not begun, and run_all.sh lives."""
    shutil.rmtree(run / "ppo")
    (run / ".pipeline.stages").write_text("sft\nreward\nppo\n")
    with (run / ".pipeline.lock").open("w") as lock:
        assert _ended(read_run(run, STAGES.values()))
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not _ended(read_run(run, STAGES.values()))


def test_a_stage_that_has_measured_nothing_yet_is_one_too(run):
    stage = run / "reward"
    stage.mkdir()
    (stage / "health.jsonl").write_text("")
    (stage / "plan.json").write_text('{"planned": 9}')
    (record,) = read_run(stage, STAGES.values()).stages
    assert record.directory == stage and progress(record) == (0, 9)


def test_small_curves():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([2.0, 2.0]) == "▅▅" and sparkline([]) == "" and sparkline([float("nan"), 1.0, 0.0]) == "█▁"
    assert sparkline(list(range(64)), columns=8) == "▁▂▃▄▅▆▇█"
    assert (duration(59.6), duration(61), duration(3661)) == ("01:00", "01:01", "1:01:01")


def test_responses_are_found_by_iteration_score_and_text(run):
    found = KeptResponses.read(run)
    assert found.notes == ["rollouts.jsonl: its last line is half-written (passed over)"] and len(found.lines) == 6
    assert [line["response"] for line in found.chosen(count=2)] == ["답 3.1", "답 3.0"]
    assert [line["response"] for line in found.chosen(order="worst", count=2)] == ["답 3.0", "답 2.0"]
    assert [line["response"] for line in found.chosen(iteration=2, order="best")] == ["답 2.1", "답 2.0"]
    assert [line["response"] for line in found.chosen(contains="묻기 1")] == ["답 1.1", "답 1.0"]
    with pytest.raises(NoRolloutsError, match="has no iteration 9: it has 1 to 3"):
        found.chosen(iteration=9)


def test_the_command_shows_them_for_reading_or_as_json(run, tmp_path, capsys):
    assert rlhf(["samples", str(run), "--iteration", "3", "--worst", "--count", "1"]) == 0
    told = capsys.readouterr()
    assert told.out == (
        "--- iteration 3, score -0.30, ends +1.00, KL 0.50, 4 tokens, does not end\n묻기 3\n-> 답 3.0\n\n"
    )
    assert "half-written" in told.err
    assert rlhf(["samples", str(run / "ppo"), "--json", "--best"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["response"] == "답 1.1"
    assert rlhf(["samples", str(tmp_path / "sft")]) == 2
    assert "has no rollouts.jsonl" in capsys.readouterr().err
    assert rlhf(["samples", str(run), "--contains", "없는 말"]) == 0
    told = capsys.readouterr()
    assert told.out == "" and "none has that text" in told.err


def test_every_subcommand_is_a_module_that_is_imported_when_it_is_asked_for(capsys):
    for name in SUBCOMMANDS:
        with pytest.raises(SystemExit) as ended:
            rlhf([name, "--help"])
        assert ended.value.code == 0 and f"rlhf {name}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        rlhf(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in SUBCOMMANDS)
    with pytest.raises(SystemExit) as ended:
        rlhf(["nothing"])
    assert ended.value.code == 2
