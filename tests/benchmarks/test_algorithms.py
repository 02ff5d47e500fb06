"""The comparison of the algorithms without its runs: what is run, what its table says, what it refuses."""

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


def evaluation(gold, by_prompt, score=0.0):
    return {"gold": gold, "gold_by_prompt": by_prompt, "score": score, "kl_per_response": 1.5, "eos_rate": 1.0,
            "well_formed_responses": 0.9, "response_tokens": 20.0}  # fmt: skip


def result(gold, by_prompt, *, seconds=10.0):
    return {"start": evaluation(0.5, [0.5, 0.5, 0.5]), "end": evaluation(gold, by_prompt, score=0.25), "steps": 4,
            "seconds": seconds, "peak_bytes": 2**30, "points": []}  # fmt: skip


def test_every_method_of_a_seed_comes_before_the_next_seed(benchmark):
    algorithms = benchmark("algorithms")
    found = algorithms.trials(algorithms.parse(["--methods", "ppo,kto", "--seeds", "1,2"]))
    assert [(trial.seed, trial.method) for trial in found] == [(1, "ppo"), (1, "kto"), (2, "ppo"), (2, "kto")]
    rates = algorithms.trials(algorithms.parse(["--methods", "dpo", "--seeds", "1", "--rates", "1e-5,1e-4"]))
    assert [trial.key for trial in rates] == ["dpo_seed1_lr1e-5", "dpo_seed1_lr1e-4"]
    assert rates[0].options[-2:] == ["--learning_rate", "1e-5"]


def test_every_algorithm_there_is_takes_part(benchmark):
    from rlhf.algorithms.advantages import ESTIMATORS
    from rlhf.algorithms.config import OFFLINE_CONSTANTS

    options = [option for method in benchmark("algorithms_workloads").METHODS.values() for option in method.options]
    assert {f"algorithm={name}" for name in OFFLINE_CONSTANTS} <= set(options)
    assert {f"advantage={name}" for name in ESTIMATORS if name != "gae"} <= set(options)


def test_a_row_is_the_mean_of_its_seeds(benchmark):
    algorithms, trial = benchmark("algorithms"), benchmark("algorithms_workloads").Trial
    results = {
        trial("ppo", 1): result(0.8, [0.9, 0.4, 0.5], seconds=10.0),  # won, lost, a tie
        trial("ppo", 2): result(0.6, [0.9, 0.9, 0.9], seconds=20.0),
        trial("dpo", 1): result(0.7, [0.4, 0.4, 0.4]),
    }
    first, second = algorithms.table_rows(results)
    assert first["gold"] == pytest.approx(0.7) and first["worst seed"] == 0.6 and first["seeds"] == 2
    assert first["better than SFT"] == pytest.approx((0.5 + 1.0) / 2) and first["seconds"] == 15.0
    assert first["score gained"] == 0.25 and first["peak GiB"] == 1.0
    assert second["algorithm"] == "dpo" and second["better than SFT"] == 0.0


def test_a_report_reads_what_is_there_and_runs_nothing(benchmark, tmp_path, capsys):
    algorithms, workloads = benchmark("algorithms"), benchmark("algorithms_workloads")
    kept = tmp_path / "results" / f"{workloads.Trial('rrhf', 2).key}.json"
    kept.parent.mkdir()
    kept.write_text(json.dumps(result(0.75, [0.6, 0.6, 0.6])))
    payload = algorithms.main(["--report", "--work_dir", str(tmp_path), "--out_dir", str(tmp_path / "out")])
    assert [row["algorithm"] for row in payload["table"]] == ["rrhf"] and "| rrhf |" in capsys.readouterr().out


def test_an_unknown_method_is_refused(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark("algorithms").parse(["--methods", "ppo,trpo"])
    assert "--methods trpo: choose from ppo" in capsys.readouterr().err
