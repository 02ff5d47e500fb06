"""The loop of an on-policy training: when it evaluates and exports, and how far the held-out score has risen."""

import json
import math

import pytest

from rlhf.training.on_policy import score_gain
from tests.algorithms.test_ppo_checklist import make_trainer  # noqa: F401  (a fixture)


@pytest.mark.parametrize(("every", "expected"), [(0, [0, 5]), (2, [0, 2, 4, 5]), (5, [0, 5])])
def test_it_evaluates_before_every_so_often_and_at_the_end(make_trainer, every, expected):  # noqa: F811
    trainer, exported = make_trainer(iterations=5, eval_every_steps=every), []
    trainer.export = lambda: exported.append(trainer.step + 1)
    trainer.fit()
    lines = [json.loads(line) for line in (trainer.directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_score" in line] == expected
    assert exported == expected[1:], "what is evaluated after training began is what is saved"


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4, 5]), (2, [1, 2, 4, 5]), (10, [1, 5])])
def test_it_writes_a_line_at_the_first_and_the_last_iteration_and_every_so_often(make_trainer, every, expected):  # noqa: F811
    trainer = make_trainer(iterations=5)
    trainer.run.log_every_steps = every
    outcome = trainer.fit()
    lines = [json.loads(line) for line in (trainer.directory / "metrics.jsonl").read_text().splitlines()]
    written = [line for line in lines if "policy_loss" in line]
    assert [line["step"] for line in written] == expected
    assert all(min(line["seconds_update"], line["seconds_experience"]) > 0 for line in written)
    assert sum(line["seconds_update"] + line["seconds_experience"] for line in written) < outcome["seconds"]
    first, last = [line for line in lines if "eval_score" in line]
    assert (first["eval_score"], last["eval_score"]) == (outcome["before"]["score"], outcome["after"]["score"])
    assert last["eval_score_gain"] == outcome["after"]["score_gain"] and "eval_score_gain" not in first


@pytest.mark.parametrize(("full_until", "ends"), [(2, True), (3, False)])
def test_a_disk_that_is_full_ends_a_run_at_its_last_export_alone(make_trainer, full_until, ends):  # noqa: F811
    trainer, tried = make_trainer(iterations=3, eval_every_steps=1), []

    def export():
        tried.append(trainer.step + 1)
        if tried[-1] <= full_until:
            raise OSError(28, "no space left on device")

    trainer.export = export
    if ends:
        assert trainer.fit()["after"]["rows"] == 3
    else:
        with pytest.raises(OSError, match="no space left"):
            trainer.fit()
    assert tried == [1, 2, 3]


def test_the_gain_and_its_error_are_those_of_the_differences_by_prompt():
    """Prompts that are far apart and all rise by about 1: the error is that of the rises, not of the scores."""
    before, after = [-5.0, 0.0, 5.0, 10.0], [-4.0, 1.5, 5.5, 11.0]
    found = score_gain({"prompt_scores": before}, {"prompt_scores": after})
    assert found["score_gain"] == pytest.approx(1.0)
    assert found["score_gain_error"] == pytest.approx(math.sqrt((0 + 0.25 + 0.25 + 0) / 3) / 2)


@pytest.mark.parametrize("scores", [[], [1.0]])
def test_without_two_prompts_nothing_is_said(scores):
    assert score_gain({"prompt_scores": scores}, {"prompt_scores": scores}) == {}
    assert score_gain({"rows": 0.0}, {"rows": 0.0}) == {}


def scripted(trainer, figures):
    """The trainer with evaluations that give `figures`, (gold, reward) by iteration, and what it exports."""
    exported, evaluated = [], []

    def evaluate(iteration):
        evaluated.append(iteration)
        gold, reward = figures[iteration]
        by_prompt = [gold - 0.25, gold + 0.25]
        return {"rows": 2.0, "score": 0.0, "gold": gold, "reward": reward, "prompt_measures": {"gold": by_prompt}}

    trainer.evaluate = evaluate
    trainer.export = lambda: exported.append(evaluated[-1])
    return exported, evaluated


RISING_AND_FALLING = {0: (0.9, 0.0), 1: (0.5, 1.0), 2: (0.7, 2.0), 3: (0.7, 5.0), 4: (0.6, 4.0), 5: (0.6, 3.0)}


@pytest.mark.parametrize(
    ("keep_best", "expected", "kept"),
    [(None, [1, 2, 3, 4, 5], 5), ("gold", [1, 2], 2), ("reward", [1, 2, 3], 3)],
)
def test_the_best_trained_actor_is_the_one_exported(make_trainer, keep_best, expected, kept):  # noqa: F811
    """The actor before training, the best of all by gold here, is none of those that can be kept."""
    trainer = make_trainer(iterations=5, eval_every_steps=1, keep_best=keep_best)
    exported, _ = scripted(trainer, RISING_AND_FALLING)
    outcome = trainer.fit()
    assert exported == expected
    assert (outcome["kept_iteration"], outcome["iterations"]) == (kept, 5)
    assert (outcome["after"]["gold"], outcome["after"]["reward"]) == RISING_AND_FALLING[kept]
    lines = [json.loads(line) for line in (trainer.directory / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["eval_kept_step"] == kept


@pytest.mark.parametrize(
    ("stop_when", "patience", "last"),
    [("gold", 1, 1), ("gold", 3, 3), ("reward", 1, 4), ("reward", 2, 5), (None, 1, 5)],
)
def test_a_run_ends_when_the_best_stays_unreached(make_trainer, stop_when, patience, last, caplog):  # noqa: F811
    trainer = make_trainer(iterations=5, eval_every_steps=1, stop_when=stop_when, patience=patience)
    exported, evaluated = scripted(trainer, RISING_AND_FALLING)
    with caplog.at_level("INFO", logger="rlhf"):
        outcome = trainer.fit()
    assert evaluated == list(range(last + 1)) and exported[-1] == last
    assert (outcome["iterations"], outcome["kept_iteration"]) == (last, last)
    if last < 5:
        assert f"ends after iteration {last} of 5 (stop_when): the best {stop_when}" in caplog.text


def test_a_best_export_that_fails_leaves_the_earlier_models_and_a_later_one_may_follow(make_trainer):  # noqa: F811
    trainer = make_trainer(iterations=5, eval_every_steps=1, keep_best="reward")
    exported, evaluated = scripted(trainer, RISING_AND_FALLING)

    def export():
        if evaluated[-1] == 3:
            raise OSError(28, "no space left on device")
        exported.append(evaluated[-1])

    trainer.export = export
    assert trainer.fit()["kept_iteration"] == 4, "better than the second, which was the last to be written"
    assert exported == [1, 2, 4]


def test_a_run_that_ends_early_does_not_end_without_a_model(make_trainer):  # noqa: F811
    trainer = make_trainer(iterations=5, eval_every_steps=1, keep_best="reward", stop_when="gold", patience=2)
    _, evaluated = scripted(trainer, RISING_AND_FALLING)

    def export():
        raise OSError(28, "no space left on device")

    trainer.export = export
    with pytest.raises(OSError, match="no space left"):
        trainer.fit()
    assert evaluated == [0, 1, 2]


def test_a_run_that_was_killed_when_its_patience_was_over_ends_without_another_step(make_trainer):  # noqa: F811
    first = make_trainer(iterations=5, eval_every_steps=1, keep_best="gold", stop_when="reward", patience=1)
    scripted(first, RISING_AND_FALLING)
    outcome = first.fit()
    state = json.loads(json.dumps({**first.state(), "outcome": {**first.outcome}}))
    again = make_trainer(iterations=5, eval_every_steps=1, keep_best="gold", stop_when="reward", patience=1)
    exported, evaluated = scripted(again, RISING_AND_FALLING)
    again.begin = lambda: (again.load_state(state, [first.rank_state()], {}), again.step)[1]
    resumed = again.fit()
    assert (exported, evaluated) == ([], [])
    assert [resumed[name] for name in ("iterations", "kept_iteration", "after")] == [
        outcome[name] for name in ("iterations", "kept_iteration", "after")
    ]  # fmt: skip
