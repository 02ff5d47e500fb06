"""The doctor beside a real stage: while it trains, after it was killed, after it was stopped, and when it is done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.cli.__main__ import main
from tests.slow.chaos.kill_and_resume import write_data
from tests.support.launch import LAUNCHER_VARIABLES, ROOT
from tests.support.pipeline_worker import SMALL


@pytest.fixture
def start(micro_base, tmp_path):
    """Start SFT in a process of its own; returns once it has trained two steps and saved one."""
    write_data(tmp_path)
    words = [sys.executable, str(ROOT / "step1_sft" / "main.py"), "--base_model", str(micro_base), *SMALL.split()]
    words += ["--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache"), "--save_every_steps", "1"]
    words += ["--sft_data", str(tmp_path / "sft.jsonl"), "--sft_eval_data", str(tmp_path / "sft_eval.jsonl")]
    started = []

    def begin(*more: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        for name in LAUNCHER_VARIABLES:
            environment.pop(name, None)
        with (tmp_path / "log").open("ab") as log:
            started.append(subprocess.Popen([*words, *more], stdout=log, stderr=log, env=environment, cwd=tmp_path))
        metrics = tmp_path / "run" / "sft" / "metrics.jsonl"
        before = metrics.read_text().count("\n") if metrics.exists() else 0
        until = time.monotonic() + 180
        while not metrics.exists() or metrics.read_text().count("\n") <= before + 2:
            assert time.monotonic() < until and started[-1].poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.05)
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def doctor(directory: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and text."""
    status = main(["doctor", str(directory)])
    return status, " ".join(capsys.readouterr().out.split())


def test_a_run_is_told_as_it_is(start, tmp_path, capsys):
    run = tmp_path / "run"
    process = start("--max_steps", "100000")
    status, text = doctor(run, capsys)  # 11 rows are held out, which is too few
    assert status == 1 and "sft: running; last line at step" in text and "run_incomplete" not in text
    process.kill()
    process.wait()
    status, text = doctor(run, capsys)
    assert status == 3 and "sft: incomplete; last line at step" in text
    assert f"process {process.pid} on" in text and ", is gone; the last training state is step-000" in text
    assert "diagnosis: incomplete, 2 findings" in text
    process = start("--max_steps", "100000", "--resume", "auto")
    assert doctor(run, capsys)[0] == 1, "it runs again"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0
    status, text = doctor(run, capsys)
    assert status == 3 and "stopped in good order by SIGTERM at step" in text


def test_a_run_that_is_done_is_complete(start, tmp_path, capsys):
    process = start("--max_steps", "20")
    assert process.wait(timeout=180) == 0, (tmp_path / "log").read_text()[-3000:]
    status, text = doctor(tmp_path / "run", capsys)
    assert status == 1 and "sft: finished (last line at step 20" in text and "run_incomplete" not in text
    assert "11 held out" in text and "(n = 11)" in text
