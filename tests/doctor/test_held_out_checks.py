"""What the doctor says of held-out figures: runs that trained without a fault and prove nothing."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch

from rlhf.algorithms.ranking_metrics import RowNames, ScoredRows, ranking_metrics
from rlhf.cli.__main__ import main
from rlhf.cli.doctor import stage_views
from rlhf.doctor.checks import examine, unchecked
from rlhf.doctor.history import best_evaluation, condensed
from rlhf.doctor.monitor import HealthMonitor
from rlhf.training.on_policy import score_gain

CHECKS = {stage.name: stage.checks for stage in stage_views()}


def evaluation(step, right, longer, *, both=None, pairs_per_prompt=1, loss=0.5):
    """A line of metrics: the model has the first `right` pairs right, choosing the longer response the last `longer`.

    `right` and `longer` are lists of 0, 0.5 and 1, or (number of ones, pairs).
    """
    right, longer = (
        [1.0] * each[0] + [0.0] * (each[1] - each[0]) if isinstance(each, tuple) else each for each in (right, longer)
    )
    longer = longer if both else longer[::-1]
    pairs = len(right)
    scores = torch.tensor([part for each in right for part in (each, 0.5)])
    lengths = torch.tensor([part for each in longer for part in (each, 0.5)])
    groups = torch.arange(pairs).repeat_interleave(2)
    rows = ScoredRows(
        scores, groups, groups // pairs_per_prompt, torch.tensor([0, 1] * pairs), lengths, *[0 * groups] * 3
    )
    metrics = {name: value for name, value in ranking_metrics(rows, RowNames([""])).items() if isinstance(value, float)}
    return {"step": step, **metrics, "eval_loss": loss}


def training(first, last, **more):
    return [{"step": step, "loss": 0.6, "learning_rate": 1e-4, **more} for step in range(first, last + 1)]


def reward_run(*evaluations):
    """A reward model before training, and after steps 20, 40, ...: lines of metrics."""
    lines = [{**evaluation(0, (1, 2), (1, 2)), **evaluations[-1], "step": 0, "eval_loss": 0.7}]
    for number, each in enumerate(evaluations, 1):
        lines += [*training(20 * number - 19, 20 * number), {**each, "step": 20 * number}]
    return lines


def found(stage, lines):
    return {one.check: one for one in examine(CHECKS[stage], lines)}


def diagnosis(directory, stage, lines, capsys):
    """The status and the text of `rlhf doctor` of a finished stage with these metrics."""
    directory = directory / stage
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (directory / "result.json").write_text('{"seed": 1}', encoding="utf-8")
    status = main(["doctor", str(directory)])
    return status, " ".join(capsys.readouterr().out.split())


# ------------------------------------------------------------------------------------------- the reward model


def test_a_reward_model_right_in_1_of_4_where_length_alone_is_right_in_4(tmp_path, capsys):
    status, text = diagnosis(tmp_path, "reward", reward_run(evaluation(0, (1, 4), (4, 4))), capsys)
    assert status == 1
    assert "[critical] the reward model is not shown to be better than chance, since step 20" in text
    assert "held-out accuracy 0.250 on 4 pairs (95% interval 0.046 to 0.699)" in text
    assert "not shown to be better than length alone" in text and "choosing the longer response 1.000" in text
    assert "the model is -0.750 beside it" in text
    assert "too few held-out rows to say" in text and "(n = 4)" in text


def test_an_accuracy_that_rests_on_2_pairs(tmp_path, capsys):
    """Right in both: nothing to hold against the model, and nothing that speaks for it."""
    lines = reward_run(evaluation(0, (2, 2), (1, 2)))
    status, text = diagnosis(tmp_path, "reward", lines, capsys)
    assert status == 1 and set(found("reward", lines)) == {"too_few_held_out"}
    assert "2 held out" in text and "held-out accuracy 1.000 on 2 pairs (95% interval 0.342 to 1.000)" in text


def test_a_reward_model_below_what_length_alone_gives(tmp_path, capsys):
    """0.647 where the longer response gives 0.707: far above chance, and no better than a rule that reads nothing."""
    lines = reward_run(evaluation(0, (75, 116), (82, 116)))
    status, text = diagnosis(tmp_path, "reward", lines, capsys)
    assert status == 1 and set(found("reward", lines)) == {"reward_model_is_shortcut"}
    assert "held-out accuracy 0.647 on 116 pairs (95% interval 0.556 to 0.728)" in text
    assert "choosing the longer response 0.707" in text and "the model is -0.060 beside it" in text


def test_choosing_the_shorter_response_is_a_shortcut_too():
    """A length baseline of 0.293 is as good as one of 0.707."""
    one = found("reward", reward_run(evaluation(0, (75, 116), (34, 116))))["reward_model_is_shortcut"]
    assert "choosing the shorter response 0.707" in one.message


def test_a_model_that_is_surely_worse_than_the_shortcut_is_critical():
    severities = [
        found("reward", reward_run(evaluation(0, (75, 116), (longer, 116))))["reward_model_is_shortcut"].severity
        for longer in (82, 110)
    ]
    assert severities == ["warning", "critical"]


def test_the_same_accuracies_are_compared_pair_by_pair(tmp_path, capsys):
    """0.90 beside 0.83: right wherever length is and on eight pairs more it is better, else it may be chance, which is
    worth a note."""
    nested = evaluation(0, (104, 116), (96, 116), both=True)
    apart = evaluation(0, (104, 116), (96, 116))
    assert nested["eval_accuracy"] == apart["eval_accuracy"] and nested["eval_over_shortcut"] > 0
    assert found("reward", reward_run(nested)) == found("reward", reward_run(apart)) == {}
    status, text = diagnosis(tmp_path / "nested", "reward", reward_run(nested), capsys)
    assert status == 0 and "choosing the longer" not in text
    status, text = diagnosis(tmp_path / "apart", "reward", reward_run(apart), capsys)
    assert status == 0 and "choosing the longer response 0.828, so that the model is +0.069 beside it" in text


@pytest.mark.parametrize(
    ("right", "longer", "checks"),
    [
        ((107, 112), (56, 112), set()),  # the embedded run
        ((80, 112), (58, 112), set()),  # a baseline of 0.52 is chance: what beats chance need not beat it
        ((60, 112), (58, 112), {"reward_model_at_chance"}),
        ((20, 112), (56, 112), {"reward_model_at_chance"}),  # labels the wrong way round
        ((66, 112), (56, 112), {"reward_model_at_chance"}),  # 0.589: the interval begins at 0.497
        ((67, 112), (56, 112), set()),  # 0.598: at 0.506
        ((20, 29), (15, 29), {"too_few_held_out"}),
        ((23, 29), (22, 29), {"too_few_held_out"}),  # better than length, which may be chance
        ((83, 116), (82, 116), set()),
        ((82, 116), (82, 116), {"reward_model_is_shortcut"}),
        ((21, 29), (22, 29), {"too_few_held_out", "reward_model_is_shortcut"}),
        ((14, 29), (15, 29), {"too_few_held_out", "reward_model_at_chance"}),
        ((14, 28), (14, 28), {"too_few_held_out", "reward_model_at_chance"}),  # right in a half of them
        ((30, 30), (15, 30), set()),
    ],
)
def test_accuracies_and_their_neighbours(right, longer, checks):
    assert set(found("reward", reward_run(evaluation(0, right, longer)))) == checks


def test_pairs_of_one_prompt_are_one_row(tmp_path, capsys):
    """90 pairs of 15 prompts say as little as 15 pairs."""
    line = evaluation(0, (70, 90), (45, 90), pairs_per_prompt=6)
    one = found("reward", reward_run(line))["too_few_held_out"]
    assert "15 held out" in one.message and "on 90 pairs of 15 prompts" in one.message
    assert "(n = 90)" in diagnosis(tmp_path, "reward", reward_run(line), capsys)[1], "the accuracy is one of pairs"
    assert found("reward", reward_run(evaluation(0, (70, 90), (45, 90)))) == {}


def test_prompts_that_few_of_hold_most_of_the_pairs_are_few():
    line = {**evaluation(0, (107, 112), (56, 112)), "eval_rows": 35.0, "eval_effective_rows": 6.4}
    one = found("reward", reward_run(line))["too_few_held_out"]
    assert "35 held out, which tell as much as 6.4" in one.message
    assert "too_few_held_out" not in found("reward", reward_run({**line, "eval_effective_rows": 30.0}))


def test_it_is_the_kept_model_that_is_judged():
    """The evaluation with the lowest loss, wherever it stands; never the model before training."""
    good, coin = evaluation(0, (107, 112), (56, 112), loss=0.2), evaluation(0, (56, 112), (56, 112), loss=0.69)
    assert found("reward", reward_run(coin)[:-1]) == {}, "nothing is evaluated after training began"
    assert found("reward", reward_run(coin, good, coin)) == {}
    one = found("reward", reward_run(coin, {**coin, "eval_loss": 0.6}, coin))["reward_model_at_chance"]
    assert one.since == 40
    lines = reward_run(*[coin] * 20, good, *[coin] * 60)
    assert best_evaluation(condensed(lines))["eval_accuracy"] == good["eval_accuracy"], "not forgotten in the middle"


@pytest.mark.parametrize("line", [evaluation(0, (56, 112), (56, 112)), evaluation(0, (75, 116), (82, 116))])
def test_a_reward_model_is_not_judged_before_half_of_its_steps(line):
    """At chance, and below the shortcut: so is every healthy one at first."""
    lines = reward_run(*[line] * 4)
    lines = [{**one, "eval_progress": one["step"] / 80} if "eval_loss" in one else one for one in lines]
    judged = {end: set(found("reward", [one for one in lines if one["step"] <= end])) for end in (20, 39, 40, 80)}
    assert judged[20] == judged[39] == set()
    assert judged[40] == judged[80] != set()


def test_a_model_at_chance_on_the_way_leaves_no_trace_once_it_is_better(tmp_path, caplog):
    good, coin = evaluation(0, (107, 112), (56, 112), loss=0.2), evaluation(0, (56, 112), (56, 112), loss=0.69)
    monitor = HealthMonitor(tmp_path, "reward", CHECKS["reward"])
    for line in reward_run(coin, good):
        monitor.observe(line["step"], {name: value for name, value in line.items() if name != "step"})
        if line["step"] == 30:
            assert [one["check"] for one in monitor.summary()["findings"]] == ["reward_model_at_chance"]
    assert monitor.summary()["healthy"]
    told = [json.loads(line) for line in (tmp_path / "health.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(event["event"], event["at"]) for event in told] == [("found", 20), ("ended", 40)]


def test_what_stays_is_told_once_and_stands_in_the_result(tmp_path):
    line = evaluation(0, (75, 116), (82, 116))
    monitor = HealthMonitor(tmp_path, "reward", CHECKS["reward"])
    for each in reward_run(line, line, line):
        monitor.observe(each["step"], {name: value for name, value in each.items() if name != "step"})
    (one,) = monitor.summary()["findings"]
    assert (one["check"], one["since"], one["until"]) == ("reward_model_is_shortcut", 20, None)
    assert len((tmp_path / "health.jsonl").read_text(encoding="utf-8").splitlines()) == 1


# ---------------------------------------------------------------------------------------------- too few rows


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize(("rows", "says"), [(0, "nothing is held out"), (1, "1 held out"), (29, "29 held out")])
def test_too_few_rows_in_every_stage(stage, rows, says):
    lines = [{"step": 0, "eval_rows": float(rows)}, *training(1, 5)]
    assert says in found(stage, lines)["too_few_held_out"].message
    assert "too_few_held_out" not in found(stage, [{"step": 0, "eval_rows": 30.0}, *training(1, 5)])


def test_a_run_of_an_earlier_version_that_counts_no_rows_is_not_judged(tmp_path, capsys):
    lines = [{"step": 0, "eval_loss": 3.0}, *training(1, 5), {"step": 5, "eval_loss": 2.0}]
    status, text = diagnosis(tmp_path, "sft", lines, capsys)
    assert status == 0 and "not checked: too_few_held_out (no eval_rows)" in text


# ------------------------------------------------------------------------------------------------- PPO's score


def ppo_run(gain, *, prompts=52, spread=0.3, iterations=8, reward=0.0, score_std=1.0, seed=0):
    """Held-out scores before and after, `gain` apart over the prompts, and lines of metrics of the iterations."""
    generator = random.Random(seed)
    before = [generator.gauss(0, 1) for _ in range(prompts)]
    noise = [generator.gauss(0, spread) for _ in range(prompts)]
    shift = gain - sum(noise) / prompts
    scores = {0: before, iterations: [one + shift + other for one, other in zip(before, noise, strict=True)]}
    evaluations = {
        step: {
            "step": step,
            "eval_score": sum(values) / prompts,
            "eval_score_std": score_std,
            "eval_rows": float(prompts),
        }
        for step, values in scores.items()
    }
    gained = score_gain(*({"prompt_scores": values} for values in scores.values()))
    evaluations[iterations].update({f"eval_{name}": value for name, value in gained.items()})
    evaluations[0]["eval_reward"], evaluations[iterations]["eval_reward"] = 0.0, reward
    return [evaluations[0], *training(1, iterations), evaluations[iterations]]


def test_a_run_that_ends_below_its_start(tmp_path, capsys):
    status, text = diagnosis(tmp_path, "ppo", ppo_run(-0.38, score_std=2.0, reward=0.4), capsys)
    assert status == 1
    assert "the held-out score is below its start, since iteration 8 (score_below_start)" in text
    assert re.search(r"standard error 0\.04\d+ = 0\.02 SD", text)
    assert "-0.380 = -0.19 SD of the first scores (less penalties, as optimised: +0.400) on 52 prompts" in text


@pytest.mark.parametrize(
    ("run", "checks"),
    [
        ({"gain": -0.19}, {"score_below_start"}),
        ({"gain": 0.19}, set()),
        ({"gain": 0.0, "spread": 0.0, "score_std": 0.0}, set()),  # responses and scores are as they were
        ({"gain": -0.09}, set()),  # two standard errors of 0.3 / sqrt(52) = 0.042, and too small to matter
        ({"gain": -0.19, "spread": 0.87}, {"score_below_start"}),  # 0.12
        ({"gain": -0.38, "spread": 1.74, "score_std": 2.0}, {"score_below_start"}),
        ({"gain": -0.11, "spread": 0.87}, set()),
        ({"gain": -0.22, "spread": 1.74, "score_std": 2.0}, set()),
        ({"gain": -0.19, "spread": 1.74}, set()),
        ({"gain": -0.2, "prompts": 4}, {"too_few_held_out"}),  # 0.09, which is itself known badly
        ({"gain": -2.0, "prompts": 4}, {"too_few_held_out", "score_below_start"}),
    ],
)
def test_a_fall_counts_by_its_standard_error(run, checks):
    assert set(found("ppo", ppo_run(**run))) == checks


def test_a_score_that_has_only_begun_to_fall_is_judged_again():
    lines = ppo_run(-0.19)
    recovered = {**ppo_run(0.3)[-1], "step": 16}
    assert "score_below_start" in found("ppo", lines)
    assert "score_below_start" not in found("ppo", [*lines, *training(9, 16), recovered])


@pytest.mark.parametrize(("gain", "error", "expected"), [
    (-0.25, 0.125, True), (-0.24, 0.125, False), (-0.5, 0.5, False), (-0.5, 0.49, True),
])  # fmt: skip
def test_a_fall_of_a_tenth_of_the_spread_matters_and_one_of_its_error_is_chance(gain, error, expected):
    """A spread of 2.5 at the start. What is told: the newest score, how much lower it is, and how sure that is."""
    start = {"step": 0, "eval_score": 1.0, "eval_score_std": 2.5, "eval_reward": 0.5, "eval_rows": 40.0}
    first = {"step": 3, "eval_score": 9.0, "eval_score_gain": 8.0, "eval_score_gain_error": 0.1, "eval_rows": 40.0}
    last = {**start, "step": 6, "eval_score": 1 + gain, "eval_score_std": 1.0, "eval_reward": 0.7,
            "eval_score_gain": gain, "eval_score_gain_error": error}  # fmt: skip
    one = found("ppo", [start, first, last]).get("score_below_start")
    assert (one is not None) is expected
    if expected:
        assert (one.severity, one.since, one.step) == ("warning", 6, 6)
        assert one.badness == pytest.approx(-gain / error)
        assert one.message == (
            f"held-out score {1 + gain:.3f} after 1.000 at the start: {gain:+.3f} = {gain / 2.5:+.2f} SD of the first "
            f"scores (less penalties, as optimised: +0.200) on 40 prompts, standard error {error:.3g} = "
            f"{error / 2.5:.2f} SD"
        )
        without_start = found("ppo", [first, last])["score_below_start"].message
        assert without_start == (
            f"held-out score {1 + gain:.3f}, {gain:+.3f} since the start on 40 prompts, standard error {error:.3g}"
        )


@pytest.mark.parametrize(("effective", "told"), [
    (19.0, "20 held out: a mean over so many is known to +-0.45 of their SD"),
    (18.9, "20 held out, which tell as much as 18.9: few of them have most of the pairs: a mean over so many is known "
           "to +-0.45 of their SD"),
])  # fmt: skip
def test_how_much_too_few_rows_tell(effective, told):
    lines = [{"step": step, "eval_rows": 20.0, "eval_effective_rows": effective} for step in (2, 4)]
    one = found("sft", lines)["too_few_held_out"]
    assert (one.severity, one.since, one.step, one.message) == ("warning", 2, 4, told)
    assert one.badness == pytest.approx(30 / effective)
    assert found("sft", [{"step": 0, "eval_rows": 0.0}])["too_few_held_out"].badness == 60


def test_what_is_told_of_a_reward_model_that_is_as_good_as_a_rule_or_as_a_coin():
    """Of the evaluation that is kept, at a half of the run at the earliest."""
    accuracy = {"eval_accuracy": 0.375, "eval_accuracy_low": 0.25, "eval_accuracy_high": 0.5, "eval_rows": 64.0,
                "eval_pairs": 128.0, "eval_over_shortcut": -0.375, "eval_over_shortcut_low": -0.5,
                "eval_over_shortcut_high": -0.125, "eval_shortcut_accuracy": 0.75,
                "eval_length_baseline_accuracy": 0.25, "eval_loss": 0.5, "eval_progress": 0.5}  # fmt: skip
    lines = [{**accuracy, "step": 5, "eval_progress": 0.25}, {**accuracy, "step": 10, "eval_loss": 0.75}]
    told = found("reward", lines)
    assert set(told) == {"reward_model_at_chance", "reward_model_is_shortcut"}
    assert {(one.severity, one.since, one.step) for one in told.values()} == {("critical", 5, 5)}
    chance, shortcut = told["reward_model_at_chance"], told["reward_model_is_shortcut"]
    figures = "held-out accuracy 0.375 on 128 pairs of 64 prompts (95% interval 0.250 to 0.500)"
    assert (chance.message, chance.badness) == (figures, 1.125)
    assert shortcut.badness == 1.375 and shortcut.message == (
        f"{figures}; choosing the shorter response 0.750, so that the model is -0.375 beside it "
        "(95% interval -0.500 to -0.125)"
    )
    assert found("reward", [{**lines[1], "eval_progress": 0.49}]) == {}
    lines[0]["eval_over_shortcut_high"] = 0.0
    assert found("reward", lines)["reward_model_is_shortcut"].severity == "warning"
    lines[0]["eval_over_shortcut"] = 0.0
    assert "reward_model_is_shortcut" in found("reward", lines)
    lines[0]["eval_accuracy"], lines[0]["eval_accuracy_low"] = 0.55, 0.5
    assert found("reward", lines)["reward_model_at_chance"].badness == 1


def golden_run(golds, scores, *, error=0.01, kept=None, name="gold"):
    """Evaluations every ten iterations with these golds and scores; an error of the fall from the best."""
    lines, best = [], 0
    for number, (gold, score) in enumerate(zip(golds, scores, strict=True)):
        line = {"step": 10 * number, f"eval_{name}": gold, "eval_score": score, "eval_rows": 100.0}
        if gold > golds[best] or number == 0:
            best = number
        else:
            line |= {
                f"eval_{name}_fall": golds[best] - gold, f"eval_{name}_fall_error": error,
                f"eval_{name}_fall_since": 10.0 * best, f"eval_{name}_fall_score": score - scores[best],
            }  # fmt: skip
        lines.append({**line, "eval_kept_step": 10.0 * number if kept is None else kept})
    return lines


@pytest.mark.parametrize(
    ("name", "what"), [("gold", "gold"), ("held_out_score", "the score of the held-out reward model")]
)
def test_gold_that_falls_while_the_score_rises(name, what):
    """Five evaluations: the limit is sqrt(2 ln 5) = 1.79 errors, in two of them in a row."""
    lines = golden_run([0.75, 0.86, 0.85, 0.83, 0.82], [0.0, 1.0, 1.5, 2.0, 2.5], name=name)
    one = found("ppo", lines)["over_optimised"]
    assert (one.severity, one.since, one.step) == ("warning", 30, 40)
    assert one.message == (
        f"{what} is 0.820, 0.040 (standard error 0.010) below that of iteration 10, while the score rose by 1.500"
    )
    assert one.badness == pytest.approx(4 / 1.794, rel=1e-3)


@pytest.mark.parametrize(
    ("golds", "scores", "more"),
    [
        ([0.75, 0.86, 0.85, 0.85, 0.82], [0, 1, 2, 3, 4], {}),  # one evaluation alone
        ([0.75, 0.86, 0.85, 0.843, 0.843], [0, 1, 2, 3, 4], {}),  # 1.7 errors
        ([0.75, 0.86, 0.85, 0.83, 0.82], [0, 1, 2, 1, 0.9], {}),  # the score fell too
        ([0.75, 0.86, 0.85, 0.83, 0.82], [0, 1, 2, 3, 4], {"kept": 10.0}),  # the best one is the one that is kept
        ([0.75, 0.76, 0.77, 0.78, 0.79], [0, 1, 2, 3, 4], {}),
        ([0.75, 0.86, 0.80, 0.80, 0.87], [0, 1, 2, 3, 4], {}),  # a new best
    ],
)
def test_gold_that_is_as_good_as_it_was(golds, scores, more):
    assert "over_optimised" not in found("ppo", golden_run(golds, scores, **more))
    assert "over_optimised" not in found("ppo", [{"step": 0, "eval_score": 0.0, "eval_rows": 100.0}])


def test_more_evaluations_have_a_luckier_best():
    """1.9 errors below: beyond the luck of five evaluations, within that of ten (2.15)."""
    few = golden_run([0.75, 0.86, 0.841, 0.841, 0.841], [0, 1, 2, 3, 4])
    many = golden_run([0.70] * 5 + [0.75, 0.86, 0.841, 0.841, 0.841], [0] * 5 + [0, 1, 2, 3, 4])
    assert ("over_optimised" in found("ppo", few), "over_optimised" in found("ppo", many)) == (True, False)


@pytest.mark.parametrize(("correlations", "since"), [([0.62], 0), ([-0.55, -0.7], 0), ([0.1, 0.52, 0.6], 10)])
def test_a_score_that_follows_the_length_of_the_actors_responses(correlations, since):
    """Told before training where it is so then already."""
    lines = [{"step": 10 * at, "eval_rows": 100.0, "eval_score_length_within": c} for at, c in enumerate(correlations)]
    one = found("ppo", lines)["score_follows_length"]
    assert (one.severity, one.since, one.step) == ("warning", since, 10 * (len(lines) - 1))
    assert one.message.startswith(f"correlation of score and length {correlations[-1]:+.2f} among")
    assert one.badness == pytest.approx(abs(correlations[-1]) / 0.5)
    calm = {"step": 10 * len(lines), "eval_rows": 100.0, "eval_score_length_within": 0.48}
    assert "score_follows_length" not in found("ppo", [*lines, calm])
    assert "score_follows_length" not in found("ppo", [{**line, "eval_rows": 8.0} for line in lines]), "too few to say"


def test_what_is_missing_for_it_is_said_once_for_both_measures():
    lines = golden_run([0.7, 0.8], [0, 1])
    bare = [{"step": 0, "eval_score": 0.0, "eval_rows": 100.0}]
    assert "over_optimised" not in unchecked(CHECKS["ppo"], lines)
    assert unchecked(CHECKS["ppo"], bare)["over_optimised"] == ["eval_gold or eval_held_out_score"]


def test_a_score_below_its_start_is_that_of_the_actor_that_is_kept():
    """The kept one is 24 evaluations back and more; the newest one is far below the start."""
    start = {"step": 0, "eval_score": 1.0, "eval_score_std": 1.0, "eval_rows": 40.0}
    good = {"step": 1, "eval_score": 2.0, "eval_score_gain": 1.0, "eval_score_gain_error": 0.1, "eval_rows": 40.0}
    bad = [
        {**good, "step": step, "eval_score": 0.0, "eval_score_gain": -1.0, "eval_kept_step": 1.0}
        for step in range(2, 60)
    ]
    lines = condensed([start, *({**good, "step": -step} for step in range(9, 3, -1)), good, *bad])
    assert good in lines
    assert "score_below_start" not in found("ppo", lines)
    assert "score_below_start" in found("ppo", [start, good, *[{**line, "eval_kept_step": 59.0} for line in bad]])
