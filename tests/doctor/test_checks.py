"""Every limit to the line and to the digit: so many bad lines are a finding, one fewer or the limit itself is none."""

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
