"""The stages as one table: whatever runs, summarises, diagnoses or documents stages reads `STAGES`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from rlhf.algorithms.advantages import ESTIMATORS
from rlhf.algorithms.config import (
    OFFLINE_CONSTANTS,
    OfflineConfig,
    PPOBatchConfig,
    PPOConfig,
    PPOOptimizerConfig,
    RewardConfig,
    SFTConfig,
)
from rlhf.config import (
    BatchConfig,
    ConfigError,
    DataConfig,
    EngineConfig,
    ModelConfig,
    OfflineDataConfig,
    OptimizerConfig,
    PPODataConfig,
    RewardDataConfig,
    RunConfig,
    SFTDataConfig,
    check_together,
    parse_config,
)
from rlhf.config.explain import FieldsInForce, default_of
from rlhf.config.parsing import fields_in_force
from rlhf.doctor.checks import OFFLINE, ON_POLICY, PREFERENCE, REWARD, Check
from rlhf.report.charts import Chart
from rlhf.report.figures import Figure, NoteFigure, PartsFigure, ShortcutFigure

PROJECT = Path(__file__).resolve().parents[2]
DEFAULT_CONFIG = PROJECT / "training_scripts" / "configs" / "default.yaml"
"""Hyper-parameters that suit the embedded tiny model."""


@dataclass(frozen=True)
class StageConfig:
    """The configuration of one run of a stage, a part for each concern. Field names are unique over the parts."""

    run: RunConfig
    model: ModelConfig
    engine: EngineConfig
    optimizer: OptimizerConfig
    batch: BatchConfig
    data: DataConfig

    def check(self) -> None:
        """ConfigError for parts that are right each and do not go together."""
        check_together(self.model, self.engine)

    def parts(self) -> list[Any]:
        """The dataclasses it is made of."""
        return [getattr(self, item.name) for item in dataclasses.fields(self)]


@dataclass(frozen=True)
class SFTStageConfig(StageConfig):
    """Supervised fine-tuning."""

    data: SFTDataConfig
    sft: SFTConfig


@dataclass(frozen=True)
class RewardStageConfig(StageConfig):
    """The reward model."""

    data: RewardDataConfig
    reward: RewardConfig


@dataclass(frozen=True)
class PPOStageConfig(StageConfig):
    """PPO and its relatives."""

    optimizer: PPOOptimizerConfig
    batch: PPOBatchConfig
    data: PPODataConfig
    ppo: PPOConfig

    def check(self) -> None:
        super().check()
        coef, data = self.ppo.ptx_coef, self.data.ptx_data
        if coef > 0 and not data:
            raise ConfigError(f"ptx_coef={coef} needs data: name it in `ptx_data`, or set ptx_coef to 0")
        if coef == 0 and data:
            raise ConfigError(
                "ptx_data is given and ptx_coef is 0: set ptx_coef (InstructGPT: 27.8) or leave ptx_data out"
            )
        buffer, longest = self.ppo.overlong_buffer_tokens, self.data.max_response_tokens
        if buffer and not self.ppo.overlong_penalty:
            raise ConfigError(
                f"overlong_buffer_tokens={buffer} is given and overlong_penalty is 0: set overlong_penalty (DAPO: "
                "1.0) or leave overlong_buffer_tokens out"
            )
        if buffer > longest:
            raise ConfigError(
                f"overlong_buffer_tokens={buffer} is more than max_response_tokens={longest}, of which it is a "
                "part: lower it, or leave it out for a fifth of them"
            )
        estimator, samples = ESTIMATORS[self.ppo.advantage], self.batch.samples_per_prompt
        if samples < estimator.samples_per_prompt:
            raise ConfigError(
                f"advantage={self.ppo.advantage} compares the responses to one prompt and needs samples_per_prompt of "
                f"at least {estimator.samples_per_prompt}, got {samples}; nothing leaves the training as it is: "
                f"set samples_per_prompt={estimator.samples_per_prompt}"
            )
        if self.ppo.resample_equal_groups and samples < 2:
            raise ConfigError(
                f"resample_equal_groups={self.ppo.resample_equal_groups} replaces prompts whose responses are all "
                f"worth the same, and samples_per_prompt={samples} has nothing to compare: raise it, or leave it out"
            )
        if self.ppo.critic_model is not None and not estimator.needs_critic:
            raise ConfigError(f"advantage={self.ppo.advantage} has no critic: leave critic_model out")


@dataclass(frozen=True)
class OfflineStageConfig(StageConfig):
    """Preference optimisation without sampling."""

    data: OfflineDataConfig
    offline: OfflineConfig


@dataclass(frozen=True)
class Stage:
    """One stage. A new one is a row in `STAGES` and a script.

    `label`: its name in the summary table; `title`: what `run_all.sh` calls it. `short_run`: what `--short` sets.
    `takes`: configuration field -> the stage whose saved model it is where it is unset. `unit`: what its metrics are
    numbered by. `figures`: its lines in the summary; `result_keys`: further entries of its `result.json` that
    `summary.json` holds, `optional_result_keys` such ones that results of an earlier release lack. `checks`: the
    doctor's; `curves`: metrics that the doctor shows as first -> last value; `charts`: the pictures of the report.
    `logged`: the figures of an evaluation that its line in the log shows, the first five of them that there are;
    `metrics.jsonl` has all.
    `in_default_run`: `run_all.sh` runs it unasked, `stage_split` has a share for it, and the summary shows it.
    """

    name: str
    label: str
    script: str
    title: str
    config: type[StageConfig]
    short_run: Mapping[str, str]
    figures: Sequence[Figure | NoteFigure | PartsFigure | ShortcutFigure]
    checks: Sequence[Check]
    curves: Sequence[str]
    charts: Sequence[Chart]
    logged: Sequence[str]
    takes: Mapping[str, str] = field(default_factory=dict)
    result_keys: Sequence[str] = ()
    optional_result_keys: Sequence[str] = ()
    unit: str = "step"
    in_default_run: bool = True

    def config_classes(self) -> dict[str, type]:
        """The configuration dataclasses by the name of their part."""
        hints = get_type_hints(self.config)
        return {item.name: hints[item.name] for item in dataclasses.fields(self.config)}

    def defaults(self) -> dict[str, Any]:
        """Every configuration field with its default."""
        return {
            item.name: default_of(item) for kind in self.config_classes().values() for item in dataclasses.fields(kind)
        }

    def field_names(self) -> set[str]:
        """The names of all configuration fields."""
        return {item.name for kind in self.config_classes().values() for item in dataclasses.fields(kind)}


def _certainty(result: Mapping[str, Any]) -> str:
    """How far the accuracy is known, and the better of choosing by length alone, on the same pairs."""
    longer = result["length_baseline_accuracy"]
    if longer is None:
        return "nothing was held out"
    rule = f"choosing the longer response: {longer:.3f}" if longer >= 0.5 else f"the shorter response: {1 - longer:.3f}"
    if "accuracy_low" not in result:
        return rule
    return f"of n pairs, 95% interval {result['accuracy_low']:.3f} to {result['accuracy_high']:.3f}; {rule}"


def _gain(result: Mapping[str, Any]) -> str:
    """The gain of the score over n prompts, also in the spread of single scores at the start."""
    gain = (result["score_after"] or 0.0) - (result["score_before"] or 0.0)  # null where nothing was held out
    spread, error = result["score_std_before"] or 0.0, result.get("score_gain_error")
    if spread == 0:
        return f"{gain:+.3f}"
    known_to = "" if error is None else f" (standard error {error / spread:.2f}, n prompts)"
    return f"{gain:+.3f} = {gain / spread:+.2f} standard deviations of the SFT model's scores{known_to}"


def _kept(result: Mapping[str, Any]) -> str:
    """Which iteration's actor is exported, where that is not the last of the run as it was planned."""
    kept, done, planned = (result.get(name) for name in ("kept_iteration", "iterations", "planned_iterations"))
    keep_best, stop_when = result.get("keep_best"), result.get("stop_when")
    if kept is None or not (keep_best or done != planned):
        return ""
    chosen = f"the best by {keep_best}" if keep_best else "the last"
    return f"iteration {kept} of {done}, {chosen}" + (
        f"; ended before {planned} by {stop_when}" if done != planned else ""
    )


def _wins(gold: Mapping[str, Any]) -> str:
    """On how many prompts PPO beats SFT by gold, and whether its Korean is whole."""
    formed = f"{gold['well_formed_before']:.0%} -> {gold['well_formed_after']:.0%}"
    return f"better than SFT on {gold['win_rate']:.0%} of n prompts; well-formed responses {formed}"


LEARNING_CHARTS = (
    Chart("gradient norm", ("gradient_norm",), logarithmic=True),
    Chart("learning rate", ("learning_rate",)),
)

STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            name="sft",
            label="SFT",
            script="step1_sft/main.py",
            title="supervised fine-tuning",
            config=SFTStageConfig,
            short_run={"max_steps": "4"},
            figures=(
                Figure(
                    "held-out loss",
                    before="eval_loss_before",
                    after="eval_loss_after",
                    count="held_out_rows",
                    note=lambda _: "nats per token, over n rows",
                ),
            ),
            checks=OFFLINE,
            curves=("loss", "eval_loss", "gradient_norm"),
            charts=(Chart("loss, nats per token", ("loss",)), *LEARNING_CHARTS),
            logged=("eval_loss", "eval_perplexity"),
        ),
        Stage(
            name="reward",
            label="reward",
            script="step2_reward/main.py",
            title="reward model",
            config=RewardStageConfig,
            short_run={"max_steps": "4"},
            figures=(
                Figure("held-out accuracy", after="accuracy", count="held_out_pairs", note=_certainty),
                ShortcutFigure("shortcuts"),
                Figure("mean margin", after="mean_margin", count="held_out_pairs"),
                Figure("", each="accuracy_by_category", count="pairs_by_category"),
            ),
            result_keys=("length_baseline_accuracy",),
            optional_result_keys=(
                "held_out_prompts",
                "accuracy_low",
                "accuracy_high",
                "over_shortcut",
                "over_shortcut_low",
                "over_shortcut_high",
                "shortcuts",
            ),
            checks=REWARD,
            curves=("loss", "accuracy", "margin", "eval_accuracy"),
            charts=(
                Chart("loss", ("loss",)),
                Chart("accuracy", ("accuracy", "length_baseline_accuracy"), level=0.5),
                Chart("margin of chosen over rejected", ("margin",)),
                Chart("accuracy by category", ("accuracy/",), level=0.5),
                Chart("correlation of score and length within prompts", ("score_length_correlation",), level=0.0),
                Chart("calibration error", ("calibration_error",)),
                *LEARNING_CHARTS,
            ),
            logged=("eval_loss", "eval_accuracy", "eval_length_baseline_accuracy", "eval_margin"),
        ),
        Stage(
            name="ppo",
            label="PPO",
            script="step3_ppo/main.py",
            title="PPO",
            config=PPOStageConfig,
            takes={"actor_model": "sft", "reward_model": "reward"},
            short_run={"max_steps": "2"},
            unit="iteration",
            figures=(
                NoteFigure("exported actor", note=_kept),
                PartsFigure("gold", entry="gold", note=_wins),
                Figure(
                    "held-out score", before="score_before", after="score_after", count="held_out_prompts", note=_gain
                ),
                Figure(
                    "held-out reward model",
                    before="held_out_score_before",
                    after="held_out_score_after",
                    count="held_out_prompts",
                    note=lambda _: "the score of a reward model that training does not ask",
                    optional=True,
                ),
                Figure(
                    "score less penalties",
                    before="reward_before",
                    after="reward_after",
                    count="held_out_prompts",
                    note=lambda _: "what was optimised: clipped score, missing end, KL",
                ),
                Figure(
                    "KL per token (nats)",
                    after="kl_per_token",
                    count="held_out_prompts",
                    note=lambda _: "to the SFT model",
                ),
                Figure("eos rate", before="eos_rate_before", after="eos_rate_after", count="held_out_prompts"),
                Figure(
                    "response tokens",
                    before="mean_response_tokens_before",
                    after="mean_response_tokens_after",
                    count="held_out_prompts",
                ),
            ),
            result_keys=("score_std_before", "samples"),
            optional_result_keys=(
                "score_gain_error",
                "held_out_score_before",
                "held_out_score_after",
                "kept_iteration",
                "iterations",
                "planned_iterations",
                "keep_best",
                "stop_when",
            ),
            checks=ON_POLICY,
            curves=(
                "eval_score",
                "score",
                "kl_per_token",
                "eos_rate",
                "response_tokens",
                "entropy_estimate",
                "explained_variance",
            ),
            charts=(
                Chart("score", ("score", "held_out_score")),
                Chart("parts of the score", ("score/",)),
                Chart("gold", ("gold",)),
                Chart("parts of gold", ("gold/",)),
                Chart("reward: the score less penalties and KL", ("reward",)),
                Chart("KL per response, nats", ("kl_per_response",), level=0.0),
                Chart("score against KL", ("score",), along="kl_per_response"),
                Chart("gold against KL", ("gold",), along="kl_per_response"),
                Chart("responses that end", ("eos_rate",), level=1.0),
                Chart("tokens of a response", ("response_tokens",)),
                Chart("entropy, nats per token (estimate)", ("entropy_estimate",)),
                Chart("repeated 4-grams", ("repeated_4grams",)),
                Chart("clipped ratios and values", ("clip_fraction", "value_clip_fraction")),
                Chart("policy loss", ("policy_loss",)),
                Chart("value loss", ("value_loss",)),
                Chart("variance that the critic explains", ("explained_variance",), level=0.0),
                Chart("groups whose responses are all worth the same", ("equal_groups",)),
                Chart("gradient norm", ("gradient_norm", "critic_gradient_norm"), logarithmic=True),
                Chart("learning rate", ("learning_rate", "critic_learning_rate")),
                Chart("KL coefficient", ("kl_coef",), varying=True),
                Chart("seconds of an iteration", ("seconds_generation", "seconds_scoring", "seconds_update")),
            ),
            logged=(
                "eval_gold",
                "eval_held_out_score",
                "eval_score",
                "eval_reward",
                "eval_kl_per_token",
                "eval_eos_rate",
                "eval_response_tokens",
            ),
        ),
        Stage(
            name="offline",
            label="offline",
            script="step3_ppo/offline.py",
            title="preference optimisation without sampling",
            config=OfflineStageConfig,
            takes={"actor_model": "sft"},
            short_run={"max_steps": "4"},
            figures=(
                Figure("held-out loss", before="loss_before", after="loss_after", count="held_out_prompts"),
                Figure("accuracy", before="accuracy_before", after="accuracy_after", count="held_out_prompts"),
                Figure(
                    "better response (nats)",
                    before="chosen_logprob_before",
                    after="chosen_logprob_after",
                    count="held_out_prompts",
                    note=lambda _: "log-probability by token",
                ),
                PartsFigure("gold", entry="gold", note=_wins),
                Figure(
                    "eos rate", before="eos_rate_before", after="eos_rate_after", count="sampled_prompts", optional=True
                ),
                Figure(
                    "response tokens",
                    before="response_tokens_before",
                    after="response_tokens_after",
                    count="sampled_prompts",
                    optional=True,
                ),
            ),
            result_keys=("algorithm", "best_step"),
            checks=PREFERENCE,
            curves=("loss", "accuracy", "margin", "chosen_logprob", "eval_accuracy"),
            charts=(
                Chart("loss", ("loss",)),
                Chart("accuracy", ("accuracy",), level=0.5),
                Chart("margin", ("margin",), level=0.0),
                Chart("log-probability by token", ("chosen_logprob", "rejected_logprob")),
                Chart("gold of sampled responses", ("gold",)),
                Chart("parts of gold", ("gold/",)),
                Chart("responses that end", ("eos_rate",), level=1.0),
                Chart("tokens of a response", ("response_tokens",)),
                *LEARNING_CHARTS,
            ),
            logged=("eval_gold", "eval_loss", "eval_accuracy", "eval_margin", "eval_chosen_logprob", "eval_eos_rate"),
            in_default_run=False,
        ),
    )
}
"""Every stage by name, in the order of a whole run."""

METHODS = {"advantage": tuple(ESTIMATORS), "algorithm": tuple(OFFLINE_CONSTANTS)}
"""The fields that choose between methods of a stage; each method may have a section of its own in a file."""


def default_run() -> list[Stage]:
    """The stages of a run that names none."""
    return [stage for stage in STAGES.values() if stage.in_default_run]


def parse_stage(name: str, argv: Sequence[str] | None = None) -> Any:
    """The configuration of stage `name` (an instance of its `config` class) from a command line; see `parse_config`."""
    stage = STAGES[name]
    parts = parse_config(name, stage.config_classes(), argv, **_sources())
    config = stage.config(**parts)
    config.check()
    return config


def stage_fields(name: str, argv: Sequence[str] | None = None) -> FieldsInForce:
    """What a command line and its file give to stage `name`, for explaining it."""
    words = sys.argv[1:] if argv is None else argv
    return fields_in_force(name, STAGES[name].config_classes().values(), words, **_sources())


def config_files(name: str, argv: Sequence[str] | None = None) -> set[Path]:
    """The configuration files that a command line of stage `name` reads, those that they extend too."""
    return set(stage_fields(name, argv).files)


def _sources() -> dict[str, Any]:
    """Where a stage's fields may come from beside its own dataclasses."""
    return {
        "sections": STAGES.keys(),
        "methods": METHODS,
        "known_fields": set().union(*(other.field_names() for other in STAGES.values())),
        "default_config": DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else None,
    }


def find_stage_model(stage: Stage, config_field: str, given: str | None, output_dir: str) -> str:
    """The model directory of a field that a stage `takes` from an earlier one: the one given, or that of `output_dir`.

    Raises ConfigError that says how to make it when it is not there.
    """
    if given is not None:
        return given
    earlier = STAGES[stage.takes[config_field]]
    path = Path(output_dir) / earlier.name / "model"
    if not path.is_dir():
        raise ConfigError(
            f"{path} not found: {stage.title} needs the model that {earlier.script} saves. Run `deepspeed "
            f"{earlier.script} --output_dir {output_dir}` first, or name a directory with --{config_field}"
        )
    return str(path)
