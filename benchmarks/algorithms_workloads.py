"""What `algorithms.py` compares: the ways from an SFT model to an aligned one, and a run of each, kept as JSON."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from learning_workloads import CONFIG, QUICK, Run, Workplace, points_of, read_lines
from measure import BENCHMARKS
from ppo_workloads import write_job

ITERATIONS = 40
KL_COEF = 0.1
RESPONSES = 64
"""Sampled in one iteration."""
PROMPTS = 3000
"""Rows of `sample:prompts_train`."""
SAMPLES = 4
"""Responses to a prompt where they are compared with each other."""
CALIBRATION_STEPS = (4, 36)
"""Steps of two offline runs whose difference tells what one takes."""
GROUPED = (f"rollout_batch_size={RESPONSES // SAMPLES}", f"samples_per_prompt={SAMPLES}")

BARE = ("kl_ratio=false",)
"""The KL penalty in the loss as GRPO's and Dr. GRPO's papers have it."""

Source = Literal["rollouts", "rankings", "own responses", "pairs"]
PAIR_STEPS = 250
"""Steps of 16 pairs, or of 32 of their responses: the 4,000 pairs of `sample:preference_train`, once."""
PAIRS = ("preference_data=sample:preference_train",)


@dataclass(frozen=True)
class Method:
    """A way to align: what it learns from, and what differs from default.yaml.

    `rollouts` are sampled as it learns (step3_ppo/main.py). `rankings` are those of the world (step3_ppo/offline.py).
    `own responses` are sampled once from the SFT model, as many as the rollouts of a run, and scored by the reward
    model: `form` is what `rlhf sample` makes of them. `pairs` are the world's, read once: what TRL's trainers take.
    `trl`: TRL's trainer of that name, with the same options.
    """

    name: str
    source: Source
    options: tuple[str, ...] = ()
    form: str = ""
    trl: str = ""


METHODS = {
    method.name: method
    for method in (
        Method("ppo", "rollouts"),
        Method("rloo", "rollouts", ("advantage=rloo", *GROUPED)),
        Method("grpo", "rollouts", ("advantage=grpo", "kl_coef=0.04", *BARE, *GROUPED)),
        Method("grpo_bare_kl_0.3", "rollouts", ("advantage=grpo", "kl_coef=0.3", *BARE, *GROUPED)),
        Method("grpo_kl_0.04", "rollouts", ("advantage=grpo", "kl_coef=0.04", *GROUPED)),
        Method("grpo_kl_0.3", "rollouts", ("advantage=grpo", "kl_coef=0.3", *GROUPED)),
        Method("dr_grpo", "rollouts", ("advantage=dr_grpo", *BARE, *GROUPED)),
        Method("reinforce_pp", "rollouts", ("advantage=reinforce_pp",)),
        Method("reinforce_pp_baseline", "rollouts", ("advantage=reinforce_pp_baseline", *GROUPED)),
        Method("dpo", "rankings", ("algorithm=dpo", "learning_rate=3e-5")),
        Method("ipo", "rankings", ("algorithm=ipo", "learning_rate=3e-5")),
        Method("kto", "rankings", ("algorithm=kto", "learning_rate=3e-5")),
        Method("rrhf", "rankings", ("algorithm=rrhf", "learning_rate=3e-4")),
        Method("orpo", "rankings", ("algorithm=orpo", "learning_rate=3e-4")),
        Method("imitation", "rankings", ("algorithm=rrhf", "rank_coef=0", "learning_rate=3e-4")),
        Method("simpo", "rankings", ("algorithm=simpo", "learning_rate=3e-5")),
        Method("raft", "own responses", ("learning_rate=1e-4",), form="best"),
        Method("dpo_own_pairs", "own responses", ("algorithm=dpo", "learning_rate=3e-5"), form="pairs"),
    )
}
"""By name, in the order of the table."""

_DPO_PAIRS = ("algorithm=dpo", "learning_rate=3e-5", *PAIRS)
_KTO_PAIRS = ("algorithm=kto", "learning_rate=3e-5", "global_batch_size=32", "micro_batch_size=32", *PAIRS)
BESIDE_TRL = {
    method.name: method
    for method in (
        Method("dpo_pairs", "pairs", _DPO_PAIRS),
        Method("trl_dpo", "pairs", _DPO_PAIRS, trl="DPOTrainer"),
        Method("kto_pairs", "pairs", _KTO_PAIRS),
        Method("trl_kto", "pairs", _KTO_PAIRS, trl="KTOTrainer"),
        METHODS["grpo_kl_0.3"],
        Method("trl_grpo", "rollouts", METHODS["grpo_kl_0.3"].options, trl="GRPOTrainer"),
        METHODS["rloo"],
        Method("trl_rloo", "rollouts", METHODS["rloo"].options, trl="RLOOTrainer"),
    )
}
"""By name: what learns with TRL's trainers, after ours with the same data, settings and steps."""

ALL_METHODS = {**METHODS, **BESIDE_TRL}


@dataclass(frozen=True)
class Trial:
    """One run of a method: its seed, and the learning rate where it is not the method's."""

    method: str
    seed: int
    learning_rate: str = ""

    @property
    def key(self) -> str:
        """The name of its file."""
        rate = [f"lr{self.learning_rate}"] if self.learning_rate else []
        return "_".join([self.method, f"seed{self.seed}", *rate])

    @property
    def options(self) -> list[str]:
        """What a stage's script is given beside the configuration."""
        changes = list(ALL_METHODS[self.method].options)
        if self.learning_rate:
            changes.append(f"learning_rate={self.learning_rate}")
        return [word for change in changes for word in _as_words(change)]


def _as_words(change: str) -> tuple[str, str]:
    name, _, value = change.partition("=")
    return f"--{name}", value


@dataclass(frozen=True)
class AlignmentPlace(Workplace):
    """Where the models of each seed and the runs of the methods are kept. `offline_seconds`: of an offline run."""

    offline_seconds: float = 100.0

    def file(self, trial: Trial) -> Path:
        """Where what a trial came to is kept."""
        return self.directory / "results" / f"{trial.key}.json"

    def trial(self, trial: Trial) -> dict[str, Any]:
        """What `trial` came to; run first if it is not there.

        "start" and "end" are evaluations of the SFT model and of the exported one by the same code
        (sides/rlhf_judge.py), "points" those on the way, where there are any.
        """
        path = self.file(trial)
        if not path.is_file():
            print(f"running {trial.key}", file=sys.stderr, flush=True)
            directory = self.directory / "runs" / trial.key
            shutil.rmtree(directory, ignore_errors=True)
            run = {
                "rollouts": self._rollouts,
                "rankings": self._rankings,
                "own responses": self._own_responses,
                "pairs": self._pairs,
            }[ALL_METHODS[trial.method].source]
            found = (self._trl if ALL_METHODS[trial.method].trl else run)(trial, directory)
            policies = [[0, None], [1, str(found.pop("actor"))]]
            judged = self.judged(Run("ours", trial.seed, KL_COEF, ITERATIONS), policies, directory)
            start, end = judged["evaluations"]
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            content = {"key": trial.key, "threads": self.threads, "start": start, "end": end, **found}
            part.write_text(json.dumps(content, indent=1), encoding="utf-8")
            part.replace(path)
            shutil.rmtree(directory)
        content = json.loads(path.read_text(encoding="utf-8"))
        return content

    def _rollouts(self, trial: Trial, directory: Path) -> dict[str, Any]:
        command = [
            "-m",
            "step3_ppo.main",
            *self.arguments(Run("ours", trial.seed, KL_COEF, ITERATIONS)),
            *trial.options,
        ]
        command += ["--output_dir", str(directory), *(QUICK["stage"] if self.quick else [])]
        peak = self.run(command, directory / "log.txt").peak_bytes
        lines = read_lines(directory / "ppo" / "metrics.jsonl")
        seconds = [one["seconds_experience"] + one["seconds_update"] for one in lines if "seconds_update" in one]
        evaluations = [
            {"iteration": line["step"], **{name.removeprefix("eval_"): value for name, value in line.items()}}
            for line in lines
            if "eval_score" in line
        ]
        return {
            "actor": directory / "ppo" / "actor",
            "steps": len(seconds),
            "seconds": sum(seconds),
            "peak_bytes": peak,
            "points": points_of(evaluations, seconds),
        }

    def _rankings(self, trial: Trial, directory: Path) -> dict[str, Any]:
        step, rest = self._step_seconds(trial.method)
        steps = 2 if self.quick else max(1, round(self.offline_seconds * self.threads / step))
        found = self._offline(trial, directory, ["--max_steps", str(steps)])
        return {**found, "seconds": (found["cpu_seconds"] - rest) / self.threads}

    def _pairs(self, trial: Trial, directory: Path) -> dict[str, Any]:
        return self._offline(trial, directory, ["--max_steps", str(2 if self.quick else PAIR_STEPS)])

    def _trl(self, trial: Trial, directory: Path) -> dict[str, Any]:
        """TRL's trainer on what `trial`'s own side is given."""
        method, model = ALL_METHODS[trial.method], directory / "model"
        job: dict[str, Any] = {"seed": trial.seed, "model": str(model)}
        if method.source == "pairs":
            steps = ["--max_steps", str(2 if self.quick else PAIR_STEPS)]
            options = [*self._offline_options(trial, directory), *trial.options]
            job["arguments"] = ["--actor_model", str(self.sft_model(trial.seed)), *steps, *options]
        else:
            run = Run("ours", trial.seed, KL_COEF, ITERATIONS, changes=method.options)
            job["arguments"] = [*self.arguments(run), "--output_dir", str(directory)]
            iterations = 1 if self.quick else ITERATIONS
            job["prompts"] = self.judged(run, [], directory, iterations=iterations)["prompts"]
        script = BENCHMARKS / "peers" / "trl_alignment.py"
        job_file, out_file = write_job(job, directory / "trl-job.json"), directory / "trl-out.json"
        peak = self.run([str(script), str(job_file), str(out_file)], directory / "trl.log").peak_bytes
        trained = json.loads(out_file.read_text(encoding="utf-8"))
        return {"actor": model, "peak_bytes": peak, "points": [], **trained}

    def _own_responses(self, trial: Trial, directory: Path) -> dict[str, Any]:
        method, file = ALL_METHODS[trial.method], directory / "responses.jsonl"
        prompts = (16 if self.quick else ITERATIONS * RESPONSES) // SAMPLES
        data = json.dumps({"path": "sample:prompts_train", "weight": prompts / PROMPTS})
        command = [
            "-m",
            "rlhf.cli",
            "sample",
            str(self.sft_model(trial.seed)),
            "--prompts",
            data,
            "--output",
            str(file),
        ]
        command += ["--reward_model", str(self.reward_model("default", trial.seed)), "--form", method.form]
        command += ["--max_prompt_tokens", "64", "--max_response_tokens", "64", "--temperature", "0.7"]
        command += ["--samples", str(SAMPLES), "--seed", str(trial.seed), "--cache_dir", str(self.cache_dir)]
        started = time.perf_counter()
        peak = self.run(command, directory / "sample.txt").peak_bytes
        seconds = time.perf_counter() - started
        if method.form == "pairs":
            found = self._offline(trial, directory, ["--epochs", "3", "--preference_data", str(file)])
        else:
            found = self._imitate(trial, directory, file)
        return {**found, "seconds": seconds + found["seconds"], "peak_bytes": max(peak, found["peak_bytes"])}

    def _step_seconds(self, method: str) -> tuple[float, float]:
        """CPU seconds of an optimizer step of an offline method, what the reference says of its rows included, and of
        everything else in a run; measured once."""
        path = self.directory / "step_cpu_seconds" / f"{method}.json"
        if not path.is_file():
            directory = self.directory / "runs" / f"step-seconds-{method}"
            few, many = (1, 3) if self.quick else CALIBRATION_STEPS
            spent = {}
            for steps in (few, many):
                shutil.rmtree(directory, ignore_errors=True)
                spent[steps] = self._offline(Trial(method, 1), directory, ["--max_steps", str(steps)])["cpu_seconds"]
            step = max(1e-3, (spent[many] - spent[few]) / (many - few))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps([step, spent[few] - few * step]), encoding="utf-8")
            shutil.rmtree(directory)
        step, rest = json.loads(path.read_text(encoding="utf-8"))
        return float(step), float(rest)

    def _offline(self, trial: Trial, directory: Path, options: Sequence[str]) -> dict[str, Any]:
        quick = QUICK["ppo"][6:] if self.quick else []
        command = ["-m", "step3_ppo.offline", "--actor_model", str(self.sft_model(trial.seed)), *options, *quick]
        return self._trained(trial, command, directory, "offline", "actor")

    def _imitate(self, trial: Trial, directory: Path, file: Path) -> dict[str, Any]:
        quick = QUICK["stage"] if self.quick else []
        command = ["-m", "step1_sft.main", "--base_model", str(self.sft_model(trial.seed)), "--sft_data", str(file)]
        return self._trained(trial, [*command, *quick], directory, "sft", "model")

    def _offline_options(self, trial: Trial, directory: Path) -> list[str]:
        # A cache of its own: what the reference says is part of what a run takes.
        return ["--config", str(CONFIG), "--seed", str(trial.seed), "--cache_dir", str(directory / "cache"),
                "--tensorboard", "false", "--log_every_steps", "1", "--eval_every_steps", "0",
                "--output_dir", str(directory)]  # fmt: skip

    def _trained(self, trial: Trial, command: Sequence[str], directory: Path, stage: str, model: str) -> dict[str, Any]:
        """What an offline stage's script came to; seconds are those of its steps."""
        usage = self.run([*command, *self._offline_options(trial, directory), *trial.options], directory / "log.txt")
        lines = read_lines(directory / stage / "metrics.jsonl")
        began = next(line["seconds"] for line in lines if "eval_progress" in line)
        steps = [line["seconds"] for line in lines if "loss" in line]
        actor = directory / stage / model
        return {
            "actor": actor,
            "steps": len(steps),
            "seconds": steps[-1] - began,
            "cpu_seconds": usage.cpu_seconds,
            "peak_bytes": usage.peak_bytes,
            "points": [],
        }
