"""The quickstart notebook runs from top to bottom in a fresh process, and every stage really does its work."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
STEPS = 2


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_notebook(directory: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Execute the notebook in `directory`; what its cells printed."""
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager

    class ThisPython(KernelSpecManager):
        """The kernel is the Python that runs the tests, whatever kernels the machine has registered."""

        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=argv, display_name=kernel_name, language="python")

    monkeypatch.setenv("RLHF_QUICKSTART_STEPS", str(STEPS))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)  # another test of this process may have made a world
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    manager = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(directory)}}
    ).create_kernel_manager()
    manager.kernel_spec_manager = ThisPython()
    client = nbclient.NotebookClient(
        notebook, km=manager, timeout=300, resources={"metadata": {"path": str(directory)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")


def test_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = run_notebook(tmp_path, monkeypatch)
    out = tmp_path / "runs" / "quickstart"

    losses = [line["eval_loss"] for line in lines_of(out / "sft" / "metrics.jsonl") if "eval_loss" in line]
    assert len(losses) == 2
    assert losses[1] < losses[0], "two steps of SFT must lower the held-out loss of a barely trained model"
    accuracies = [
        line["eval_accuracy"] for line in lines_of(out / "reward" / "metrics.jsonl") if "eval_accuracy" in line
    ]
    assert len(accuracies) == 2
    assert all(0.0 <= accuracy <= 1.0 for accuracy in accuracies)
    iterations = [line for line in lines_of(out / "ppo" / "metrics.jsonl") if "advantage_std" in line]
    assert [line["step"] for line in iterations] == [1, 2]
    first, second = iterations
    assert first["ratio_first"] == pytest.approx(1.0, abs=1e-4)
    assert first["kl_per_token"] == pytest.approx(0.0, abs=1e-4), "before its first update the actor is the reference"
    assert first["explained_variance"] == pytest.approx(0.0, abs=1e-4), "the critic starts with values of 0"
    assert first["sampling_logprob_error"] < 1e-3
    assert abs(second["kl_per_token"]) > 0, "the actor has moved"

    assert "held-out loss" in printed
    assert printed.count("  SFT ") == printed.count("  PPO ") == 5
    assert "GPTNeoXForCausalLM in" in printed


def test_notebook_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None
