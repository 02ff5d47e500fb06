"""Finished, running, cut short, never begun: what a run's directory says (real processes: tests/slow)."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time

import pytest

from rlhf.checkpoint.run_lock import RunLock, is_held
from rlhf.cli.__main__ import main
from rlhf.distributed.peers import GONE_MACHINE_SECONDS
from rlhf.doctor.run_state import run_state
from tests.support.held_directory import left_behind, without_flock


def begin(directory, *, result=None):
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text('{"step": 0, "eval_rows": 52.0}\n', encoding="utf-8")
    if result is not None:
        (directory / "result.json").write_text(result, encoding="utf-8")
    return directory


def status(directory, capsys):
    """Exit status and text of `rlhf doctor`."""
    found = main(["doctor", str(directory)])
    return found, " ".join(capsys.readouterr().out.split())


def test_a_stage_that_holds_its_directory_runs_and_one_that_does_not_was_cut_short(tmp_path, capsys):
    directory = begin(tmp_path / "sft")
    with RunLock(directory):
        assert run_state(directory).kind == "running"
    found, text = status(tmp_path, capsys)
    assert found == 3 and "sft: incomplete; last line at step 0" in text
    assert "[critical] the stage has not come to its end" in text and "--resume auto" in text
    assert text.endswith("diagnosis: incomplete, 1 finding")
    (directory / "result.json").write_text('{"seed": 1}', encoding="utf-8")
    assert status(tmp_path, capsys)[0] == 0


def test_a_running_run_is_told_as_one(tmp_path, capsys):
    with RunLock(begin(tmp_path / "sft")):
        found, text = status(tmp_path, capsys)
    assert found == 0 and text.endswith("diagnosis: healthy so far: it is running")


@pytest.mark.parametrize("result", ["{", "[1]", "{}", ""])
def test_a_result_that_is_none_counts_as_none(tmp_path, result):
    assert run_state(begin(tmp_path / "sft", result=result)).kind == "incomplete"


def test_how_it_ended_is_told(tmp_path):
    directory = begin(tmp_path / "sft")
    assert run_state(directory).reason == "no result.json; nobody holds the directory; no training state is there"
    left_behind(directory, host="node-2", pid=5, birth="1")
    (directory / "states" / "step-00000040").mkdir(parents=True)
    (directory / "states" / "step-00000120").mkdir()
    reason = run_state(directory).reason
    assert "process 5 on node-2, since then, is gone" in reason and "is step-00000120" in reason
    (directory / "stopped.json").write_text('{"step": 7, "signal": "SIGTERM", "saved": true}', encoding="utf-8")
    assert "stopped in good order by SIGTERM at step 7" in run_state(directory).reason


def test_a_stage_that_was_begun_has_left_a_lock_with_its_name_or_a_line(tmp_path, capsys):
    """Killed while it read its data: no metrics yet."""
    (tmp_path / "sft").mkdir()
    assert run_state(tmp_path / "sft").kind == "not started"
    (tmp_path / "sft" / ".lock").write_text("")
    assert run_state(tmp_path / "sft").kind == "not started", "refused, or removed by --overwrite"
    assert main(["doctor", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "metrics.jsonl, health.jsonl, result.json or a .lock that names a process" in message
    left_behind(tmp_path / "sft", birth="1")
    assert run_state(tmp_path / "sft").kind == "incomplete"
    assert main(["doctor", str(tmp_path)]) == 3 and main(["doctor", str(tmp_path / "sft")]) == 3


# ------------------------------------------------------------------------------- a process of another machine


def show_life(directory, seconds_ago):
    (directory / ".ranks").mkdir(exist_ok=True)
    path = directory / ".ranks" / "rank_00000.json"
    path.write_text("{}")
    os.utime(path, (time.time() - seconds_ago, time.time() - seconds_ago))


@pytest.mark.parametrize("locks", ["flock", "without_flock"])
def test_of_another_machine_its_signs_of_life_decide(tmp_path, monkeypatch, locks):
    """Its lock may not be seen from here, where each machine keeps its own."""
    if locks == "without_flock":
        without_flock(monkeypatch)
    directory = begin(tmp_path / "sft")
    left_behind(directory, host="elsewhere", pid=5)
    assert is_held(directory / ".lock") is None
    assert run_state(directory).kind == "incomplete"
    show_life(directory, 1)
    assert run_state(directory).kind == "running"
    show_life(directory, GONE_MACHINE_SECONDS + 5)
    assert run_state(directory).kind == "incomplete"


def test_without_flock_the_process_that_is_named_decides(tmp_path, monkeypatch):
    without_flock(monkeypatch)
    directory = begin(tmp_path / "sft")
    left_behind(directory)  # this process
    assert run_state(directory).kind == "running"
    left_behind(directory, birth="1")  # an earlier one of its number
    assert run_state(directory).kind == "incomplete"


def test_looking_takes_no_lock_and_changes_nothing(tmp_path):
    directory = begin(tmp_path / "sft")
    left_behind(directory, birth="1")
    before = (directory / ".lock").read_bytes()
    assert run_state(directory).kind == "incomplete"
    assert (directory / ".lock").read_bytes() == before
    with RunLock(directory):
        pass
    shutil.rmtree(directory)
    assert is_held(directory / ".lock") is False


# -------------------------------------------------------------------------------------------------- run_all.sh


def asked_for(run_dir, *stages):
    (run_dir / ".pipeline.stages").write_text("".join(f"{stage}\n" for stage in stages), encoding="utf-8")


def test_stages_that_were_asked_for_and_never_began(tmp_path, capsys):
    begin(tmp_path / "sft", result='{"seed": 1}')
    assert status(tmp_path, capsys)[0] == 0, "stages run one by one: nobody asked for more"
    asked_for(tmp_path, "sft")
    assert status(tmp_path, capsys)[0] == 0, "--stages sft"
    asked_for(tmp_path, "sft", "reward")
    found, text = status(tmp_path, capsys)
    assert found == 3 and "reward: not started" in text and "run_all.sh was asked for it" in text
    assert text.count("(run_incomplete)") == 1, "nobody asked for PPO"


def test_from_inside_a_stages_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(begin(tmp_path / "reward"))
    asked_for(tmp_path, "sft", "reward")
    with (tmp_path / ".pipeline.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert status(".", capsys)[0] == 0
    assert status(".", capsys)[0] == 3


def test_between_two_stages_of_a_run_all_that_lives(tmp_path, capsys):
    begin(tmp_path / "sft", result='{"seed": 1}')
    begin(tmp_path / "reward")  # died, and is started again by --max_restarts
    asked_for(tmp_path, "sft", "reward", "ppo")
    with (tmp_path / ".pipeline.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found, text = status(tmp_path, capsys)
        assert text.endswith("so far: it is running")
        assert found == 0 and "reward: waiting" in text and "ppo: not started" in text
        asked_for(tmp_path, "ppo")
        assert run_state(tmp_path / "reward").kind == "incomplete", "what lives was not asked for it"
    assert status(tmp_path, capsys)[0] == 3


def test_while_an_earlier_stage_runs_elsewhere_nothing_is_missed(tmp_path, capsys):
    """The lock of run_all.sh is another machine's, which is not seen held from here."""
    left_behind(begin(tmp_path / "sft"), host="elsewhere", pid=5)
    begin(tmp_path / "reward")  # of an earlier run, which was interrupted
    asked_for(tmp_path, "sft", "reward", "ppo")
    show_life(tmp_path / "sft", 1)
    found, text = status(tmp_path, capsys)
    assert found == 0 and "sft: running" in text and "reward: waiting" in text and "ppo: not started" in text
    assert status(tmp_path / "reward", capsys)[0] == 0
    show_life(tmp_path / "sft", GONE_MACHINE_SECONDS + 5)
    found, text = status(tmp_path, capsys)
    assert found == 3 and text.count("(run_incomplete)") == 3


def test_a_later_stage_that_runs_does_not_excuse_an_earlier_one(tmp_path):
    begin(tmp_path / "sft")
    asked_for(tmp_path, "sft", "reward")
    with RunLock(begin(tmp_path / "reward")):
        assert run_state(tmp_path / "sft").kind == "incomplete"


def test_between_two_stages_of_a_run_all_on_another_machine(tmp_path):
    begin(tmp_path / "sft", result='{"seed": 1}')
    asked_for(tmp_path, "sft", "reward")
    lock = tmp_path / ".pipeline.lock"
    left_behind(tmp_path, host="elsewhere", pid=5)
    (tmp_path / ".lock").rename(lock)
    assert is_held(lock) is None and run_state(tmp_path / "reward").kind == "not started"
    long_ago = time.time() - GONE_MACHINE_SECONDS - 5
    os.utime(tmp_path / "sft" / "result.json", (long_ago, long_ago))
    os.utime(lock, (long_ago, long_ago))
    assert run_state(tmp_path / "reward").kind == "incomplete"


def test_what_to_do_is_told_by_case(tmp_path, capsys):
    asked_for(tmp_path, "sft", "reward")
    directory = begin(tmp_path / "sft")
    text = status(tmp_path, capsys)[1]
    assert "--resume auto (in place of --overwrite): no state was saved, so it begins at step 0" in text
    assert "skips the stages that are finished, and begins this one" in text and "last training state." not in text
    (directory / "states" / "step-00000040").mkdir(parents=True)
    text = status(tmp_path, capsys)[1]
    assert "--resume auto (in place of --overwrite): it goes on from the last training state." in text


def test_incomplete_goes_before_findings_which_are_told_all_the_same(tmp_path, capsys):
    directory = begin(tmp_path / "sft")
    line = {"step": 0, "eval_rows": 2.0}
    (directory / "metrics.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    found, text = status(tmp_path, capsys)
    assert found == 3 and "too few held-out rows to say" in text and "diagnosis: incomplete, 2 findings" in text
    with RunLock(directory):
        assert status(tmp_path, capsys)[0] == 1
