"""What a training state holds, which run may load it, and when it is saved (engines in it: tests/slow)."""

from __future__ import annotations

import dataclasses
import json
import logging
import random

import pytest
import torch

import rlhf.training.resume
from rlhf.config import ConfigError, RunConfig
from rlhf.training.resume import TrainingStates, refusal, remove_states

IDENTITY = {"seed": 3, "data": "abc"}


@dataclasses.dataclass
class Counter:
    """A loop without engines: a number alike on all ranks, one of each rank, and a tensor."""

    total: int = 0
    mine: float = 0.0
    weights: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(2))
    rank_states: list = dataclasses.field(default_factory=list)

    def engines(self):
        return {}

    def state(self):
        return {"total": self.total}

    def rank_state(self):
        return {"mine": self.mine}

    def tensors(self):
        return {"weights": self.weights}

    def load_state(self, state, rank_states, tensors):
        self.total, self.rank_states, self.weights = state["total"], list(rank_states), tensors["weights"]


def states(directory, identity=IDENTITY, **run):
    return TrainingStates(directory / "states", RunConfig(output_dir=str(directory), seed=5, **run), identity)


def saved(directory, *steps, **run):
    """Save a state after each of the steps."""
    store = states(directory, **run)
    for step in steps:
        assert store.save(step, Counter(step, step / 2, torch.tensor([step, 0.5])))
    return store


def test_a_run_resumes_from_its_newest_state_with_the_same_random_numbers(tmp_path, caplog):
    random.seed(7)
    torch.manual_seed(7)
    saved(tmp_path, 1, 2)
    expected = random.random(), torch.rand(3).tolist()
    random.seed(0)
    loop = Counter()
    with caplog.at_level(logging.INFO, logger="rlhf"):
        assert states(tmp_path, resume="auto").restore(loop)
    assert (loop.total, loop.rank_states, loop.weights.tolist()) == (2, [{"mine": 1.0}], [2.0, 0.5])
    assert (random.random(), torch.rand(3).tolist()) == expected
    said = [message for message in caplog.messages if "state" in message or "resuming" in message]
    assert said == [f"resuming after step 2 from {tmp_path / 'states' / 'step-00000002'}"]  # of as many processes


def test_a_state_of_more_processes_hands_over_the_sums_of_all_of_them(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("rlhf.checkpoint.state_directory.world_size", lambda: 2)
    store = states(tmp_path)
    store.store.save(4, {"identity": IDENTITY, "identity_version": rlhf.training.resume.IDENTITY_VERSION,
                         "loop": {"total": 9}}, two_ranks)  # fmt: skip
    monkeypatch.undo()
    loop = Counter()
    with caplog.at_level(logging.INFO, logger="rlhf"):
        assert states(tmp_path, resume="auto").restore(loop)
    assert loop.rank_states == [{"mine": 1}, {"mine": 2}]
    assert "the training state is one of 2 processes and 1 run now" in caplog.messages


def two_ranks(part):
    from safetensors.torch import save_file

    from rlhf.checkpoint.random_state import save_rng

    for number in (0, 1):
        save_rng(part, number)
        (part / f"loop-rank{number:05d}.json").write_text(json.dumps({"mine": number + 1}))
    save_file({"weights": torch.ones(2)}, part / rlhf.training.resume.TENSORS)


@pytest.mark.parametrize("resume", [None, "never"])
def test_a_run_that_is_not_to_resume_starts_anew(tmp_path, resume):
    saved(tmp_path, 1)
    loop = Counter()
    assert not states(tmp_path, resume=resume).restore(loop) and loop.total == 0


def test_nothing_to_resume_from_is_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="rlhf"):
        assert not states(tmp_path).restore(Counter())
        assert caplog.messages == []  # nobody asked
        assert not states(tmp_path, resume="auto").restore(Counter())
    assert caplog.messages == ["no training state to resume from: starting at step 0"]


def test_the_state_of_another_run_or_release_is_refused(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    with pytest.raises(ConfigError, match="seed was 3 and is 4"):
        states(tmp_path, {**IDENTITY, "seed": 4}, resume="auto").restore(Counter())
    monkeypatch.setattr(rlhf.training.resume, "IDENTITY_VERSION", rlhf.training.resume.IDENTITY_VERSION + 1)
    with pytest.raises(ConfigError, match="step-00000001 was saved by an earlier release.*--resume never"):
        states(tmp_path, resume="auto").restore(Counter())


def test_a_state_without_the_first_scores_by_prompt_is_refused_at_the_start(tmp_path, monkeypatch):
    """Version 2 kept no scores by prompt and no rendered prompts, which the end of a run needs."""
    with monkeypatch.context() as patch:
        patch.setattr(rlhf.training.resume, "IDENTITY_VERSION", 2)
        saved(tmp_path, 1)
    with pytest.raises(ConfigError, match="step-00000001 was saved by an earlier release.*kept less in a state"):
        states(tmp_path, resume="auto").restore(Counter())


@pytest.mark.parametrize(
    ("run", "total", "due"),
    [
        ({"save_every_steps": 4}, 10, [4, 8, 10]),
        ({}, 35, [*range(3, 34, 3), 35]),  # ten times in a run, and at its end
        ({}, 4, [1, 2, 3, 4]),
        ({"save_every_steps": 4, "keep_last": 0}, 10, []),
    ],
)
def test_when_a_state_is_saved(tmp_path, run, total, due):
    store = states(tmp_path, **run)
    assert [step for step in range(1, total + 1) if store.due(step, total)] == due


def test_the_newest_and_the_permanent_states_are_kept(tmp_path):
    assert saved(tmp_path, *range(1, 9), keep_last=1, keep_every=3).store.steps() == [3, 6, 8]
    remove_states(tmp_path / "states", RunConfig(keep_every=3), keep_permanent=True)
    assert states(tmp_path).store.steps() == [3, 6]
    remove_states(tmp_path / "states", RunConfig(keep_every=3), keep_permanent=False)
    assert not (tmp_path / "states").exists()


def test_an_unfinished_run_is_not_started_over_unasked(tmp_path):
    assert refusal(tmp_path / "states", RunConfig()) is None
    saved(tmp_path, 1, 2)
    assert "saved after step 2: go on with --resume auto" in str(refusal(tmp_path / "states", RunConfig()))
    for resume in ("auto", "never"):
        assert refusal(tmp_path / "states", RunConfig(resume=resume)) is None
    (tmp_path / "result.json").write_text("{}")
    assert refusal(tmp_path / "states", RunConfig()) is None
