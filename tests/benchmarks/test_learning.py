"""The learning benchmark without its runs: what is run in which order, its tables, what it refuses."""

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture()
def benchmark(monkeypatch):
    """Import a module of `benchmarks/` as its scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def result(golds, *, seconds=10.0, kls=(0, 1, 4), findings=()):
    """A kept run with an evaluation every `seconds`; the score is ten times gold, every fourth iteration is judged."""
    points = [
        {"iteration": 4 * place, "seconds": seconds * place, "kl": kl, "gold": gold, "score": 10 * gold, "reward": gold,
         "eos_rate": 1.0, "tokens": 20.0, "well_formed": 0.9}
        for place, (gold, kl) in enumerate(zip(golds, kls, strict=True))
    ]  # fmt: skip
    return {
        "points": points,
        "iteration_seconds": [seconds / 4] * 8,
        "findings": list(findings),
        "reward_accuracy": 0.7,
        "shortcuts": {"length": {"matched": {"accuracy": 0.6}, "chosen_less": {"accuracy": 0.5},
                                 "chosen_more": {"accuracy": 0.9}, "correlation_within": {"value": 0.4}}},
    }  # fmt: skip


def keep(workplace, run, content):
    path = workplace / "results" / "threads1-every4" / f"{run.key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_the_sides_take_turns_and_a_seed_is_done_before_the_next(benchmark):
    learning = benchmark("learning")
    arguments = learning.parse(["--seeds", "1,2", "--kl_coefs", "0.1,0.02"])
    order = [(run.seed, run.kl_coef, run.side) for run in learning.compared(arguments, "default")]
    assert order[:5] == [(1, 0.1, "ours"), (1, 0.1, "trl"), (1, 0.02, "ours"), (1, 0.02, "trl"), (2, 0.1, "ours")]
    alone = learning.parse(["--seeds", "1", "--kl_coefs", "0.1", "--peer", "none"])
    assert [run.side for run in learning.compared(alone, "default")] == ["ours"]


def test_the_default_of_the_variants_is_a_run_of_the_comparison(benchmark):
    learning = benchmark("learning")
    arguments = learning.parse(["--seeds", "1"])
    compared, varied = set(learning.compared(arguments, "default")), list(learning.varied(arguments))
    assert varied[0] in compared and not varied[0].changes and len(varied) == 1 + len(learning.VARIANTS)


@pytest.mark.parametrize(
    ("given", "says"),
    [(["--sections", "A,F"], "--sections F: choose from A, B, C, E, D"), (["--variants", "ppo_epochs"], "NAME=VALUE")],
)
def test_a_wrong_command_line_says_what_is_needed(benchmark, capsys, given, says):
    with pytest.raises(SystemExit) as ended:
        benchmark("learning").parse(given)
    assert ended.value.code == 2 and says in capsys.readouterr().err


def test_the_report_of_kept_runs_compares_them(benchmark, tmp_path):
    learning, workloads = benchmark("learning"), benchmark("learning_workloads")
    keep(tmp_path, workloads.Run("ours", 1, 0.1, 40), result([0.7, 0.8, 0.9]))
    keep(tmp_path, workloads.Run("trl", 1, 0.1, 40), result([0.7, 0.75, 0.8], seconds=40.0))
    words = [
        "--report",
        "--threads",
        "1",
        "--sections",
        "A,D",
        "--work_dir",
        str(tmp_path),
        "--out_dir",
        str(tmp_path / "out"),
    ]
    payload = learning.main(words)
    (row,) = payload["sections"]["A"]["table"]
    # reached after 10 of 20 seconds and after 80 of 80; at d = 1 and 2 the difference is 0.05 and 0.1
    assert (row["s to 0.8"], row["TRL s to 0.8"], row["seconds, ours / TRL"]) == (10.0, 80.0, 0.125)
    assert row["gold at equal KL, last"] == pytest.approx(0.1) and row["gold at equal KL, kl"] == 4
    assert (row["gold"], row["TRL gold"], row["s/iteration"], row["TRL s/iteration"]) == (0.9, 0.8, 2.5, 10.0)
    (default,) = payload["sections"]["D"]["table"]
    assert default["variant"] == "default" and default["gold less default's"] is None
    assert json.loads((tmp_path / "out" / "learning.json").read_text())["sections"]["A"]["table"] == [row]


def test_a_run_without_the_peer_has_a_row_of_its_own(benchmark):
    learning, workloads = benchmark("learning"), benchmark("learning_workloads")
    run = workloads.Run("ours", 1, 0.1, 40)
    row = learning.compare_row(run, {run: result([0.7, 0.75, 0.78])}, 0.8)
    assert row["s to 0.8"] is None and row["best gold"] == 0.78 and not any("TRL" in name for name in row)


def test_variants_are_held_against_the_default_of_their_seed(benchmark):
    learning, workloads = benchmark("learning"), benchmark("learning_workloads")

    def run(seed, *changes):
        return workloads.Run("ours", seed, 0.1, 40, changes=changes)

    results = {
        run(1): result([0.7, 0.8, 0.8]),
        run(2): result([0.7, 0.8, 0.9]),
        run(1, "ppo_epochs=4"): result([0.7, 0.9, 0.81]),
        run(2, "ppo_epochs=4"): result([0.7, 0.8, 0.86]),
    }
    default, variant = learning.variant_rows(list(results), results, None)
    assert default["gold"] == pytest.approx(0.85) and default["worst gold"] == 0.8
    assert variant["gold less default's"] == pytest.approx(-0.015)
    assert (variant["lowest"], variant["highest"]) == pytest.approx((-0.04, 0.01))
    assert variant["best gold"] == pytest.approx(0.88) and variant["seeds"] == 2


def test_the_doctors_findings_stand_beside_the_turn(benchmark):
    learning, workloads = benchmark("learning"), benchmark("learning_workloads")
    run = workloads.Run("ours", 1, 0.01, 100, "rankings-250")
    found = [{"check": "kl_large", "at": 12, "since": 8, "message": ""}]
    golds, kls = [0.70, 0.80, 0.80, 0.80, 0.74, 0.70], [0, 1, 4, 9, 16, 25]
    content = result(golds, kls=kls, findings=found)
    for place, point in enumerate(content["points"]):
        point["score"] = place
    (row,) = learning.turning_rows([run], {run: content}, None)
    assert (row["rankings"], row["turned"], row["peak at iteration"], row["peak KL"]) == (250, "yes", 8, 4)
    assert row["doctor (told at iteration)"] == "kl_large (12)"


def test_length_control_is_told_with_what_the_score_follows(benchmark):
    learning, workloads = benchmark("learning"), benchmark("learning_workloads")
    runs = list(learning.controlled(learning.parse(["--seeds", "1"])))
    rows = learning.control_rows(runs, {run: result([0.7, 0.9, 0.8]) for run in runs}, None)
    controls = [(control, "no") for control in ("none", "balance", "calibrate", "odin")]
    curves = ("of the first actor", "every 4 iterations")
    controls += [(control, curve) for control in ("none", "calibrate") for curve in curves]
    assert [(row["length bias"], row["length_control"], row["curve of PPO"]) for row in rows] == [
        (0.0, "none", "no"), *((workloads.LENGTH_BIAS, *control) for control in controls),
    ]  # fmt: skip
    assert (rows[0]["gold before"], rows[0]["gold"], rows[0]["best gold"]) == (0.7, 0.8, 0.9)
    assert (rows[0]["of like length"], rows[0]["score and length, within prompts"]) == (0.6, 0.4)


def test_models_that_differ_are_not_compared(benchmark):
    workloads = benchmark("learning_workloads")
    rows = [{"score": 1.0, "logprob": -20.0}]
    workloads.check_same_models(rows, {"scores": [1.0001], "logprobs": [-20.0001]})
    with pytest.raises(SystemExit, match="their logprobs differ by up to 0.5"):
        workloads.check_same_models(rows, {"scores": [1.0], "logprobs": [-20.5]})
    with pytest.raises(SystemExit, match="their scores differ"):
        workloads.check_same_models(rows, {"scores": [float("nan")], "logprobs": [-20.0]})


def test_the_judge_must_evaluate_as_the_run_did(benchmark):
    workloads = benchmark("learning_workloads")
    own = {"gold": 0.8, "score": 1.0, "kl_per_response": 2.0, "response_tokens": 20.0}
    assert workloads.check_same_evaluation(own, dict(own))["gold"] == [0.8, 0.8]
    with pytest.raises(SystemExit, match="does not evaluate as step 3 does"):
        workloads.check_same_evaluation(own, {**own, "gold": 0.81})


def test_seconds_are_those_of_the_training_before_an_evaluation(benchmark):
    names = ("kl_per_response", "score", "reward", "gold", "eos_rate", "response_tokens", "well_formed_responses")
    evaluations = [{"iteration": iteration, **dict.fromkeys(names, 0.0)} for iteration in (0, 2, 3)]
    points = benchmark("learning_workloads").points_of(evaluations, [1.0, 2.0, 4.0])
    assert [point["seconds"] for point in points] == [0.0, 3.0, 7.0]


def test_the_peer_is_given_our_settings(benchmark):
    workloads = benchmark("learning_workloads")
    words = ["--config", str(workloads.CONFIG), "--kl_coef", "0.3", "--actor_model", "a", "--reward_model", "b"]
    settings = workloads.peer_settings(workloads.stage_config(words))
    assert settings["kl_coef"] == 0.3 and settings["learning_rate"] == 3e-4 and settings["temperature"] == 0.7
    assert (settings["adam_beta2"], settings["adam_epsilon"], settings["lr_scheduler_type"]) == (0.95, 1e-5, "linear")
    assert (settings["response_length"], settings["missing_eos_penalty"], settings["num_ppo_epochs"]) == (64, 1.0, 2)
