"""The benchmark of PPO, run small: a report whose figures agree with one another."""

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
