"""Fixtures: tiny random models of six architectures, their tokenizer, and ragged rows of token ids."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RLHF_PIPELINE", "1")  # a stage that a test starts draws no report at its end

import pytest
import torch

from rlhf.models.tiny_base import TinyRecipe, build_tiny_base
from tests.support.samples import sample_lines
from tests.support.tiny_models import ARCHITECTURES, TOKENS, make_tokenizer, save_tiny_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files of tests/slow first: a long one that begins last would leave the other worker without work."""
    items.sort(key=lambda item: "slow" not in item.path.parts)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """See `make_tokenizer`."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """One causal LM directory per architecture. Tests must not write into them."""
    root = tmp_path_factory.mktemp("tiny")
    return {name: save_tiny_model(root / name, name, tokenizer) for name in ARCHITECTURES}


@pytest.fixture()
def ragged() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same four rows right- and left-padded with 0 (which is eos): ids, mask, ids, mask, each [4, 9]."""
    generator = torch.Generator().manual_seed(5)
    right_ids, right_mask = torch.zeros(4, 9, dtype=torch.long), torch.zeros(4, 9, dtype=torch.bool)
    left_ids, left_mask = right_ids.clone(), right_mask.clone()
    for row, length in enumerate((9, 6, 3, 1)):
        tokens = torch.randint(1, TOKENS, (length,), generator=generator)
        if length > 3:
            tokens[-1] = 0  # ends in eos, the same id as padding
        right_ids[row, :length], right_mask[row, :length] = tokens, True
        left_ids[row, 9 - length :], left_mask[row, 9 - length :] = tokens, True
    return right_ids, right_mask, left_ids, left_mask


@pytest.fixture(scope="session")
def micro_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal LM that has seen a little Korean, far smaller than the embedded base. Tests must not write into it."""
    recipe = TinyRecipe(vocabulary_size=400, hidden_size=32, layers=2, heads=2, intermediate_size=64, steps=40)
    texts = sample_lines("sft_train", 200)
    return build_tiny_base(texts, tmp_path_factory.mktemp("micro"), progress=False, recipe=recipe)
