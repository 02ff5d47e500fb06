"""The texts that the embedded base model is pre-trained on, made from the training files of the embedded corpus."""

from __future__ import annotations

from rlhf.data.sources import read_rows
from rlhf.data.spec import DatasetSpec


def embedded_corpus() -> list[str]:
    """Plain text for the base model: questions, and exchanges of two lines. Nothing held out is read.

    Good and bad answers occur alike, so the base can say both and has yet to learn which is wanted. The answers of
    the SFT rows and the prompt template are left out: following instructions is what step 1 teaches.
    """
    texts = [row.values["instruction"] for row in read_rows(DatasetSpec("sample:sft_train"))]
    for row in read_rows(DatasetSpec("sample:preference_train")):
        texts += [f"{row.values['prompt']}\n{row.values[answer]}" for answer in ("chosen", "rejected")]
        texts += [row.values["chosen"], row.values["rejected"]]
    return texts + [row.values["prompt"] for row in read_rows(DatasetSpec("sample:prompts_train"))]
