"""Every limit to the line and to the digit: so many bad lines are a finding, one fewer or the limit itself is none."""

import dataclasses
import math

import pytest

from rlhf.doctor.checks import examine
from rlhf.doctor.monitor import HealthWatch
from tests.doctor.test_doctor import CHECKS, LINES, history, last, lines_of, names

LASTING = [
    # check, metric, beyond the limit, the limit, healthy, lines at the end, severity
    ("sampling_mismatch", "sampling_logprob_error_mean", 0.051, 0.05, 0.01, 1, "critical"),
    ("kl_negative", "kl_per_token", -0.021, -0.02, 0.1, 3, "critical"),
    ("kl_explodes", "kl_per_token", 1.1, 1.0, 0.2, 2, "warning"),
    ("kl_explodes", "kl_per_token", 3.1, 1.0, 0.2, 2, "critical"),
    ("kl_dead", "kl_per_token", -0.9e-6, -1e-6, 0.1, 8, "warning"),
    ("clip_fraction_high", "clip_fraction", 0.41, 0.4, 0.1, 3, "warning"),
    ("value_function_useless", "explained_variance", -0.01, 0.0, 0.5, 10, "warning"),
    ("score_is_length", "score_length_correlation", -0.91, -0.9, 0.1, 5, "warning"),
    ("repetition", "repeated_4grams", 0.31, 0.3, 0.05, 3, "warning"),
    ("empty_responses", "empty_responses", 0.51, 0.5, 0.0, 3, "warning"),
    ("score_out_of_range", "scores_outside_range", 0.51, 0.5, 0.0, 3, "warning"),
    ("scores_alike", "score_std", 0.049, 0.05, 1.0, 3, "warning"),
    ("advantages_equal", "advantage_std", 0.99e-4, 1e-4, 0.5, 2, "critical"),
]


@pytest.mark.parametrize(("name", "metric", "beyond", "limit", "healthy", "lines", "severity"), LASTING)
def test_so_many_lines_beyond_the_limit_and_no_fewer(name, metric, beyond, limit, healthy, lines, severity):
    def found(count, value):
        return {
            one.check: one for one in examine(CHECKS["ppo"], history("ppo", **{metric: last(count, value, healthy)}))
        }

    one = found(lines, beyond)[name]
    assert (one.severity, one.since, one.step) == (severity, LINES - lines + 1, LINES)
    assert name not in found(lines - 1, beyond)
    assert name not in found(lines, limit)


WORSE = [
    # check, metric, beyond the limit, the limit, healthy
    ("sampling_mismatch", "sampling_logprob_error_mean", 0.06, 0.05, 0.01),
    ("kl_negative", "kl_per_token", -0.024, -0.02, 0.1),
    ("kl_explodes", "kl_per_token", 1.2, 1.0, 0.2),
    ("clip_fraction_high", "clip_fraction", 0.44, 0.4, 0.1),
    ("value_function_useless", "explained_variance", -1.2, 0.0, 0.5),
    ("repetition", "repeated_4grams", 0.36, 0.3, 0.05),
    ("too_few_held_out", "eval_rows", 20.0, 30.0, 52.0),
]


@pytest.mark.parametrize(("name", "metric", "beyond", "limit", "healthy"), WORSE)
def test_what_is_twice_as_bad_is_told_again(name, metric, beyond, limit, healthy):
    """And what is not quite twice as bad is not, nor what becomes better."""
    for times, expected in ((0.6, []), (1.9, []), (2.1, ["worse"])):
        watch = HealthWatch("ppo", CHECKS["ppo"])
        later = beyond / times if abs(beyond) < abs(limit) else beyond * times
        lines = lines_of(metric, [*[healthy] * 20, *[beyond] * 10, *[later] * 2])
        events = [event for line in lines for event, one in watch.look(line["step"], line) if one.check == name]
        assert events == (["found", *expected]), times


def test_a_value_function_is_given_twenty_lines():
    for lines, expected in ((19, False), (20, True)):
        found = examine(CHECKS["ppo"], history("ppo", lines=lines, explained_variance=lambda index: -0.5))
        assert ("value_function_useless" in names(found)) is expected


def test_a_diverging_loss_is_told_by_the_means_of_five_lines_at_either_end():
    (found,) = examine(CHECKS["sft"], lines_of("loss", [2.0, 3.0, 2.0, 3.0, 5.0, *[2.0] * 20, 5.0, 6.0, 7.0, 8.0, 9.0]))
    assert (found.check, found.severity, found.since, found.step) == ("loss_diverges", "critical", 26, 30)
    assert found.message == "loss 7 over the last 5 lines, 3 over the first 5, 2 in the first"


@pytest.mark.parametrize(("times", "expected"), [(1.49, False), (1.51, True)])
def test_a_loss_diverges_from_one_and_a_half_times_its_start_on(times, expected):
    assert bool(examine(CHECKS["sft"], lines_of("loss", [2.0] * 10 + [2.0 * times] * 5))) is expected


def test_one_of_the_last_five_lines_below_the_limit_is_no_diverging_loss():
    for losses, expected in (([2.9, 9.0, 9.0, 9.0, 9.0], False), ([3.1, 9.0, 9.0, 9.0, 9.0], True)):
        assert bool(examine(CHECKS["sft"], lines_of("loss", [2.0] * 20 + losses))) is expected


@pytest.mark.parametrize("lines", [2, 3])
def test_a_saturated_reward_model_is_a_warning_after_three_lines(lines):
    history_ = history("reward", accuracy=last(lines, 0.9991, 0.9), margin=last(lines, 20.1, 5.0))
    found = [(one.check, one.severity, one.since) for one in examine(CHECKS["reward"], history_)]
    assert found == [("reward_model_saturated", "warning", 150)] * (lines == 3)


def test_the_start_of_the_eos_rate_is_the_mean_of_three_lines():
    """From 0.8 on average 0.48 is left at the limit; the first two lines alone would have set it at 0.6."""
    start = (1.0, 1.0, 0.4)
    for end, expected in ((0.5, False), (0.47, True)):
        lines = lines_of("eos_rate", [*start, *[0.7] * 10, *[end] * 3])
        assert ("eos_rate_falls" in names(examine(CHECKS["ppo"], lines))) is expected


@pytest.mark.parametrize(("first_of_three", "expected"), [(20.0, False), (25.0, True)])
def test_growth_of_the_length_is_that_of_the_means_of_three_lines(first_of_three, expected):
    """From 20 tokens, 1.5 times that is 30: the last three lines have 28.7 or 30.3 on average."""
    lengths = [20.0] * (LINES - 3) + [first_of_three, 33.0, 33.0]
    found = examine(CHECKS["ppo"], history(
        "ppo", response_tokens=lambda index: lengths[index], score=last(3, 2.0, 0.0), score_std=lambda index: 1.0,
        score_length_correlation=lambda index: 0.6,
    ))  # fmt: skip
    assert ("length_exploited" in names(found)) is expected


@pytest.mark.parametrize(("first_of_three", "expected"), [(0.0, False), (0.3, True)])
def test_the_gain_of_the_score_is_that_of_the_means_of_three_lines(first_of_three, expected):
    """Half a standard deviation of 1: the last three lines have 0.47 or 0.57 on average."""
    scores = [0.0] * (LINES - 3) + [first_of_three, 0.7, 0.7]
    found = examine(CHECKS["ppo"], history(
        "ppo", response_tokens=last(3, 50.0, 20.0), score=lambda index: scores[index], score_std=lambda index: 1.0,
        score_length_correlation=lambda index: 0.6,
    ))  # fmt: skip
    assert ("length_exploited" in names(found)) is expected


def test_what_has_fallen_is_told_by_the_means_of_three_lines_at_either_end():
    lines = lines_of("entropy_estimate", [2.5, 2.0, 1.5, *[2.0] * 10, 0.3, 0.2, 0.1])
    (found,) = examine(CHECKS["ppo"], lines)
    assert found.message == "nats of entropy per token: 0.2 after 2 at the start"


def rising(start, middle, end):
    """`start` and `end` in the first and the last lines, `middle` between them."""
    return lambda index: [*start, *[middle] * (LINES - len(start) - len(end)), *end][index]


WHOLE = [
    # stage, what makes it; check, severity, step, since, message, badness
    ("ppo", {"score": last(1, math.nan, 0.0), "score_std": last(1, -math.inf, 1.0)},
     "not_finite", "critical", 32, 32, "score = nan, score_std = -inf", 2.0),
    ("sft", {"loss": rising((2.0, 3.0, 4.0, 3.0, 3.0), 4.5, (4.6, 5.0, 5.0, 5.0, 6.0, 7.0))},
     "loss_diverges", "critical", 160, 135, "loss 5.6 over the last 5 lines, 3 over the first 5, 2 in the first",
     5.6 / 4.5),
    ("ppo", {"learning_rate": last(2, 0.0, 1e-4)},
     "learning_rate_zero", "critical", 32, 31, "learning_rate is 0", 1.0),
    ("ppo", {"ratio_first": last(1, 0.95, 1.0), "log_ratio_first_mean": last(1, 0.06, 0.0),
             "log_ratio_first_max": last(1, 0.5, 0.0), "sampling_logprob_error": lambda i: 0.0011},
     "ratio_not_one", "critical", 32, 32, "mean ratio 0.9500; |log ratio| is 0.06 nats a token on average and 0.5 at "
     "most, where 0.05 and 1.0 are rounding's", 2.5),
    ("ppo", {"log_ratio_first_mean": last(1, 0.1, 0.0), "sampling_logprob_error": lambda i: 0.0011},
     "ratio_not_one", "critical", 32, 32, "mean ratio 1.0000; |log ratio| is 0.1 nats a token on average and 2e-05 at "
     "most, where 0.05 and 1.0 are rounding's", 2.0),
    ("ppo", {"log_ratio_first_mean": last(1, 0.004, 0.0), "sampling_logprob_error": lambda i: 0.001},
     "ratio_not_one", "critical", 32, 32, "mean ratio 1.0000; |log ratio| is 0.004 nats a token on average and 2e-05 "
     "at most, where 0.001 and 0.02 are rounding's", 4.0),
    ("ppo", {"log_ratio_first_max": last(1, 0.05, 0.0), "sampling_logprob_error": lambda i: 0.001},
     "ratio_not_one", "critical", 32, 32, "mean ratio 1.0000; |log ratio| is 1e-06 nats a token on average and 0.05 at "
     "most, where 0.001 and 0.02 are rounding's", 2.5),
    ("ppo", {"sampling_logprob_error_mean": last(2, 0.125, 0.01)}, "sampling_mismatch", "critical", 32, 31,
     "captured and recomputed log-probabilities differ by 0.125 nats a token on average", 2.5),
    ("ppo", {"kl_per_token": last(3, -0.05, 0.01)}, "kl_negative", "critical", 32, 30, "KL -0.05 nats per token", 2.5),
    ("ppo", {"kl_per_token": last(2, 3.25, 0.01)}, "kl_explodes", "critical", 32, 31, "KL 3.25 nats per token", 3.25),
    ("ppo", {"kl_per_token": last(8, 1.5e-8, 0.01)}, "kl_dead", "warning", 32, 25, "KL 1.5e-08 nats per token", 1.0),
    ("ppo", {"clip_fraction": last(3, 0.5, 0.01)},
     "clip_fraction_high", "warning", 32, 30, "50% of the tokens are clipped", 1.25),
    ("ppo", {"explained_variance": last(12, -1.5, 0.1)},
     "value_function_useless", "warning", 32, 21, "explained variance -1.5", 1.5),
    ("ppo", {"entropy_estimate": rising((2.0, 3.0, 4.0), 0.61, (0.5, 0.3, 0.4))},
     "entropy_collapse", "warning", 32, 30, "nats of entropy per token: 0.4 after 3 at the start", 1.0),
    ("ppo", {"eos_rate": rising((0.9, 0.6, 0.6), 0.41, (0.41, 0.12, 0.4))},
     "eos_rate_falls", "warning", 32, 4, "share of responses that end: 0.31 after 0.7 at the start", 1.0),
    ("ppo", {"response_tokens": rising((20.0, 20.0, 35.0), 40.0, (40.0, 36.0, 59.0)),
             "score": rising((0.0, 0.5, 1.0), 2.0, (2.0, 2.5, 3.0)), "score_std": rising((1.0, 2.0, 6.0), 1.0, ()),
             "score_length_correlation": rising((), 0.0, (0.2, 0.5, 0.5, 0.4, 0.4))},
     "length_exploited", "warning", 32, 32, "responses of 45 tokens after 25, the score +0.67 standard deviations; "
     "correlation of score and length 0.40 within rollouts, 0.78 over time", 1.2),
    ("ppo", {"score_length_correlation": last(5, -0.9876, 0.0)}, "score_is_length", "warning", 32, 28,
     "correlation of score and length -0.988 within the rollout", 1.0),
    ("ppo", {"score/fallback": last(2, 0.5, 0.0), "score/http/fallback": last(1, 0.005, 0.0)},
     "reward_fails", "critical", 32, 31, "the reward gave no score for 50% of the responses", 50.0),
    ("ppo", {"score/http_2/fallback": last(1, 0.25, 0.0)},
     "reward_fails", "warning", 32, 32, "http_2 gave no score for 25% of the responses", 25.0),
    ("ppo", {"score": rising((0.0, 1.0, 2.0), 2.0, (2.0, 2.5, 3.0)), "score_std": lambda i: 1.0,
             "score/a": rising((6.0, 5.0, 4.0), 4.0, (2.0, 1.5, 2.5)), "score_std/a": rising((1.0, 2.0, 3.0), 9.0, ()),
             "score/b": rising((1.0, 1.0, 1.0), 0.5, (0.0, 0.0, 0.0)), "score_std/b": lambda i: 0.8},
     "reward_part_falls", "warning", 32, 30, "a -1.5 standard deviations, the score +1.5", 1.5),
    ("ppo", {"equal_groups": last(4, 0.75, 0.25)}, "groups_alike", "warning", 32, 29,
     "at 75% of the prompts all responses have the same score", 1.5),
    ("ppo", {"repeated_4grams": last(3, 0.45, 0.0)},
     "repetition", "warning", 32, 30, "45% of the 4-grams stood earlier in their response", 1.5),
    ("ppo", {"empty_responses": last(3, 0.75, 0.0)},
     "empty_responses", "warning", 32, 30, "75% of the responses are empty", 1.5),
    ("ppo", {"scores_outside_range": last(3, 0.75, 0.0)}, "score_out_of_range", "warning", 32, 30,
     "75% of the scores are beyond those of every training response", 1.5),
    ("ppo", {"score_std": last(3, 0.0125, 1.0)},
     "scores_alike", "warning", 32, 30, "standard deviation of the scores 0.013", 1.0),
    ("ppo", {"advantage_std": last(2, 2.5e-5, 1.0)}, "advantages_equal", "critical", 32, 31,
     "standard deviation of the advantages 2.5e-05 before whitening", 1.0),
    ("reward", {"accuracy": last(4, 0.9992, 0.9), "margin": last(6, 50.0, 5.0)}, "reward_model_saturated", "warning",
     160, 145, "accuracy 0.999, mean margin 50 on the training pairs", 2.5),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "sick", "check", "severity", "step", "since", "message", "badness"), WHOLE)
def test_a_finding_says_how_bad_it_is_since_when_and_what_was_measured(
    stage, sick, check, severity, step, since, message, badness
):
    (found,) = [one for one in examine(CHECKS[stage], history(stage, **sick)) if one.check == check]
    told = dataclasses.asdict(found)
    assert told.pop("badness") == pytest.approx(badness)
    assert told == {
        "check": check, "severity": severity, "step": step, "since": since, "message": message, "advice": "",
    }  # fmt: skip


def test_a_reward_model_that_is_blind_is_told_from_the_first_evaluation_after_training_began():
    lines = [
        {"step": step, "eval_score_std": spread} for step, spread in ((0, 0.5), (9, 0.1), (18, 0.005), (27, 0.004))
    ]
    (found,) = [one for one in examine(CHECKS["reward"], lines) if one.check == "reward_model_blind"]
    assert (found.severity, found.since, found.step, found.badness) == ("warning", 18, 27, 1.0)
    assert found.message == "standard deviation of the held-out scores 0.004"
    lines[-1]["eval_score_std"] = 0.01
    assert "reward_model_blind" not in names(examine(CHECKS["reward"], lines))


def test_the_ratio_of_the_newest_line_that_has_one_counts():
    """A line of an evaluation has none; neither has a line whose other figures are missing a fault in them."""
    lines = [{"step": 1, "ratio_first": 1.0}, {"step": 2, "ratio_first": 1.03}, {"step": 2, "eval_score": 1.0}]
    assert [(one.check, one.since) for one in examine(CHECKS["ppo"], lines)] == [("ratio_not_one", 2)]
    assert examine(CHECKS["ppo"], [*lines, {"step": 3, "ratio_first": 1.0}]) == []


@pytest.mark.parametrize(("changed", "expected"), [
    ({}, True),
    ({"response_tokens": rising((20.0, 20.0, 20.0), 29.9, (29.9, 30.0, 30.0))}, False),
    ({"score": rising((0.0, 0.0, 0.0), 1.0, (1.0, 0.9, 1.0))}, False),
    ({"score_length_correlation": last(5, 0.29, 0.9)}, False),
])  # fmt: skip
def test_growth_gain_and_correlation_at_their_limits_are_length_that_is_exploited(changed, expected):
    """1.5 times as long, half a standard deviation of 2 higher, and a correlation of 0.3 within rollouts."""
    scores = rising((0.0, 0.0, 0.0), 1.0, ())
    lengths = [20.0, 20.0, 20.0, *[20.0, 40.0] * 13, 30.0, 30.0, 30.0]  # which go up and down while scores do not
    sick = {
        "response_tokens": lambda index: lengths[index], "score": scores, "score_std": lambda index: 2.0,
        "score_length_correlation": last(5, 0.3, 0.9),
    }  # fmt: skip
    found = examine(CHECKS["ppo"], history("ppo", **(sick | changed)))
    assert [one.since for one in found if one.check == "length_exploited"] == [LINES] * expected


def test_what_is_critical_comes_first_then_what_began_first():
    sick = {
        "clip_fraction": last(9, 0.5, 0.0), "repeated_4grams": last(4, 0.5, 0.0), "empty_responses": last(4, 0.75, 0.0),
        "advantage_std": last(2, 0.0, 1.0), "sampling_logprob_error_mean": last(3, 0.1, 0.0),
    }  # fmt: skip
    assert [one.check for one in examine(CHECKS["ppo"], history("ppo", **sick))] == [
        "sampling_mismatch", "advantages_equal", "clip_fraction_high", "empty_responses", "repetition",
    ]  # fmt: skip


def test_better_responses_that_lose_a_quarter_of_a_nat_by_token_are_told():
    def lines(*values):
        return [{"step": 10 * index, "eval_chosen_logprob": value} for index, value in enumerate(values)]

    assert examine(CHECKS["offline"], lines(-1.0, -1.2, -1.25)) == []
    (found,) = examine(CHECKS["offline"], lines(-1.0, -1.2, -1.6, -2.0))
    assert (found.check, found.severity, found.since, found.step) == ("chosen_collapses", "warning", 20, 30)
    assert found.message == "-2 nats by token after -1 at the start" and found.badness == 4
    assert examine(CHECKS["offline"], lines(-1.0, -2.0, -1.2)) == [], "one that recovers"
