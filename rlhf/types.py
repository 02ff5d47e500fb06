"""Records (what a row means) and batches (what a model sees), as frozen dataclasses.

Dimension letters used everywhere: B sequences, P prompt tokens, T response tokens, L = P + T,
V vocabulary, K candidates per prompt, G prompts of a ranked batch, N = sum of K over the G prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch

Meta = Mapping[str, Any]
Message = Mapping[str, str]
"""One turn of a conversation: `role` (system, user or assistant) and `content`."""
IGNORE_INDEX = -100
"""Label of a position the language-modelling loss must not look at."""


@dataclass(frozen=True)
class PromptRecord:
    """A prompt, already rendered with its template; `messages` and `columns` as in `TokenizedPrompt`."""

    id: str
    prompt: str
    meta: Meta = field(default_factory=dict)
    messages: tuple[Message, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ResponseRecord:
    """A prompt and the response to imitate (SFT)."""

    id: str
    prompt: str
    response: str
    meta: Meta = field(default_factory=dict)


@dataclass(frozen=True)
class PreferenceRecord:
    """Two responses to one prompt; `margin` is how much better `chosen` is (0 when not given)."""

    id: str
    prompt: str
    chosen: str
    rejected: str
    margin: float = 0.0
    meta: Meta = field(default_factory=dict)


@dataclass(frozen=True)
class RankedRecord:
    """K responses to one prompt; rank 0 is best, equal ranks are ties."""

    id: str
    prompt: str
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    meta: Meta = field(default_factory=dict)


@dataclass(frozen=True)
class LabelledRecord:
    """A prompt and a response that somebody called good or bad."""

    id: str
    prompt: str
    response: str
    good: bool
    meta: Meta = field(default_factory=dict)


Record = PromptRecord | ResponseRecord | PreferenceRecord | RankedRecord | LabelledRecord


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as token ids, with all that a reward may want to know of its data row.

    `text` is what `input_ids` say. `messages` is the conversation that the prompt was rendered from, whole also where
    `input_ids` and `text` lost their beginning to a limit; empty for a prompt that came with markers of its own, whose
    turns are not known. `columns` are the row's columns that are not part of the prompt (a reference answer, an id),
    under the names that the file gives them, as JSON values.
    """

    id: str
    input_ids: tuple[int, ...]
    text: str
    category: str = ""
    messages: tuple[Message, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizedResponse:
    """Prompt and response as one row of token ids; the response starts at `prompt_tokens`."""

    id: str
    input_ids: tuple[int, ...]
    prompt_tokens: int
    category: str = ""

    @property
    def response_tokens(self) -> int:
        """Tokens of the response, its end of sequence included."""
        return len(self.input_ids) - self.prompt_tokens


@dataclass(frozen=True)
class TokenizedRanking:
    """K tokenised responses to one prompt with their ranks (a preference pair is K = 2, ranks (0, 1)).

    `source` is the file that it comes from.
    """

    id: str
    candidates: tuple[TokenizedResponse, ...]
    ranks: tuple[int, ...]
    margin: float = 0.0
    category: str = ""
    source: str = ""


@dataclass(frozen=True)
class TokenizedLabel:
    """A tokenised response that is `good` or not."""

    response: TokenizedResponse
    good: bool

    @property
    def id(self) -> str:
        return self.response.id

    @property
    def category(self) -> str:
        return self.response.category


class TensorBatch:
    """Mixin of the batch dataclasses: move to a device, count rows, slice rows."""

    def to(self, device: torch.device | str) -> Self:
        """The same batch with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device))

    def __len__(self) -> int:
        first = next(iter(self._tensors()))
        return int(first.shape[0])

    def rows(self, index: slice | torch.Tensor) -> Self:
        """The rows that `index` selects from every tensor."""
        return self._map(lambda tensor: tensor[index])

    def split(self, rows_per_part: int) -> list[Self]:
        """Consecutive parts of at most `rows_per_part` rows, in order."""
        if rows_per_part < 1:
            raise ValueError(f"rows_per_part={rows_per_part} must be at least 1")
        return [self.rows(slice(start, start + rows_per_part)) for start in range(0, len(self), rows_per_part)]

    def _tensors(self) -> Iterator[torch.Tensor]:
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, TensorBatch):
                yield from value._tensors()

    def _map(self, function: Any) -> Self:
        changed = {}
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, TensorBatch):
                changed[item.name] = value._map(function)
            else:
                changed[item.name] = function(value)
        return type(self)(**changed)


@dataclass(frozen=True)
class TokenBatch(TensorBatch):
    """Right-padded rows for the language-modelling loss. All fields [B, L]; padding and prompt labels are -100."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class ResponseBatch(TensorBatch):
    """Right-padded prompts with their responses. `input_ids`, `attention_mask` [B, L]; `lengths` [B] are the tokens of
    the responses, with which the rows end."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True)
class RankedBatch(TensorBatch):
    """Right-padded candidates of several prompts, to be scored in one forward.

    `input_ids`, `attention_mask` [N, L]; `groups` [N] is the prompt (0 .. G-1) of each row; `ranks` [N],
    0 is best; `margins` [N] is the margin of the row's prompt; `categories` [N] indexes the caller's
    category names; `lengths` [N] are the tokens of the responses. Rows of one prompt are never split over two batches.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    groups: torch.Tensor
    ranks: torch.Tensor
    margins: torch.Tensor
    categories: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True)
class PromptBatch(TensorBatch):
    """Left-padded prompts. `input_ids`, `attention_mask` [B, P]; `row_ids` [B] number the prompts of an
    iteration over all ranks and seed each row's sampling, so that the split over ranks changes no sample."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    row_ids: torch.Tensor


@dataclass(frozen=True)
class Rollout(TensorBatch):
    """Prompts and the responses sampled for them.

    `prompt_ids`, `prompt_mask` [B, P] left-padded; `response_ids`, `response_mask` [B, T] right-padded,
    the mask includes the end-of-sequence token where one was sampled; `logprobs` [B, T] float32 as captured
    while sampling, 0 where the mask is False.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    response_ids: torch.Tensor
    response_mask: torch.Tensor
    logprobs: torch.Tensor

    def sequences(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt and response side by side: ids and mask [B, P + T]."""
        ids = torch.cat([self.prompt_ids, self.response_ids], dim=1)
        mask = torch.cat([self.prompt_mask.bool(), self.response_mask.bool()], dim=1)
        return ids, mask

    def trimmed(self) -> tuple[Self, slice]:
        """Without the columns that are padding in every row, and the slice of response columns that is left."""
        prompt_tokens = int(self.prompt_mask.sum(-1).max())
        columns = slice(0, max(1, int(self.response_mask.sum(-1).max())))
        start = self.prompt_ids.shape[1] - prompt_tokens
        trimmed = type(self)(
            prompt_ids=self.prompt_ids[:, start:],
            prompt_mask=self.prompt_mask[:, start:],
            response_ids=self.response_ids[:, columns],
            response_mask=self.response_mask[:, columns],
            logprobs=self.logprobs[:, columns],
        )
        return trimmed, columns

    def widened(self, response_tokens: int, pad_token_id: int) -> Self:
        """Right-padded to `response_tokens` response columns, so that rollouts of several ranks fit together."""
        missing = response_tokens - self.response_ids.shape[1]

        def widen(tensor: torch.Tensor, value: float) -> torch.Tensor:
            return torch.nn.functional.pad(tensor, (0, missing), value=value)

        return type(self)(
            prompt_ids=self.prompt_ids,
            prompt_mask=self.prompt_mask,
            response_ids=widen(self.response_ids, pad_token_id),
            response_mask=widen(self.response_mask, False),
            logprobs=widen(self.logprobs, 0.0),
        )


@dataclass(frozen=True)
class Responses:
    """Responses to be scored: what a reward may look at of B rows.

    `rollout` holds token ids and masks; `prompts` [B] are the prompts with their text, their turns and the other
    columns of their data rows; `texts` [B] are the responses as text, without special tokens; `ended` [B] bool says
    which of them end with an end-of-sequence token.
    """

    rollout: Rollout
    prompts: Sequence[TokenizedPrompt]
    texts: Sequence[str]
    ended: torch.Tensor

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class RewardOutput:
    """What a reward says of B responses.

    `scores` [B] float32; `per_token` [B, T] float32 is added to the rewards of single tokens, None for nothing;
    `parts` are named scores [B] that it is made of, for the log.
    """

    scores: torch.Tensor
    per_token: torch.Tensor | None = None
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)


Measure = Callable[[Responses], Mapping[str, torch.Tensor]]
"""Named numbers [B] of B responses that training never sees; nothing for responses it cannot say anything of."""
OnEnded = Callable[[Sequence[int], Rollout], None]
"""Told of prompts of a batch, by number, and of their responses, which are whole while others are still sampled."""
