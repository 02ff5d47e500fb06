"""What `learning.py` runs: models made once by the stages' own scripts, and runs of either side kept as JSON.

A run is known by what it is made of (`Run.key`). Its file under `<work_dir>/results` has a point for each evaluation:
iteration, training seconds up to it (sampling, scoring, optimizer steps; neither evaluation nor the process's start),
KL to the SFT model in nats per response, the reward model's score, gold. A run that is there is not run again.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import BENCHMARKS, ROOT, worker_environment
from ppo_workloads import write_job

CONFIG = ROOT / "training_scripts" / "configs" / "default.yaml"
LENGTH_BIAS = 1.0
"""Of the length-biased annotator: 10 characters more are worth 1 in the exponent; gold of 1 is worth 11."""
QUICK = {
    "stage": ["--max_steps", "2"],
    "ppo": ["--rollout_batch_size", "8", "--global_batch_size", "4", "--micro_batch_size", "4", "--eval_prompts", "8",
            "--eval_samples_per_prompt", "1", "--max_response_tokens", "8"],
}  # fmt: skip
SAME = 1e-3
"""How far a score or the log-probability of a response may lie apart where two programs run the same model."""


@dataclass(frozen=True)
class RewardData:
    """The rankings of four that teach a reward model, in how many epochs, the bias of who ranked them, and what the
    reward stage does about it."""

    rankings: int
    epochs: int
    length_bias: float = 0.0
    length_control: str = "none"


REWARD_DATA = {
    "default": RewardData(4000, 1),
    "rankings-1000": RewardData(1000, 4),
    "rankings-250": RewardData(250, 4),
    "length-biased": RewardData(4000, 1, LENGTH_BIAS),
    **{f"length-{control}": RewardData(4000, 1, LENGTH_BIAS, control) for control in ("balance", "calibrate", "odin")},
}


@dataclass(frozen=True)
class Run:
    """One run of PPO: `side` ("ours", "trl"), the name of its reward data, and what differs from default.yaml."""

    side: str
    seed: int
    kl_coef: float
    steps: int
    reward: str = "default"
    changes: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The name of its file."""
        parts = [self.side, self.reward, f"seed{self.seed}", f"kl{self.kl_coef:g}", f"steps{self.steps}", *self.changes]
        return "_".join(parts)


@dataclass(frozen=True)
class Usage:
    """What a process took: its peak resident bytes, and its CPU seconds, which other work beside it hardly changes."""

    peak_bytes: int
    cpu_seconds: float


@dataclass(frozen=True)
class Workplace:
    """Where models and runs are kept, and what every process is given."""

    directory: Path
    threads: int
    base_model: str
    cache_dir: Path
    eval_every_steps: int
    quick: bool
    peer_python: Path | None

    # ------------------------------------------------------------------------------------------------- processes

    def run(self, command: Sequence[str], log: Path, *, python: Path | str = sys.executable) -> Usage:
        """Run `python *command` with its output in `log`. SystemExit with the last lines if it fails."""
        environment = {**worker_environment(self.threads), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen([str(python), *command], env=environment, cwd=ROOT, stdout=output, stderr=output)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # it is no longer there to be waited for
        if process.returncode != 0:
            tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-30:])
            raise SystemExit(f"{' '.join(command)[:300]} ended with status {process.returncode} ({log}):\n{tail}")
        return Usage(usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime)  # kilobytes on Linux

    def job(self, script: Path, content: dict[str, Any], directory: Path, *, python: Any = sys.executable) -> Any:
        """What `script` writes of a job, in a process of its own."""
        job_file, out_file = write_job(content, directory / f"{script.stem}-job.json"), directory / "out.json"
        self.run([str(script), str(job_file), str(out_file)], directory / f"{script.stem}.log", python=python)
        return json.loads(out_file.read_text(encoding="utf-8"))

    # ---------------------------------------------------------------------------------------------------- models

    def stage(self, module: str, directory: Path, seed: int, options: Sequence[str]) -> Path:
        """The model that a stage's script trains; trained first if it is not there."""
        name = module.split(".")[0].split("_")[1]
        model = directory / name / "model"
        if not (directory / name / "result.json").is_file():
            print(f"training {model}", file=sys.stderr, flush=True)
            command = ["-m", module, "--config", str(CONFIG), "--output_dir", str(directory), "--seed", str(seed)]
            command += ["--base_model", self.base_model, "--cache_dir", str(self.cache_dir), "--tensorboard", "false"]
            command += ["--overwrite", "true", *options, *(QUICK["stage"] if self.quick else [])]
            self.run(command, directory / f"{name}.log")
        return model

    def sft_model(self, seed: int) -> Path:
        """The model that every run of `seed` starts from."""
        return self.stage("step1_sft.main", self._models(seed), seed, [])

    def reward_model(self, name: str, seed: int) -> Path:
        """The reward model of `seed` that the data `name` teaches; the best of its evaluations is kept."""
        data, options = REWARD_DATA[name], []
        if name == "default":
            return self.stage("step2_reward.main", self._models(seed), seed, [])
        world = self.world(data)
        if data.epochs > 1:  # it learns its rankings by heart before the last one
            options += ["--epochs", str(data.epochs), "--eval_every_steps", "25"]
        options += ["--preference_data", str(world / "ranked_train.jsonl")]
        options += ["--preference_eval_data", str(world / "preference_heldout.jsonl")]
        options += ["--length_control", data.length_control]
        return self.stage("step2_reward.main", self._models(seed, name), seed, options)

    def reward_figures(self, run: Run) -> dict[str, Any]:
        """Of the reward model of `run`, on the held-out pairs of who taught it: accuracy, what the score follows."""
        file = self._models(run.seed, run.reward) / "reward" / "result.json"
        result = json.loads(file.read_text(encoding="utf-8"))
        return {"reward_accuracy": float(result["accuracy"]), "shortcuts": result["shortcuts"]}

    def _models(self, seed: int, reward: str = "default") -> Path:
        return self.directory / "models" / (f"seed{seed}" if reward == "default" else f"seed{seed}-{reward}")

    def world(self, data: RewardData) -> Path:
        """The files of the world in which `data` was ranked."""
        directory = self.directory / "data" / f"length-bias-{data.length_bias:g}-{data.rankings}"
        if not (directory / "written").is_file():
            command = ["-m", "rlhf.cli", "world", str(directory), "--length_bias", f"{data.length_bias:g}"]
            unread = [f"{name}=1" for name in ("sft_train", "preference_train", "prompts_train", "base")]
            self.run([*command, "--rows", f"ranked_train={data.rankings}", *unread], directory / "world.log")
            (directory / "written").touch()
        return directory

    # ------------------------------------------------------------------------------------------------------ runs

    def arguments(self, run: Run) -> list[str]:
        """What step3_ppo/main.py is given for `run`, without where it writes."""
        options = ["--config", str(CONFIG), "--actor_model", str(self.sft_model(run.seed)), "--reward_model",
                   str(self.reward_model(run.reward, run.seed)), "--seed", str(run.seed), "--kl_coef", str(run.kl_coef),
                   "--max_steps", str(run.steps), "--eval_every_steps", str(self.eval_every_steps), "--cache_dir",
                   str(self.cache_dir), "--tensorboard", "false", "--log_every_steps", "1"]  # fmt: skip
        options += QUICK["ppo"] if self.quick else []
        for change in run.changes:
            name, _, value = change.partition("=")
            options += [f"--{name}", value]
        return options

    def _file(self, run: Run) -> Path:
        settings = f"threads{self.threads}-every{self.eval_every_steps}"
        return self.directory / "results" / settings / f"{run.key}.json"

    def has(self, run: Run) -> bool:
        """Whether `run` is finished and kept."""
        return self._file(run).is_file()

    def result(self, run: Run) -> dict[str, Any]:
        """What `run` came to; run first if it is not there."""
        path = self._file(run)
        if not self.has(run):
            print(f"running {run.key}", file=sys.stderr, flush=True)
            directory = self.directory / "runs" / run.key
            shutil.rmtree(directory, ignore_errors=True)
            load = os.getloadavg()[0]
            found = (self._ours if run.side == "ours" else self._peer)(run, directory)
            facts = {"key": run.key, "threads": self.threads, "load_average": load}
            facts |= self.reward_figures(run)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(json.dumps({**facts, **found}, indent=1), encoding="utf-8")
            part.replace(path)
            shutil.rmtree(directory)
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content

    def _ours(self, run: Run, directory: Path) -> dict[str, Any]:
        command = ["-m", "step3_ppo.main", *self.arguments(run), "--output_dir", str(directory)]
        self.run(command, directory / "log.txt")
        lines = read_lines(directory / "ppo" / "metrics.jsonl")
        seconds = [one["seconds_experience"] + one["seconds_update"] for one in lines if "seconds_update" in one]
        evaluations = [
            {"iteration": line["step"], **{name.removeprefix("eval_"): value for name, value in line.items()}}
            for line in lines
            if "eval_score" in line
        ]
        findings = [entry for entry in read_lines(directory / "ppo" / "health.jsonl") if entry["event"] != "ended"]
        result = {
            "points": points_of(evaluations, seconds),
            "iteration_seconds": seconds,
            "findings": [{name: entry[name] for name in ("check", "at", "since", "message")} for entry in findings],
        }
        checked = self.directory / "evaluator_checked.json"
        if not checked.is_file():
            again = self.judged(run, [[run.steps, str(directory / "ppo" / "actor")]], directory)["evaluations"][0]
            write_job(check_same_evaluation(evaluations[-1], again), checked)
        return result

    def judged(self, run: Run, policies: list[Any], directory: Path, *, iterations: int = 0) -> dict[str, Any]:
        """`sides/rlhf_judge.py` of `run`'s arguments."""
        arguments = [*self.arguments(run), "--output_dir", str(directory)]
        job = {"arguments": arguments, "policies": policies, "iterations": iterations}
        found: dict[str, Any] = self.job(BENCHMARKS / "sides" / "rlhf_judge.py", job, directory)
        return found

    def _given(self, run: Run, directory: Path) -> dict[str, Any]:
        """The prompts of `run`, its models' word on some responses, and the evaluation of its start: alike for every
        KL coefficient, so that it is kept."""
        path = self.directory / "given" / f"{run.reward}_seed{run.seed}_steps{run.steps}.json"
        if not path.is_file():
            write_job(self.judged(run, [[0, None]], directory, iterations=run.steps), path)
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content

    def _peer(self, run: Run, directory: Path) -> dict[str, Any]:
        if run.changes or self.peer_python is None:
            raise SystemExit(f"{run.key}: TRL has no such run")
        config = stage_config(self.arguments(run))
        given = self._given(run, directory)
        job = {
            "actor": config.ppo.actor_model,
            "reward": config.ppo.reward_model,
            "seed": run.seed,
            "prompts": given["prompts"],
            "checked": given["checked"],
            "directory": str(directory),
            "save_every": self.eval_every_steps,
            "minibatch": config.batch.global_batch_size,
            "settings": peer_settings(config),
        }
        trained = self.job(BENCHMARKS / "peers" / "trl_learning.py", job, directory, python=self.peer_python)
        check_same_models(given["checked"], trained["checked"])
        evaluations = given["evaluations"] + self.judged(run, trained["saved"], directory)["evaluations"]
        seconds = [one["total"] for one in trained["iterations"]]
        facts = {name: trained[name] for name in ("optimizer", "threads", "versions", "iterations")}
        return {"points": points_of(evaluations, seconds), "iteration_seconds": seconds, "peer": facts}


def stage_config(arguments: Sequence[str]) -> Any:
    """The configuration that step 3 makes of its command line."""
    from rlhf.pipeline.stages import parse_stage

    return parse_stage("ppo", list(arguments))


def peer_settings(config: Any) -> dict[str, Any]:
    """Our configuration in the words of TRL's PPOConfig. One learning rate: that of the actor."""
    return {
        "learning_rate": config.optimizer.learning_rate,
        "lr_scheduler_type": config.optimizer.lr_schedule,
        "adam_beta1": config.optimizer.adam_betas[0],
        "adam_beta2": config.optimizer.adam_betas[1],
        "adam_epsilon": config.optimizer.adam_eps,
        "weight_decay": config.optimizer.weight_decay,
        "num_ppo_epochs": config.batch.ppo_epochs,
        "response_length": config.data.max_response_tokens,
        "temperature": config.ppo.temperature,
        "missing_eos_penalty": config.ppo.missing_eos_penalty,
        "kl_coef": config.ppo.kl_coef,
        "kl_estimator": config.ppo.kl_estimate,
        "whiten_rewards": config.ppo.whiten_rewards,
        "cliprange": config.ppo.clip_range,
        "cliprange_value": config.ppo.value_clip_range,
        "gamma": config.ppo.gamma,
        "lam": config.ppo.lam,
    }


def points_of(evaluations: Sequence[dict[str, Any]], seconds: Sequence[float]) -> list[dict[str, float]]:
    """A point for each evaluation, with the seconds of training before it; gold is there for prompts of the world."""
    before = [0.0, *itertools.accumulate(seconds)]
    kept = {"kl": "kl_per_response", "score": "score", "reward": "reward", "gold": "gold", "eos_rate": "eos_rate",
            "tokens": "response_tokens", "well_formed": "well_formed_responses"}  # fmt: skip
    return [
        {
            "iteration": int(one["iteration"]),
            "seconds": before[int(one["iteration"])],
            **{name: one[key] for name, key in kept.items()},
        }
        for one in evaluations
    ]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_same_evaluation(own: dict[str, Any], again: dict[str, Any]) -> dict[str, list[float]]:
    """Figures of our run's last evaluation and of the judge's of its exported actor; SystemExit if they differ."""
    names = ("gold", "score", "kl_per_response", "response_tokens")
    if any(abs(own[name] - again[name]) > SAME for name in names):
        raise SystemExit(f"the judge does not evaluate as step 3 does: { {n: (own[n], again[n]) for n in names} }")
    return {name: [own[name], again[name]] for name in names}


def check_same_models(ours: Sequence[dict[str, Any]], peer: dict[str, list[float]]) -> None:
    """SystemExit unless both sides give the same scores and log-probabilities to the same responses."""
    for name in ("score", "logprob"):
        apart = max(abs(row[name] - value) for row, value in zip(ours, peer[f"{name}s"], strict=True))
        if not apart <= SAME:
            raise SystemExit(f"the two sides do not run the same models: their {name}s differ by up to {apart:.4g}")
