"""Sample prompts and score the responses, over all ranks: everything PPO needs before its mathematics."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F

from rlhf.config import ConfigError
from rlhf.distributed import all_gather_rows, all_reduce_max, logger, rank, world_size
from rlhf.generation import Sampling, generate
from rlhf.numerics.cpu import side_by_side
from rlhf.numerics.statistics import correlation, last_true, masked_mean, repeated_share
from rlhf.training.data_order import Plan
from rlhf.training.scoring import response_logprobs, response_values
from rlhf.types import PromptBatch, Rollout, TokenizedPrompt

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


@dataclass(frozen=True)
class _Part:
    """Rows of a rollout that are scored in one pass: their numbers, the same as a tensor, and themselves."""

    indices: Sequence[int]
    rows: torch.Tensor
    rollout: Rollout


class RolloutWorker:
    """Samples with the actor of an `RLHFEngine` and scores with all four models, in its evaluation mode.

    `slots` rows are sampled side by side on a device (0: all of them). A scoring pass holds `scoring_tokens`
    tokens (0: by the training pass of `plan`, see FORWARD_ONLY).
    `old_logprobs` says where the log-probabilities of the sampling policy come from: the sampler, a forward pass of
    the actor, or (`auto`) the sampler once a rollout computed both ways has shown them equal to CAPTURED_IS_EXACT.
    `backend`, a `DeepSpeedRollout`, samples in place of `rlhf.generation`.
    `together` scores with several models side by side (see `rlhf.numerics.cpu`).
    `gather_weights` gathers ZeRO-3 weights once per rollout instead of once per token.
    """

    def __init__(
        self,
        engine: Any,
        scorer: Any,
        sampling: Sampling,
        *,
        eos_ids: Sequence[int],
        pad_token_id: int,
        seed: int,
        slots: int = 0,
        plan: Plan,
        scoring_tokens: int = 0,
        old_logprobs: OldLogprobs = "auto",
        together: bool = False,
        synchronised: bool = False,
        gather_weights: bool = True,
        backend: Any = None,
    ) -> None:
        self.engine = engine
        self.scorer = scorer
        self.sampling = sampling
        self.eos_ids = list(eos_ids)
        self.pad_token_id = pad_token_id
        self.seed = seed
        self.slots = slots
        self.plan = plan
        self.scoring_tokens = scoring_tokens
        self.old_logprobs = old_logprobs
        self.together = together
        self.synchronised = synchronised
        self.gather_weights = gather_weights
        self.backend = backend
        if backend is not None:
            if old_logprobs == "sampled":
                raise ConfigError(
                    "old_logprobs=sampled needs generation_backend=own: the other backend captures no "
                    "log-probabilities; use old_logprobs=auto or recomputed"
                )
            self.old_logprobs = "recomputed"
        self.seconds = {"seconds_generation": 0.0, "seconds_scoring": 0.0}
        self.captured_error: float | None = None
        self.captured_error_mean: float | None = None

    @property
    def measured(self) -> dict[str, float]:
        """Seconds of the last rollout, and how exact captured log-probabilities were when last looked at."""
        errors = {
            "sampling_logprob_error": self.captured_error,
            "sampling_logprob_error_mean": self.captured_error_mean,
        }
        return {**self.seconds, **{name: error for name, error in errors.items() if error is not None}}

    @property
    def device(self) -> torch.device:
        return self.engine.actor.device

    def run(self, examples: Sequence[TokenizedPrompt], iteration: int) -> tuple[Rollout, dict[str, torch.Tensor]]:
        """Sample and score `examples` over all ranks; every rank gets all rows, in the order of `examples`.

        Every rank must have one at least: there are as many examples as ranks, or more. Beside the rollout come
        `logprobs`, `ref_logprobs`, `values` [B, T] and `scores` [B]; seconds go to `self.seconds`.
        """
        with self.engine.scoring():
            started = time.perf_counter()
            mine, share = self.sample(examples, iteration)
            sampled = time.perf_counter()
            scored = self.score(mine, [examples[index].text for index in share])
        order = torch.argsort(all_gather_rows(torch.tensor(share, device=self.device)))
        rollout = mine._map(lambda tensor: gather_in_order(tensor, order))
        gathered = {name: gather_in_order(tensor, order) for name, tensor in scored.items()}
        self.seconds = {
            "seconds_generation": sampled - started,
            "seconds_scoring": time.perf_counter() - sampled,
        }
        return rollout, gathered

    def sample(self, examples: Sequence[TokenizedPrompt], iteration: int) -> tuple[Rollout, list[int]]:
        """This rank's share of the rollout (every world_size-th prompt) and which examples it is."""
        from rlhf.data import collate_prompts
        from rlhf.engine import whole_weights_of

        everything = collate_prompts(examples, self.pad_token_id, row_ids=list(range(len(examples))))
        share = list(range(rank(), len(examples), world_size()))
        mine: PromptBatch = everything.rows(torch.tensor(share)).to(self.device)
        whole = whole_weights_of(self.engine.actor) if self.gather_weights else nullcontext()
        with whole:
            rollout = self._generate(mine, iteration)
        longest = all_reduce_max(rollout.response_ids.shape[1], self.device)
        return rollout.widened(longest, self.pad_token_id), share

    def _generate(self, prompts: PromptBatch, iteration: int) -> Rollout:
        in_lockstep = self.synchronised and not self.gather_weights
        if self.backend is None and not in_lockstep:
            return self._decode(prompts, iteration, in_lockstep)
        # these two decode whatever they are given side by side
        parts = [self._decode(part, iteration, in_lockstep) for part in prompts.split(self.slots or len(prompts))]
        longest = max(part.response_ids.shape[1] for part in parts)
        wide = [part.widened(longest, self.pad_token_id) for part in parts]
        return Rollout(*(torch.cat([getattr(part, item.name) for part in wide]) for item in fields(Rollout)))

    def _decode(self, prompts: PromptBatch, iteration: int, in_lockstep: bool) -> Rollout:
        if self.backend is not None:
            first = int(prompts.row_ids[0])
            seed = ((self.seed * 1_000_003 + iteration) * 1_000_003 + first) % 2**63
            sampling = self.sampling
            return self.backend.generate(
                prompts, max_new_tokens=sampling.max_new_tokens, temperature=sampling.temperature, seed=seed
            )
        return generate(
            self.engine.actor,
            prompts,
            self.sampling,
            eos_token_ids=self.eos_ids,
            pad_token_id=self.pad_token_id,
            seed=self.seed,
            iteration=iteration,
            synchronised=in_lockstep,
            slots=self.slots,
        )

    @torch.no_grad()
    def score(self, rollout: Rollout, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Log-probabilities of actor and reference, values [B, T] and scores [B] of this rank's rollout."""
        from rlhf.engine import partition

        width = rollout.response_ids.shape[1]
        lengths = (rollout.prompt_mask.sum(1) + rollout.response_mask.sum(1)).tolist()
        # as many passes on every rank: under ZeRO-3 each one gathers weights; ranks may differ by a row
        factor = 1 if self.device.type == "cpu" else FORWARD_ONLY
        budget = self.scoring_tokens or factor * self.plan.token_budget(lengths)
        fewest_rows = -all_reduce_max(-len(lengths), self.device)
        passes = min(fewest_rows, all_reduce_max(-(-sum(lengths) // budget), self.device))
        parts = [
            _Part(indices, rows, rollout.rows(rows).trimmed()[0])
            for indices in partition(lengths, passes)
            for rows in [torch.tensor(indices, device=self.device)]
        ]
        recompute = self.old_logprobs != "sampled"
        names = ["ref_logprobs", "values", *(["logprobs"] if recompute else [])]
        columns = {name: torch.zeros_like(rollout.logprobs) for name in names}
        scores = torch.zeros(len(rollout), device=self.device)

        def keep(name: str, part: _Part, found: torch.Tensor) -> None:
            inside = torch.where(part.rollout.response_mask, found.float(), 0.0)
            columns[name][part.rows] = F.pad(inside, (0, width - found.shape[1]))

        def policies() -> None:  # one job: the two may be one model, with its adapter on and off
            for part in parts:
                with self.engine.reference_model() as reference:
                    keep("ref_logprobs", part, self._logprobs(reference, part.rollout))
                if recompute:
                    keep("logprobs", part, self._logprobs(self.engine.actor, part.rollout))

        def rewards() -> None:  # one job: a tokenizer serves one thread at a time
            for part in parts:
                scores[part.rows] = self.scorer(part.rollout, [texts[index] for index in part.indices])

        def values(part: _Part) -> None:
            keep("values", part, response_values(self.engine.critic, part.rollout))

        jobs: list[Callable[[], None]] = [policies, rewards, *(partial(values, part) for part in parts)]
        side_by_side(jobs, together=self.together)
        if recompute and self.backend is None:
            self._compare(rollout, columns["logprobs"])
        if self.old_logprobs == "sampled":
            columns["logprobs"] = rollout.logprobs
        return {**columns, "scores": scores}

    def _logprobs(self, model: Any, part: Rollout) -> torch.Tensor:
        return response_logprobs(model, part, self.sampling.temperature)

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

    def describe(self, rollout: Rollout, scored: dict[str, torch.Tensor]) -> dict[str, float]:
        """Metrics of a rollout: scores, KL to the reference, entropy, share that ended, length, repetition.

        `kl_error` is the standard error of `kl_per_token`, by response. `entropy_estimate` is the mean of -log pi of
        the sampled tokens: an unbiased estimate of the entropy per token of the distribution that was sampled from (at
        the sampling temperature), without another pass over the logits.
        """
        mask, scores = rollout.response_mask, scored["scores"]
        log_ratio = scored["logprobs"] - scored["ref_logprobs"]
        lengths = mask.sum(1).float()
        return {
            "score": float(scores.mean()),
            "score_std": float(scores.std(unbiased=False)),
            "score_min": float(scores.min()),
            "score_max": float(scores.max()),
            **({"score_length_correlation": correlation(scores, lengths)} if len(scores) >= CORRELATED_ROWS else {}),
            **self._outside_range(scores),
            "kl_per_token": float(masked_mean(log_ratio, mask)),
            "kl_per_response": float((log_ratio * mask).sum(1).mean()),
            "kl_error": float(((log_ratio * mask).sum(1) / lengths.mean()).std(unbiased=False)) / len(scores) ** 0.5,
            "entropy_estimate": -float(masked_mean(scored["logprobs"], mask)),
            "eos_rate": float(self.ended(rollout).float().mean()),
            "response_tokens": float(lengths.mean()),
            "empty_responses": float(((lengths == 1) & self.ended(rollout)).float().mean()),
            "repeated_4grams": repeated_share(rollout.response_ids, mask),
        }

    def _outside_range(self, scores: torch.Tensor) -> dict[str, float]:
        """The share of scores that the reward model never gave in its training, where it was saved with that range."""
        known = getattr(self.scorer, "score_range", None)
        if known is None or known.get("responses", RANGE_RESPONSES) < RANGE_RESPONSES:
            return {}
        outside = (scores < known["minimum"]) | (scores > known["maximum"])
        return {"scores_outside_range": float(outside.float().mean())}


def gather_in_order(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows of all ranks, put into the order of the prompts."""
    if tensor.dtype == torch.bool:
        return all_gather_rows(tensor.to(torch.uint8)).bool()[order]
    return all_gather_rows(tensor)[order]
