"""The texts that the embedded base model is pre-trained on, made from the training files of the embedded corpus."""

from __future__ import annotations

from rlhf.data.sources import read_rows
from rlhf.data.spec import DatasetSpec
from rlhf.data.templates import load_template


def embedded_corpus() -> list[str]:
    """Every training text twice: as a whole in the kullm template, and as a plain sentence. Nothing held out is read.

    Chosen and rejected answers occur alike, so the base model can say both and has yet to learn which is wanted.
    """
    template = load_template("kullm")
    texts: list[str] = []
    for row in read_rows(DatasetSpec("sample:sft_train")):
        values = row.values
        prompt = template.render(values["instruction"], values.get("input") or "")
        texts += [prompt + values["output"], values["instruction"], values["output"]]
    for row in read_rows(DatasetSpec("sample:preference_train")):
        prompt = template.render(row.values["prompt"])
        for answer in (row.values["chosen"], row.values["rejected"]):
            texts += [prompt + answer, answer]
    texts += [row.values["prompt"] for row in read_rows(DatasetSpec("sample:prompts_train"))]
    return texts
