"""The benchmarks of PPO and of what it learns, run small: reports whose figures agree with one another."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.launch import ROOT

BENCHMARKS = ROOT / "benchmarks"


def test_quick_run_of_our_side(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "ppo.py"), "--quick", "--peer", "none", "--device", "cpu"]
    command += ["--threads", "1", "--rounds", "1", "--iterations", "2", "--warmup", "1"]
    command += ["--work_dir", str(tmp_path / "models"), "--out_dir", str(tmp_path / "out")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads((tmp_path / "out" / "ppo-tiny-cpu-float32.json").read_text())
    by_name = {result["name"]: result for result in content["workloads"]}
    assert list(by_name) == ["W1", "W3"]
    for result in by_name.values():
        ours, workload = result["ours"], result["job"]["workload"]
        assert len(ours["seconds"]["seconds"]) == 2
        assert ours["samples_per_second"] == pytest.approx(workload["prompts"] / ours["seconds"]["median"])
        assert 0 < ours["phase_seconds"]["update"] < ours["seconds"]["max"]
        assert ours["bytes_after_imports"] < ours["peak_bytes"]
        assert sum(ours["necessary_flops"].values()) == pytest.approx(2 * ours["necessary_flops"]["total"])
        reached = ours["share_of_matmul_rate"]["total"] * result["matmul_flops_per_second"]["median"]
        assert reached == pytest.approx(ours["necessary_flops"]["total"] / ours["seconds"]["median"])
        assert "peer" not in result and "speed_ratio" not in result
    # random models never end an answer; those of W3 have learnt to
    assert by_name["W1"]["ours"]["response_tokens"]["median"] == 8
    assert by_name["W3"]["ours"]["response_tokens"]["mean"] < 0.9 * by_name["W3"]["job"]["workload"]["max_new_tokens"]
    table = (tmp_path / "out" / "ppo-tiny-cpu-float32.md").read_text()
    assert "| W1 | fp32 |" in table and "share of matmul rate" in table


def test_quick_run_of_learning_keeps_its_runs(tmp_path, micro_base):
    command = [sys.executable, str(BENCHMARKS / "learning.py"), "--quick", "--peer", "none", "--threads", "1"]
    command += ["--sections", "A,C,E,D", "--variants", "ppo_epochs=1", "--base_model", str(micro_base)]
    command += ["--work_dir", str(tmp_path / "work"), "--out_dir", str(tmp_path / "out")]
    command += ["--cache_dir", str(tmp_path / "cache")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads((tmp_path / "out" / "learning-quick.json").read_text())
    sections = content["sections"]
    (compared,), (fewer,) = sections["A"]["table"], sections["C"]["table"]
    assert fewer["rankings"] == 250 and compared["gold before"] > 0
    assert [row["variant"] for row in sections["D"]["table"]] == ["default", "ppo_epochs=1"]
    assert [row["length_control"] for row in sections["E"]["table"]] == ["none"]
    (run,) = sections["A"]["runs"]
    assert [point["iteration"] for point in run["points"]] == [0, 1, 2]
    assert run["points"][-1]["seconds"] == pytest.approx(sum(run["iteration_seconds"]))
    checked = json.loads((tmp_path / "work" / "quick" / "evaluator_checked.json").read_text())
    assert all(own == pytest.approx(again, abs=1e-3) for own, again in checked.values())

    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.json")}
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "running" not in again.stderr, again.stderr[-3000:]
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.json")}
