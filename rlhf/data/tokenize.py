"""Records to token ids, with an exact boundary between prompt and response.

Prompt and response are tokenised apart and concatenated, so no merge crosses the boundary and the ids a model
is trained on are those it continues from while sampling.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.row_values import without_end_marks
from rlhf.data.spec import DataError
from rlhf.distributed.progress import Progress
from rlhf.types import (
    LabelledRecord,
    PreferenceRecord,
    PromptRecord,
    RankedRecord,
    Record,
    ResponseRecord,
    TokenizedLabel,
    TokenizedPrompt,
    TokenizedRanking,
    TokenizedResponse,
)

COMMON_EOS_TEXT = "<|endoftext|>"
"""Often left at the end of responses in public corpora, whatever the tokenizer's own end of sequence is."""
TEXTS_PER_CALL = 1024
PROGRESS_FROM_TEXTS = 20_000

Tokenized = TokenizedPrompt | TokenizedResponse | TokenizedRanking | TokenizedLabel


@dataclass(frozen=True)
class TokenReport:
    """What tokenisation did. Token counts are after truncation and include the beginning and end of sequence."""

    rows: int = 0
    responses: int = 0
    truncated_prompts: int = 0
    truncated_responses: int = 0
    empty_responses: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    longest_prompt_tokens: int = 0
    longest_response_tokens: int = 0
    key: str = ""
    """Digest of all that the rows depend on, where they come from the cache (see `rlhf.data.token_cache`)."""

    def as_dict(self) -> dict[str, int]:
        """The counts by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "key"}


@dataclass(frozen=True)
class EncodedText:
    """Token ids of one prompt or response; `truncated` says that a part was cut off, `empty` that nothing was said."""

    ids: tuple[int, ...]
    truncated: bool
    empty: bool


class TextEncoder:
    """Encodes prompts and responses of one tokenizer under token limits (None: no limit).

    `prompt_has_special_tokens` is for templates that write special tokens as text (chat templates): they are then
    read as special tokens in the prompt. Otherwise, and always in a response, text that looks like a special
    token stays text. Raises DataError for a tokenizer without an end of sequence and for limits that leave no room.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_prompt_tokens: int | None = None,
        max_response_tokens: int | None = None,
        prompt_has_special_tokens: bool = False,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no eos_token, so a response could never end; set one, for example in "
                'tokenizer_config.json: "eos_token": "<|endoftext|>"'
            )
        self.tokenizer = tokenizer
        self.eos_id = int(tokenizer.eos_token_id)
        self._appends_eos = _appends_eos(tokenizer)
        self.start_ids = self._ids_added_at_start()
        self.max_prompt_tokens = sys.maxsize if max_prompt_tokens is None else max_prompt_tokens
        self.max_response_tokens = sys.maxsize if max_response_tokens is None else max_response_tokens
        self.prompt_has_special_tokens = prompt_has_special_tokens
        if self.max_prompt_tokens <= len(self.start_ids):
            raise DataError(
                f"max_prompt_tokens={max_prompt_tokens} leaves no room for a prompt: this tokenizer starts every text "
                f"with {len(self.start_ids)} token(s); use at least {len(self.start_ids) + 1}"
            )
        if self.max_response_tokens < 1:
            raise DataError(f"max_response_tokens={max_response_tokens} must be at least 1")
        self._eos_texts = tuple(sorted({tokenizer.eos_token, COMMON_EOS_TEXT} - {None, ""}))
        guarded = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token} - {None, ""}
        self._guarded_ids = frozenset(int(tokenizer.convert_tokens_to_ids(text)) for text in guarded)
        self._guarded_text = re.compile("|".join(re.escape(text) for text in sorted(guarded, key=len, reverse=True)))

    def prompts(self, texts: Sequence[str], special: Sequence[bool] | None = None) -> list[EncodedText]:
        """Ids of each prompt: what the tokenizer puts before a text (once), then the END of the prompt's tokens.

        `special` says of each prompt whether its special tokens are read as such; without it
        `prompt_has_special_tokens` says it of all.
        """
        reads = [self.prompt_has_special_tokens] * len(texts) if special is None else list(special)
        room = self.max_prompt_tokens - len(self.start_ids)
        encoded: dict[int, EncodedText] = {}
        for read_special in sorted(set(reads)):
            places = [place for place, read in enumerate(reads) if read == read_special]
            part = [texts[place] if read_special else self._without_start_text(texts[place]) for place in places]
            for place, ids in zip(places, self._encode(part, read_special_tokens=read_special), strict=True):
                if self.start_ids and tuple(ids[: len(self.start_ids)]) == self.start_ids:
                    ids = ids[len(self.start_ids) :]
                kept = ids[-room:] if len(ids) > room else ids
                encoded[place] = EncodedText(self.start_ids + tuple(kept), len(ids) > room, not ids)
        return [encoded[place] for place in range(len(texts))]

    def responses(self, texts: Sequence[str], *, append_eos: bool = True) -> list[EncodedText]:
        """Ids of each response with exactly one end of sequence; a response that is too long loses its end and it.

        `append_eos` False is for a response that was cut off, which must not look finished.
        """
        texts = [without_end_marks(text, self._eos_texts) for text in texts]
        encoded = []
        for ids in self._encode(texts, read_special_tokens=False):
            whole = [*ids, self.eos_id] if append_eos else ids
            kept = tuple(ids[: self.max_response_tokens]) if len(whole) > self.max_response_tokens else tuple(whole)
            encoded.append(EncodedText(kept, len(whole) > self.max_response_tokens, not ids))
        return encoded

    def _encode(self, texts: Sequence[str], *, read_special_tokens: bool) -> list[list[int]]:
        rows: list[list[int]] = []
        with Progress(len(texts), "tokenise", "text", shown=len(texts) >= PROGRESS_FROM_TEXTS) as progress:
            for start in range(0, len(texts), TEXTS_PER_CALL):
                part = list(texts[start : start + TEXTS_PER_CALL])
                for text, ids in zip(part, self._call(part, read_special_tokens), strict=True):
                    misread = not read_special_tokens and not self._guarded_ids.isdisjoint(ids)
                    rows.append(self._encode_in_pieces(text) if misread and self._guarded_text.search(text) else ids)
                progress.advance(len(part))
        return rows

    def _call(self, texts: list[str], read_special_tokens: bool) -> list[list[int]]:
        rows = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=not read_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return [ids[:-1] for ids in rows] if self._appends_eos else [list(ids) for ids in rows]

    def _encode_in_pieces(self, text: str) -> list[int]:
        """Encode text whose literal special tokens this tokenizer reads as such, by cutting through each of them."""
        cuts = [match.start() + 1 for match in self._guarded_text.finditer(text)]
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return [token for ids in self._call(pieces, False) for token in ids]

    def _ids_added_at_start(self) -> tuple[int, ...]:
        plain = self._call(["a"], False)[0]
        full = list(self.tokenizer("a", verbose=False)["input_ids"])
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return tuple(full[:start])
        return ()

    def _without_start_text(self, text: str) -> str:
        bos = self.tokenizer.bos_token
        return text.removeprefix(bos) if bos and self.start_ids == (self.tokenizer.bos_token_id,) else text


def tokenize_records(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    prompt_has_special_tokens: bool = False,
) -> tuple[list[Tokenized], TokenReport]:
    """Tokenise records in order: prompts, prompt-response rows, labelled ones, or (pairs and rankings alike) rankings.

    Special tokens in a prompt are read as such where `prompt_has_special_tokens`, or the record's meta, says so.
    A long prompt keeps its end; a long response keeps its beginning and has no end of sequence then. Both are counted.
    Raises DataError for a PromptRecord without a single token, which nothing could be sampled from.
    """
    encoder = TextEncoder(
        tokenizer,
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
        prompt_has_special_tokens=prompt_has_special_tokens,
    )
    special = [prompt_has_special_tokens or bool(record.meta.get("special_tokens")) for record in records]
    prompts = encoder.prompts([record.prompt for record in records], special)
    answers = [_responses_of(record) for record in records]
    responses = encoder.responses([text for texts in answers for text in texts])
    rows: list[Tokenized] = []
    used = 0
    for record, prompt, texts in zip(records, prompts, answers, strict=True):
        rows.append(_assemble(record, prompt, responses[used : used + len(texts)], encoder))
        used += len(texts)
    return rows, _report(prompts, responses)


def _appends_eos(tokenizer: Any) -> bool:
    """True for a tokenizer that ends every text with eos even when told to add no special tokens."""
    ids = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    return len(ids) > 1 and ids[-1] == tokenizer.eos_token_id


def _responses_of(record: Record) -> tuple[str, ...]:
    if isinstance(record, ResponseRecord | LabelledRecord):
        return (record.response,)
    if isinstance(record, PreferenceRecord):
        return (record.chosen, record.rejected)
    return record.responses if isinstance(record, RankedRecord) else ()


def _assemble(record: Record, prompt: EncodedText, responses: Sequence[EncodedText], encoder: TextEncoder) -> Tokenized:
    category = str(record.meta.get("category") or "")
    if isinstance(record, PromptRecord):
        if not prompt.ids:
            raise DataError(f"prompt {record.id!r} has no tokens ({record.prompt!r}); nothing can be sampled from it")
        text = record.prompt
        if prompt.truncated:  # a byte-level token may begin in the middle of a character
            text = encoder.tokenizer.decode(prompt.ids[len(encoder.start_ids) :]).lstrip("\ufffd")
        return TokenizedPrompt(record.id, prompt.ids, text, category, record.messages, record.columns)
    rows = tuple(
        TokenizedResponse(record.id, prompt.ids + response.ids, len(prompt.ids), category) for response in responses
    )
    if isinstance(record, ResponseRecord):
        return rows[0]
    if isinstance(record, LabelledRecord):
        return TokenizedLabel(rows[0], record.good)
    if isinstance(record, PreferenceRecord):
        return TokenizedRanking(record.id, rows, (0, 1), record.margin, category)
    return TokenizedRanking(record.id, rows, tuple(record.ranks), 0.0, category)


def _report(prompts: Sequence[EncodedText], responses: Sequence[EncodedText]) -> TokenReport:
    prompt_lengths = [len(prompt.ids) for prompt in prompts]
    response_lengths = [len(response.ids) for response in responses]
    return TokenReport(
        rows=len(prompts),
        responses=len(responses),
        truncated_prompts=sum(prompt.truncated for prompt in prompts),
        truncated_responses=sum(response.truncated for response in responses),
        empty_responses=sum(response.empty for response in responses),
        prompt_tokens=sum(prompt_lengths),
        response_tokens=sum(response_lengths),
        longest_prompt_tokens=max(prompt_lengths, default=0),
        longest_response_tokens=max(response_lengths, default=0),
    )
