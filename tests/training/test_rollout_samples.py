"""Which responses of a rollout are kept for reading."""

from types import SimpleNamespace

import torch

from rlhf.training.rollout_samples import rollout_lines, spread_over_scores


def test_rows_are_spread_from_the_highest_score_to_the_lowest():
    scores = [0.0, 5.0, -2.0, 3.0, 1.0]
    assert spread_over_scores(scores, 3) == [1, 4, 2]
    assert spread_over_scores(scores, 2) == [1, 2]
    assert spread_over_scores(scores, 9) == [1, 3, 4, 0, 2]
    assert (
        spread_over_scores(scores, 1) == [1] and spread_over_scores(scores, 0) == [] and spread_over_scores([], 4) == []
    )
    assert spread_over_scores([1.0, 1.0, 1.0, 1.0], 4) == [0, 1, 2, 3], "of equal ones the first first"


def test_none_are_kept_where_none_are_wanted():
    """Before anything is decoded: an empty index is no index."""
    scored = SimpleNamespace(rollout=None, scores=torch.tensor([1.0, 2.0]))
    assert list(rollout_lines(SimpleNamespace(tokenizer=None), scored, {}, iteration=1, count=0)) == []
