"""The summary of a finished run and its closing table."""

import json

import pytest

from rlhf.cli.summary import main
from rlhf.pipeline.stages import default_run
from rlhf.report import summary
from tests.support.results import made_up_results, write_results

ROWS = default_run()


def test_summary_of_a_run_that_held_nothing_out(tmp_path, capsys):
    results = made_up_results()
    for stage, figures in results.items():
        for name, value in figures.items():
            if isinstance(value, float) and name != "seconds":
                results[stage][name] = None
            elif isinstance(value, int) and name != "seed":
                results[stage][name] = 0
    results["reward"]["accuracy_by_category"] = results["reward"]["pairs_by_category"] = {}
    results["ppo"]["samples"] = []
    write_results(tmp_path, results)
    assert main([str(tmp_path)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[2:] for line in table if "held-out accuracy" in line] == [
        ["accuracy", "0", "nothing", "was", "held", "out"]
    ]
    assert next(line for line in table if "held-out loss" in line).split()[3:5] == ["0", "nats"]


def measured_results():
    """Results of a run whose prompts the world's judge knows."""
    results = made_up_results()
    parts = ("on_topic", "friendly")
    results["ppo"]["gold"] = {
        "prompts": 100, "win_rate": 0.875, "before": 0.701, "after": 0.952, "well_formed_before": 0.96,
        "well_formed_after": 1.0, "parts_before": dict.fromkeys(parts, 0.5), "parts_after": dict.fromkeys(parts, 0.75),
    }  # fmt: skip
    results["ppo"]["samples"] = [{**sample, "gold_sft": 0.45, "gold_ppo": 1.0} for sample in results["ppo"]["samples"]]
    return results


def test_gold_stands_beside_the_score_where_it_was_measured(tmp_path, capsys):
    results = measured_results()
    write_results(tmp_path, results)
    assert main([str(tmp_path)]) == 0
    written = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert written["gold"] == results["ppo"]["gold"] and "gold" not in written["ppo"]
    assert [(sample["gold_sft"], sample["gold_ppo"]) for sample in written["samples"]] == [(0.45, 1.0)]
    table = capsys.readouterr().out
    lines = [line.split() for line in table.splitlines()]
    assert next(line for line in lines if line[1:2] == ["gold"])[2:5] == ["0.701", "0.952", "100"]
    assert "better than SFT on 88% of n prompts; well-formed responses 96% -> 100%" in table
    assert ["on", "topic", "0.500", "0.750", "100"] in lines
    assert "gold 0.45" in table and "gold 1.00" in table


def test_summary_has_exactly_the_promised_schema(tmp_path, capsys):
    write_results(tmp_path, made_up_results())
    assert main([str(tmp_path)]) == 0
    written = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert list(written) == ["sft", "reward", "ppo", "samples", "seconds", "seed", "health"]
    assert written["sft"] == {"eval_loss_before": 3.0, "eval_loss_after": 2.0, "held_out_rows": 52}
    assert set(written["reward"]) == {
        *("accuracy", "accuracy_low", "accuracy_high", "held_out_pairs", "held_out_prompts", "mean_margin"),
        *("length_baseline_accuracy", "over_shortcut", "over_shortcut_low", "over_shortcut_high"),
        *("accuracy_by_category", "pairs_by_category"),
    }
    assert set(written["ppo"]) == {
        *("score_before", "score_after", "score_std_before", "kl_per_token", "eos_rate_before", "eos_rate_after"),
        *("mean_response_tokens_before", "mean_response_tokens_after", "reward_before", "reward_after"),
        *("score_gain_error", "held_out_prompts"),
    }
    assert [set(sample) for sample in written["samples"]] == [{"prompt", "sft", "ppo", "score_sft", "score_ppo"}]
    assert written["seconds"] == {"sft": 10.0, "reward": 20.0, "ppo": 30.5, "total": 60.5}
    assert written["seed"] == 3
    table = capsys.readouterr().out
    assert "gold" not in table
    assert "choosing the longer response: 0.500" in table
    assert "+1.200 = +2.40 standard deviations" in table, "1.2 over a standard deviation of 0.5"
    assert "(standard error 0.20, n prompts)" in table and "95% interval 0.780 to 0.900" in table
    assert "what was optimised: clipped score, missing end, KL" in table
    assert "안녕하세요! 반가워요" in table and "seed 3" in table
    assert "doctor: nothing found in sft, reward, ppo" in table


def test_what_the_score_follows_beside_quality_stands_under_the_accuracy(tmp_path, capsys):
    results = made_up_results()
    share = {"low": 0.5, "high": 0.7, "effective_rows": 20.0}
    length = {name: {"accuracy": value, "pairs": count, **share} for name, value, count in
              [("matched", 0.61, 31), ("chosen_more", 0.9, 44), ("chosen_less", None, 0)]}  # fmt: skip
    results["reward"]["shortcuts"] = {"verdict": "the score leans to the longer response: figures", "length": length}
    write_results(tmp_path, results)
    assert main([str(tmp_path)]) == 0
    written = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert written["reward"]["shortcuts"] == results["reward"]["shortcuts"]
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    start = next(index for index, line in enumerate(lines) if line.startswith("of like length"))
    assert lines[start : start + 3] == [
        "of like length 0.610 31 the score leans to the longer response",
        "shorter one chosen 0",
        "longer one chosen 0.900 44",
    ]


def test_the_seconds_of_the_embedded_base_are_counted_beside_the_stages(tmp_path):
    results = made_up_results()
    results["sft"]["base_seconds"] = 83.5
    write_results(tmp_path, results)
    found = summary.summarize(tmp_path, ROWS)
    assert found["seconds"] == {"base": 83.5, "sft": 10.0, "reward": 20.0, "ppo": 30.5, "total": 144.0}
    assert "seconds: base 84, sft 10, reward 20, ppo 30, total 144; seed 3" in summary.closing_table(found, ROWS)


def test_the_table_ends_with_what_the_doctor_found(tmp_path):
    results = made_up_results()
    entry = {"check": "kl_explodes", "severity": "critical", "since": 7, "until": None, "message": "9 nats per token"}
    results["ppo"]["health"] = {"healthy": False, "lines": 12, "findings": [entry]}
    write_results(tmp_path, results)
    table = summary.closing_table(summary.summarize(tmp_path, ROWS), ROWS)
    assert "doctor: ppo since step 7: the actor runs away from the reference: 9 nats per token" in table
    assert "nothing found" not in table


def test_table_columns_line_up_with_korean_labels(tmp_path):
    write_results(tmp_path, made_up_results())
    lines = summary.closing_table(summary.summarize(tmp_path, ROWS), ROWS).splitlines()
    korean = next(line for line in lines if "일상 대화" in line)
    law = next(line for line in lines if line.split()[:1] == ["law"])
    assert law.index("0.800") - korean.index("0.900") == 4, "four letters of two columns each"


def test_every_line_says_how_many_rows_it_rests_on(tmp_path):
    write_results(tmp_path, made_up_results())
    lines = summary.closing_table(summary.summarize(tmp_path, ROWS), ROWS).splitlines()
    header, *body = lines[: lines.index("")]
    end = header.index("     n") + len("     n")
    counts = {}
    for line in body:
        wide = sum(summary._columns(letter) - 1 for letter in line)  # a Korean letter stands for two columns
        counts[line[8:28].strip()] = line[end - 6 - wide : end - wide].strip()
    assert counts == {
        "held-out loss": "52", "held-out accuracy": "112", "mean margin": "112", "일상 대화": "80", "law": "32",
        "held-out score": "64", "score less penalties": "64", "KL per token (nats)": "64", "eos rate": "64",
        "response tokens": "64",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("longer", "rule"), [(0.496, "the shorter response: 0.504"), (0.71, "choosing the longer response: 0.710")]
)
def test_a_baseline_below_a_half_is_that_of_the_shorter_response(tmp_path, longer, rule):
    results = made_up_results()
    results["reward"]["length_baseline_accuracy"] = longer
    write_results(tmp_path, results)
    assert f"; {rule}" in summary.closing_table(summary.summarize(tmp_path, ROWS), ROWS)


def test_the_table_shows_samples_from_the_largest_rise_of_the_score_to_its_largest_fall(tmp_path):
    """Five prompts named by the rank of their rise, in another order; from 9 to 10 is less than from 0 to 2."""
    results = made_up_results()
    sample = results["ppo"]["samples"][0]
    changes = {
        "second": (0.0, 2.0),
        "fifth": (8.0, 5.0),
        "first": (-4.0, 0.0),
        "fourth": (1.0, 1.0),
        "third": (9.0, 10),
    }
    results["ppo"]["samples"] = [
        {**sample, "prompt": name, "score_sft": before, "score_ppo": after} for name, (before, after) in changes.items()
    ]
    write_results(tmp_path, results)
    found = summary.summarize(tmp_path, ROWS)
    for more, shown in (
        ({}, ["first", "third", "fifth"]),
        ({"samples": 0}, []),
        ({"samples": 1}, ["third"]),
        ({"samples": 2}, ["first", "fifth"]),
        ({"samples": 9}, ["first", "second", "third", "fourth", "fifth"]),
    ):
        lines = summary.closing_table(found, ROWS, **more).splitlines()
        assert [line.split()[-1] for line in lines if line.startswith("prompt")] == shown
        headed = [line for line in lines if "largest rise of the score" in line]
        assert [line.split(" samples")[0] for line in headed] == ([f"{len(shown)} of 5"] if 0 < len(shown) < 5 else [])


def test_a_long_prompt_and_a_long_response_show_their_beginning(tmp_path):
    results = made_up_results()
    sample = results["ppo"]["samples"][0]
    results["ppo"]["samples"] = [{**sample, "prompt": "질문의 처음 " + "말 " * 100, "sft": "처음 " + "말 " * 100}]
    write_results(tmp_path, results)
    lines = summary.closing_table(summary.summarize(tmp_path, ROWS), ROWS, width=60).splitlines()
    prompt = next(line for line in lines if line.startswith("prompt"))
    response = next(line for line in lines if line.startswith("SFT ") and "처음" in line)
    assert prompt.startswith("prompt       질문의 처음") and prompt.endswith("...")
    assert response.endswith("...") and all(summary._columns(line) <= 60 for line in (prompt, response))


@pytest.mark.parametrize("width", [60, 61])
def test_a_long_line_fills_its_columns(tmp_path, width):
    results = made_up_results()
    sample = results["ppo"]["samples"][0]
    results["ppo"]["samples"] = [{**sample, "prompt": "a" * 200, "sft": "b" * 199}]
    write_results(tmp_path, results)
    lines = summary.closing_table(summary.summarize(tmp_path, ROWS), ROWS, width=width).splitlines()
    cut = [line for line in lines if line.endswith(("a...", "b..."))]
    assert [len(line) for line in cut] == [width, width]
    results["ppo"]["samples"][0]["prompt"] = "a" * (width - 13)
    write_results(tmp_path, results)
    lines = summary.closing_table(summary.summarize(tmp_path, ROWS), ROWS, width=width).splitlines()
    assert f"prompt       {'a' * (width - 13)}" in lines


@pytest.mark.parametrize(
    ("kept", "iterations", "keep_best", "stop_when", "words"),
    [
        (20, 40, "gold", None, "iteration 20 of 40, the best by gold"),
        (20, 30, "held_out_score", "gold", "iteration 20 of 30, the best by held_out_score; ended before 40 by gold"),
        (30, 30, None, "reward", "iteration 30 of 30, the last; ended before 40 by reward"),
        (40, 40, None, "reward", None),
        (40, 40, None, None, None),
    ],
)
def test_the_table_says_which_actor_is_exported(tmp_path, capsys, kept, iterations, keep_best, stop_when, words):
    results = made_up_results()
    results["ppo"] |= {"kept_iteration": kept, "iterations": iterations, "planned_iterations": 40,
                       "keep_best": keep_best, "stop_when": stop_when}  # fmt: skip
    write_results(tmp_path, results)
    assert main([str(tmp_path)]) == 0
    lines = [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines() if "exported actor" in line]
    assert lines == ([] if words is None else [["PPO", "exported", "actor", words]])
    assert json.loads((tmp_path / "summary.json").read_text())["ppo"]["kept_iteration"] == kept


def test_the_score_of_a_held_out_reward_model_has_a_line_where_it_was_measured(tmp_path, capsys):
    results = made_up_results()
    results["ppo"] |= {"held_out_score_before": None, "held_out_score_after": None}
    write_results(tmp_path, results)
    assert main([str(tmp_path)]) == 0
    assert "held-out reward model" not in capsys.readouterr().out
    results["ppo"] |= {"held_out_score_before": -0.25, "held_out_score_after": 0.5}
    write_results(tmp_path, results)
    assert main([str(tmp_path)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "held-out reward model" in line)
    assert line.split()[3:5] == ["-0.250", "0.500"]


NEWER = {
    "sft": ("held_out_rows",),
    "reward": (
        *("held_out_pairs", "held_out_prompts", "pairs_by_category", "accuracy_low", "accuracy_high"),
        *("over_shortcut", "over_shortcut_low", "over_shortcut_high"),
    ),
    "ppo": ("held_out_prompts", "score_gain_error"),
}
"""What results of an earlier release lack."""


def test_a_run_of_an_earlier_release_is_summarised_without_counts_and_intervals(tmp_path, capsys):
    results = made_up_results()
    for stage, names in NEWER.items():
        for name in names:
            results = without(results, stage, name)
    write_results(tmp_path, results)
    assert main([str(tmp_path)]) == 0
    table = capsys.readouterr().out.splitlines()
    accuracy = next(line for line in table if "held-out accuracy" in line)
    assert accuracy.split()[1:] == [
        *("held-out", "accuracy", "0.850"), *("choosing", "the", "longer", "response:", "0.500"),
    ]  # fmt: skip
    assert next(line for line in table if line.split()[:1] == ["law"]).split() == ["law", "0.800"]
    score = next(line for line in table if "held-out score" in line)
    assert score.endswith("+1.200 = +2.40 standard deviations of the SFT model's scores")
    written = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert not any(name in written[stage] for stage, names in NEWER.items() for name in names)


def without(results, stage, key):
    return {**results, stage: {name: value for name, value in results[stage].items() if name != key}}


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({key: made_up_results()[key] for key in ("sft", "ppo")}, r"stage reward has left no result: .*step2_reward"),
        (
            without(made_up_results(), "ppo", "kl_per_token"),
            r"ppo/result.json lacks kl_per_token; run `.*step3_ppo.* --overwrite`",
        ),
        (without(made_up_results(), "sft", "seed"), r"sft/result.json lacks seed"),
        (without(made_up_results(), "ppo", "samples"), r"lacks samples"),
        (
            {**made_up_results(), "sft": {**made_up_results()["sft"], "seed": 4}},
            r"different seeds: .*'sft': 4.*--overwrite",
        ),
        (
            {**made_up_results(), "ppo": {**made_up_results()["ppo"], "samples": [{"prompt": ""}]}},
            r"sample 0 lacks sft.*--overwrite",
        ),
    ],
)
def test_a_missing_or_incomplete_result_is_named(tmp_path, results, message, capsys):
    write_results(tmp_path, results)
    with pytest.raises(summary.SummaryError, match=message):
        summary.summarize(tmp_path, ROWS)
    assert main([str(tmp_path)]) == 1
    assert "error:" in capsys.readouterr().err
    assert not (tmp_path / "summary.json").exists()


def test_a_result_that_is_not_json_is_named(tmp_path):
    write_results(tmp_path, made_up_results())
    (tmp_path / "reward" / "result.json").write_text("{", encoding="utf-8")
    with pytest.raises(summary.SummaryError, match=r"reward/result.json is not JSON.*--overwrite"):
        summary.summarize(tmp_path, ROWS)


def sick_results():
    """A run that had to train the base first, with gold; the doctor found something in one stage."""
    results = measured_results()
    entry = {"check": "reward_model_at_chance", "severity": "critical", "since": 7, "until": None, "message": "a coin"}
    results["sft"] |= {"base_seconds": 83.5, "health": None}
    results["reward"]["health"] = {"healthy": False, "lines": 3, "findings": [entry]}
    return results


def test_the_whole_table(tmp_path):
    write_results(tmp_path, sick_results())
    assert summary.closing_table(summary.summarize(tmp_path, ROWS), ROWS) == TABLE


def test_the_whole_summary(tmp_path):
    """Every entry of a result that the summary names, as it is, and nothing that it does not."""
    results = sick_results()
    write_results(tmp_path, results)
    found = summary.summarize(tmp_path, ROWS)
    left_out = {"seconds", "seed", "health", "samples", "gold", "best_step", "base_seconds"}
    for stage, result in results.items():
        assert found.pop(stage) == {name: value for name, value in result.items() if name not in left_out}
    (sample,) = results["ppo"]["samples"]
    assert found == {
        "samples": [{name: value for name, value in sample.items() if name != "id"}],
        "gold": results["ppo"]["gold"],
        "seconds": {"base": 83.5, "sft": 10.0, "reward": 20.0, "ppo": 30.5, "total": 144.0},
        "seed": 3,
        "health": {stage: result["health"] for stage, result in results.items()},
    }


def test_a_run_that_the_doctor_has_not_looked_at_and_one_whose_second_stage_it_has(tmp_path):
    results = without(made_up_results(), "sft", "health")
    results["reward"]["health"] = results["ppo"]["health"] = None
    write_results(tmp_path, results)
    found = summary.summarize(tmp_path, ROWS)
    assert found["health"] == {"sft": None, "reward": None, "ppo": None}
    assert "doctor: has not looked at this run" in summary.closing_table(found, ROWS).splitlines()
    found["health"]["reward"] = {"findings": []}
    assert "doctor: nothing found in reward" in summary.closing_table(found, ROWS).splitlines()


@pytest.mark.parametrize(("stage", "text"), [("sft", "[1]"), ("ppo", "3")])
def test_a_result_that_is_no_mapping_lacks_every_figure(tmp_path, stage, text):
    write_results(tmp_path, made_up_results())
    (tmp_path / stage / "result.json").write_text(text, encoding="utf-8")
    first = {"sft": "eval_loss_before, eval_loss_after, seconds, seed", "ppo": "score_before, score_after"}[stage]
    with pytest.raises(summary.SummaryError, match=f"{stage}/result.json lacks {first}"):
        summary.summarize(tmp_path, ROWS)


TABLE = """\
stage   figure                   before     after      n
SFT     held-out loss             3.000     2.000     52  nats per token, over n rows
reward  held-out accuracy                   0.850    112  of n pairs, 95% interval 0.780 to 0.900; choosing the longer response: 0.500
        mean margin                         1.500    112
          일상 대화                         0.900     80
          law                               0.800     32
PPO     gold                      0.701     0.952    100  better than SFT on 88% of n prompts; well-formed responses 96% -> 100%
          on topic                0.500     0.750    100
          friendly                0.500     0.750    100
        held-out score            0.100     1.300     64  +1.200 = +2.40 standard deviations of the SFT model's scores (standard error 0.20, n prompts)
        score less penalties      0.500     0.500     64  what was optimised: clipped score, missing end, KL
        KL per token (nats)                 0.500     64  to the SFT model
        eos rate                  0.500     0.500     64
        response tokens           0.500     0.500     64

prompt       안녕?
SFT    -0.50  gold 0.45  응
PPO    +1.25  gold 1.00  안녕하세요! 반가워요

doctor: reward since step 7: the reward model is not shown to be better than chance: a coin
doctor: `python -m rlhf.cli doctor OUTPUT_DIR` says what each means and what to try
seconds: base 84, sft 10, reward 20, ppo 30, total 144; seed 3"""  # noqa: E501
