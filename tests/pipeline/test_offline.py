"""What the offline stage is put together from: a row for every algorithm, and what `keep_best` needs."""

from __future__ import annotations

import json

import pytest

from rlhf.algorithms.config import OFFLINE_CONSTANTS, REFERENCED, OfflineConfig
from rlhf.config import ConfigError
from rlhf.pipeline.offline import OFFLINE_ALGORITHMS, _check_kept
from rlhf.types import TokenizedPrompt
from tests.support.samples import sample_lines


def test_every_algorithm_has_a_trainer_and_reads_what_it_learns_from():
    assert set(OFFLINE_ALGORITHMS) == set(OFFLINE_CONSTANTS)
    assert {name for name, row in OFFLINE_ALGORITHMS.items() if row.kind == "labelled"} == {"kto"}
    assert {name for name, row in OFFLINE_ALGORITHMS.items() if row.needs_reference} == set(REFERENCED)


def test_gold_can_be_kept_by_on_prompts_of_the_world_alone():
    question = json.loads(sample_lines("prompts_heldout", 1)[0])["prompt"]
    of_the_world, other = (TokenizedPrompt("a", (1,), text) for text in (question, "무엇이든"))
    by_gold = OfflineConfig(keep_best="gold", eval_every_steps=10)
    _check_kept(by_gold, [of_the_world])
    _check_kept(OfflineConfig(), [])
    with pytest.raises(ConfigError, match="and not all of them are: name sample:prompts_heldout"):
        _check_kept(by_gold, [of_the_world, other])
    with pytest.raises(ConfigError, match="and none is named"):
        _check_kept(by_gold, [])
