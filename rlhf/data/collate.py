"""Token ids to padded batches.

Masks are made from lengths. They are never read off the ids, because the padding token may be the end-of-sequence
token, and that one must stay in the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from rlhf.types import (
    IGNORE_INDEX,
    PromptBatch,
    RankedBatch,
    ResponseBatch,
    TokenBatch,
    TokenizedPrompt,
    TokenizedRanking,
    TokenizedResponse,
)


def collate_responses(examples: Sequence[TokenizedResponse], pad_id: int, *, whole_text: bool = False) -> TokenBatch:
    """Right-padded rows [B, L] with the labels of the responses, or of prompts too with `whole_text`.

    Raises ValueError without examples.
    """
    input_ids, mask = _pad([example.input_ids for example in examples], pad_id, left=False)
    counted = mask.clone()
    if not whole_text:
        starts = torch.tensor([example.prompt_tokens for example in examples])
        counted &= torch.arange(input_ids.shape[1]) >= starts[:, None]
    labels = torch.where(counted, input_ids, IGNORE_INDEX)
    return TokenBatch(input_ids=input_ids, attention_mask=mask, labels=labels)


def collate_with_lengths(examples: Sequence[TokenizedResponse], pad_id: int) -> ResponseBatch:
    """Right-padded rows [B, L] with the lengths of the responses. Raises ValueError without examples."""
    input_ids, mask = _pad([example.input_ids for example in examples], pad_id, left=False)
    return ResponseBatch(input_ids, mask, torch.tensor([example.response_tokens for example in examples]))


def collate_rankings(
    examples: Sequence[TokenizedRanking], pad_id: int, category_index: Mapping[str, int]
) -> RankedBatch:
    """All candidates of the G examples as right-padded rows [N, L]; row n belongs to example `groups[n]`.

    Raises ValueError for a category that `category_index` does not number.
    """
    for example in examples:
        if example.category not in category_index:
            raise ValueError(
                f"example {example.id!r} has category {example.category!r}, which has no number; "
                f"known categories: {', '.join(map(repr, category_index)) or 'none'}"
            )
    rows = [(group, example, place) for group, example in enumerate(examples) for place in range(len(example.ranks))]
    input_ids, mask = _pad([example.candidates[place].input_ids for _, example, place in rows], pad_id, left=False)
    return RankedBatch(
        input_ids=input_ids,
        attention_mask=mask,
        groups=torch.tensor([group for group, _, _ in rows]),
        ranks=torch.tensor([example.ranks[place] for _, example, place in rows]),
        margins=torch.tensor([example.margin for _, example, _ in rows], dtype=torch.float32),
        categories=torch.tensor([category_index[example.category] for _, example, _ in rows]),
        lengths=torch.tensor([example.candidates[place].response_tokens for _, example, place in rows]),
    )


def collate_prompts(examples: Sequence[TokenizedPrompt], pad_id: int, row_ids: Sequence[int]) -> PromptBatch:
    """Left-padded prompts [B, P], so that every response starts in the same column. `row_ids` has B numbers."""
    if len(row_ids) != len(examples):
        raise ValueError(f"{len(examples)} prompts came with {len(row_ids)} row_ids; give one for each prompt")
    input_ids, mask = _pad([example.input_ids for example in examples], pad_id, left=True)
    return PromptBatch(input_ids=input_ids, attention_mask=mask, row_ids=torch.tensor(list(row_ids)))


def _pad(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, L] (int64) and mask [B, L] (bool) of ragged rows."""
    if not rows:
        raise ValueError("a batch needs at least one example, got none")
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    columns = torch.arange(width)
    mask = columns >= width - lengths[:, None] if left else columns < lengths[:, None]
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    ids[mask] = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    return ids, mask
