"""Rows without padding: several sequences as one long row, and attention that keeps them apart.

Everything in a transformer but attention treats positions alone, so it costs what the real tokens cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

PACKED_SDPA = "rlhf_packed_sdpa"
"""Name of our attention function in `transformers`: that of sdpa, but for packed rows."""
PACKABLE = frozenset({"gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2"})
"""Architectures (`model_type`) checked to compute packed rows as they compute each row alone."""
FLASH = ("flash_attention_2", "flash_attention_3")


@dataclass(frozen=True)
class PackedRows:
    """The tokens of B rows one after the other: `input_ids` [S], `where` [S] their places in the padded [B * L].

    `lengths` are the tokens of each row, S = sum(lengths); rows without a token are left out.
    """

    input_ids: torch.Tensor
    where: torch.Tensor
    lengths: tuple[int, ...]
    shape: tuple[int, int]

    @property
    def position_ids(self) -> torch.Tensor:
        """Positions within each row: [S]."""
        device = self.input_ids.device
        starts = torch.tensor([0, *accumulate(self.lengths[:-1])], device=device)
        lengths = torch.tensor(self.lengths, device=device)
        return torch.arange(len(self.input_ids), device=device) - starts.repeat_interleave(
            lengths, output_size=len(self.input_ids)
        )

    def padded(self, values: torch.Tensor) -> torch.Tensor:
        """`values` [S, ...] back in the padded places: [B, L, ...], 0 at padding."""
        rows, columns = self.shape
        flat = values.new_zeros(rows * columns, *values.shape[1:]).index_copy(0, self.where, values)
        return flat.view(rows, columns, *values.shape[1:])


def pack(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> PackedRows:
    """Take the padding out of rows [B, L] padded on either side. Raises ValueError when no token is left."""
    mask = attention_mask.bool()
    lengths = tuple(int(length) for length in mask.sum(1).tolist() if length)
    if not lengths:
        raise ValueError(f"a batch of {len(input_ids)} rows has no token outside its padding")
    where = mask.flatten().nonzero().squeeze(1)
    return PackedRows(input_ids.flatten()[where], where, lengths, (mask.shape[0], mask.shape[1]))


def prepare_for_packed_rows(config: Any) -> bool:
    """Whether the model of this configuration takes packed rows; where its attention is sdpa, ours takes its place.

    Other attention implementations (eager) and architectures need padded rows.
    """
    if config.model_type not in PACKABLE:
        return False
    if config._attn_implementation == "sdpa":
        register_packed_attention()
        config._attn_implementation = PACKED_SDPA
    return config._attn_implementation in (PACKED_SDPA, *FLASH)


def packed_arguments(rows: PackedRows, config: Any) -> dict[str, Any]:
    """Keyword arguments of a `transformers` forward over packed rows [1, S], without a cache."""
    arguments: dict[str, Any] = {
        "input_ids": rows.input_ids.unsqueeze(0),
        "position_ids": rows.position_ids.unsqueeze(0),
        "use_cache": False,
    }
    if config._attn_implementation in FLASH:
        ends = F.pad(torch.tensor(rows.lengths, device=rows.input_ids.device).cumsum(0, dtype=torch.int32), (1, 0))
        longest = max(rows.lengths)
        return {**arguments, "attention_mask": None, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends,
                "max_length_q": longest, "max_length_k": longest}  # fmt: skip
    # a mask of four dimensions is taken for one that is made already, so that none of S x S is made
    made = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=rows.input_ids.device)
    return {**arguments, "attention_mask": made, "row_lengths": rows.lengths}


@cache
def register_packed_attention() -> None:
    """Make our attention known to `transformers`; without `row_lengths` it is sdpa to the bit."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PACKED_SDPA, packed_sdpa)
    AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)


def packed_sdpa(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    row_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row: query [1, heads, S, D] -> [1, S, heads, D]; key and value may have fewer heads.

    One call per row: at these lengths that is faster than one over padded rows (see docs/performance.md).
    """
    if row_lengths is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    lengths = list(row_lengths)
    parts = [
        F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_window(length, sliding_window, q.device),
            is_causal=sliding_window is None or length <= sliding_window,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        for length, q, k, v in zip(
            lengths, query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True
        )
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _window(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Mask [length, length] of a causal window of so many tokens; None where the window holds the whole row."""
    if window is None or length <= window:
        return None
    places = torch.arange(length, device=device)
    distance = places.unsqueeze(1) - places.unsqueeze(0)
    return (distance >= 0) & (distance < window)
