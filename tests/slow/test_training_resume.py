"""A run that was stopped, killed or moved goes on as if nothing had been; a run of something else is refused."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rlhf.training.resume
from rlhf.checkpoint.run_lock import RunLock
from rlhf.config import ConfigError
from rlhf.distributed.rank_watch import Stopped
from rlhf.training.resume import IDENTITY_VERSION
from step1_sft.main import main as sft
from step2_reward.main import main as reward
from step3_ppo.main import main as ppo
from tests.slow.chaos.kill_and_resume import Setting, differences, finish, kill_and_resume, metrics, write_data
from tests.support.pipeline_worker import ON_POLICY, SMALL


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    write_data(directory)
    return directory


def arguments(base: Path, data: Path, output: Path, *extra: str) -> dict[str, list[str]]:
    """Command lines of the three stages for a run in this process."""
    common = ["--output_dir", str(output), "--cache_dir", str(data / "cache"), "--base_model", str(base)]
    common += [*SMALL.split(), "--save_every_steps", "1", "--log_every_steps", "6", "--model_dropout", "0.1", *extra]
    files = {
        "sft": ("sft", "sft", ["--max_steps", "6", "--eval_every_steps", "2"]),
        "reward": ("preference", "preference", ["--max_steps", "3"]),
        "ppo": ("prompt", "prompts", ["--max_steps", "4", *ON_POLICY.split()]),
    }
    return {
        stage: [*common, f"--{field}_data", f"{data}/{name}.jsonl", f"--{field}_eval_data", f"{data}/{name}_eval.jsonl"]
        + more
        for stage, (field, name, more) in files.items()
    }


MAINS = {"sft": sft, "reward": reward, "ppo": ppo}


@pytest.fixture(scope="module")
def whole(micro_base, data, tmp_path_factory) -> Path:
    """The three stages, never interrupted."""
    output = tmp_path_factory.mktemp("whole")
    for stage, line in arguments(micro_base, data, output).items():
        MAINS[stage](line)
    return output


def stop_when_saved(states: Path) -> threading.Thread:
    """Ask this process to stop as soon as a state is there."""

    def watch() -> None:
        until = time.monotonic() + 120
        while not list(states.glob("step-*")) and time.monotonic() < until:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def interrupt(stage: str, line: list[str], output: Path) -> Stopped:
    """Start a stage and stop it after its first saved state."""
    thread = stop_when_saved(output / stage / "states")
    with pytest.raises(Stopped) as stopped:
        MAINS[stage](line)
    thread.join()
    return stopped.value


def test_a_stopped_run_goes_on_to_the_same_bytes(whole, micro_base, data, tmp_path):
    """With dropout, in the middle of the logging interval, with evaluations before and after the stop."""
    lines = arguments(micro_base, data, tmp_path)
    for stage, line in lines.items():
        stopped = interrupt(stage, line, tmp_path)
        told = json.loads((tmp_path / stage / "stopped.json").read_text())
        assert told == {"step": stopped.step, "signal": "SIGTERM", "saved": True}
        assert stopped.step < {"sft": 6, "reward": 3, "ppo": 4}[stage], "nothing was left to do"
        assert not (tmp_path / stage / "result.json").exists()
        MAINS[stage]([*line, "--resume", "auto"])
        assert not list((tmp_path / stage).glob("states/step-*")), "a finished run needs no state"
        assert not (tmp_path / stage / "stopped.json").exists()
    assert differences(whole, tmp_path, tuple(lines)) == []
    assert [row["step"] for row in metrics(tmp_path / "sft")] == [0, 2, 4, 6, 6]
    starts = [json.loads(line) for line in (tmp_path / "ppo" / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 2 and all(start["packages"]["torch"] == torch.__version__ for start in starts)
    kept = [json.loads(line) for line in (tmp_path / "ppo" / "rollouts.jsonl").read_text().splitlines()]
    assert {line["iteration"] for line in kept} == {1, 2, 3, 4} and len(kept) % 4 == 0
    for iteration in range(1, 5):
        scores = [line["score"] for line in kept if line["iteration"] == iteration]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    "control", ["--length_control odin --cross_prompt_share 0.5", "--length_control calibrate --eval_every_steps 1"]
)
def test_a_stopped_reward_model_with_length_control_goes_on_to_the_same_bytes(control, micro_base, data, tmp_path):
    """A second head and rows that are drawn belong to the state; with dropout, which ODIN's look ahead leaves alone."""
    outputs = [tmp_path / "whole", tmp_path / "stopped"]
    lines = [[*arguments(micro_base, data, output)["reward"], *control.split()] for output in outputs]
    reward(lines[0])
    stopped = interrupt("reward", lines[1], outputs[1])
    assert stopped.step < 3, "nothing was left to do"
    reward([*lines[1], "--resume", "auto"])
    assert metrics(outputs[0] / "reward") == metrics(outputs[1] / "reward")
    files = [{each.name: each.read_bytes() for each in (output / "reward" / "model").iterdir()} for output in outputs]
    assert files[0] == files[1]
    assert ("length_curve.json" in files[0]) == ("calibrate" in control)


def test_the_best_model_so_far_is_not_replaced_by_a_worse_one(micro_base, data, tmp_path):
    """The learning rate is so high that every evaluation is worse than the one before the stop."""
    extra = ["--learning_rate", "0.1", "--save_every_steps", "3"]
    outputs = [tmp_path / "whole", tmp_path / "stopped"]
    lines = [[*arguments(micro_base, data, output)["sft"], *extra] for output in outputs]
    sft(lines[0])
    interrupt("sft", lines[1], outputs[1])
    sft([*lines[1], "--resume", "auto"])
    results = [json.loads((output / "sft" / "result.json").read_text()) for output in outputs]
    assert [result["best_step"] for result in results] == [2, 2]
    weights = [(output / "sft" / "model" / "model.safetensors").read_bytes() for output in outputs]
    assert weights[0] == weights[1]


def test_a_stopped_run_that_keeps_the_best_goes_on_to_the_same_choice(micro_base, data, whole, tmp_path):
    """The best so far, the patience that is used up and the length curve belong to the state."""
    extra = [f"--reward_model={whole}/reward/model", f"--actor_model={whole}/sft/model", "--learning_rate=0.02"]
    extra += ["--max_steps=8", "--eval_every_steps=1", "--keep_best=reward", "--stop_when=reward", "--patience=2"]
    extra += ["--length_calibration_prompts=8", "--length_calibration_every=2"]
    outputs = [tmp_path / "whole", tmp_path / "stopped"]
    lines = [[*arguments(micro_base, data, output)["ppo"], *extra] for output in outputs]
    ppo(lines[0])
    interrupt("ppo", lines[1], outputs[1])
    ppo([*lines[1], "--resume", "auto"])
    results = [json.loads((output / "ppo" / "result.json").read_text()) for output in outputs]
    assert results[0]["iterations"] < results[0]["planned_iterations"] == 8, "it was to end early"
    assert 0 < results[0]["kept_iteration"] < results[0]["iterations"]
    assert metrics(outputs[0] / "ppo") == metrics(outputs[1] / "ppo")
    same = ("iterations", "kept_iteration", "score_after", "reward_after", "samples")
    assert [results[0][name] for name in same] == [results[1][name] for name in same]
    weights = [(output / "ppo" / "actor" / "model.safetensors").read_bytes() for output in outputs]
    assert weights[0] == weights[1]


def test_a_run_without_a_critic_on_a_function_goes_on_to_the_same_bytes(micro_base, data, whole, tmp_path):
    """No reward model is there at all; the function belongs to the run, so that another content is another run."""
    file = tmp_path / "mine.py"
    file.write_text("def score(prompts, responses):\n    return [len(set(response)) / 10 for response in responses]\n")
    extra = [f"--actor_model={whole}/sft/model", "--advantage=grpo", "--samples_per_prompt=2", "--max_steps=4"]
    extra += ["--rollout_batch_size=8", "--ppo_epochs=2", "--eval_samples_per_prompt=1"]
    outputs = [tmp_path / "whole", tmp_path / "stopped"]
    lines = [[*arguments(micro_base, data, output)["ppo"], *extra] for output in outputs]
    lines = [[*line, "--rewards", f"{file}:score", "ends"] for line in lines]
    ppo(lines[0])
    assert interrupt("ppo", lines[1], outputs[1]).step < 4
    content = file.read_text()
    file.write_text(content.replace("10", "9"))
    with pytest.raises(ConfigError, match=r"is of another run: .*rewards\[0\] was"):
        ppo([*lines[1], "--resume", "auto"])
    file.write_text(content)
    ppo([*lines[1], "--resume", "auto"])
    assert metrics(outputs[0] / "ppo") == metrics(outputs[1] / "ppo")
    weights = [(output / "ppo" / "actor" / "model.safetensors").read_bytes() for output in outputs]
    assert weights[0] == weights[1] and not (outputs[0] / "ppo" / "critic").exists()
    samples = json.loads((outputs[0] / "ppo" / "samples.json").read_text())["samples"]
    assert samples and all(sample["score_ppo"] >= 0 for sample in samples)


def test_what_is_not_the_same_run_is_refused_with_the_difference_named(whole, micro_base, data, tmp_path, monkeypatch):
    line = arguments(micro_base, data, tmp_path)["sft"]
    interrupt("sft", line, tmp_path)
    with pytest.raises(ConfigError, match=r"unfinished run, saved after step \d.*--resume auto.*--resume never"):
        sft(line)
    with pytest.raises(ConfigError, match="learning_rate was 0.001 and is 0.002"):
        sft([*line, "--learning_rate", "2e-3", "--resume", "auto"])
    assert "learning_rate: 0.001" in (tmp_path / "sft" / "config.yaml").read_text(), "a refusal changes nothing"
    assert len((tmp_path / "sft" / "starts.jsonl").read_text().splitlines()) == 1
    less = tmp_path / "less.jsonl"
    less.write_text("".join((data / "sft.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:-1]))
    with pytest.raises(ConfigError, match="data was"):
        sft([*line, "--sft_data", str(less), "--resume", "auto"])
    with pytest.raises(ConfigError, match="base.model.safetensors was"):
        sft([*line, "--base_model", str(whole / "sft" / "model"), "--resume", "auto"])
    newest = max((tmp_path / "sft" / "states").glob("step-*"))
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="by an earlier release.*--resume never"):
        patch.setattr(rlhf.training.resume, "IDENTITY_VERSION", IDENTITY_VERSION + 1)
        sft([*line, "--resume", "auto"])
    assert newest.is_dir(), "a refusal must not cost the state"
    sft([*line, "--resume", "never"])
    assert metrics(tmp_path / "sft") == metrics(whole / "sft")


def test_a_finished_run_is_left_alone_and_done_again_only_to_overwrite_it(whole, micro_base, data, tmp_path):
    line = [*arguments(micro_base, data, tmp_path)["sft"], "--max_steps", "1"]
    sft(line)
    model = tmp_path / "sft" / "model" / "model.safetensors"
    made = model.stat().st_mtime_ns
    result = sft([*line, "--resume", "auto"])
    assert result == json.loads((tmp_path / "sft" / "result.json").read_text())
    with pytest.raises(ConfigError, match="holds a finished run"):
        sft(line)
    assert model.stat().st_mtime_ns == made
    sft([*line, "--overwrite"])
    assert model.stat().st_mtime_ns > made


def test_a_directory_that_takes_no_state_stops_no_training(micro_base, data, tmp_path, caplog):
    """A file lies where the states' directory should be: every save fails."""
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "states").write_text("in the way")
    logging.getLogger("rlhf").propagate = True
    sft([*arguments(micro_base, data, tmp_path)["sft"], "--max_steps", "2"])
    assert (tmp_path / "sft" / "result.json").is_file()
    assert any("states" in record.message for record in caplog.records if record.levelno >= logging.ERROR)


def test_two_runs_never_write_one_directory(micro_base, data, tmp_path):
    (tmp_path / "sft").mkdir()
    with RunLock(tmp_path / "sft"), pytest.raises(ConfigError, match="already holds"):
        sft(arguments(micro_base, data, tmp_path)["sft"])


def test_two_ranks_are_refused_together_and_told_once_who_holds_the_directory(micro_base, data, tmp_path):
    (tmp_path / "sft").mkdir()
    with RunLock(tmp_path / "sft"):
        process = Setting(micro_base, data, ranks=2).start(tmp_path)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    assert output.count(f"process {os.getpid()} on ") == 1, output
    assert "Traceback" not in output


def test_ppo_on_adapters_does_not_depend_on_who_merged_them(micro_base, data, tmp_path):
    """The first run merges the SFT adapter and draws random numbers for it, a second one finds it merged."""
    lines = arguments(micro_base, data, tmp_path, "--lora_rank", "4")
    for stage, line in lines.items():
        MAINS[stage]([*line, "--max_steps", "1"])
    first = metrics(tmp_path / "ppo")
    assert list((tmp_path / "sft" / "model").glob("merged/*")), "nothing is merged any more: this test looks elsewhere"
    ppo([*lines["ppo"], "--max_steps", "1", "--overwrite"])
    assert metrics(tmp_path / "ppo") == first


def test_permanent_states_stay_after_the_run(micro_base, data, tmp_path):
    sft([*arguments(micro_base, data, tmp_path)["sft"], "--save_every_steps", "1", "--keep_every", "2"])
    names = sorted(path.name for path in (tmp_path / "sft" / "states").glob("step-*"))
    assert names == ["step-00000002", "step-00000004", "step-00000006"]


# ---------------------------------------------------------------------------------------- kill -9, real launcher


SETTINGS = {
    "two ranks, ZeRO-2": {"ranks": 2, "zero_stage": 2},
    "4-bit with LoRA": {
        "extra": (
            "--quantization",
            "4bit",
            "--lora_rank",
            "4",
            "--model_dropout",
            "0.1",
            "--offline",
            "rrhf",
            "--advantage",
            "grpo",
        )
    },
}
"""Two of many: `python -m tests.slow.chaos.kill_and_resume` takes any."""


@pytest.fixture(scope="module", params=SETTINGS)
def launched(request, micro_base, data, tmp_path_factory) -> tuple[Setting, Path]:
    """A run under the launcher that nobody kills."""
    setting = Setting(micro_base, data, **SETTINGS[request.param])
    output = tmp_path_factory.mktemp("launched")
    finish(setting.start(output))
    return setting, output


def test_a_killed_run_goes_on_to_the_same_bytes(launched, tmp_path):
    setting, expected = launched
    said = kill_and_resume(setting, tmp_path, kills=2, chance=random.Random(4))
    assert len(said) == 2
    assert differences(expected, tmp_path) == []


def test_a_run_goes_on_with_other_ranks_and_another_zero_stage(micro_base, data, tmp_path_factory):
    """Two ranks under ZeRO-3 are killed, one rank goes on without ZeRO: the same run but for rounding (1e-3)."""
    outputs = [tmp_path_factory.mktemp("moved") for _ in range(2)]
    two, one = Setting(micro_base, data, ranks=2, zero_stage=3), Setting(micro_base, data)
    finish(one.start(outputs[0]))
    process = two.start(outputs[1])
    while process.poll() is None and not list(outputs[1].glob("sft/states/step-*1")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finish(one.start(outputs[1], "--resume", "auto"))
    for stage in ("sft", "reward", "ppo"):
        first, second = (metrics(output / stage) for output in outputs)
        assert [row["step"] for row in first] == [row["step"] for row in second]
        assert [row.get("eval_loss") for row in second] == pytest.approx(
            [row.get("eval_loss") for row in first], abs=1e-3
        )
    first, second = (load_file(output / "sft" / "model" / "model.safetensors") for output in outputs)
    assert max((first[name] - second[name]).abs().max() for name in first) < 2e-4
    assert not torch.equal(
        first["gpt_neox.embed_in.weight"], load_file(micro_base / "model.safetensors")["gpt_neox.embed_in.weight"]
    )
