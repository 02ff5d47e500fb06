"""What a user sets of each algorithm. Read and checked before torch is loaded, so none of it is needed here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.algorithms.advantages import ESTIMATORS, Estimator, KLPlace
from rlhf.config import BatchConfig, ConfigError, OptimizerConfig, require_at_least, setting
from rlhf.generation.backend import BACKENDS
from rlhf.rewards.table import RewardSpec

FEWEST_CALIBRATION_PROMPTS = 8
"""Fewer have too few responses for a length curve to say anything."""


@dataclass
class SFTConfig:
    """What SFT learns from a row, and how often it is evaluated."""

    loss_on: Literal["response", "whole_text"] = "response"
    """Positions in the loss: the response with its end-of-sequence token, or the prompt too (as in Alpaca-LoRA)."""
    eval_every_steps: int = 0
    """Optimizer steps between evaluations; 0 evaluates before and after only. The best model is kept."""


@dataclass
class RewardConfig:
    """The reward model's loss and evaluation."""

    centering_coef: float = 0.0
    """Weight of (s_i + s_j)^2 (Eisenstein et al. use 0.01); 0 turns it off."""
    use_margins: bool = False
    """Subtract the margin of a row, where it has one, inside the sigmoid (Llama 2)."""
    length_control: Literal["none", "balance", "calibrate", "odin"] = "none"
    """What is done against a score that follows length, either way (docs/rewards.md): `balance` weighs pairs so that
    the longer response is chosen as often as the shorter one, `calibrate` takes E[score | length] off after training
    (arXiv 2409.17407), `odin` trains a head for length beside and drops it (arXiv 2402.07319)."""
    length_curve_span: float = 0.667
    """Share of the training responses that each place of the curve of `calibrate` is fitted to (Cleveland 1979: 0.2 to
    0.8; R and statsmodels: 2/3)."""
    odin_length_coef: float = 1.0
    """Weight of the loss of ODIN's two correlations with length (its authors' script: 1)."""
    odin_orthogonality_coef: float = 1.0
    """Weight of the loss that keeps ODIN's two heads orthogonal (its authors' script: 1)."""
    cross_prompt_share: float = 0.0
    """Pairs added for each training ranking, with a response to another prompt as the rejected one (RRM, arXiv
    2409.13156); 0 adds none. They count as rows of an epoch."""
    calibration_rows: int = 512
    """Prompts whose best responses set the saved mean and standard deviation of the scores (InstructGPT: mean 0)."""
    eval_every_steps: int = 0
    """Optimizer steps between evaluations; 0 evaluates before and after only. The best model is kept."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "odin_length_coef", "odin_orthogonality_coef", "cross_prompt_share")
        if not 0 < self.length_curve_span <= 1:
            raise ConfigError(
                f"length_curve_span={self.length_curve_span} must lie in (0, 1]: a share of the responses"
            )


@dataclass
class PPOOptimizerConfig(OptimizerConfig):
    """AdamW of the actor and the critic."""

    learning_rate: float = 9.65e-6
    """Peak learning rate of the actor (InstructGPT and DeepSpeed-Chat: 9.65e-6)."""
    critic_learning_rate: float = 5e-6
    """Peak learning rate of the critic (DeepSpeed-Chat, KULLM-RLHF: 5e-6)."""
    adam_eps: float = 1e-5
    """Adam's epsilon (Huang et al.: 1e-5 for PPO)."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "linear"
    """Shape of both learning rates; annealed to 0 (Huang et al.)."""


@dataclass
class PPOBatchConfig(BatchConfig):
    """Rollouts, minibatches and micro-batches."""

    rollout_batch_size: int = 32
    """Prompts sampled in one iteration over all devices."""
    generation_batch_size: int = setting(0, may_change_on_resume=True)
    """Responses that one device samples side by side, waiting prompts taking freed places; 0 takes all of a rollout."""
    scoring_batch_tokens: int = setting(0, may_change_on_resume=True)
    """Tokens of one scoring pass on one device, about; 0: those of a training pass, off the CPU four times those."""
    samples_per_prompt: int = 1
    """Responses sampled to each prompt of a rollout."""
    ppo_epochs: int = 1
    """Passes over each rollout (KULLM-RLHF, DeepSpeed-Chat: 1; Ziegler et al.: 4)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "rollout_batch_size", "samples_per_prompt", "ppo_epochs")
        require_at_least(self, 0, "generation_batch_size", "scoring_batch_tokens")


@dataclass
class PPOConfig:
    """The constants of PPO and where its models come from."""

    actor_model: str | None = setting(None, may_change_on_resume=True, path="read", names_model=True)
    """The SFT model to align; unset takes `<output_dir>/sft/model`."""
    reward_model: str | None = setting(None, may_change_on_resume=True, path="read", names_model=True)
    """A directory saved by step 2; unset takes `<output_dir>/reward/model`."""
    critic_model: str | None = setting(None, may_change_on_resume=True, path="read", names_model=True)
    """A saved scalar model the critic starts from; unset copies the reward model (InstructGPT)."""
    rewards: list[str] = setting(["reward_model"])
    """What scores a response: names, functions (`file.py:function`) or mappings {name, weight, ...}, of which the
    weighted sum counts (docs/reward_sources.md)."""
    advantage: str = "gae"
    """How advantages are estimated from rewards: gae (PPO, with a critic), or without one rloo, grpo, dr_grpo,
    reinforce_pp, reinforce_pp_baseline (docs/ppo.md)."""
    critic_init: Literal["reward", "zero"] | None = None
    """The critic's scalar head at the start: `reward`, that of the model it starts from (in the units of the normalised
    rewards; a causal LM gets a random one), or `zero`, under which it knows nothing yet. The layers below are copied
    either way. Unset: the head of a `critic_model` that is named, else zero (measured: docs/results.md)."""
    critic_warmup_iterations: int = 0
    """First iterations, at most all but one, in which the critic alone learns, on responses of the first actor. With a
    head of zeros none is needed (measured: docs/results.md)."""
    kl_coef: float = 0.1
    """Weight of the KL penalty (KULLM-RLHF, DeepSpeed-Chat: 0.1; InstructGPT: 0.02)."""
    kl_in: Literal["reward", "loss"] | None = None
    """Where the KL penalty stands: in the rewards of the tokens, or in the policy loss. Unset: as the source of
    `advantage` has it (grpo, dr_grpo: loss; the others: reward)."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Per-token KL estimate (Schulman 2020). Unset: k1 in the rewards, k3 in the loss."""
    kl_ratio: bool = True
    """With the KL penalty in the loss: weigh it by the ratio of the new policy to the old one so that its gradient is
    that of the KL divergence (DeepSeek-V3.2, arXiv 2512.02556). Off: the bare estimate, as GRPO's paper has it."""
    kl_target: float | None = None
    """Steer `kl_coef` towards this many nats per response (Ziegler et al.: 6); unset keeps it fixed."""
    kl_horizon: int = 10_000
    """Responses over which the adaptive coefficient moves (Ziegler et al.: 10000)."""
    score_clip: float = 5.0
    """Scores are clipped to plus and minus this before the KL penalty (DeepSpeed-Chat: 5); 0 turns it off."""
    clip_range: float = setting(0.2, may_be_infinite=True)
    """Clip range of the ratio (Schulman et al.: 0.2)."""
    clip_range_high: float | None = setting(None, may_be_infinite=True)
    """Clip range above 1, where it is to be another (DAPO's clip-higher: 0.28 beside 0.2); unset: `clip_range`."""
    loss_mean: Literal["token", "sequence", "constant"] | None = None
    """What the policy loss is a mean over: all tokens of a minibatch (DAPO), its responses, each the mean of its tokens
    (GRPO), or its responses, each the sum over max_response_tokens (Dr. GRPO). Unset: as the source of `advantage`."""
    value_clip_range: float = setting(0.2, may_be_infinite=True)
    """Clip range of the value update (DeepSpeed-Chat, KULLM-RLHF: 0.2)."""
    gamma: float = 1.0
    """Discount (InstructGPT, KULLM-RLHF: 1)."""
    lam: float = 0.95
    """GAE's lambda (InstructGPT, KULLM-RLHF: 0.95)."""
    whiten_advantages: bool | None = None
    """Scale advantages to mean 0 and variance 1 over the whole rollout (Huang et al.). Unset: as the source of
    `advantage` does (gae, reinforce_pp, reinforce_pp_baseline: yes)."""
    whiten_rewards: bool = False
    """Scale rewards to variance 1, keeping their mean, before GAE (Ziegler et al.)."""
    temperature: float = 1.0
    """Sampling temperature; divides the logits of actor, old actor and reference alike."""
    generation_backend: str = "own"
    """What samples: `rlhf.generation`, or DeepSpeed's rollout engine, checked against a forward pass of ours first."""
    old_logprobs: Literal["auto", "sampled", "recomputed"] = "auto"
    """Log-probabilities of the sampling policy: as captured while sampling, recomputed, or (auto) captured where the
    first rollout, computed both ways, agrees to 1e-4 nats (float32 does, 16-bit does not)."""
    missing_eos_penalty: float = 0.0
    """Taken off the score of a response that does not end (TRL: 1.0)."""
    overlong_penalty: float = 0.0
    """Taken off the score of a response of max_response_tokens, less of it the shorter the response, nothing before the
    last `overlong_buffer_tokens` (DAPO, arXiv 2503.14476: 1.0 beside rewards of 1 and -1); 0 turns it off."""
    overlong_buffer_tokens: int = 0
    """Tokens over which `overlong_penalty` grows, the last ones below max_response_tokens; 0 takes a fifth of
    max_response_tokens (DAPO: 4096 of 20480)."""
    length_calibration_prompts: int = 0
    """Training prompts to which the first actor writes four responses each: how their scores follow length within
    prompts is taken off all scores of the run (after arXiv 2409.17407; docs/rewards.md). 0 takes nothing off."""
    length_calibration_every: int = 0
    """Iterations after which that curve is fitted anew, to responses of the actor as it is then beside all earlier
    ones; 0 keeps the first actor's. Evaluations keep it either way, so that their scores can be compared."""
    resample_equal_groups: int = 0
    """Rounds in which prompts whose responses are all worth the same are replaced by other prompts, before advantages
    are estimated (DAPO's dynamic sampling, arXiv 2503.14476); 0 keeps them. Needs samples_per_prompt of 2 or more."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    ptx_coef: float = 0.0
    """Weight of the pretraining or SFT loss mixed into the actor's (InstructGPT: 27.8)."""
    ema_decay: float = 0.0
    """Decay of the averaged actor, saved as `actor_ema` (DeepSpeed-Chat: 0.992); 0 keeps none."""
    eval_every_steps: int = 0
    """Iterations between evaluations on held-out prompts; 0 evaluates before and after only."""
    held_out_reward_model: str | None = setting(None, may_change_on_resume=True, path="read")
    """A second reward model that training never asks, best of other data: its scores of the held-out prompts'
    responses, `held_out_score`, tell what the first one's are worth (Gao et al., arXiv 2210.10760)."""
    keep_best: Literal["gold", "held_out_score", "reward"] | None = None
    """The figure of an evaluation by which the best actor is the one exported: `gold` (prompts of the embedded world),
    `held_out_score`, or `reward`, what PPO optimises. Unset: the last one."""
    stop_when: Literal["gold", "held_out_score", "reward"] | None = None
    """The figure whose best stays unreached for `patience` evaluations when the run ends early. Unset: it does not."""
    patience: int = 3
    """Evaluations in a row that do not reach the best by `stop_when`, after which the run ends."""
    eval_prompts: int = 256
    """Held-out prompts of an evaluation, the same ones every time, chosen with `seed`; 0 takes all of them."""
    eval_samples_per_prompt: int = 4
    """Responses sampled per held-out prompt in an evaluation."""
    sample_table_rows: int = setting(4, may_change_on_resume=True)
    """Prompts shown with their responses at each evaluation."""
    keep_samples: int = setting(8, may_change_on_resume=True)
    """Responses of each rollout that are kept in `rollouts.jsonl`, from the highest score to the lowest; 0 keeps none.
    `rlhf samples` shows them."""

    def __post_init__(self) -> None:
        for name, table in (("advantage", ESTIMATORS), ("generation_backend", BACKENDS)):
            if getattr(self, name) not in table:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {', '.join(table)}")
        if not self.reward_specs():
            raise ConfigError("rewards is empty: name at least one, such as reward_model")
        for name in ("clip_range", "clip_range_high", "value_clip_range", "temperature"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}={value} must be above 0")
        if self.kl_coef > 0 and not self.kl_ratio and (self.kl_place, self.kl_estimator) == ("loss", "k1"):
            raise ConfigError(
                "kl_estimator=k1 with the KL penalty in the loss: the gradient of k1 is 0 on average, whatever the "
                "policies; use k3 or k2, kl_ratio=true, or kl_in=reward"
            )
        require_at_least(self, 0, "kl_coef", "score_clip", "missing_eos_penalty", "entropy_coef", "ptx_coef")
        require_at_least(self, 0, "eval_prompts", "critic_warmup_iterations", "length_calibration_prompts")
        require_at_least(self, 0, "length_calibration_every", "resample_equal_groups", "keep_samples")
        require_at_least(self, 0, "overlong_penalty", "overlong_buffer_tokens")
        if 0 < self.length_calibration_prompts < FEWEST_CALIBRATION_PROMPTS:
            raise ConfigError(
                f"length_calibration_prompts={self.length_calibration_prompts} are too few for a curve: give "
                f"{FEWEST_CALIBRATION_PROMPTS} at least, better 128, or 0 for none"
            )
        if self.length_calibration_every and not self.length_calibration_prompts:
            raise ConfigError(
                f"length_calibration_every={self.length_calibration_every} fits a curve anew that "
                "length_calibration_prompts=0 does not fit: set length_calibration_prompts to 64, say, or leave it out"
            )
        require_at_least(self, 1, "eval_samples_per_prompt", "kl_horizon", "patience")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay={self.ema_decay} must lie in [0, 1); 0 keeps no average")
        if self.kl_target is not None and self.kl_target <= 0:
            raise ConfigError(f"kl_target={self.kl_target} must be above 0 nats, or unset for a fixed kl_coef")

        for name in ("keep_best", "stop_when"):
            measure = getattr(self, name)
            if measure == "held_out_score" and self.held_out_reward_model is None:
                raise ConfigError(
                    f"{name}=held_out_score needs a second reward model: train one with step 2 on other data, and name "
                    "its directory with held_out_reward_model"
                )
            if measure is not None and self.eval_every_steps < 1:
                raise ConfigError(
                    f"{name}={measure} chooses between evaluations, and eval_every_steps={self.eval_every_steps} makes "
                    "none on the way: set eval_every_steps to 10, say"
                )

    @property
    def estimator(self) -> Estimator:
        """The row of `advantage`."""
        return ESTIMATORS[self.advantage]

    @property
    def whitens(self) -> bool:
        """What `whiten_advantages` comes to."""
        return self.estimator.whitens if self.whiten_advantages is None else self.whiten_advantages

    @property
    def kl_place(self) -> KLPlace:
        """What `kl_in` comes to."""
        return self.kl_in or self.estimator.kl_in

    @property
    def kl_estimate(self) -> Literal["k1", "k2", "k3"]:
        """What `kl_estimator` comes to."""
        return self.kl_estimator or ("k1" if self.kl_place == "reward" else "k3")

    @property
    def zero_critic_head(self) -> bool:
        """Whether `critic_init` comes to a zero head."""
        return (self.critic_init or ("zero" if self.critic_model is None else "reward")) == "zero"

    def overlong_buffer(self, max_response_tokens: int) -> int:
        """What `overlong_buffer_tokens` comes to, at least 1."""
        return self.overlong_buffer_tokens or max(1, max_response_tokens // 5)

    def reward_specs(self) -> list[RewardSpec]:
        """The entries of `rewards`, parsed."""
        return [RewardSpec.parse(text) for text in self.rewards]


OFFLINE_CONSTANTS: dict[str, dict[str, float]] = {
    "dpo": {"beta": 0.1, "label_smoothing": 0.0, "length_coef": 0.0},
    "ipo": {"beta": 0.1},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "rrhf": {"length_penalty": 1.0, "rank_coef": 1.0, "sft_coef": 1.0},
    "orpo": {"beta": 0.1, "sft_coef": 1.0},
    "simpo": {"beta": 2.0, "target_margin": 1.0},
}
"""The constants of each offline loss and what its source sets them to (DPO, IPO, KTO: TRL; RRHF: Law-Polyglot; ORPO
and SimPO: their authors)."""

REFERENCED = ("dpo", "ipo", "kto")
"""The offline losses that compare with a reference."""


@dataclass
class OfflineConfig:
    """Preference optimisation on responses that are there (docs/offline.md)."""

    actor_model: str | None = setting(None, may_change_on_resume=True, path="read", names_model=True)
    """The SFT model to align; unset takes `<output_dir>/sft/model`."""
    algorithm: Literal["dpo", "ipo", "kto", "rrhf", "orpo", "simpo"] = "dpo"
    """The loss: dpo (arXiv 2305.18290), ipo (2310.12036), kto (2402.01306), rrhf (2304.05302), orpo (2403.07691), simpo
    (2405.14734)."""
    reference: Literal["cached", "live"] = "cached"
    """dpo, ipo, kto: log-probabilities of the reference computed once before training and kept under `cache_dir`, or at
    every step by a model that is held for it (with LoRA the actor without its adapter)."""
    beta: float | None = None
    """dpo, kto, simpo: scale of the implicit reward (0.1, 0.1, 2.0); ipo: its tau (0.1); orpo: weight of the odds ratio
    (0.1)."""
    label_smoothing: float | None = None
    """dpo: share of the pairs whose label is taken to be wrong (conservative DPO); 0 trusts them all."""
    robust: bool = False
    """dpo: `label_smoothing` by the unbiased form of arXiv 2403.00409."""
    length_coef: float | None = None
    """dpo: alpha of length-regularised DPO (arXiv 2403.19159: 0.01 to 0.1), per token; 0 turns it off."""
    desirable_weight: float | None = None
    """kto: weight of good responses (1); times their number it should be 1 to 4/3 of the same of bad ones."""
    undesirable_weight: float | None = None
    """kto: weight of bad responses (1)."""
    target_margin: float | None = None
    """simpo: gamma, by which the better response is to be preferred (1.0: half of beta)."""
    length_penalty: float | None = None
    """rrhf: power of the length that a response's log-probability is divided by (Law-Polyglot: 1)."""
    rank_coef: float | None = None
    """rrhf: weight of the ranking loss (Law-Polyglot: 1)."""
    sft_coef: float | None = None
    """rrhf, orpo: weight of the loss of imitating the best response (1)."""
    temperature: float = 1.0
    """Sampling temperature of evaluations (`prompt_eval_data`)."""
    eval_prompts: int = 256
    """Held-out prompts that are sampled in an evaluation, the same ones every time; 0 takes all of them."""
    eval_samples_per_prompt: int = 4
    """Responses sampled to each of them."""
    generation_batch_size: int = setting(0, may_change_on_resume=True)
    """Responses that one device samples side by side; 0 takes all of them."""
    sample_table_rows: int = setting(4, may_change_on_resume=True)
    """Prompts shown with their responses at each evaluation."""
    eval_every_steps: int = 0
    """Optimizer steps between evaluations; 0 evaluates before and after only. The best model is kept."""
    keep_best: Literal["gold"] | None = None
    """The figure of an evaluation by which the best model is the one kept: `gold`, where `prompt_eval_data` is of the
    embedded world. Unset: the held-out loss."""

    def __post_init__(self) -> None:
        if self.keep_best is not None and self.eval_every_steps < 1:
            raise ConfigError(
                f"keep_best={self.keep_best} chooses between evaluations, and eval_every_steps={self.eval_every_steps} "
                "makes none on the way: set eval_every_steps to 50, say"
            )
        require_at_least(self, 0, "eval_prompts", "generation_batch_size", "sample_table_rows", "eval_every_steps")
        require_at_least(self, 1, "eval_samples_per_prompt")
        if self.temperature <= 0:
            raise ConfigError(f"temperature={self.temperature} must be above 0")
        if self.algorithm not in OFFLINE_CONSTANTS:
            raise ConfigError(f"algorithm={self.algorithm!r} is not one of {', '.join(OFFLINE_CONSTANTS)}")
        if self.reference == "live" and self.algorithm not in REFERENCED:
            raise ConfigError(
                f"reference=live with algorithm={self.algorithm}, which has no reference: leave it out, or take one of "
                f"{', '.join(REFERENCED)}"
            )
        constants = OFFLINE_CONSTANTS[self.algorithm]
        for name in sorted({name for each in OFFLINE_CONSTANTS.values() for name in each}):
            value = getattr(self, name)
            if value is None:
                continue
            if name not in constants:
                owners = [algorithm for algorithm, each in OFFLINE_CONSTANTS.items() if name in each]
                raise ConfigError(
                    f"{name}={value} is a constant of {', '.join(owners)}, not of algorithm={self.algorithm}, which "
                    f"has {', '.join(constants)}: leave it out"
                )
            require_at_least(self, 0, name)
        if "beta" in constants and self.of("beta") <= 0:
            raise ConfigError(f"beta={self.beta} must be above 0")
        if self.algorithm == "dpo" and not self.of("label_smoothing") < 0.5:
            raise ConfigError(f"label_smoothing={self.label_smoothing} must lie in [0, 0.5): a share of wrong labels")
        if self.robust and (self.algorithm != "dpo" or self.of("label_smoothing") == 0):
            raise ConfigError(
                f"robust=true with algorithm={self.algorithm}, label_smoothing={self.label_smoothing}: it is a form of "
                "dpo's label_smoothing; set that above 0, or leave it out"
            )

    def of(self, name: str) -> float:
        """The constant `name` of the algorithm: what is set, or its source's value."""
        value: float | None = getattr(self, name)
        return OFFLINE_CONSTANTS[self.algorithm][name] if value is None else value
