"""The texts that the embedded base model is pre-trained on, written by the world's writer."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from rlhf.data.templates import load_template
from rlhf.data.world.datasets import base_texts

TEMPLATE = "kullm"
TEMPLATE_TEXTS = 300


@functools.cache
def embedded_corpus() -> Sequence[str]:
    """Plain text for the base model: exchanges of two lines, no combination of which is held out.

    Good and bad answers occur alike, so the base can say both and has yet to learn which is wanted. The words of the
    default template stand there alone, so that the tokenizer knows them; following instructions is what step 1
    teaches.
    """
    return (*base_texts(), *[load_template(TEMPLATE).render("")] * TEMPLATE_TEXTS)
