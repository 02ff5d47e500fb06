"""Progress: a bar for somebody who watches, few plain lines for a file or a pipe."""

import logging
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from rlhf.distributed import progress
from rlhf.distributed.progress import Progress

ROOT = Path(__file__).parents[2]
LOOP = """
import time
from rlhf.distributed import progress
from rlhf.distributed.log import setup_logging
from rlhf.distributed.progress import Progress
progress.FIRST_LINE_SECONDS, progress.LINE_SECONDS = 0.1, 0.25
setup_logging()
with Progress(40, "sft", "step") as bar:
    for _ in range(40):
        time.sleep(0.025)
        bar.advance(loss=1.25)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0"}


def test_a_pipe_gets_a_line_now_and_then_and_one_at_the_end():
    done = subprocess.run([sys.executable, "-c", LOOP], env=environment(), capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert done.stderr == "" and "\r" not in done.stdout
    assert 3 <= len(lines) <= 6, "a second of work, a line at once and every quarter of it"
    assert int(lines[0].split()[1]) <= 8, "the first one tells early how long it will take"
    for line in lines[:-1]:
        assert re.fullmatch(r"sft: \d+ of 40 steps, loss 1\.2500, 00:0[01] left", line), line
    assert re.fullmatch(r"sft: 40 of 40 steps, loss 1\.2500, 00:0[12]", lines[-1])


def test_a_terminal_gets_a_bar_and_no_lines():
    mine, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 100))
    process = subprocess.Popen([sys.executable, "-c", LOOP], env=environment(), stdout=its, stderr=its)
    os.close(its)
    shown = b""
    while True:
        try:
            part = os.read(mine, 65536)
        except OSError:  # the last writer is gone
            break
        shown += part
    text = shown.decode()
    assert process.wait(timeout=60) == 0, text
    assert text.count("\r") > 5 and "40/40" in text and "loss=1.25" in text
    assert "of 40 steps" not in text


@pytest.fixture
def every_step(monkeypatch, caplog):
    monkeypatch.setattr(progress, "FIRST_LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    caplog.set_level(logging.INFO, logger="rlhf")
    return caplog


def test_the_time_left_goes_by_the_steps_of_this_process(every_step, monkeypatch):
    clock = iter([0.0, 10.0, 20.0, 30.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Progress(100, "ppo", "iteration", done=70) as bar:
        bar.advance()
        bar.advance(score=0.12345)
    assert every_step.messages == [
        "ppo: 71 of 100 iterations, 04:50 left",
        "ppo: 72 of 100 iterations, score 0.1235, 04:40 left",
        "ppo: 72 of 100 iterations, score 0.1235, 00:30",
    ]


def test_an_error_has_the_last_word(every_step):
    with pytest.raises(ValueError), Progress(3, "sft", "step") as bar:
        bar.advance()
        raise ValueError
    assert len(every_step.messages) == 1


def test_what_is_not_shown_and_other_ranks_say_nothing(every_step, monkeypatch):
    with Progress(2, "tokenise", "text", shown=False) as bar:
        bar.advance()
    monkeypatch.setattr(progress, "is_main", lambda: False)
    with Progress(2, "sft", "step") as bar:
        bar.advance()
    assert every_step.messages == []
