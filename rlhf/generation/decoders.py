"""What computes the logits of the next token: an interface, and the decoder that serves every model.

`rlhf.generation.fast_decoder` holds the fast one, for the architectures it knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from rlhf.generation.fast_decoder import make_fast_decoder
from rlhf.models.forward import model_arguments
from rlhf.models.inner_model import innermost


class Decoder(Protocol):
    """Rows of token ids that grow by one token a step, in slots 0 .. A-1 of a batch.

    A row's logits depend on its own tokens only. `refills` is True when rows may join while others are under way.
    """

    refills: bool

    def prefill(self, ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Admit R rows, in slots A .. A+R-1: ids [R, L] right-padded, row r has `lengths[r]` >= 1 tokens.

        Returns the logits [R, V] of each row's next token.
        """

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append tokens [A], one to each row; the logits [A, V] of the next ones."""

    def compact(self, keep: Sequence[int], *, final: bool) -> None:
        """Move the row of slot keep[i] to slot i; len(keep) rows remain. `final`: no further prefill comes."""


class HuggingFaceDecoder:
    """Any Hugging Face causal LM through its own forward and cache, left-padded; rows join all at once only."""

    refills = False

    def __init__(self, model: nn.Module, pad_token_id: int) -> None:
        self.model = model
        self.pad_token_id = pad_token_id
        self.attention = torch.empty(0)
        self.cache: Any = None

    def prefill(self, ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """See `Decoder.prefill`; no earlier row may be left."""
        from transformers import DynamicCache

        longest = max(lengths)
        left = torch.full((len(lengths), longest), self.pad_token_id, dtype=ids.dtype, device=ids.device)
        self.attention = torch.zeros(left.shape, dtype=torch.bool, device=ids.device)
        for row, length in enumerate(lengths):
            left[row, longest - length :] = ids[row, :length]
            self.attention[row, longest - length :] = True
        config: Any = innermost(self.model).config
        self.cache = DynamicCache(config=config)
        return self._forward(left)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Decoder.step`."""
        ids = tokens.unsqueeze(1)
        self.attention = torch.cat([self.attention, torch.ones_like(ids, dtype=torch.bool)], dim=1)
        return self._forward(ids)

    def compact(self, keep: Sequence[int], *, final: bool) -> None:
        """See `Decoder.compact`."""
        if not keep:
            self.cache = None
            return
        index = torch.tensor(keep, dtype=torch.long, device=self.attention.device)
        self.attention = self.attention[index]
        self.cache.batch_select_indices(index)

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        arguments = model_arguments(
            self.model, self.attention, use_cache=True, past_key_values=self.cache, logits_to_keep=1
        )
        if "position_ids" in arguments:
            arguments["position_ids"] = arguments["position_ids"][:, -ids.shape[1] :]
        output = self.model(input_ids=ids, **arguments)
        self.cache = output.past_key_values
        logits: torch.Tensor = output.logits[:, -1]
        return logits


def make_decoder(model: nn.Module, *, slots: int, capacity: int, pad_token_id: int) -> Decoder:
    """The fast decoder where it knows the model, else the model's own forward.

    `slots` rows at most are decoded side by side, and none grows beyond `capacity` tokens.
    """
    return make_fast_decoder(model, slots=slots, capacity=capacity) or HuggingFaceDecoder(model, pad_token_id)
