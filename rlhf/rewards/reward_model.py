"""A learned reward model as a reward, also one with another tokenizer than the actor's."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.config import ConfigError
from rlhf.data.spec import DataError
from rlhf.data.templates import Template, load_template
from rlhf.data.token_cache import tokenizer_fingerprint
from rlhf.data.tokenize import TextEncoder
from rlhf.distributed.log import logger
from rlhf.numerics.local_regression import Curve
from rlhf.numerics.statistics import score_last
from rlhf.rewards.reward import RewardSources
from rlhf.types import Responses, RewardOutput, TokenizedPrompt


class RewardModel:
    """The normalised scores of a reward model: mean 0 and variance 1 on its reference responses, its length curve
    (where it has one) taken off by the response's tokens as the reward model reads them.

    With the actor's tokenizer the ids go in as they are. With another one the text is encoded again, the reward
    model's own end-of-sequence token stands for the actor's, and what is too long for the reward model's positions
    loses the prompt's beginning, then the response's end (which is told). Where the actor's prompts are chats, their
    turns are rendered with the reward model's own chat template, see `ChatPrompts`.
    """

    def __init__(self, sources: RewardSources) -> None:
        from rlhf.models.positions import max_positions  # loads transformers, which a list of the rewards needs not

        self.engine = sources.engine
        self.tokenizer = sources.reward_tokenizer
        self.same_tokenizer = same_tokenizer(sources.reward_tokenizer, sources.tokenizer)
        self.chat = ChatPrompts.for_reward_model(self.tokenizer, sources.tokenizer) if sources.chat else None
        self.encoder = TextEncoder(self.tokenizer, prompt_has_special_tokens=self.chat is not None)
        self.max_tokens = max_positions(self._module.config) or sys.maxsize
        self.told = False

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
        if self.same_tokenizer:
            ids, mask = responses.rollout.sequences()
            lengths = responses.rollout.response_mask.sum(-1)
        else:
            ids, mask, lengths = self._encode_again(responses)
        scores = score_last(self.engine(ids, mask), mask).float()
        curve: Curve | None = getattr(self._module, "length_curve", None)
        return RewardOutput(scores if curve is None else scores - curve.at(lengths))

    def _encode_again(self, responses: Responses) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids and mask [B, L] in the reward model's own tokens, and how many of them the responses have [B]."""
        texts = [prompt.text if self.chat is None else self.chat.text(prompt) for prompt in responses.prompts]
        prompts = self.encoder.prompts(texts)
        start, rows, lengths = self.encoder.start_ids, [], []
        for prompt, text, ended in zip(prompts, responses.texts, responses.ended.tolist(), strict=True):
            response = self.encoder.responses([text], append_eos=ended)[0].ids
            room = self.max_tokens - len(start) - len(response)
            if room < 1:
                self._tell_once(len(response))
            row = [*start, *prompt.ids[len(start) :][-max(room, 1) :], *response]
            rows.append(row[: self.max_tokens])
            lengths.append(len(response))
        longest = max(len(row) for row in rows)
        device = responses.rollout.response_ids.device
        ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id, device=device)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool, device=device)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row, device=device)
            mask[index, : len(row)] = True
        return ids, mask, torch.tensor(lengths, device=device)

    def _tell_once(self, tokens: int) -> None:
        if not self.told:
            logger.warning(
                "a response has %d tokens for the reward model, which reads %d with the prompt: its end is not scored; "
                "lower max_response_tokens, or take a reward model with more positions", tokens, self.max_tokens,
            )  # fmt: skip
        self.told = True


@dataclass(frozen=True)
class ChatPrompts:
    """The actor's prompts as a reward model of another tokenizer reads them: rendered with its own chat template."""

    template: Template

    @classmethod
    def for_reward_model(cls, reward_tokenizer: Any, actor_tokenizer: Any) -> ChatPrompts | None:
        """None where the two tokenizers are the same; ConfigError for a reward model without a chat template."""
        if same_tokenizer(reward_tokenizer, actor_tokenizer):
            return None
        if not getattr(reward_tokenizer, "chat_template", None):
            raise ConfigError(
                "template=chat with a reward model of another tokenizer, which has no chat template: it could only "
                "read the actor's markup as literal text. Give a reward model with a chat template, or train all "
                "stages with a text template such as template=kullm"
            )
        return cls(load_template("chat", reward_tokenizer))

    def text(self, prompt: TokenizedPrompt) -> str:
        """The prompt in the reward model's markup. ConfigError that names a prompt which cannot be rendered."""
        if not prompt.messages:
            raise ConfigError(
                f"prompt {prompt.id!r} came rendered already, so its turns are not known and the reward model's chat "
                "template cannot be used on it; give prompts as messages, or a reward model of the actor's tokenizer"
            )
        try:
            return self.template.render_messages(prompt.messages)
        except DataError as error:
            raise ConfigError(
                f"the reward model's chat template does not take prompt {prompt.id!r}: {error}"
            ) from error


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
