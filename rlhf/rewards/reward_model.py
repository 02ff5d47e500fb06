"""A learned reward model as a reward, also one with another tokenizer than the actor's."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch

from rlhf.config import ConfigError
from rlhf.data.templates import Template, load_template
from rlhf.data.token_cache import tokenizer_fingerprint
from rlhf.data.tokenize import TextEncoder
from rlhf.numerics.statistics import score_last
from rlhf.rewards.reward import RewardSources
from rlhf.types import Responses, RewardOutput, TokenizedPrompt


class RewardModel:
    """The normalised scores of a reward model: mean 0 and variance 1 on its reference responses.

    With the actor's tokenizer the ids go in as they are. With another one the text is encoded again, the reward
    model's own end-of-sequence token stands for the actor's, and a prompt too long for the reward model's positions
    loses its beginning. Where the actor's prompts are chats, their turns are rendered with the reward model's own chat
    template: the actor's markup would be literal text to it. ConfigError when it has none.
    """

    def __init__(self, sources: RewardSources) -> None:
        self.engine = sources.engine
        self.tokenizer = sources.reward_tokenizer
        self.same_tokenizer = same_tokenizer(sources.reward_tokenizer, sources.tokenizer)
        self.chat: Template | None = None
        if sources.chat and not self.same_tokenizer:
            if not getattr(self.tokenizer, "chat_template", None):
                raise ConfigError(
                    "template=chat with a reward model of another tokenizer, which has no chat template: it could only "
                    "read the actor's markup as literal text. Give a reward model with a chat template, or train all "
                    "stages with a text template such as template=kullm"
                )
            self.chat = load_template("chat", self.tokenizer)
        self.encoder = TextEncoder(self.tokenizer, prompt_has_special_tokens=self.chat is not None)
        self.max_tokens = getattr(getattr(self._module, "config", None), "max_position_embeddings", None)

    @property
    def _module(self) -> Any:
        return getattr(self.engine, "module", self.engine)

    @property
    def training_range(self) -> dict[str, Any] | None:
        """How far normalised scores reached in the training of the reward model, where it was saved with that."""
        found: dict[str, Any] | None = getattr(self._module, "score_range", None)
        return found

    @torch.no_grad()
    def score(self, responses: Responses) -> RewardOutput:
        """See `rlhf.rewards.reward.Reward`."""
        ids, mask = responses.rollout.sequences() if self.same_tokenizer else self._encode_again(responses)
        scores = score_last(self.engine(ids, mask), mask)
        return RewardOutput(scores.float())

    def _prompt_text(self, prompt: TokenizedPrompt) -> str:
        if self.chat is None:
            return prompt.text
        if not prompt.messages:
            raise ConfigError(
                f"prompt {prompt.id!r} came rendered already, so its turns are not known and the reward model's chat "
                "template cannot be used on it; give prompts as messages, or a reward model of the actor's tokenizer"
            )
        return self.chat.render_messages(prompt.messages)

    def _encode_again(self, responses: Responses) -> tuple[torch.Tensor, torch.Tensor]:
        prompts = self.encoder.prompts([self._prompt_text(prompt) for prompt in responses.prompts])
        start, rows = self.encoder.start_ids, []
        for prompt, text, ended in zip(prompts, responses.texts, responses.ended.tolist(), strict=True):
            response = self.encoder.responses([text], append_eos=ended)[0].ids
            room = (self.max_tokens or sys.maxsize) - len(start) - len(response)
            rows.append([*start, *prompt.ids[len(start) :][-max(room, 1) :], *response])
        longest = max(len(row) for row in rows)
        device = responses.rollout.response_ids.device
        ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id, device=device)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool, device=device)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row, device=device)
            mask[index, : len(row)] = True
        return ids, mask


def same_tokenizer(first: Any, second: Any) -> bool:
    """True when two tokenizers give the same ids for every text: vocabulary, merges, normaliser, special tokens.

    What they pad with plays no part: a saved reward model pads with a token of its own (`rlhf.models.padding`).
    """
    padding = {tokenizer.pad_token for tokenizer in (first, second)}
    padding -= {text for tokenizer in (first, second) for text in (tokenizer.eos_token, tokenizer.bos_token)}
    fingerprints = set()
    for tokenizer in (first, second):
        own = copy.deepcopy(tokenizer)
        own.pad_token = None
        fingerprints.add(tokenizer_fingerprint(own, without=padding))
    return len(fingerprints) == 1
