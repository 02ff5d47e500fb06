"""Proximal policy optimisation for language models, with a critic.

Schulman et al. (arXiv 1707.06347) as InstructGPT (arXiv 2203.02155) uses it; the details follow Huang et al.,
"The N implementation details of RLHF with PPO". Per-token tensors [B, T] cover the response only.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import torch

from rlhf.config import BatchConfig, ConfigError, OptimizerConfig, RunConfig, require_at_least
from rlhf.distributed import all_gather_rows, rank, world_size
from rlhf.generation import Sampling, make_backend
from rlhf.models.model_call import eos_token_ids
from rlhf.numerics.cpu import WORKERS, can_run_side_by_side, side_by_side
from rlhf.numerics.logprobs import KLEstimator, estimate_kl
from rlhf.numerics.statistics import last_true, masked_variance, masked_whiten
from rlhf.training.data_order import DataOrder, Plan
from rlhf.training.metrics import MeanMeter
from rlhf.training.nonfinite import check_rollout
from rlhf.training.on_policy import OnPolicyTrainer
from rlhf.training.resume import TrainingStates
from rlhf.training.rollouts import RolloutWorker
from rlhf.training.scoring import label_loss, response_logprobs, response_logprobs_and_entropy, response_values
from rlhf.training.step import accumulate_step, learning_rate
from rlhf.types import IGNORE_INDEX, PPOExperience, Rollout, TokenBatch, TokenizedPrompt, TokenizedResponse

logger = logging.getLogger("rlhf")

# ------------------------------------------------------------------------------------------------ mathematics


def shape_rewards(
    scores: torch.Tensor,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    kl_coef: float,
    kl_estimator: KLEstimator = "k1",
    score_clip: float = 0.0,
    penalties: torch.Tensor | None = None,
) -> torch.Tensor:
    """Per-token rewards [B, T]: -kl_coef * KL estimate on every response token, plus the score on the last one.

    Ziegler et al. (arXiv 1909.08593) eq. 2. `scores` [B] are clipped to +-score_clip (0: not at all) before the
    KL penalty and `penalties` [B] (of a missing end) are taken off, so that no penalty is clipped away. 0 outside
    `mask` [B, T].
    """
    kl = estimate_kl(logprobs, ref_logprobs, kl_estimator)
    rewards = torch.where(mask, -kl_coef * kl, torch.zeros_like(kl))
    clipped = scores.clamp(-score_clip, score_clip) if score_clip else scores
    if penalties is not None:
        clipped = clipped - penalties
    last = last_true(mask).unsqueeze(1)
    has_tokens = mask.any(dim=1)
    return rewards.scatter_add(1, last, (clipped * has_tokens).to(rewards.dtype).unsqueeze(1))


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16): advantages and returns, [B, T] each.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, with V and A equal to 0 after the
    last response token. `mask` is True on a prefix of each row; both results are 0 outside it.
    """
    zero = torch.zeros_like(values)
    rewards, values = torch.where(mask, rewards, zero), torch.where(mask, values, zero)
    advantage = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(values[:, 0])
    advantages = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        next_value = values[:, t]
        advantages.append(advantage)
    stacked = torch.stack(advantages[::-1], dim=1)
    return stacked, stacked + values


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_range: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped surrogate (arXiv 1707.06347, eq. 7), summed over the mask; all arguments [B, T].

    Per token max(-A r, -A clip(r, 1 - eps, 1 + eps)) with r = pi / pi_old. The metrics are sums over the mask as
    well: divide both by the token count of the global batch.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.where(mask, torch.maximum(unclipped, clipped), torch.zeros_like(unclipped)).sum()
    with torch.no_grad():
        metrics = {
            "policy_loss": loss.detach(),
            "ratio": (ratio * mask).sum(),
            "clip_fraction": ((clipped > unclipped) & mask).sum().float(),
            "approx_kl": ((torch.expm1(log_ratio) - log_ratio) * mask).sum(),
        }
    return loss, metrics


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, *, clip_range: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped value loss, summed over the mask; all arguments [B, T].

    Per token 0.5 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) (Huang et al., detail of openai/baselines).
    """
    clipped = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    zero = torch.zeros_like(values)
    plain = torch.where(mask, values - returns, zero) ** 2
    limited = torch.where(mask, clipped - returns, zero) ** 2
    loss = 0.5 * torch.maximum(plain, limited).sum()
    with torch.no_grad():
        metrics = {"value_loss": loss.detach(), "value_clip_fraction": (limited > plain).sum().float()}
    return loss, metrics


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the mask; 1 is a perfect critic, 0 one that knows only the mean."""
    return float(1 - masked_variance(returns - values, mask) / masked_variance(returns, mask).clamp(min=1e-12))


class KLController:
    """The coefficient of the KL penalty: fixed, or steered towards a target (Ziegler et al., section 2.2).

    Adaptive: e = clip(KL / target - 1, -0.2, 0.2); coef *= 1 + e * episodes / horizon, with the *observed* KL of
    whole responses in nats.
    """

    def __init__(self, kl_coef: float, *, target: float | None = None, horizon: int = 10_000) -> None:
        self.value = kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, observed_kl: float, episodes: int) -> None:
        """Take note of the mean KL per response over `episodes` new responses."""
        if self.target is not None:
            error = min(max(observed_kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * episodes / self.horizon


# ---------------------------------------------------------------------------------------------- configuration


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
    generation_batch_size: int = 0
    """Responses that one device samples side by side, waiting prompts taking freed places; 0 takes all of a rollout."""
    scoring_batch_tokens: int = 0
    """Tokens of one scoring pass on one device, about; 0: those of a training pass, off the CPU four times those."""
    ppo_epochs: int = 1
    """Passes over each rollout (KULLM-RLHF, DeepSpeed-Chat: 1; Ziegler et al.: 4)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "rollout_batch_size", "ppo_epochs")
        require_at_least(self, 0, "generation_batch_size", "scoring_batch_tokens")


@dataclass
class PPOConfig:
    """The constants of PPO and where its models come from."""

    actor_model: str | None = None
    """The SFT model to align; unset takes `<output_dir>/sft/model`."""
    reward_model: str | None = None
    """A directory saved by step 2; unset takes `<output_dir>/reward/model`."""
    critic_model: str | None = None
    """A saved scalar model the critic starts from; unset copies the reward model (InstructGPT)."""
    kl_coef: float = 0.1
    """Weight of the KL penalty (KULLM-RLHF, DeepSpeed-Chat: 0.1; InstructGPT: 0.02)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token KL estimate in the rewards (Schulman 2020)."""
    kl_target: float | None = None
    """Steer `kl_coef` towards this many nats per response (Ziegler et al.: 6); unset keeps it fixed."""
    kl_horizon: int = 10_000
    """Responses over which the adaptive coefficient moves (Ziegler et al.: 10000)."""
    score_clip: float = 5.0
    """Scores are clipped to plus and minus this before the KL penalty (DeepSpeed-Chat: 5); 0 turns it off."""
    clip_range: float = 0.2
    """Clip range of the ratio (Schulman et al.: 0.2)."""
    value_clip_range: float = 0.2
    """Clip range of the value update (DeepSpeed-Chat, KULLM-RLHF: 0.2)."""
    gamma: float = 1.0
    """Discount (InstructGPT, KULLM-RLHF: 1)."""
    lam: float = 0.95
    """GAE's lambda (InstructGPT, KULLM-RLHF: 0.95)."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1 over the whole rollout (Huang et al.)."""
    whiten_rewards: bool = False
    """Scale rewards to variance 1, keeping their mean, before GAE (Ziegler et al.)."""
    temperature: float = 1.0
    """Sampling temperature; divides the logits of actor, old actor and reference alike."""
    top_k: int = 0
    """Must stay 0 in PPO: a filter makes the sampling distribution differ from the scored one (TRL#256)."""
    top_p: float = 1.0
    """Must stay 1 in PPO, for the same reason."""
    generation_backend: Literal["own", "deepspeed"] = "own"
    """What samples: `rlhf.generation`, or DeepSpeed's rollout engine, checked against a forward pass of ours first."""
    old_logprobs: Literal["auto", "sampled", "recomputed"] = "auto"
    """Log-probabilities of the sampling policy: as captured while sampling, recomputed, or (auto) captured where the
    first rollout, computed both ways, agrees to 1e-4 nats (float32 does, 16-bit does not)."""
    missing_eos_penalty: float = 0.0
    """Taken off the score of a response that does not end (TRL: 1.0)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    ptx_coef: float = 0.0
    """Weight of the pretraining or SFT loss mixed into the actor's (InstructGPT: 27.8)."""
    ema_decay: float = 0.0
    """Decay of the averaged actor, saved as `actor_ema` (DeepSpeed-Chat: 0.992); 0 keeps none."""
    eval_every_steps: int = 0
    """Iterations between evaluations on held-out prompts; 0 evaluates before and after only."""
    eval_samples_per_prompt: int = 4
    """Responses sampled per held-out prompt in an evaluation."""
    sample_table_rows: int = 4
    """Prompts shown with their responses at each evaluation."""

    def __post_init__(self) -> None:
        if self.top_k != 0 or self.top_p != 1.0:
            raise ConfigError(
                f"top_k={self.top_k}, top_p={self.top_p}: PPO must score the distribution it samples from. A filter "
                "changes it, and the KL to the reference turns negative. Leave top_k at 0 and top_p at 1 and lower "
                "`temperature` instead"
            )
        for name in ("clip_range", "value_clip_range", "temperature"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")
        require_at_least(self, 0, "kl_coef", "score_clip", "missing_eos_penalty", "entropy_coef", "ptx_coef")
        require_at_least(self, 1, "eval_samples_per_prompt", "kl_horizon")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay={self.ema_decay} must lie in [0, 1); 0 keeps no average")
        if self.kl_target is not None and self.kl_target <= 0:
            raise ConfigError(f"kl_target={self.kl_target} must be above 0 nats, or unset for a fixed kl_coef")


# ---------------------------------------------------------------------------------------------------- trainer


class EmptyRolloutError(RuntimeError):
    """A rollout in which every response is empty: there is nothing to learn from."""


class PPOTrainer(OnPolicyTrainer):
    """Samples, scores and learns with the four engines of an `RLHFEngine`."""

    def __init__(
        self,
        engine: Any,
        prompts: Sequence[TokenizedPrompt],
        eval_prompts: Sequence[TokenizedPrompt],
        *,
        tokenizer: Any,
        scorer: Any,
        plan: Plan,
        batch: PPOBatchConfig,
        config: PPOConfig,
        run: RunConfig,
        directory: Path,
        max_response_tokens: int,
        synchronised: bool,
        export: Any,
        concurrent: bool = True,
        ptx: Sequence[TokenizedResponse] = (),
        states: TrainingStates | None = None,
    ) -> None:
        self.engine = engine
        self.prompts = prompts
        self.eval_prompts = eval_prompts
        self.tokenizer = tokenizer
        self.plan = plan
        self.batch = batch
        self.config = config
        self._export = export
        # ZeRO-3 keeps process-wide notes of the module that runs: two models at a time would mix them up
        can_share = not synchronised and not any_quantized(engine.actor, engine.critic)
        self.together = concurrent and can_share and can_run_side_by_side(self.device, ranks=world_size())
        self.sharers = WORKERS if self.together else 1
        self.rollouts = RolloutWorker(
            engine,
            scorer,
            make_backend(
                config.generation_backend,
                engine.actor,
                eos_ids=eos_token_ids(engine.actor, tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                seed=run.seed,
                slots=batch.generation_batch_size,
            ),
            Sampling(max_response_tokens, temperature=config.temperature, vocabulary_size=len(tokenizer)),
            eos_ids=eos_token_ids(engine.actor, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            plan=plan,
            scoring_tokens=batch.scoring_batch_tokens,
            old_logprobs=config.old_logprobs,
            together=self.together,
        )
        self.kl = KLController(config.kl_coef, target=config.kl_target, horizon=config.kl_horizon)
        self.order = DataOrder([len(prompt.input_ids) for prompt in prompts], rollout_plan(batch, plan), run.seed)
        self.ptx = ptx
        if config.ptx_coef > 0:
            if not ptx:
                raise ConfigError(f"ptx_coef={config.ptx_coef} needs data: name it in `ptx_data`, or set ptx_coef to 0")
            self.ptx_order = DataOrder([len(row.input_ids) for row in ptx], plan, run.seed + 1)
        self.optimizer_step = 0
        self.first_log_ratios: list[torch.Tensor] | None = None  # collected over the first minibatch of an update
        iterations = batch.max_steps or self.order.steps(batch.epochs)
        super().__init__(
            eval_every_steps=config.eval_every_steps,
            total_steps=iterations,
            run=run,
            directory=directory,
            stage="ppo",
            states=states,
        )

    @property
    def device(self) -> torch.device:
        return torch.device(self.engine.actor.device)

    def engines(self) -> dict[str, Any]:
        return {"actor": self.engine.actor, "critic": self.engine.critic}

    def state(self) -> dict[str, Any]:
        mine = {
            "kl_coef": self.kl.value,
            "optimizer_step": self.optimizer_step,
            "old_logprobs": self.rollouts.old_logprobs,
            "captured_error": self.rollouts.captured_error,
            "captured_error_mean": self.rollouts.captured_error_mean,
        }
        return {**super().state(), "ppo": mine}

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.engine.ema_state_dict() if self.config.ema_decay > 0 else {}

    def load_state(
        self, state: dict[str, Any], rank_states: Sequence[dict[str, Any]], tensors: dict[str, torch.Tensor]
    ) -> None:
        super().load_state(state, rank_states, tensors)
        mine = state["ppo"]
        self.kl.value, self.optimizer_step = mine["kl_coef"], mine["optimizer_step"]
        self.rollouts.old_logprobs, self.rollouts.captured_error = mine["old_logprobs"], mine["captured_error"]
        self.rollouts.captured_error_mean = mine["captured_error_mean"]
        if self.config.ema_decay > 0:
            self.engine.load_ema_state_dict(tensors)

    # -------------------------------------------------------------------------------------------- experience

    def make_experience(self, iteration: int) -> PPOExperience:
        """Prompts -> rollout -> scores, rewards, advantages and returns: computed once, over all ranks."""
        config = self.config
        examples = [self.prompts[index] for index in self.order.indices(iteration - 1)]
        rollout, scored = self.rollouts.run(examples, iteration)
        check_rollout(rollout, scored, examples, iteration, self.directory)
        mask = rollout.response_mask
        if not bool((mask.sum(1) > self.rollouts.ended(rollout).long()).any()):
            raise EmptyRolloutError(
                f"iteration {iteration}: all {len(examples)} responses are empty (end-of-sequence at once, or no token "
                "at all); nothing can be learnt from them. Check the SFT data for empty responses, and kl_coef if the "
                "actor came to this during PPO"
            )
        rewards = shape_rewards(
            scored["scores"],
            scored["logprobs"],
            scored["ref_logprobs"],
            mask,
            kl_coef=self.kl.value,
            kl_estimator=config.kl_estimator,
            score_clip=config.score_clip,
            penalties=config.missing_eos_penalty * (~self.rollouts.ended(rollout)).float(),
        )
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, scored["values"], mask, gamma=config.gamma, lam=config.lam)
        advantage_std = float(masked_variance(advantages, mask).sqrt())
        if config.whiten_advantages:
            advantages = masked_whiten(advantages, mask)
        self.experience_metrics = {
            **self.rollouts.describe(rollout, scored),
            "reward": float(rewards.sum(1).mean()),
            "advantage_std": advantage_std,
            "explained_variance": explained_variance(scored["values"], returns, mask),
            "kl_coef": self.kl.value,
            **self.rollouts.measured,
        }
        old = Rollout(rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, mask, scored["logprobs"])
        return PPOExperience(
            old, scored["ref_logprobs"], scored["values"], rewards, advantages, returns, scored["scores"]
        )

    # ------------------------------------------------------------------------------------------------ update

    def update(self, experience: PPOExperience, iteration: int) -> dict[str, float]:
        """All PPO epochs over one experience: the minibatches are reshuffled in every epoch."""
        meter, critic_meter = MeanMeter(), MeanMeter()
        first: dict[str, float] = {}
        self.first_log_ratios = []
        for epoch in range(self.batch.ppo_epochs):
            for minibatch in self.minibatches(experience, iteration, epoch):
                steps = (partial(self.actor_step, minibatch, meter), partial(self.critic_step, minibatch, critic_meter))
                side_by_side(steps, together=self.together)
                self.optimizer_step += 1
                if self.config.ema_decay > 0:
                    self.engine.update_ema()
                if self.first_log_ratios is not None:
                    first = {"ratio_first": meter.means(self.device, keep=True)["ratio"], **self.first_deviation()}
        observed = self.experience_metrics
        self.kl.update(observed["kl_per_response"], len(experience))
        return {
            **observed,
            **meter.means(self.device),
            **critic_meter.means(self.device),
            **first,
            "learning_rate": learning_rate(self.engine.actor),
            "critic_learning_rate": learning_rate(self.engine.critic),
        }

    def first_deviation(self) -> dict[str, float]:
        """How far new and old log-probabilities lie apart on the first minibatch, over all ranks; ends the collecting.

        They are the same policy's: the mean ratio alone would hide deviations of both signs, as of a shifted mask.
        """
        found = self.first_log_ratios or [torch.zeros(1, device=self.device)]
        self.first_log_ratios = None
        deviations = all_gather_rows(torch.cat(found)).abs()
        return {"log_ratio_first_mean": float(deviations.mean()), "log_ratio_first_max": float(deviations.max())}

    def minibatches(self, experience: PPOExperience, iteration: int, epoch: int) -> list[list[PPOExperience]]:
        """Shuffled minibatches, each as this rank's micro-batches of rows of like length."""
        generator = torch.Generator().manual_seed((self.run.seed * 1_000_003 + iteration) * 101 + epoch)
        permutation = torch.randperm(len(experience), generator=generator)
        lengths = (experience.rollout.prompt_mask.sum(1) + experience.rollout.response_mask.sum(1)).cpu()
        result = []
        for chosen in permutation.split(self.plan.global_batch_size):
            split = self.plan.micro_batches(lengths[chosen].tolist(), sharers=self.sharers)
            parts = split[rank() :: self.plan.world_size]
            result.append([trim_experience(experience.rows(chosen[part].to(self.device))) for part in parts])
        return result

    def actor_step(self, micro_batches: Sequence[PPOExperience], meter: MeanMeter) -> None:
        """One optimizer step of the actor, with the ptx mixture where it is on."""
        ptx_parts = self.ptx_micro_batches() if self.config.ptx_coef > 0 else []
        ptx_weight = 0.0
        if ptx_parts:
            counts = [sum(map(token_count, micro_batches)), sum(map(ptx_count, ptx_parts))]
            tokens, ptx_tokens = all_gather_rows(torch.tensor([counts], device=self.device)).sum(0).tolist()
            ptx_weight = self.config.ptx_coef * tokens / ptx_tokens

        def loss_sum(part: Any) -> torch.Tensor:
            if isinstance(part, PPOExperience):
                return self.actor_loss(part, meter)
            ptx_loss = label_loss(self.engine.actor, part)
            meter.add({"ptx_loss": ptx_loss.detach()}, ptx_count(part))
            return ptx_weight * ptx_loss

        with self.engine.updating(self.engine.actor):
            accumulate_step(
                self.engine.actor,
                [*micro_batches, *ptx_parts],
                count=lambda part: token_count(part) if isinstance(part, PPOExperience) else 0.0,
                loss_sum=loss_sum,
                step=self.step + 1,
                name="policy loss",
                engine_name="actor",
                directory=self.directory,
                meter=meter,
            )

    def actor_loss(self, part: PPOExperience, meter: MeanMeter) -> torch.Tensor:
        """Summed policy loss (less the entropy bonus) of a micro-batch."""
        config, rollout, mask = self.config, part.rollout, part.rollout.response_mask
        if config.entropy_coef > 0:
            logprobs, entropy = response_logprobs_and_entropy(self.engine.actor, rollout, self.rollouts.sampling)
        else:
            logprobs, entropy = response_logprobs(self.engine.actor, rollout, self.rollouts.sampling), None
        if self.first_log_ratios is not None:
            self.first_log_ratios.append((logprobs.detach() - rollout.logprobs)[mask])
        loss, metrics = policy_loss(logprobs, rollout.logprobs, part.advantages, mask, clip_range=config.clip_range)
        if entropy is not None:
            entropy_sum = (entropy * mask).sum()
            metrics["entropy"] = entropy_sum.detach()
            loss = loss - config.entropy_coef * entropy_sum
        meter.add(metrics, token_count(part))
        return loss

    def critic_step(self, micro_batches: Sequence[PPOExperience], meter: MeanMeter) -> None:
        """One optimizer step of the critic."""

        def loss_sum(part: PPOExperience) -> torch.Tensor:
            values = response_values(self.engine.critic, part.rollout)
            loss, metrics = value_loss(
                values, part.values, part.returns, part.rollout.response_mask, clip_range=self.config.value_clip_range
            )
            meter.add(metrics, token_count(part))
            return loss

        with self.engine.updating(self.engine.critic):
            accumulate_step(
                self.engine.critic,
                micro_batches,
                count=token_count,
                loss_sum=loss_sum,
                step=self.step + 1,
                name="value loss",
                engine_name="critic",
                directory=self.directory,
                meter=meter,
                norm_name="critic_gradient_norm",
            )

    def ptx_micro_batches(self) -> list[TokenBatch]:
        """This rank's ptx micro-batches for the next optimizer step: as many rows as the minibatch has."""
        from rlhf.data import collate_responses

        return [
            collate_responses([self.ptx[index] for index in part], self.tokenizer.pad_token_id).to(self.device)
            for part in self.ptx_order.micro_batches(self.optimizer_step, sharers=self.sharers)
        ]

    # -------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, iteration: int) -> dict[str, Any]:
        """Score the actor on the held-out prompts, with the same random numbers every time."""
        if not self.eval_prompts:
            return {}
        copies = self.config.eval_samples_per_prompt
        examples = [prompt for prompt in self.eval_prompts for _ in range(copies)]
        counted = len(examples)
        fill = (-counted) % world_size()  # every rank must have as many rows: collectives
        filled = examples + list(islice(cycle(examples), fill))
        rollout, scored = self.rollouts.run(filled, iteration=2**32 - 1)
        rows = slice(0, counted)
        rollout, scored = rollout.rows(rows), {name: tensor[rows] for name, tensor in scored.items()}
        texts = [
            self.tokenizer.decode(ids[mask].tolist(), skip_special_tokens=True).strip()
            for ids, mask in zip(
                rollout.response_ids[::copies].cpu(), rollout.response_mask[::copies].cpu(), strict=True
            )
        ]
        samples = [
            {"id": prompt.id, "prompt": prompt.text, "response": text, "score": score}
            for prompt, text, score in zip(self.eval_prompts, texts, scored["scores"][::copies].tolist(), strict=True)
        ]
        logger.info(sample_table(samples[: self.config.sample_table_rows]))
        return {**self.rollouts.describe(rollout, scored), "samples": samples}

    def export(self) -> None:
        self._export()


def rollout_plan(batch: PPOBatchConfig, plan: Plan) -> Plan:
    """The plan whose global batch is a rollout; raises ConfigError where the arithmetic does not come out even."""
    if batch.rollout_batch_size % plan.global_batch_size:
        below = max(1, batch.rollout_batch_size // plan.global_batch_size) * plan.global_batch_size
        raise ConfigError(
            f"rollout_batch_size={batch.rollout_batch_size} must be a multiple of global_batch_size="
            f"{plan.global_batch_size} (a PPO minibatch); use {below} or {below + plan.global_batch_size}"
        )
    return replace(plan, global_batch_size=batch.rollout_batch_size)  # type: ignore[type-var]


def ppo_optimizer_steps(batch: PPOBatchConfig, plan: Plan, prompts: int) -> int:
    """Optimizer steps of the actor (and of the critic) in the whole run, for the learning-rate schedule."""
    rollouts = rollout_plan(batch, plan)
    iterations = batch.max_steps or DataOrder([1] * max(1, prompts), rollouts, 0).steps(batch.epochs)
    return iterations * batch.ppo_epochs * (batch.rollout_batch_size // plan.global_batch_size)


def any_quantized(*models: torch.nn.Module) -> bool:
    """True when a weight is in 8 or 4 bits: bitsandbytes keeps scratch state beside it, which serves one thread."""
    return any(not weight.is_floating_point() for model in models for weight in model.parameters())


def token_count(part: PPOExperience) -> float:
    """Response tokens of a micro-batch."""
    return float(part.rollout.response_mask.sum())


def ptx_count(batch: TokenBatch) -> float:
    """Label tokens of a ptx micro-batch."""
    return float((batch.labels[:, 1:] != IGNORE_INDEX).sum())


def trim_experience(part: PPOExperience) -> PPOExperience:
    """Drop the columns that are padding in every row."""
    rollout, columns = part.rollout.trimmed()
    return PPOExperience(
        rollout=rollout,
        ref_logprobs=part.ref_logprobs[:, columns],
        values=part.values[:, columns],
        rewards=part.rewards[:, columns],
        advantages=part.advantages[:, columns],
        returns=part.returns[:, columns],
        scores=part.scores,
    )


def sample_table(samples: Sequence[dict[str, Any]]) -> str:
    """Prompts, responses and scores as text."""
    lines = []
    for sample in samples:
        prompt = " ".join(sample["prompt"].split())[-60:]
        lines.append(
            f"  [{sample['score']:+.2f}] ...{prompt}\n          -> {' '.join(sample['response'].split())[:110]}"
        )
    return "\n".join(lines)
