"""A padding token that is not the end of sequence, for the files that `transformers` reads scores from.

Its classifiers take the score at the last token that is not `pad_token_id`. Where padding is the end of sequence they
would pass over the real one that a response ends with.
"""

from __future__ import annotations

import copy
from typing import Any

PAD_TEXT = "<|pad|>"
CONTROL_BYTES = ("<0x00>", "\u0121")
"""The bytes NUL of a SentencePiece tokenizer and DEL of a byte-level one: no text ends with them."""


def with_own_padding(tokenizer: Any, rows: int) -> Any:
    """`tokenizer` where it pads with a token of its own, else a copy that does; `rows` are those of the embedding.

    In this order: a special token whose name says padding, a new token in a spare row of the embedding, the token of a
    control byte. A copy without a padding token where there is none of the three.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    vocabulary = changed.get_vocab()
    known = [*changed.all_special_tokens, *map(str, changed.added_tokens_decoder.values())]
    named = [text for text in known if "pad" in text.lower() and text != changed.eos_token and vocabulary[text] < rows]
    bytes_known = [text for text in CONTROL_BYTES if vocabulary.get(text, rows) < rows]
    if named:
        changed.pad_token = named[0]
    elif len(changed) < rows and max(vocabulary.values()) < rows - 1:
        changed.add_special_tokens({"pad_token": PAD_TEXT})
    elif bytes_known:
        changed.pad_token = bytes_known[0]
    else:
        changed.pad_token = None
    return changed
