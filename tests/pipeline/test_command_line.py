"""A stage's script reads its command line before it loads torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rlhf.pipeline.stages import PROJECT, STAGES

RUN = (
    "import runpy, sys\n"
    "sys.argv = sys.argv[1:]\n"
    "try:\n"
    "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    "finally:\n"
    "    print('torch' in sys.modules)\n"
)


def script(stage, *words, **environment):
    command = [sys.executable, "-c", RUN, str(PROJECT / STAGES[stage].script), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={"PATH": "", **environment})


@pytest.mark.parametrize("stage", STAGES)
def test_a_mistake_and_help_come_before_torch(stage):
    done = script(stage, "--learning_rat", "1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: command line: unknown field `learning_rat`; did you mean learning_rate")
    assert done.stderr.count("\n") == 1
    assert done.stdout == "False\n"
    done = script(stage, "--help")
    assert done.returncode == 0 and done.stdout.endswith("False\n")
    assert done.stdout.count("--learning_rate ") == 1 and done.stderr == ""


def test_what_parts_contradict_is_a_mistake_too():
    done = script("ppo", "--ptx_coef", "1")
    assert done.returncode == 2 and done.stderr.startswith("error: ptx_coef=1.0 needs data")


def test_one_rank_speaks_for_its_machine():
    ranks = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    done = script("sft", "--learning_rat", "1", **ranks)
    assert done.returncode == 2 and done.stderr == "" and done.stdout == "False\n"
    assert script("sft", "--help", **ranks).stdout == "False\n"
    assert "error: " in script("sft", "--learning_rat", "1", RANK="2", LOCAL_RANK="0", WORLD_SIZE="4").stderr
