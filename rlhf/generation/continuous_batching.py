"""Which prompts are decoded together: a row that has ended leaves its slot of the batch to a waiting prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from rlhf.generation.decoders import Decoder, make_decoder
from rlhf.generation.token_sampling import Sampling, row_uniforms, sample_tokens
from rlhf.types import OnEnded, PromptBatch, Rollout

REFILL_SHARE = 8
"""Waiting prompts are admitted when an eighth of the slots is free: a prefill of one short prompt costs as much
overhead as a whole decoding step, and until then the batch is only a little smaller."""
STEPS_PER_CHECK = 8
"""On an accelerator the host looks after every eighth step which rows have ended, because looking waits for it."""


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: PromptBatch,
    sampling: Sampling,
    *,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    seed: int = 0,
    iteration: int = 0,
    slots: int = 0,
    on_ended: OnEnded | None = None,
) -> Rollout:
    """Sample one response per prompt with a key/value cache, `slots` of them side by side (0: all).

    `logprobs` of the rollout are captured while sampling, from the distribution that was sampled. A response
    ends with an end-of-sequence token (inside its mask) or at `max_new_tokens`. T is the longest response.
    Rows that have ended leave the batch and waiting prompts take their slots; a row's response depends on neither.
    Dropout must be off. The number of forward passes depends on the responses: where a forward is a collective
    (ZeRO-3), call this within `rlhf.engine.whole_weights_of`. `on_ended` is told of the rows that leave the batch.
    Raises ValueError for a negative `slots` and for a prompt without a token.
    """
    lengths = [int(length) for length in prompts.attention_mask.bool().sum(1).tolist()]
    if slots < 0:
        raise ValueError(f"slots={slots} must be >= 0 (0 decodes all prompts side by side)")
    if min(lengths, default=1) < 1:
        raise ValueError(f"prompt {lengths.index(0)} of the batch has no token; give each at least one")
    slots = min(slots or len(prompts), len(prompts))
    state = _Responses(prompts, lengths, sampling, eos_token_ids, pad_token_id, seed, iteration)
    capacity = max(lengths, default=0) + sampling.max_new_tokens
    if slots:
        decoder = make_decoder(model, slots=slots, capacity=capacity, pad_token_id=pad_token_id)
        _decode(decoder, state, slots, None if on_ended is None else _teller(on_ended, state, prompts))
    return state.rollout(prompts)


class _Responses:
    """The responses so far, in the order of the prompts, and which of them each slot of the batch extends.

    `rows` and `steps` [A] hold, for the A slots in use, the prompt's index and its number of tokens so far.
    """

    def __init__(
        self,
        prompts: PromptBatch,
        lengths: list[int],
        sampling: Sampling,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        seed: int,
        iteration: int,
    ) -> None:
        device = prompts.input_ids.device
        shape = (len(prompts), sampling.max_new_tokens)
        self.prompts = [ids[mask] for ids, mask in zip(prompts.input_ids, prompts.attention_mask.bool(), strict=True)]
        self.lengths = lengths
        self.sampling = sampling
        self.pad_token_id = pad_token_id
        self.uniforms = row_uniforms(seed, iteration, prompts.row_ids.tolist(), shape[1]).to(device)
        self.eos = torch.tensor(list(eos_token_ids), device=device)
        self.tokens = torch.full(shape, pad_token_id, device=device)
        self.logprobs = torch.zeros(shape, device=device)
        self.rows = torch.empty(0, dtype=torch.long, device=device)
        self.steps = torch.empty(0, dtype=torch.long, device=device)
        self.last = torch.empty(0, dtype=torch.long, device=device)
        self.ended = torch.empty(0, dtype=torch.bool, device=device)
        self.left: list[int] = []  # tokens that each slot may still add, known to the host

    def admit(self, rows: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """Give the prompts `rows` the next slots: their ids [R, L], right-padded, and lengths."""
        device = self.tokens.device
        ids = nn.utils.rnn.pad_sequence(
            [self.prompts[row] for row in rows], batch_first=True, padding_value=self.pad_token_id
        )
        fresh = torch.zeros(len(rows), dtype=torch.long, device=device)
        self.rows = torch.cat([self.rows, torch.tensor(rows, device=device)])
        self.steps = torch.cat([self.steps, fresh])
        self.last = torch.cat([self.last, fresh])
        self.ended = torch.cat([self.ended, fresh.bool()])
        self.left += [self.sampling.max_new_tokens] * len(rows)
        return ids, [self.lengths[row] for row in rows]

    def write(self, logits: torch.Tensor) -> None:
        """Sample and keep a token for each of the last R slots from their logits [R, V]."""
        first = len(self.left) - len(logits)
        rows, steps = self.rows[first:], self.steps[first:]
        token, logprob = sample_tokens(logits.float(), self.sampling, self.uniforms[rows, steps])
        self.tokens[rows, steps] = token
        self.logprobs[rows, steps] = logprob
        self.last[first:] = token
        self.ended[first:] |= (token.unsqueeze(-1) == self.eos).any(-1)
        self.steps[first:] += 1
        for slot in range(first, len(self.left)):
            self.left[slot] -= 1

    def survivors(self) -> list[int] | None:
        """The slots of the rows that have not ended, None when that is all; the last move into slots that are free."""
        ended = [end or not left for end, left in zip(self.ended.tolist(), self.left, strict=True)]
        count = ended.count(False)
        if count == len(ended):
            return None
        keep = list(range(count))
        movers = (slot for slot in range(count, len(ended)) if not ended[slot])
        for slot in range(count):
            if ended[slot]:
                keep[slot] = next(movers)
        return keep

    def compact(self, keep: list[int]) -> None:
        """Move the row of slot keep[i] to slot i; the other slots are free."""
        index = torch.tensor(keep, dtype=torch.long, device=self.rows.device)
        self.rows, self.steps = self.rows[index], self.steps[index]
        self.last, self.ended = self.last[index], self.ended[index]
        self.left = [self.left[slot] for slot in keep]

    def rollout(self, prompts: PromptBatch) -> Rollout:
        """All responses, right-padded, without the tokens that a row got after its end."""
        is_eos = torch.isin(self.tokens, self.eos)
        mask = is_eos.long().cumsum(-1) - is_eos.long() == 0
        longest = int(mask.sum(1).amax()) if len(mask) else 0
        mask = mask[:, :longest]
        return Rollout(
            prompt_ids=prompts.input_ids,
            prompt_mask=prompts.attention_mask.bool(),
            response_ids=self.tokens[:, :longest].masked_fill(~mask, self.pad_token_id),
            response_mask=mask,
            logprobs=self.logprobs[:, :longest].masked_fill(~mask, 0.0),
        )


def _teller(on_ended: OnEnded, state: _Responses, prompts: PromptBatch) -> Callable[[list[int]], None]:
    """Tells `on_ended` of the rows whose slots are not kept."""

    def tell(keep: list[int]) -> None:
        kept = set(keep)
        rows = [row for slot, row in enumerate(state.rows.tolist()) if slot not in kept]
        on_ended(rows, state.rollout(prompts).rows(torch.tensor(rows, device=state.tokens.device)))

    return tell


def _decode(decoder: Decoder, state: _Responses, slots: int, tell: Callable[[list[int]], None] | None) -> None:
    """Decode all prompts, the longest first, so that rows of similar length are decoded together."""
    waiting = sorted(range(len(state.lengths)), key=lambda row: -state.lengths[row])
    steps_per_check = _steps_per_check(state.tokens.device)
    while waiting or state.left:
        free = slots - len(state.left)
        if waiting and (not state.left or (decoder.refills and free * REFILL_SHARE >= slots)):
            admitted, waiting = waiting[:free], waiting[free:]
            state.write(decoder.prefill(*state.admit(admitted)))
        else:
            for _ in range(min(steps_per_check, *state.left)):
                state.write(decoder.step(state.last))
        keep = state.survivors()
        if keep is not None:
            if tell is not None:
                tell(keep)
            state.compact(keep)
            decoder.compact(keep, final=not waiting)


def _steps_per_check(device: torch.device) -> int:
    return 1 if device.type == "cpu" else STEPS_PER_CHECK
