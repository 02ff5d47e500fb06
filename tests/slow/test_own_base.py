"""The base that `rlhf base` writes serves a stage; an interrupted one is not there."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import launch_ranks
from tests.support.pipeline_worker import SMALL
from tests.support.samples import write_sample

ROOT = Path(__file__).parents[2]
SIZES = "--vocabulary_size 600 --hidden_size 32 --layers 2 --heads 2 --max_positions 128 --row_tokens 64 --threads 1"


@pytest.fixture
def data(tmp_path):
    """Instruction rows and the same answers as text files of two kinds."""
    write_sample("sft_train", tmp_path / "train.jsonl", 60)
    write_sample("sft_heldout", tmp_path / "heldout.jsonl", 8)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = [row["output"] for row in rows]
    (tmp_path / "answers.txt").write_text("\n".join(answers), encoding="utf-8")
    (tmp_path / "questions.jsonl").write_text(
        "\n".join(json.dumps({"text": row["instruction"]}, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    return tmp_path


def start(data, *words):
    command = [sys.executable, "-m", "rlhf.cli", "base", "base", "--texts", "answers.txt", "questions.jsonl"]
    return subprocess.Popen(
        [*command, *SIZES.split(), "--eval_fraction", "0.1", *words],
        cwd=data,
        env={"PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )


def test_it_serves_a_stage(data):
    process = start(data, "--steps", "150")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    losses = json.loads((data / "base" / "base.json").read_text(encoding="utf-8"))["held_out"]["all"]
    assert losses["after"]["nats_per_token"] < 0.8 * losses["before"]["nats_per_token"]
    words = ["--base_model", data / "base", "--output_dir", data / "out", "--cache_dir", data / "cache", *SMALL.split()]
    words += ["--sft_data", data / "train.jsonl", "--sft_eval_data", data / "heldout.jsonl", "--max_steps", 3]
    done = launch_ranks(ROOT / "step1_sft" / "main.py", 1, data / "out", words)
    assert done.returncode == 0, done.stdout[-4000:]
    result = json.loads((data / "out" / "sft" / "result.json").read_text(encoding="utf-8"))
    assert result["eval_loss_after"] < result["eval_loss_before"]


def test_interrupted_it_leaves_nothing(data):
    process = start(data, "--steps", "1000000")
    for line in process.stdout:
        if line.startswith("base model: "):
            break
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted: base is not written" in output
    assert not [entry.name for entry in data.iterdir() if "base" in entry.name]
