"""Proximal policy optimisation for language models.

Schulman et al. (arXiv 1707.06347) as InstructGPT (arXiv 2203.02155) uses it; the details follow Huang et al.,
"The N implementation details of RLHF with PPO". Per-token tensors [B, T] cover the response only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch

from rlhf.algorithms.advantages import EstimatorInput, LossMean
from rlhf.algorithms.config import PPOBatchConfig, PPOConfig
from rlhf.algorithms.policy_loss import (
    KLController,
    explained_variance,
    loss_count,
    loss_kl,
    loss_weights,
    policy_loss,
    shape_rewards,
    value_loss,
)
from rlhf.config import ConfigError
from rlhf.data.collate import collate_responses
from rlhf.data.rendered import asked
from rlhf.data.stage_data import StageData
from rlhf.distributed.collectives import all_gather_rows
from rlhf.distributed.log import logger
from rlhf.distributed.place import is_main, rank
from rlhf.numerics.statistics import masked_variance, masked_whiten
from rlhf.rewards.rules import overlong_penalties
from rlhf.training.data_order import DataOrder, Plan, planned_steps
from rlhf.training.groups import all_alike, with_groups_replaced
from rlhf.training.loop import RunContext
from rlhf.training.metrics import MeanMeter
from rlhf.training.nonfinite import check_rollout
from rlhf.training.on_policy import OnPolicyTrainer, Selection
from rlhf.training.rollout_samples import rollout_lines
from rlhf.training.rollouts import RolloutWorker, ScoredRollout, one_for_each_rank
from rlhf.training.scoring import label_loss, response_logprobs, response_logprobs_and_entropy, response_values
from rlhf.training.step import accumulate_step, learning_rate
from rlhf.types import IGNORE_INDEX, Rollout, TensorBatch, TokenBatch, TokenizedPrompt

CALIBRATION_COPIES = 4
"""Responses to each of `length_calibration_prompts`."""
FURTHER_ROUND = 2**24
"""Between the numbers by which an iteration and its further rounds of sampling draw their random numbers."""


class EmptyRolloutError(RuntimeError):
    """A rollout in which every response is empty: there is nothing to learn from."""


@dataclass(frozen=True)
class PPOExperience(TensorBatch):
    """What PPO learns from. Per-token fields [B, T] cover the response only.

    `rollout.logprobs` holds the old log-probabilities that the ratio is taken against, `ref_logprobs` the reference's.
    `scores` [B] are what the reward says, `rewards` what is learnt from. `values` and `returns` are the critic's; where
    there is none they are not used.
    """

    rollout: Rollout
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    rewards: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    scores: torch.Tensor

    def trimmed(self) -> PPOExperience:
        """Without the columns that are padding in every row."""
        rollout, columns = self.rollout.trimmed()
        names = ("ref_logprobs", "values", "rewards", "advantages", "returns")
        per_token = {name: getattr(self, name)[:, columns] for name in names}
        return PPOExperience(rollout=rollout, scores=self.scores, **per_token)

    def tokens(self) -> float:
        """Response tokens."""
        return float(self.rollout.response_mask.sum())


class PtxMixture:
    """Pretraining or SFT rows whose loss is mixed into the actor's (InstructGPT, eq. 2), as many as a minibatch has."""

    def __init__(self, data: StageData, plan: Plan, *, coef: float, pad_token_id: int, seed: int) -> None:
        self.rows = data.train
        self.fingerprint = data.fingerprint
        self.coef = coef
        self.pad_token_id = pad_token_id
        self.order = DataOrder([len(row.input_ids) for row in self.rows], plan, seed + 1)

    def micro_batches(self, step: int, device: torch.device, *, sharers: int) -> list[TokenBatch]:
        """This rank's micro-batches of optimizer step `step`."""
        return [
            collate_responses([self.rows[index] for index in part], self.pad_token_id).to(device)
            for part in self.order.micro_batches(step, sharers=sharers)
        ]


class PPOTrainer(OnPolicyTrainer):
    """Samples, scores and learns with the engines of an `RLHFEngine` (those of `rollouts`)."""

    def __init__(
        self,
        rollouts: RolloutWorker,
        prompts: StageData,
        config: PPOConfig,
        *,
        batch: PPOBatchConfig,
        export: Callable[[], None],
        context: RunContext,
        ptx: PtxMixture | None = None,
    ) -> None:
        self.rollouts = rollouts
        self.engine = rollouts.engine
        self.plan = rollouts.plan
        self.prompts = prompts
        self.config = config
        self.batch = batch
        self.ptx = ptx
        self.estimator = config.estimator
        self.loss_mean: LossMean = config.loss_mean or config.estimator.loss_mean
        self.kl = KLController(config.kl_coef, target=config.kl_target, horizon=config.kl_horizon)
        iterations = planned_iterations(batch, self.plan, len(prompts.train))
        lengths = [len(prompt.input_ids) for prompt in prompts.train]
        self.order = DataOrder(lengths, self.plan, context.run.seed, size=batch.rollout_batch_size)
        self.questions = {prompt.input_ids: asked(prompt) for prompt in prompts.train}
        self.evaluated = chosen_prompts(prompts.evaluation, config.eval_prompts, context.run.seed)
        self.warmup = warmup_iterations(config, batch, self.plan, len(prompts.train))
        self.optimizer_step = 0
        self.first_log_ratios: list[torch.Tensor] | None = None  # collected over the first minibatch of an update
        self._export = export
        selection = Selection(config.eval_every_steps, config.keep_best, config.stop_when, config.patience)
        super().__init__(context, total_steps=iterations, selection=selection)

    @property
    def device(self) -> torch.device:
        return torch.device(self.engine.actor.device)

    def engines(self) -> dict[str, Any]:
        critic = {} if self.engine.critic is None else {"critic": self.engine.critic}
        return {"actor": self.engine.actor, **critic}

    def export(self) -> None:
        self._export()

    def state(self) -> dict[str, Any]:
        mine = {**self.kl.state(), "optimizer_step": self.optimizer_step, **self.rollouts.state()}
        return {**super().state(), "ppo": mine}

    def tensors(self) -> dict[str, torch.Tensor]:
        averaged = self.engine.averaged_actor
        return {} if averaged is None else averaged.state_dict()

    def load_state(
        self, state: dict[str, Any], rank_states: Sequence[dict[str, Any]], tensors: dict[str, torch.Tensor]
    ) -> None:
        super().load_state(state, rank_states, tensors)
        self.optimizer_step = state["ppo"]["optimizer_step"]
        self.kl.load_state(state["ppo"])
        self.rollouts.load_state(state["ppo"])
        if self.engine.averaged_actor is not None:
            self.engine.averaged_actor.load_state_dict(tensors)

    def prepare(self) -> None:
        """Fit the length curve of the actor's responses as it is now where `length_calibration_prompts` asks for it."""
        prompts = chosen_prompts(self.prompts.train, self.config.length_calibration_prompts, self.run.seed)
        if self.config.length_calibration_prompts:
            found = self.rollouts.calibrate_length(prompts, copies=CALIBRATION_COPIES)
            logger.info(
                "length curve after iteration %d: of the actor's %d responses to %d prompts the correlation of score "
                "and length within prompts is %+.2f, %+.2f with the curve taken off",
                self.step, len(prompts) * CALIBRATION_COPIES, len(prompts), found.before, found.after,
            )  # fmt: skip

    # -------------------------------------------------------------------------------------------- experience

    def make_experience(self, iteration: int) -> PPOExperience:
        """Prompts -> rollout -> scores, rewards, advantages and returns: computed once, over all ranks."""
        config = self.config
        if config.length_calibration_every and iteration > 1 and (iteration - 1) % config.length_calibration_every == 0:
            self.prepare()
        scored, sampled = self.sample(iteration)
        if is_main():
            self.rollout_lines = list(
                rollout_lines(self.rollouts, scored, self.questions, iteration=iteration, count=config.keep_samples)
            )
        rollout, mask = scored.rollout, scored.rollout.response_mask
        if not bool((mask.sum(1) > scored.ended.long()).any()):
            raise EmptyRolloutError(
                f"iteration {iteration}: all {len(rollout)} responses are empty (end-of-sequence at once, or no token "
                "at all); nothing can be learnt from them. Check the SFT data for empty responses, and kl_coef if the "
                "actor came to this during PPO"
            )
        rewards = self.rewards_of(scored, self.kl.value)
        optimised = float(rewards.sum(1).mean())
        if config.kl_place == "loss":
            rewards = self.rewards_of(scored, 0.0)
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        groups = torch.arange(len(rollout), device=mask.device) // self.batch.samples_per_prompt
        advantages, returns = self.estimator.compute(
            EstimatorInput(rewards, scored.values, mask, groups, gamma=config.gamma, lam=config.lam)
        )
        advantage_std = float(masked_variance(advantages, mask).sqrt())
        if config.whitens:
            advantages = masked_whiten(advantages, mask)
        self.experience_metrics = {
            **self.rollouts.describe(scored),
            "reward": optimised,
            "advantage_std": advantage_std,
            **self._critic_metrics(scored.values, returns, mask),
            "kl_coef": self.kl.value,
            **self.rollouts.measured,
            **sampled,
        }
        old = replace(rollout, logprobs=scored.logprobs)
        return PPOExperience(old, scored.ref_logprobs, scored.values, rewards, advantages, returns, scored.scores)

    def sample(self, iteration: int) -> tuple[ScoredRollout, dict[str, float]]:
        """The rollout of an iteration and, with several responses to a prompt, how many prompts have equal ones.

        `resample_equal_groups` replaces those by other prompts, drawn at random, as often as it says (DAPO's dynamic
        sampling, arXiv 2503.14476, section 3.2); prompts that are equal to the last stay.
        """
        samples, chosen = self.batch.samples_per_prompt, self.order.indices(iteration - 1)
        scored = self._rollout(chosen, iteration)
        if samples < 2:
            return scored, {}
        alike = self._alike(scored)
        told = {"equal_groups": float(alike.float().mean())}
        if self.config.resample_equal_groups == 0:
            return scored, told
        others = iter(self._others(chosen, iteration) if bool(alike.any()) else [])
        drawn, seconds = 0, [self.rollouts.seconds]
        for round_number in range(1, self.config.resample_equal_groups + 1):
            further = list(islice(others, int(alike.sum())))
            if not further:
                break
            drawn += len(further)
            more = self._rollout(further, iteration, draw=iteration + round_number * FURTHER_ROUND)
            seconds.append(self.rollouts.seconds)
            scored = with_groups_replaced(
                scored, alike, more, ~self._alike(more), samples=samples, pad=self.rollouts.tokenizer.pad_token_id
            )
            alike = self._alike(scored)
        told |= {name: sum(each[name] for each in seconds) for name in self.rollouts.seconds}
        left = float(alike.float().mean())
        return scored, {**told, "resampled_prompts": float(drawn), "equal_groups_left": left}

    def _rollout(self, chosen: Sequence[int], iteration: int, *, draw: int | None = None) -> ScoredRollout:
        """Responses to the training prompts `chosen`, sampled with the random numbers of `draw` (None: `iteration`)."""
        prompts = [self.prompts.train[index] for index in chosen]
        examples = [prompt for prompt in prompts for _ in range(self.batch.samples_per_prompt)]
        scored = self.rollouts.run(one_for_each_rank(examples), iteration if draw is None else draw)
        scored = scored.rows(slice(0, len(examples)))
        check_rollout(scored, examples, iteration, self.directory)
        return scored

    def _alike(self, scored: ScoredRollout) -> torch.Tensor:
        """By prompt, whether its responses are worth the same, whatever their KL divergence: [G] bool."""
        return all_alike(self.rewards_of(scored, 0.0).sum(1), self.batch.samples_per_prompt)

    def _others(self, chosen: Sequence[int], iteration: int) -> list[int]:
        """The other training prompts in a random order, the same for a seed and iteration."""
        generator = torch.Generator().manual_seed((self.run.seed * 1_000_003 + iteration) % 2**63)
        order = torch.randperm(len(self.prompts.train), generator=generator).tolist()
        taken = set(chosen)
        return [index for index in order if index not in taken]

    def rewards_of(self, scored: ScoredRollout, kl_coef: float) -> torch.Tensor:
        """What is optimised, by token [B, T]: scores less the penalties of a missing end, of too many tokens and of
        the KL divergence."""
        config = self.config
        penalties = config.missing_eos_penalty * (~scored.ended).float()
        if config.overlong_penalty:
            max_tokens = self.rollouts.sampling.max_new_tokens
            penalties = penalties - config.overlong_penalty * overlong_penalties(
                scored.rollout.response_mask.sum(1),
                max_tokens=max_tokens,
                buffer_tokens=config.overlong_buffer(max_tokens),
            )
        return shape_rewards(
            scored.scores,
            scored.logprobs,
            scored.ref_logprobs,
            scored.rollout.response_mask,
            kl_coef=kl_coef,
            kl_estimator=config.kl_estimate if config.kl_place == "reward" else "k1",
            score_clip=config.score_clip,
            penalties=penalties,
            token_rewards=scored.token_rewards,
        )

    def _critic_metrics(self, values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
        if self.engine.critic is None:
            return {}
        return {"explained_variance": explained_variance(values, returns, mask)}

    # ------------------------------------------------------------------------------------------------ update

    def update(self, experience: PPOExperience, iteration: int) -> dict[str, float]:
        """All PPO epochs over one experience: the minibatches are reshuffled in every epoch."""
        meter, critic_meter = MeanMeter(), MeanMeter()
        first: dict[str, float] = {}
        actor_learns = iteration > self.warmup
        self.first_log_ratios = [] if actor_learns else None
        for epoch in range(self.batch.ppo_epochs):
            for minibatch in self.minibatches(experience, iteration, epoch):
                steps = [partial(self.actor_step, minibatch, meter)] if actor_learns else []
                if self.engine.critic is not None:
                    steps.append(partial(self.critic_step, minibatch, critic_meter))
                self.engine.run_jobs(steps)
                if not actor_learns:
                    continue
                self.optimizer_step += 1
                if self.engine.averaged_actor is not None:
                    self.engine.averaged_actor.update()
                if self.first_log_ratios is not None:
                    first = {"ratio_first": meter.means(self.device, keep=True)["ratio"], **self.first_deviation()}
        observed = self.experience_metrics
        if actor_learns:
            self.kl.update(observed["kl_per_response"], len(experience))
        rates = {"learning_rate": learning_rate(self.engine.actor)}
        if self.engine.critic is not None:
            rates["critic_learning_rate"] = learning_rate(self.engine.critic)
        return {**observed, **meter.means(self.device), **critic_meter.means(self.device), **first, **rates}

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
            split = self.plan.micro_batches(lengths[chosen].tolist(), sharers=self.engine.jobs_at_a_time)
            parts = split[rank() :: self.plan.world_size]
            result.append([experience.rows(chosen[part].to(self.device)).trimmed() for part in parts])
        return result

    def actor_step(self, micro_batches: Sequence[PPOExperience], meter: MeanMeter) -> None:
        """One optimizer step of the actor, with the ptx mixture where it is on."""
        ptx_parts, ptx_weight = self._ptx_parts(micro_batches)

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
                count=lambda part: self._count(part) if isinstance(part, PPOExperience) else 0.0,
                loss_sum=loss_sum,
                step=self.step + 1,
                name="policy loss",
                engine_name="actor",
                directory=self.directory,
                meter=meter,
            )

    def _ptx_parts(self, micro_batches: Sequence[PPOExperience]) -> tuple[list[TokenBatch], float]:
        """The ptx micro-batches of the next step, and the weight that makes theirs a mean over their own tokens."""
        if self.ptx is None:
            return [], 0.0
        parts = self.ptx.micro_batches(self.optimizer_step, self.device, sharers=self.engine.jobs_at_a_time)
        counts = [sum(map(self._count, micro_batches)), sum(map(ptx_count, parts))]
        counted, ptx_tokens = all_gather_rows(torch.tensor([counts], device=self.device)).sum(0).tolist()
        return parts, self.ptx.coef * counted / ptx_tokens

    def _count(self, part: PPOExperience) -> float:
        return loss_count(part.rollout.response_mask, self.loss_mean)

    def actor_loss(self, part: PPOExperience, meter: MeanMeter) -> torch.Tensor:
        """Summed policy loss (less the entropy bonus, with the KL penalty where it is there) of a micro-batch."""
        config, rollout, mask = self.config, part.rollout, part.rollout.response_mask
        entropy: torch.Tensor | None = None
        if config.entropy_coef > 0:
            logprobs, entropy = response_logprobs_and_entropy(self.engine.actor, rollout, self.rollouts.sampling)
        else:
            logprobs = response_logprobs(self.engine.actor, rollout, self.rollouts.sampling)
        if self.first_log_ratios is not None:
            self.first_log_ratios.append((logprobs.detach() - rollout.logprobs)[mask])
        weights = loss_weights(mask, self.loss_mean, max_tokens=self.rollouts.sampling.max_new_tokens)
        loss, metrics = policy_loss(
            logprobs, rollout.logprobs, part.advantages, mask, clip_range=config.clip_range,
            clip_range_high=config.clip_range_high, weights=weights,
        )  # fmt: skip
        meter.add({"policy_loss": metrics.pop("policy_loss")}, self._count(part))
        if config.kl_place == "loss" and self.kl.value > 0:
            kl = loss_kl(logprobs, rollout.logprobs, part.ref_logprobs, config.kl_estimate, ratio=config.kl_ratio)
            kl = torch.where(mask, kl, 0.0)
            metrics["kl_loss"] = kl.detach().sum()
            loss = loss + self.kl.value * (kl * weights).sum()
        if entropy is not None:
            metrics["entropy"] = (entropy * mask).sum().detach()
            loss = loss - config.entropy_coef * (entropy * mask * weights).sum()
        meter.add(metrics, part.tokens())
        return loss

    def critic_step(self, micro_batches: Sequence[PPOExperience], meter: MeanMeter) -> None:
        """One optimizer step of the critic."""

        def loss_sum(part: PPOExperience) -> torch.Tensor:
            values = response_values(self.engine.critic, part.rollout)
            loss, metrics = value_loss(
                values, part.values, part.returns, part.rollout.response_mask, clip_range=self.config.value_clip_range
            )
            meter.add(metrics, part.tokens())
            return loss

        with self.engine.updating(self.engine.critic):
            accumulate_step(
                self.engine.critic,
                micro_batches,
                count=PPOExperience.tokens,
                loss_sum=loss_sum,
                step=self.step + 1,
                name="value loss",
                engine_name="critic",
                directory=self.directory,
                meter=meter,
                norm_name="critic_gradient_norm",
            )

    # -------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, iteration: int) -> dict[str, Any]:
        """Score the actor on the held-out prompts, with the same random numbers and KL coefficient every time."""
        config = self.config
        return self.rollouts.evaluate(
            self.evaluated,
            copies=config.eval_samples_per_prompt,
            shown=config.sample_table_rows,
            further=lambda scored: {"reward": float(self.rewards_of(scored, config.kl_coef).sum(1).mean())},
        )


def planned_iterations(batch: PPOBatchConfig, plan: Plan, prompts: int) -> int:
    """Iterations of a run over so many prompts. ConfigError when a rollout is no whole number of minibatches."""
    responses = batch.rollout_batch_size * batch.samples_per_prompt
    if responses % plan.global_batch_size:
        raise ConfigError(
            f"rollout_batch_size={batch.rollout_batch_size} prompts with samples_per_prompt={batch.samples_per_prompt} "
            f"give {responses} responses, which is no multiple of global_batch_size={plan.global_batch_size} (a PPO "
            "minibatch). Where memory set these sizes, lower micro_batch_size or generation_batch_size in their place, "
            f"which learns the same; else use {_whole_minibatches(batch, plan, responses)}, which changes the training"
        )
    return planned_steps(max(1, prompts), batch, batch.rollout_batch_size)


def _whole_minibatches(batch: PPOBatchConfig, plan: Plan, responses: int) -> str:
    """The nearest sizes of a rollout, and of a minibatch, with which one is a multiple of the other."""
    unit = plan.global_batch_size // math.gcd(plan.global_batch_size, batch.samples_per_prompt)
    below = batch.rollout_batch_size // unit * unit
    rollouts = " or ".join(str(size) for size in (below, below + unit) if size)
    fitting = [size for size in range(plan.world_size, responses + 1) if responses % size == 0]
    nearest = [*[size for size in fitting if size < plan.global_batch_size][-1:],
               *[size for size in fitting if size > plan.global_batch_size][:1]]  # fmt: skip
    minibatches = f", or global_batch_size={' or '.join(map(str, nearest))}" if nearest else ""
    return f"rollout_batch_size={rollouts}{minibatches}"


def warmup_iterations(config: PPOConfig, batch: PPOBatchConfig, plan: Plan, prompts: int) -> int:
    """Iterations in which the critic alone learns: 0 without a critic, and never the last one of a run."""
    if not config.estimator.needs_critic:
        return 0
    return min(config.critic_warmup_iterations, planned_iterations(batch, plan, prompts) - 1)


def ppo_optimizer_steps(config: PPOConfig, batch: PPOBatchConfig, plan: Plan, prompts: int) -> tuple[int, int]:
    """Optimizer steps of the actor and of the critic in the whole run, for their learning-rate schedules."""
    iterations = planned_iterations(batch, plan, prompts)
    per_iteration = batch.ppo_epochs * (batch.rollout_batch_size * batch.samples_per_prompt // plan.global_batch_size)
    warmup = warmup_iterations(config, batch, plan, prompts)
    return (iterations - warmup) * per_iteration, iterations * per_iteration


def chosen_prompts(prompts: Sequence[TokenizedPrompt], most: int, seed: int) -> Sequence[TokenizedPrompt]:
    """At most `most` of the prompts (0: all), in their order, the same ones for a seed."""
    if not 0 < most < len(prompts):
        return prompts
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    return [prompts[index] for index in sorted(order[:most].tolist())]


def ptx_count(batch: TokenBatch) -> float:
    """Label tokens of a ptx micro-batch."""
    return float((batch.labels[:, 1:] != IGNORE_INDEX).sum())
