"""A decoder of our own for the architectures of `rlhf.generation.architectures`.

It calls the model's linear layers, norms and embeddings; positions, cache and attention are its own. Every row lies
left-aligned in its slot of a cache that grows in blocks, with its own length: rows may join and leave at any step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from rlhf.generation.architectures import Anatomy, Rotation, take_apart
from rlhf.numerics.cpu import LaidOut

PREFILL_TOKENS, PREFILL_TOKENS_ON_CPU = 4096, 1024
"""Prompt tokens of one forward pass at most (a longer single prompt goes alone): enough to fill a device, and the
feed-forward activations of more would only take memory, and leave a CPU's cache."""
SMALLEST_GROWTH = 32
"""Columns the cache grows by at least; see `FastDecoder._reserve`."""

STEPS_BEFORE_LAYOUT = 4
"""The step before which weights are laid out anew, if they can be; it costs about what it saves in four steps."""

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def make_fast_decoder(model: nn.Module, *, slots: int, capacity: int) -> FastDecoder | None:
    """A FastDecoder for `slots` rows of at most `capacity` tokens, or None when the model is not known to it."""
    anatomy = take_apart(model, capacity=capacity)
    return None if anatomy is None else FastDecoder(model, anatomy, slots=slots, capacity=capacity)


class FastDecoder:
    """See `rlhf.generation.decoders.Decoder`.

    `cache[layer]` [2, slots, kv_heads, columns, head_dim] holds keys and values; the row in slot i occupies columns
    0 .. lengths[i] - 1. What lies behind is finite (zeros, or a row that has left) and never attended to.
    """

    refills = True

    def __init__(self, model: nn.Module, anatomy: Anatomy, *, slots: int, capacity: int) -> None:
        self.model = model
        self.anatomy = anatomy  # of the prefill
        self.stepping = anatomy  # of the steps
        self.steps = 0
        self.slots = slots
        self.capacity = capacity
        self.columns = 0
        self.lengths: list[int] = []
        self.cache: list[torch.Tensor] = []

    def prefill(self, ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """See `Decoder.prefill`. Padding is never computed: the tokens of all rows lie one behind the other."""
        logits, start = [], 0
        most = PREFILL_TOKENS_ON_CPU if ids.device.type == "cpu" else PREFILL_TOKENS
        while start < len(lengths):
            stop, tokens = start + 1, lengths[start]
            while stop < len(lengths) and tokens + lengths[stop] <= most:
                tokens += lengths[stop]
                stop += 1
            logits.append(self._prefill(ids[start:stop], list(lengths[start:stop])))
            start = stop
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Decoder.step`."""
        rows = len(self.lengths)
        self.steps += 1
        if self.steps == STEPS_BEFORE_LAYOUT:
            self.stepping = take_apart(self.model, capacity=self.capacity, linear=LaidOut()) or self.anatomy
        hidden = self.anatomy.embed(tokens)
        self._reserve(max(self.lengths) + 1, hidden)
        positions = self.positions[:rows]
        attend = self._step_attention(positions, self._entries(slice(rows), positions))
        hidden = self._blocks(self.stepping, hidden, self._rotation(positions), attend)
        positions += 1
        self.lengths = [length + 1 for length in self.lengths]
        return self.stepping.head(self.stepping.final_norm(hidden))

    def compact(self, keep: Sequence[int], *, final: bool) -> None:
        """See `Decoder.compact`; only rows that change slots are copied."""
        targets = [slot for slot, source in enumerate(keep) if source != slot]
        if targets:
            sources = [keep[slot] for slot in targets]
            for cached in self.cache:
                cached[:, targets] = cached[:, sources]
            self.positions[targets] = self.positions[sources]
        self.lengths = [self.lengths[source] for source in keep]
        if final:
            self.slots = len(keep)  # the next growth allocates no more than these

    def _prefill(self, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        device, kv_heads, first = ids.device, self.anatomy.kv_heads, len(self.lengths)
        count, longest = len(lengths), max(lengths)
        size = torch.tensor(lengths, device=device)
        real = torch.arange(longest, device=device) < size.unsqueeze(1)
        packed = real.flatten().nonzero().squeeze(1)  # of the N real tokens, their entries in [count, longest]
        hidden = self.anatomy.embed(ids[:, :longest].reshape(-1)[packed])
        self._reserve(longest, hidden)
        rows = slice(first, first + count)
        positions = packed % longest
        row = packed // longest
        written = self._entries(row + first, positions)

        def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            """Causal attention within each row; no real token comes behind padding, which therefore needs no mask."""
            keys, values = self._remember(layer, written, key, value)
            padded = query.new_zeros(count * longest, *query.shape[1:]).index_copy_(0, packed, query)
            attended = scaled_dot_product_attention(
                padded.view(count, longest, *query.shape[1:]).transpose(1, 2),
                keys[rows, :, :longest],
                values[rows, :, :longest],
                is_causal=True,
                scale=self.anatomy.scaling,
                enable_gqa=kv_heads != self.anatomy.heads,
            )
            return attended.transpose(1, 2).reshape(count * longest, -1)[packed]

        hidden = self._blocks(self.anatomy, hidden, self._rotation(positions), attend)
        self.positions[rows] = size
        self.lengths += lengths
        return self.anatomy.head(self.anatomy.final_norm(hidden[size.cumsum(0) - 1]))

    def _step_attention(self, positions: torch.Tensor, written: torch.Tensor) -> Attend:
        """Attention of one query per row over the cache, each row over its own length.

        It runs over all columns of the cache behind a mask: on a CPU, products with a contiguous cache are twice as
        fast as with a slice of it. Queries that share keys stand side by side, so that no key is repeated.
        """
        rows, kv_heads, size = len(positions), self.anatomy.kv_heads, self.anatomy.head_dim
        group, columns, scaling = self.anatomy.heads // kv_heads, self.columns, self.anatomy.scaling
        dtype = self.cache[0].dtype
        hidden = self.column_numbers > positions.unsqueeze(1)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
        plain = dtype == torch.float32 and hidden.device.type == "cpu"
        if plain:
            mask = mask.view(rows, 1, 1, columns).expand(-1, kv_heads, group, -1).reshape(-1, group, columns)

        def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            keys, values = self._remember(layer, written, key, value)
            if plain:
                folded = query.reshape(rows * kv_heads, group, size)
                scores = torch.baddbmm(mask, folded, keys[:rows].view(-1, columns, size).transpose(1, 2), alpha=scaling)
                attended = torch.bmm(scores.softmax(-1), values[:rows].view(-1, columns, size))
            else:
                attended = scaled_dot_product_attention(
                    query.reshape(rows, kv_heads, group, size),
                    keys[:rows],
                    values[:rows],
                    attn_mask=mask.view(rows, 1, 1, columns),
                    scale=scaling,
                )
            return attended.view(rows, -1)

        return attend

    def _blocks(self, anatomy: Anatomy, hidden: torch.Tensor, rotation: Rotation, attend: Attend) -> torch.Tensor:
        """Hidden states [N, H] through all layers."""
        for layer, block in enumerate(anatomy.blocks):
            attended = block.output(attend(layer, *block.project(block.attention_norm(hidden), rotation)))
            if block.parallel:
                hidden = block.mlp(block.mlp_norm(hidden)) + attended + hidden
            else:
                hidden = hidden + attended
                hidden = hidden + block.mlp(block.mlp_norm(hidden))
        return hidden

    def _remember(
        self, layer: int, written: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values [N, kv_heads, D] at the entries `written`; all of the layer's keys and values."""
        cached = self.cache[layer]
        size = cached.shape[-1]
        cached.view(-1, size).index_copy_(0, written, torch.stack((key, value)).view(-1, size))
        return cached[0], cached[1]

    def _entries(self, slots: torch.Tensor | slice, positions: torch.Tensor) -> torch.Tensor:
        """Where keys, then values of N tokens lie in a layer's cache seen as rows of head_dim: [2 * N * kv_heads]."""
        return (self.first_entries[:, slots] + positions.view(1, -1, 1)).flatten()

    def _rotation(self, positions: torch.Tensor) -> Rotation:
        return self.cosines[positions], self.sines[positions]

    def _reserve(self, columns: int, like: torch.Tensor) -> None:
        """Make room for rows of `columns` tokens, in the dtype and on the device of `like`.

        The cache grows in blocks and not to its capacity at once: most rows end early, and every step reads all
        columns. A block is an eighth of the cache: the copying then costs a step as little as the unused columns do.
        Layer by layer, so that no more than one layer is held twice.
        """
        if columns <= self.columns:
            return
        anatomy = self.anatomy
        if not self.columns:
            self._tabulate(like)
            empty = torch.empty(2, 0, anatomy.kv_heads, 0, anatomy.head_dim, dtype=like.dtype, device=like.device)
            self.cache = [empty for _ in anatomy.blocks]
        grown = columns + max(SMALLEST_GROWTH, columns // 8)
        self.columns = min(grown, self.capacity)
        shape = (2, self.slots, anatomy.kv_heads, self.columns, anatomy.head_dim)
        used = len(self.lengths)
        for layer, old in enumerate(self.cache):
            new = torch.zeros(shape, dtype=like.dtype, device=like.device)
            new[:, :used, :, : old.shape[3]] = old[:, :used]
            self.cache[layer] = new
        heads = torch.arange(2 * self.slots * anatomy.kv_heads, device=like.device)
        self.first_entries = heads.view(2, self.slots, -1) * self.columns
        self.column_numbers = torch.arange(self.columns, device=like.device)

    def _tabulate(self, like: torch.Tensor) -> None:
        """Cosines and sines of all positions, from the model's own rotary embedding."""
        every = torch.arange(self.capacity, device=like.device)
        cosines, sines = self.anatomy.rotary(like, every.unsqueeze(0))
        half = sines.shape[-1] // 2
        self.cosines = cosines[0].unsqueeze(1)
        self.sines = torch.cat((-sines[0, :, :half], sines[0, :, half:]), dim=-1).unsqueeze(1)
        self.positions = torch.zeros(self.slots, dtype=torch.long, device=like.device)
