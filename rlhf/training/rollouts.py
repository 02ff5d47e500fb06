"""Sample responses and score them, over all ranks: everything an on-policy algorithm needs before its mathematics."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from typing import Any, Literal

import torch
import torch.nn.functional as F

from rlhf.config import ConfigError
from rlhf.data.collate import collate_prompts
from rlhf.data.rendered import asked
from rlhf.distributed.collectives import all_gather_rows, all_reduce_max
from rlhf.distributed.log import logger
from rlhf.distributed.place import rank, world_size
from rlhf.generation.backend import Backend
from rlhf.generation.token_sampling import Sampling
from rlhf.numerics.local_regression import Curve
from rlhf.numerics.statistics import correlation, last_true, masked_mean, repeated_share
from rlhf.rewards.reward import Reward, RewardError, RewardPart, prefetch, prefetches
from rlhf.training.data_order import Plan
from rlhf.training.length_calibration import LengthCalibration, LengthCurves, within_prompts
from rlhf.training.score_normalization import ScoreNormalization
from rlhf.training.scoring import response_logprobs, response_values
from rlhf.types import Measure, Responses, Rollout, TensorBatch, TokenizedPrompt

OldLogprobs = Literal["auto", "sampled", "recomputed"]
CAPTURED_IS_EXACT = 1e-4
"""Largest difference in nats at which log-probabilities captured while sampling stand for recomputed ones."""
CORRELATED_ROWS = 8
"""Fewer responses correlate with anything by chance."""
RANGE_RESPONSES = 100
"""Of fewer responses the next ones' scores often lie outside the range: 2 / (n + 1) of them are expected to."""
FORWARD_ONLY = 4
"""A scoring pass holds so many times the tokens of a training pass on an accelerator: it keeps no activations. On a
CPU it holds as many: larger passes are slower there, since they leave the cache."""
EVALUATION = 2**32 - 1
"""The iteration number of evaluations: they draw the same random numbers every time, and no iteration's."""
CALIBRATION = 2**32 - 2
"""The iteration number of the responses that `calibrate_length` draws."""


@dataclass(frozen=True)
class ScoredRollout(TensorBatch):
    """A rollout and what is said of it, all rows on every rank in the order of the prompts.

    `logprobs` (of the sampling policy), `ref_logprobs`, `values`, `token_rewards` [B, T] float32, 0 outside the
    response; values are 0 without a critic, reference log-probabilities those of the actor without a reference.
    `scores` [B] of the reward, `part_scores` [B, N] of the N parts it is made of, `ended` [B] bool: the response ends
    with an end-of-sequence token.
    """

    rollout: Rollout
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    token_rewards: torch.Tensor
    scores: torch.Tensor
    part_scores: torch.Tensor
    ended: torch.Tensor


@dataclass(frozen=True)
class _Pass:
    """Rows of a rollout that are scored in one pass: their numbers, the same as a tensor, and themselves."""

    indices: Sequence[int]
    rows: torch.Tensor
    rollout: Rollout


class RolloutWorker:
    """Samples with a backend and scores with the models of an `RLHFEngine`, in evaluation mode, and with a reward.

    A scoring pass holds `scoring_tokens` tokens (0: by the training pass of `plan`, see FORWARD_ONLY).
    `old_logprobs` says where the log-probabilities of the sampling policy come from: the sampler, a forward pass of
    the actor, or (`auto`) the sampler once a rollout computed both ways has shown them equal to CAPTURED_IS_EXACT.
    `measure` and `held_out_reward` say more of the responses of an evaluation, by what training never sees.
    `parts` are the rewards that `reward` is the sum of, where it is one.
    """

    def __init__(
        self,
        engine: Any,
        backend: Backend,
        reward: Reward,
        sampling: Sampling,
        *,
        tokenizer: Any,
        eos_ids: Sequence[int],
        plan: Plan,
        scoring_tokens: int = 0,
        old_logprobs: OldLogprobs = "auto",
        measure: Measure | None = None,
        held_out_reward: Reward | None = None,
        parts: Sequence[RewardPart] = (),
    ) -> None:
        if not backend.captures_logprobs and old_logprobs == "sampled":
            raise ConfigError(
                "old_logprobs=sampled needs generation_backend=own: the other backend captures no "
                "log-probabilities; use old_logprobs=auto or recomputed"
            )
        self.engine = engine
        self.backend = backend
        self.reward = reward
        self.sampling = sampling
        self.tokenizer = tokenizer
        self.eos_ids = list(eos_ids)
        self.plan = plan
        self.scoring_tokens = scoring_tokens
        self.old_logprobs: OldLogprobs = old_logprobs if backend.captures_logprobs else "recomputed"
        self.measure = measure
        self.held_out_reward = held_out_reward
        self.part_names: tuple[str, ...] = ()
        self.seconds = {"seconds_generation": 0.0, "seconds_scoring": 0.0}
        self.captured_error: float | None = None
        self.captured_error_mean: float | None = None
        self.length_curves = LengthCurves()
        self.normalization = ScoreNormalization(parts)
        self.watched_parts = [part.name for part in parts if part.weight > 0]

    @property
    def device(self) -> torch.device:
        return torch.device(self.engine.actor.device)

    @property
    def measured(self) -> dict[str, float]:
        """Seconds of the last rollout, and how exact captured log-probabilities were when last looked at."""
        errors = {
            "sampling_logprob_error": self.captured_error,
            "sampling_logprob_error_mean": self.captured_error_mean,
        }
        return {**self.seconds, **{name: error for name, error in errors.items() if error is not None}}

    def state(self) -> dict[str, Any]:
        """What later rollouts depend on."""
        return {
            "old_logprobs": self.old_logprobs,
            "captured_error": self.captured_error,
            "captured_error_mean": self.captured_error_mean,
            "length_curves": self.length_curves.state(),
            "normalization": self.normalization.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        self.old_logprobs = state["old_logprobs"]
        self.captured_error, self.captured_error_mean = state["captured_error"], state["captured_error_mean"]
        self.length_curves.load_state(state["length_curves"])
        self.normalization.load_state(state["normalization"])

    def calibrate_length(self, prompts: Sequence[TokenizedPrompt], *, copies: int) -> LengthCalibration:
        """Take off all later scores how those of `copies` responses to each prompt, by the actor as it is now and as it
        was when this was called before, follow length. A collective; every rank gets the same curve. RewardError for a
        score that is not finite."""
        examples = [prompt for prompt in prompts for _ in range(copies)]
        scored = self.run(one_for_each_rank(examples), CALIBRATION).rows(slice(0, len(examples)))
        if wrong := (~torch.isfinite(scored.scores)).nonzero().flatten().tolist():
            raise RewardError(
                f"the reward gave {float(scored.scores[wrong[0]])} for a response to prompt {examples[wrong[0]].id!r}, "
                f"the first of {len(wrong)} of {len(examples)} that are not finite: no length curve can be fitted"
            )
        return self.length_curves.add(scored.scores, scored.rollout.response_mask.sum(1), copies=copies)

    def _length_curve(self, iteration: int) -> Curve | None:
        """What is taken off the scores of an iteration: evaluations are comparable, the curve's own data are raw."""
        if iteration == CALIBRATION:
            return None
        return self.length_curves.first if iteration == EVALUATION else self.length_curves.last

    def run(self, examples: Sequence[TokenizedPrompt], iteration: int) -> ScoredRollout:
        """Sample and score `examples` over all ranks; every rank gets all rows, in the order of `examples`.

        Every rank must have one at least: there are as many examples as ranks, or more.
        """
        with self.engine.scoring():
            started = time.perf_counter()
            mine, share = self.sample(examples, iteration)
            sampled = time.perf_counter()
            scored = self.score(mine, [examples[index] for index in share], self._length_curve(iteration))
        order = torch.argsort(all_gather_rows(torch.tensor(share, device=self.device)))
        gathered = scored._map(lambda tensor: gather_in_order(tensor, order))
        scores = self.normalization.apply(
            gathered.scores, gathered.part_scores, self.part_names, evaluation=iteration == EVALUATION
        )
        self.seconds = {
            "seconds_generation": sampled - started,
            "seconds_scoring": time.perf_counter() - sampled,
        }
        return replace(gathered, scores=scores)

    def sample(self, examples: Sequence[TokenizedPrompt], iteration: int) -> tuple[Rollout, list[int]]:
        """This rank's share of the rollout (every world_size-th prompt) and which examples it is."""
        pad_token_id = self.tokenizer.pad_token_id
        everything = collate_prompts(examples, pad_token_id, row_ids=list(range(len(examples))))
        share = list(range(rank(), len(examples), world_size()))
        self.backend.sync()
        mine = [examples[index] for index in share]

        told = 0

        def on_ended(rows: Sequence[int], responses: Rollout) -> None:
            nonlocal told
            told += len(rows)
            prompts = [mine[row] for row in rows]
            prefetch(self.reward, self._responses(responses, prompts, self.ended(responses)), more=told < len(mine))

        rollout = self.backend.generate(
            everything.rows(torch.tensor(share)).to(self.device),
            self.sampling,
            iteration=iteration,
            on_ended=on_ended if prefetches(self.reward) else None,
        )
        longest = all_reduce_max(rollout.response_ids.shape[1], self.device)
        return rollout.widened(longest, pad_token_id), share

    @torch.no_grad()
    def score(
        self, rollout: Rollout, examples: Sequence[TokenizedPrompt], length_curve: Curve | None = None
    ) -> ScoredRollout:
        """This rank's rollout with what actor, reference, critic and reward say of it, less what the curve does."""
        passes = self._passes(rollout)
        columns = {name: torch.zeros_like(rollout.logprobs) for name in ("logprobs", "ref_logprobs", "values")}
        width = rollout.response_ids.shape[1]

        def keep(name: str, part: _Pass, found: torch.Tensor) -> None:
            inside = torch.where(part.rollout.response_mask, found.float(), 0.0)
            columns[name][part.rows] = F.pad(inside, (0, width - found.shape[1]))

        recompute = self.old_logprobs != "sampled"

        def policies() -> None:  # one job: the two may be one model, with its adapter on and off
            for part in passes:
                if self.engine.has_reference:
                    with self.engine.reference_model() as reference:
                        keep("ref_logprobs", part, self._logprobs(reference, part.rollout))
                if recompute:
                    keep("logprobs", part, self._logprobs(self.engine.actor, part.rollout))

        def values(part: _Pass) -> None:
            keep("values", part, response_values(self.engine.critic, part.rollout))

        ended = self.ended(rollout)
        rewards = _Rewards(rollout)
        jobs: list[Callable[[], None]] = [
            policies, partial(self._reward, self.reward, rewards, passes, examples, ended),
        ]  # fmt: skip
        if self.engine.critic is not None:
            jobs += [partial(values, part) for part in passes]
        self.engine.run_jobs(jobs)
        if recompute and self.backend.captures_logprobs:
            self._compare(rollout, columns["logprobs"])
        if self.old_logprobs == "sampled":
            columns["logprobs"] = rollout.logprobs
        if not self.engine.has_reference:
            columns["ref_logprobs"] = columns["logprobs"]
        if length_curve is not None:
            rewards.take_off_length(length_curve)
        self.part_names = tuple(sorted(rewards.parts))
        parts = [rewards.parts[name].unsqueeze(1) for name in self.part_names]
        parts.append(rewards.scores.new_zeros(len(rollout), 0))
        return ScoredRollout(
            rollout,
            **columns,
            token_rewards=rewards.per_token,
            scores=rewards.scores,
            part_scores=torch.cat(parts, dim=1),
            ended=ended,
        )

    def _passes(self, rollout: Rollout) -> list[_Pass]:
        from rlhf.engine import partition

        lengths = (rollout.prompt_mask.sum(1) + rollout.response_mask.sum(1)).tolist()
        factor = 1 if self.device.type == "cpu" else FORWARD_ONLY
        budget = self.scoring_tokens or factor * self.plan.token_budget(lengths)
        # as many passes on every rank: under ZeRO-3 each one gathers weights; ranks may differ by a row
        fewest_rows = -all_reduce_max(-len(lengths), self.device)
        count = min(fewest_rows, all_reduce_max(-(-sum(lengths) // budget), self.device))
        return [
            _Pass(indices, rows, rollout.rows(rows).trimmed()[0])
            for indices in partition(lengths, count)
            for rows in [torch.tensor(indices, device=self.device)]
        ]

    def _reward(
        self,
        reward: Reward,
        found: _Rewards,
        passes: Sequence[_Pass],
        examples: Sequence[TokenizedPrompt],
        ended: torch.Tensor,
    ) -> None:
        """Let `reward` score every pass; one job, because a tokenizer serves one thread at a time."""
        for part in passes:
            prompts = [examples[index] for index in part.indices]
            found.keep(part, reward.score(self._responses(part.rollout, prompts, ended[part.rows])))

    def _responses(self, rollout: Rollout, prompts: Sequence[TokenizedPrompt], ended: torch.Tensor) -> Responses:
        return Responses(rollout, prompts, self.texts(rollout), ended)

    def texts(self, rollout: Rollout) -> list[str]:
        """The responses as text, without special tokens."""
        rows = [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts

    def _logprobs(self, model: Any, part: Rollout) -> torch.Tensor:
        return response_logprobs(model, part, self.sampling)

    def _compare(self, rollout: Rollout, recomputed: torch.Tensor) -> None:
        """Measure how exact the captured log-probabilities are; in `auto` that decides which are used from now on."""
        error = ((rollout.logprobs - recomputed) * rollout.response_mask).abs()
        measured = torch.stack([error.max(), error.sum(), rollout.response_mask.sum().to(error.dtype)])
        largest, total, tokens = all_gather_rows(measured.unsqueeze(0)).unbind(1)
        self.captured_error = float(largest.max())
        self.captured_error_mean = float(total.sum() / tokens.sum().clamp(min=1))
        if self.old_logprobs == "auto":
            self.old_logprobs = "sampled" if self.captured_error <= CAPTURED_IS_EXACT else "recomputed"
            logger.info(
                "log-probabilities captured while sampling differ from recomputed ones by at most %.1e nats: %s from "
                "now on (old_logprobs=auto)", self.captured_error, self.old_logprobs
            )  # fmt: skip

    def ended(self, rollout: Rollout) -> torch.Tensor:
        """Which responses end with an end-of-sequence token: [B] bool."""
        last = last_true(rollout.response_mask).unsqueeze(1)
        final = rollout.response_ids.gather(1, last).squeeze(1)
        return torch.isin(final, torch.tensor(self.eos_ids, device=final.device)) & rollout.response_mask.any(1)

    def describe(self, scored: ScoredRollout) -> dict[str, float]:
        """Metrics of a rollout: scores, KL to the reference, entropy, share that ended, length, repetition.

        `kl_error` is the standard error of `kl_per_token`, by response. `entropy_estimate` is the mean of -log pi of
        the sampled tokens: an unbiased estimate of the entropy per token of the distribution that was sampled from (at
        the sampling temperature), without another pass over the logits.
        """
        mask, scores = scored.rollout.response_mask, scored.scores
        log_ratio = scored.logprobs - scored.ref_logprobs
        lengths = mask.sum(1).float()
        return {
            "score": float(scores.mean()),
            "score_std": float(scores.std(unbiased=False)),
            "score_min": float(scores.min()),
            "score_max": float(scores.max()),
            **dict(
                zip((f"score/{name}" for name in self.part_names), scored.part_scores.mean(0).tolist(), strict=True)
            ),
            **self._spreads(scored),
            **({"score_length_correlation": correlation(scores, lengths)} if len(scores) >= CORRELATED_ROWS else {}),
            **self._outside_range(scores),
            "kl_per_token": float(masked_mean(log_ratio, mask)),
            "kl_per_response": float((log_ratio * mask).sum(1).mean()),
            "kl_error": float(((log_ratio * mask).sum(1) / lengths.mean()).std(unbiased=False)) / len(scores) ** 0.5,
            "entropy_estimate": -float(masked_mean(scored.logprobs, mask)),
            "eos_rate": float(scored.ended.float().mean()),
            "response_tokens": float(lengths.mean()),
            "empty_responses": float(((lengths == 1) & scored.ended).float().mean()),
            "repeated_4grams": repeated_share(scored.rollout.response_ids, mask),
        }

    def _spreads(self, scored: ScoredRollout) -> dict[str, float]:
        """Standard deviations of the rewards that count with a weight above 0, where there are several."""
        columns = {name: scored.part_scores[:, self.part_names.index(name)] for name in self.watched_parts}
        return {f"score_std/{name}": float(values.std(unbiased=False)) for name, values in columns.items()}

    def _outside_range(self, scores: torch.Tensor) -> dict[str, float]:
        """The share of scores that the reward never gave in its training, where it knows that range."""
        known = self.reward.training_range if self.length_curves.last is None else None
        if known is None or known.get("responses", RANGE_RESPONSES) < RANGE_RESPONSES:
            return {}
        outside = (scores < known["minimum"]) | (scores > known["maximum"])
        return {"scores_outside_range": float(outside.float().mean())}

    def evaluate(
        self,
        prompts: Sequence[TokenizedPrompt],
        *,
        copies: int,
        shown: int,
        further: Callable[[ScoredRollout], dict[str, float]],
    ) -> dict[str, Any]:
        """Metrics of `copies` responses to each prompt: numbers, "prompt_scores", the mean score of each prompt,
        "prompt_measures", the same by name of what `measure` says, and "samples", the first response to each.

        A sample's "prompt" is what was asked, its "rendered_prompt" what the actor was given. Drawn with the same
        random numbers every time. `further` metrics come from the algorithm; `shown` samples go to the log. Of no
        prompts nothing but their number, "rows".
        """
        if not prompts:
            return {"rows": 0.0}
        examples = [prompt for prompt in prompts for _ in range(copies)]
        counted = len(examples)
        filled = one_for_each_rank(examples)
        scored = self.run(filled, EVALUATION)
        held_out = {name: values[:counted] for name, values in self._held_out(filled, scored).items()}
        scored = scored.rows(slice(0, counted))
        texts = [text.strip() for text in self.texts(scored.rollout)]
        measured = {**held_out, **self._measured(examples, texts, scored)}
        samples = [
            {
                "id": prompt.id,
                "prompt": asked(prompt),
                "rendered_prompt": prompt.text,
                "response": text,
                "score": float(scored.scores[row]),
                "parts": dict(zip(self.part_names, scored.part_scores[row].tolist(), strict=True)),
                "measures": {name: float(values[row]) for name, values in measured.items()},
            }
            for prompt, text, row in zip(prompts, texts[::copies], range(0, counted, copies), strict=True)
        ]
        logger.info(sample_table(samples[:shown]))
        return {
            "rows": float(len(prompts)),
            "responses": float(counted),
            **self.describe(scored),
            **further(scored),
            **follows_length(scored, copies),
            **{name: float(values.mean()) for name, values in measured.items()},
            "prompt_scores": scored.scores.view(-1, copies).mean(1).tolist(),
            "prompt_measures": {name: values.view(-1, copies).mean(1).tolist() for name, values in measured.items()},
            "samples": samples,
        }

    def _measured(
        self, examples: Sequence[TokenizedPrompt], texts: Sequence[str], scored: ScoredRollout
    ) -> Mapping[str, torch.Tensor]:
        if self.measure is None:
            return {}
        return self.measure(Responses(scored.rollout, examples, texts, scored.ended))

    def _held_out(self, examples: Sequence[TokenizedPrompt], scored: ScoredRollout) -> dict[str, torch.Tensor]:
        """What the held-out reward says of all rows, each rank scoring its share of them."""
        if self.held_out_reward is None:
            return {}
        share = list(range(rank(), len(examples), world_size()))
        rows = torch.tensor(share, device=self.device)
        mine = scored.rollout.rows(rows)
        found, prompts = _Rewards(mine), [examples[index] for index in share]
        with self.engine.scoring():
            self._reward(self.held_out_reward, found, self._passes(mine), prompts, scored.ended[rows])
        return {"held_out_score": gather_in_order(found.scores, torch.argsort(all_gather_rows(rows)))}


class _Rewards:
    """What the reward says of a rollout, filled in pass by pass."""

    def __init__(self, rollout: Rollout) -> None:
        self.tokens = rollout.response_mask.sum(1)
        self.scores = torch.zeros(len(rollout), device=rollout.response_ids.device)
        self.per_token = torch.zeros_like(rollout.logprobs)
        self.parts: dict[str, torch.Tensor] = {}

    def keep(self, part: _Pass, output: Any) -> None:
        self.scores[part.rows] = output.scores
        if output.per_token is not None:
            self.per_token[part.rows, : output.per_token.shape[1]] = output.per_token
        for name, scores in output.parts.items():
            self.parts.setdefault(name, torch.zeros_like(self.scores))[part.rows] = scores

    def take_off_length(self, curve: Curve) -> None:
        """Less what the curve says of each length, which stands among the parts."""
        self.parts["length_curve"] = -curve.at(self.tokens)
        self.scores = self.scores + self.parts["length_curve"]


def one_for_each_rank(examples: list[TokenizedPrompt]) -> list[TokenizedPrompt]:
    """The examples, the first ones again where there are fewer than ranks: scoring is a collective."""
    return examples + list(islice(cycle(examples), max(0, world_size() - len(examples))))


def follows_length(scored: ScoredRollout, copies: int) -> dict[str, float]:
    """How scores follow length among the `copies` responses to each prompt; nothing of one response to each."""
    if copies < 2 or len(scored) < CORRELATED_ROWS:
        return {}
    tokens, prompts = scored.rollout.response_mask.sum(1), torch.arange(len(scored), device=scored.scores.device)
    return {"score_length_within": within_prompts(scored.scores, tokens, prompts // copies)}


def gather_in_order(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows of all ranks, put into the order of the prompts."""
    if tensor.dtype == torch.bool:
        return all_gather_rows(tensor.to(torch.uint8)).bool()[order]
    return all_gather_rows(tensor)[order]


def sample_table(samples: Sequence[dict[str, Any]]) -> str:
    """Prompts, responses and scores as text, two lines each, with the parts of a score where it has several."""
    lines = []
    for sample in samples:
        parts = ", ".join(f"{name} {value:+.2f}" for name, value in sample.get("parts", {}).items())
        lines.append(f"  [{sample['score']:+.2f}{parts and f': {parts}'}] {_one_line(sample['prompt'])}")
        lines.append(f"          -> {_one_line(sample['response'])}")
    return "\n".join(lines)


def _one_line(text: str, most: int = 110) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."
