"""run_all.sh when a run is interrupted: stages skipped, started again, stopped in good order."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.cli.__main__ import main as doctor
from rlhf.config import ConfigError
from rlhf.distributed.processes import process_stat
from rlhf.pipeline.arguments import sort_arguments

ROOT = Path(__file__).parents[2]
STAGES = {"sft": "step1_sft", "reward": "step2_reward", "ppo": "step3_ppo"}

LAUNCHER = """
import os, subprocess, sys
def main():
    script = next(index for index, word in enumerate(sys.argv) if word.endswith("main.py"))
    sys.exit(subprocess.call([sys.executable, *sys.argv[script:]], env={**os.environ, "RANK": "0"}))
"""

FAKE_STAGE = """
# Notes how it was called; fails as often as FAIL says (`sft 2 3`: twice with status 3), then leaves a result.
import json, os, sys
from pathlib import Path
stage = "STAGE"
directory = Path(sys.argv[sys.argv.index("--output_dir") + 1]) / stage
directory.mkdir(parents=True, exist_ok=True)
with open(os.environ["CALLS"], "a") as calls:
    print(stage, "auto" if "auto" in sys.argv else "", file=calls)
    calls.flush()
failing, times, status = os.environ.get("FAIL", "none 0 0").split()
count = Path(os.environ["CALLS"]).read_text().split("\\n")
if stage == failing and sum(line.startswith(stage) for line in count) <= int(times):
    if status == "early":  # before it has looked at its directory
        sys.exit(3)
    (directory / ".cleared").touch()
    if status == "killed":
        os.kill(os.getpid(), 9)
    sys.exit(int(status))
(directory / "result.json").write_text(json.dumps({"seed": 1}))
"""

WATCHED_STAGE = """
# Two ranks that step until they are asked to stop.
import os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from rlhf.config import ConfigError, RunConfig
from rlhf.distributed import rank_watch
from rlhf.distributed.world import close_world
from rlhf.distributed.job_exit import run_to_end
directory = Path(sys.argv[sys.argv.index("--output_dir") + 1]) / "sft"
directory.mkdir(parents=True, exist_ok=True)
dist.init_process_group("gloo")
def main():
    with rank_watch.watched_ranks(directory, RunConfig(), "cpu"):
        for step in range(1, 100000):
            dist.all_reduce(torch.ones(1))
            time.sleep(0.01)
            rank_watch.beat(f"step {step}")
            if rank_watch.stop_requested():
                time.sleep(0.5)  # saving takes a while
                if dist.get_rank() == 0:
                    (directory / "saved").write_text(str(step))
                raise rank_watch.Stopped(step, directory, saved=True)
run_to_end(main, (ConfigError,))
close_world()
"""


class Pipeline:
    """A copy of the project with stages of a few lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.output = path / "out"
        self.environment = {
            "HOME": os.environ["HOME"],
            "PATH": os.environ["PATH"],
            "RLHF_PYTHON": sys.executable,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "CALLS": str(path / "calls"),
        }

    def start(self, *words: str, output: bool = True, **variables: str) -> subprocess.Popen[str]:
        named = ["--output_dir", str(self.output)] if output else []
        return subprocess.Popen(
            ["bash", str(self.path / "training_scripts" / "run_all.sh"), *named, *words],
            env={**self.environment, **variables},
            cwd=self.path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # bash cannot trap what its parent ignored, as the parent of a background job does
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *words: str, output: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*words, output=output, **variables)
        output, _ = process.communicate(timeout=180)
        return subprocess.CompletedProcess(words, process.returncode, output, "")

    @property
    def calls(self) -> list[str]:
        """Stages in the order they were started; `sft auto` where with --resume auto."""
        file = self.path / "calls"
        return [line.strip() for line in file.read_text().splitlines()] if file.exists() else []

    def finish(self, stage: str, content: str = '{"seed": 1}') -> None:
        (self.output / stage).mkdir(parents=True, exist_ok=True)
        (self.output / stage / "result.json").write_text(content)


def write_stages(path: Path, source: str) -> None:
    for stage, folder in STAGES.items():
        (path / folder).mkdir()
        (path / folder / "main.py").write_text(source.replace("STAGE", stage))


@pytest.fixture
def project(tmp_path) -> Path:
    path = tmp_path / "project"
    for folder in ("training_scripts", "rlhf"):
        shutil.copytree(ROOT / folder, path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.jsonl"))
    shutil.copy(ROOT / "setup.cfg", path)
    # stages of a few lines have nothing to check; tests/pipeline/test_preflight.py and test_scripts.py check real ones
    (path / "rlhf" / "pipeline" / "preflight.py").write_text("")
    return path


@pytest.fixture
def pipeline(project) -> Pipeline:
    """Fake stages under a launcher of a few lines (the real one takes longer to import than all of them to run)."""
    write_stages(project, FAKE_STAGE)
    package = project / "fake" / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    (package / "runner.py").write_text(LAUNCHER)
    for directory in (package, package.parent):
        (directory / "__init__.py").write_text("")
    made = Pipeline(project)
    made.environment["PYTHONPATH"] = str(project / "fake")
    return made


def test_finished_stages_are_skipped_until_one_has_to_run(pipeline):
    pipeline.finish("sft")
    pipeline.finish("ppo")  # of an earlier run: its SFT or reward model is not the one that is trained now
    done = pipeline.run("--resume", "auto", "--stages", "sft,reward,ppo", FAIL="ppo 1 5")
    assert pipeline.calls == ["reward auto", "ppo auto"]
    assert f"stage sft is finished ({pipeline.output}/sft/result.json): skipped" in done.stdout
    assert done.returncode == 5 and not (pipeline.output / "ppo" / "result.json").exists()


def test_a_damaged_result_is_no_finished_stage(pipeline):
    pipeline.finish("sft", '{"se')
    assert pipeline.run("--stages", "sft,reward", "--sft.resume", "auto").returncode == 0
    assert pipeline.calls == ["sft auto", "reward"]


def finish_all(pipeline: Pipeline) -> None:
    """A finished run with its summary, and models that tell it from a later one."""
    for stage in STAGES:
        pipeline.finish(stage)
        (pipeline.output / stage / "model").mkdir()
        (pipeline.output / stage / "model" / "weights").write_text("old")
    (pipeline.output / "summary.json").write_text("{}")


@pytest.mark.parametrize("words", [[], ["--resume", "never"], ["--short"], ["--stages", "ppo"]])
def test_a_finished_run_is_neither_replaced_nor_touched(pipeline, words):
    finish_all(pipeline)
    done = pipeline.run(*words)
    stage = "ppo" if "ppo" in words else "sft"
    assert done.returncode == 2 and pipeline.calls == [], done.stdout
    assert f"error: {pipeline.output}/{stage} holds a finished run" in done.stdout
    assert all(way in done.stdout for way in ("--overwrite", "--resume auto", "--output_dir"))
    assert (pipeline.output / "summary.json").exists() and (pipeline.output / "sft" / "model" / "weights").exists()


def test_overwrite_removes_every_stage_that_will_run_before_the_first_one(pipeline):
    """A reward model and an actor of the earlier run must not lie beside another SFT model, nor be described."""
    finish_all(pipeline)
    done = pipeline.run("--overwrite", FAIL="sft 9 5")
    assert done.returncode == 5 and pipeline.calls == ["sft"], done.stdout
    assert "run_all.sh: removing the earlier run in" in done.stdout
    left = {path.name for path in pipeline.output.rglob("*") if path.is_file()}
    assert left == {".pipeline.lock", ".pipeline.stages", ".cleared"}


def test_overwrite_spares_a_stage_that_is_left_out(pipeline):
    finish_all(pipeline)
    assert pipeline.run("--overwrite", "--stages", "reward,ppo").returncode == 0
    assert pipeline.calls == ["reward", "ppo"] and (pipeline.output / "sft" / "model" / "weights").exists()
    assert not (pipeline.output / "ppo" / "model").exists() and not (pipeline.output / "summary.json").exists()


def test_a_restart_within_a_run_that_overwrites_removes_nothing(pipeline):
    finish_all(pipeline)
    done = pipeline.run("--overwrite", "--stages", "sft,reward", "--max_restarts", "1", FAIL="reward 1 killed")
    assert done.returncode == 0 and pipeline.calls == ["sft", "reward", "reward auto"], done.stdout
    assert (pipeline.output / "sft" / "result.json").exists() and done.stdout.count("removing the earlier run") == 1
    assert "with --resume auto --overwrite false" in done.stdout, "the two would contradict each other"


def test_what_another_run_holds_is_not_removed(pipeline):
    finish_all(pipeline)
    with (pipeline.output / "ppo" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = pipeline.run("--overwrite")
    assert done.returncode == 2 and "ppo is in use by another run" in done.stdout and pipeline.calls == []
    assert (pipeline.output / "summary.json").exists() and (pipeline.output / "sft" / "model" / "weights").exists()


def test_a_trial_has_a_directory_of_its_own_and_replaces_the_trial_before(pipeline):
    """--short without --output_dir on the command line, whatever the configuration names."""
    finish_all(pipeline)
    config = pipeline.path / "mine.yaml"
    config.write_text(f"output_dir: {pipeline.output}\n")
    trial = pipeline.path / "out-short"
    for _ in range(2):
        done = pipeline.run("--config", str(config), "--short", "--stages", "sft,reward", output=False)
        assert done.returncode == 0, done.stdout
        assert (trial / "sft" / "result.json").exists() and not (trial / "reward" / "left").exists()
        (trial / "reward" / "left").touch()
    assert (pipeline.output / "sft" / "model" / "weights").read_text() == "old"
    assert (pipeline.output / "summary.json").exists()


def test_restarts_are_counted_over_the_run_and_go_on_from_the_saved_state(pipeline):
    done = pipeline.run("--stages", "sft,reward", "--max_restarts", "2", FAIL="sft 2 killed")
    assert done.returncode == 0, done.stdout
    assert pipeline.calls == ["sft", "sft auto", "sft auto", "reward"]
    words = [line for line in done.stdout.splitlines() if line.startswith("run_all.sh: ")]
    assert len(words) == 2 and "stage sft (step1_sft/main.py) failed (status 137: killed" in words[0]
    assert "restart 1 of 2, with --resume auto" in words[0] and "restart 2 of 2" in words[1]


def test_a_stage_that_died_before_it_cleared_its_directory_does_not_go_on_with_what_lies_there(pipeline):
    done = pipeline.run("--stages", "sft", "--resume", "never", "--max_restarts", "1", FAIL="sft 1 early")
    assert done.returncode == 0 and pipeline.calls == ["sft", "sft"]


def test_a_finished_stage_keeps_its_result_when_it_could_not_start_again(pipeline):
    pipeline.finish("sft")
    assert pipeline.run("--stages", "sft,reward", "--sft.resume", "auto", FAIL="reward 9 2").returncode == 2
    assert (pipeline.output / "sft" / "result.json").read_text() == '{"seed": 1}'


def test_nothing_starts_over_an_unfinished_later_stage(pipeline):
    """Training SFT anew would make the state of PPO worthless, and PPO would say so only after SFT."""
    pipeline.finish("sft")
    (pipeline.output / "ppo" / "states" / "step-00000003").mkdir(parents=True)
    done = pipeline.run("--stages", "sft,reward,ppo")
    assert done.returncode != 0 and pipeline.calls == []
    assert "unfinished run: go on with --resume auto" in done.stdout
    assert pipeline.run("--stages", "sft,reward,ppo", "--resume", "auto").returncode in (0, 1)  # 1: a made-up summary
    assert pipeline.calls == ["reward auto", "ppo auto"]


def test_one_that_looks_who_holds_the_directory_does_not_stop_a_pipeline(pipeline):
    pipeline.output.mkdir()
    look = 'touch "$0"; while :; do flock --shared "$0" sleep 0.3; done'
    looking = subprocess.Popen(["bash", "-c", look, str(pipeline.output / ".pipeline.lock")], start_new_session=True)
    try:
        assert pipeline.run("--stages", "sft").returncode == 0
        assert (pipeline.output / ".pipeline.lock").read_text() == "", "nobody's, after an end that is told"
    finally:
        os.killpg(looking.pid, signal.SIGKILL)
        looking.wait()


def test_two_pipelines_do_not_share_a_directory(pipeline):
    pipeline.output.mkdir()
    with (pipeline.output / ".pipeline.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = pipeline.run("--stages", "sft")
        assert done.returncode == 2 and "in use by another run_all.sh" in done.stdout and pipeline.calls == []
    assert pipeline.run("--stages", "sft").returncode == 0


@pytest.mark.parametrize(("status", "calls"), [("3", ["sft", "sft auto"]), ("2", ["sft"])])
def test_restarts_run_out_and_a_users_mistake_has_none(pipeline, status, calls):
    done = pipeline.run("--stages", "sft", "--max_restarts", "1", FAIL=f"sft 9 {status}")
    assert pipeline.calls == calls and done.returncode == int(status)
    assert f"error: stage sft (step1_sft/main.py) failed with status {status}; its messages are above" in done.stdout


# ------------------------------------------------------------------- two ranks that watch, under the real launcher


@pytest.fixture
def training(project) -> Callable[[], tuple[Pipeline, subprocess.Popen[str]]]:
    """Start run_all.sh; returns once both ranks train."""
    write_stages(project, WATCHED_STAGE)
    pipeline = Pipeline(project)

    def start() -> tuple[Pipeline, subprocess.Popen[str]]:
        process = pipeline.start("--num_devices", "2", "--max_restarts", "3")
        until = time.monotonic() + 120
        records = [pipeline.output / "sft" / ".ranks" / f"rank_0000{number}.json" for number in (0, 1)]
        while not all(file.exists() and json.loads(file.read_text())["beats"] > 5 for file in records):
            if time.monotonic() > until or process.poll() is not None:
                os.killpg(process.pid, signal.SIGKILL)
                raise AssertionError(process.communicate()[0])
            time.sleep(0.2)
        return pipeline, process

    return start


def rank_pids(pipeline: Pipeline) -> list[int]:
    files = sorted((pipeline.output / "sft" / ".ranks").glob("rank_*.json"))
    return [json.loads(file.read_text())["pid"] for file in files]


def test_a_signal_lets_the_ranks_save_and_ends_well(training):
    pipeline, process = training()
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does: to the whole foreground group
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    step = (pipeline.output / "sft" / "saved").read_text()
    assert f"stopped at step {step} by SIGINT; training state saved" in output
    assert "run_all.sh: stage sft has stopped in good order; go on with --resume auto" in output
    assert "2/3" not in output and "restart" not in output and "Traceback" not in output
    assert json.loads((pipeline.output / "sft" / "stopped.json").read_text())["step"] == int(step)


def test_a_second_signal_kills(training):
    pipeline, process = training()
    ranks = rank_pids(pipeline)
    os.kill(ranks[1], signal.SIGSTOP)  # the first signal waits for a step that does not end
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 143 and "SIGTERM again: killed" in output, output
    time.sleep(0.5)
    assert not [pid for pid in ranks if (stat := process_stat(pid)) is not None and stat.state != "Z"]


# ------------------------------------------------------------------------------------------------ pipeline_args


def test_stages_to_go_on_with_are_those_whose_resume_is_auto(tmp_path):
    pipeline = sort_arguments(["--resume", "auto", "--ppo.resume", "never"], user_dir=tmp_path)
    assert pipeline.resume_stages == ("sft", "reward")
    assert sort_arguments([], user_dir=tmp_path).resume_stages == ()
    pipeline = sort_arguments(["--resume", "auto", "--stages", "reward,ppo"], user_dir=tmp_path)
    assert pipeline.resume_stages == ("reward", "ppo") and pipeline.stage_arguments["ppo"] == ["--resume", "auto"]


def test_max_restarts_is_an_option_of_the_pipeline(tmp_path):
    pipeline = sort_arguments(["--max_restarts", "4"], user_dir=tmp_path)
    assert pipeline.max_restarts == 4 and pipeline.stage_arguments["sft"] == []
    assert sort_arguments([], user_dir=tmp_path).max_restarts == 0
    for wrong in ("-1", "often"):
        with pytest.raises(ConfigError, match="--max_restarts needs a whole number of at least 0"):
            sort_arguments([f"--max_restarts={wrong}"], user_dir=tmp_path)


# ------------------------------------------------------------------------------------------------------- doctor


@pytest.mark.parametrize(
    ("stages", "fail", "status"), [("sft", "", 0), ("sft,reward", "", 0), ("sft,reward", "reward", 3)]
)
def test_the_doctor_knows_which_stages_were_asked_for(pipeline, stages, fail, status, capsys):
    pipeline.run("--stages", stages, **({"FAIL": f"{fail} 9 2"} if fail else {}))
    assert doctor(["doctor", str(pipeline.output)]) == status
    assert ("run_all.sh was asked for it" in " ".join(capsys.readouterr().out.split())) == (status == 3)
