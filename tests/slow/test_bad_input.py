"""What a user sees after a mistake: one sentence that says what was given, what is needed and what to do."""

from __future__ import annotations

import gzip
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.config import ConfigError
from rlhf.data import DataError
from step1_sft.main import main as sft
from step2_reward.main import main as reward
from step3_ppo.main import main as ppo
from tests.support.launch import ROOT, launch_ranks

SMALL = (
    "--max_steps 1 --global_batch_size 4 --micro_batch_size 2 --precision fp32 --no_tensorboard --max_response_tokens 8"
)


@pytest.fixture()
def options(micro_base, tmp_path) -> list[str]:
    return [
        "--base_model",
        str(micro_base),
        "--output_dir",
        str(tmp_path / "run"),
        "--cache_dir",
        str(tmp_path),
        *SMALL.split(),
    ]


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def test_missing_file(options):
    with pytest.raises(DataError, match=r"no/such/file\.jsonl"):
        sft([*options, "--sft_data", "no/such/file.jsonl"])


def test_wrong_column(options, tmp_path):
    path = write(tmp_path / "a.csv", "질문,답변\n안녕?,네.\n".encode())
    spec = json.dumps({"path": path, "columns": {"prompt": "question", "response": "답변"}}, ensure_ascii=False)
    with pytest.raises(DataError, match=r"question(.|\n)*질문, 답변"):
        sft([*options, "--sft_data", spec])


def test_unrecognised_columns_show_how_to_map_them(options, tmp_path):
    path = write(tmp_path / "a.csv", "번호,상담,조언\n1,안녕?,네.\n".encode())
    with pytest.raises(DataError, match='--sft_data \'.*"columns": .*"상담"'):
        sft([*options, "--sft_data", path])


def test_empty_file(options, tmp_path):
    with pytest.raises(DataError, match="empty"):
        sft([*options, "--sft_data", write(tmp_path / "a.jsonl", b"")])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_git_lfs_pointer(options, tmp_path, name):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    with pytest.raises(DataError, match="git lfs pull"):
        reward([*options, "--preference_data", write(tmp_path / name, pointer)])


def test_binary_file(options, tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl"):
        sft([*options, "--sft_data", write(tmp_path / "a.jsonl", bytes(range(256)) * 8)])


def test_truncated_gz(options, tmp_path):
    rows = b'{"instruction": "a", "output": "b"}\n' * 4000
    with pytest.raises(DataError, match=r"a\.jsonl\.gz"):
        sft([*options, "--sft_data", write(tmp_path / "a.jsonl.gz", gzip.compress(rows)[:-20])])


def test_bad_row_names_file_and_line_and_can_be_skipped(options, tmp_path):
    rows = ['{"instruction": "안녕?", "output": "네, 안녕하세요."}'] * 8
    rows[2] = '{"instruction": "안녕?", "output": "\\u200b"}'
    path = write(tmp_path / "a.jsonl", "\n".join(rows).encode())
    with pytest.raises(DataError, match=r"a\.jsonl:3.*output"):
        sft([*options, "--sft_data", path])
    sft([*options, "--sft_data", path, "--on_bad_row", "skip"])
    skipped = [json.loads(line) for line in (tmp_path / "run/sft/skipped_rows.jsonl").read_text().splitlines()]
    assert [(row["line"], row["field"]) for row in skipped] == [(3, "output")]


def test_unknown_template_lists_the_known(options):
    with pytest.raises(ValueError, match=r"kulm(.|\n)*kullm"):
        sft([*options, "--template", "kulm"])


def test_unknown_option_names_near_ones(options):
    with pytest.raises(ConfigError, match="learning_rate"):
        sft([*options, "--learning_rat", "1e-5"])


def test_lora_target_that_matches_nothing(options):
    with pytest.raises(ValueError, match=r"decoder\.layers\.(.|\n)*query_key_value"):
        sft([*options, "--lora_rank", "4", "--lora_targets", "decoder.layers."])


def test_rollout_that_does_not_divide(options, micro_base, tmp_path):
    reward_model = trained_reward_model(options, tmp_path)
    with pytest.raises(ConfigError, match=r"rollout_batch_size=6 .* no multiple of global_batch_size=4 .*=4 or 8"):
        ppo([*options, "--actor_model", str(micro_base), "--reward_model", reward_model, "--rollout_batch_size", "6"])


def test_filtered_rollouts_are_refused(options):
    with pytest.raises(ConfigError, match="top_p.*temperature"):
        ppo([*options, "--top_p", "0.9"])


def test_ppo_without_earlier_stages_says_how_to_make_them(options):
    with pytest.raises(ConfigError, match=r"step1_sft/main\.py"):
        ppo(options)


def test_a_causal_lm_is_not_a_reward_model(options, micro_base):
    with pytest.raises(ConfigError, match="not a reward model"):
        ppo([*options, "--actor_model", str(micro_base), "--reward_model", str(micro_base)])


def test_output_directory_that_cannot_be_written(options, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be written"):
        sft([*options, "--output_dir", str(tmp_path / "file")])


def test_model_directory_without_a_model(options, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="not a model directory"):
        sft([*options, "--base_model", str(tmp_path / "empty")])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("log_every_steps", "0"),
        ("ppo_epochs", "0"),
        ("eval_samples_per_prompt", "0"),
        ("generation_batch_size", "-1"),
        ("ema_decay", "1.5"),
        ("kl_coef", "-0.1"),
        ("max_response_tokens", "0"),
        ("eval_fraction", "1"),
        ("adam_betas", "0.9"),
        ("ptx_coef", "27.8"),
    ],
)
def test_a_value_out_of_range_is_refused_before_anything_is_loaded(options, field, value, tmp_path):
    (tmp_path / "actor").mkdir()
    models = ["--actor_model", str(tmp_path / "actor"), "--reward_model", str(tmp_path / "actor")]
    with pytest.raises(ConfigError, match=field):
        ppo([*options, *models, f"--{field}", value])


def test_quantisation_without_lora(options):
    with pytest.raises(ConfigError, match="lora_rank above 0"):
        sft([*options, "--quantization", "4bit"])


def test_quantisation_with_zero_3(options):
    with pytest.raises(ConfigError, match="zero_stage=3"):
        sft([*options, "--quantization", "4bit", "--lora_rank", "4", "--zero_stage", "3"])


def test_reward_model_of_another_tokenizer_is_used(options, micro_base, tiny_models, tmp_path):
    """Its scores are those of the text, and the critic, which reads the actor's tokens, starts from the actor."""
    other = [*options, "--base_model", str(tiny_models["llama"]), "--max_prompt_tokens", "40"]
    other += ["--max_response_tokens", "24"]
    reward_model = trained_reward_model(other, tmp_path)
    result = ppo(
        [*options, "--actor_model", str(micro_base), "--reward_model", reward_model, "--rollout_batch_size", "4"]
        + ["--prompt_data", "sample:prompts_heldout", "--max_prompt_tokens", "40", "--learning_rate", "1e-4"]
    )
    assert result is not None
    config = json.loads((tmp_path / "run/ppo/critic/config.json").read_text())
    assert config["model_type"] == "gpt_neox"


def trained_reward_model(options: list[str], tmp_path: Path) -> str:
    rows = [{"prompt": f"question {n}?", "chosen": f"yes {n}", "rejected": f"no, {n}"} for n in range(8)]
    path = write(tmp_path / "pairs.jsonl", "\n".join(map(json.dumps, rows)).encode())
    reward([*options, "--preference_data", path])
    return str(tmp_path / "run/reward/model")


def test_port_in_use(micro_base, tmp_path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        arguments = ["--base_model", str(micro_base), "--output_dir", str(tmp_path / "run"), *SMALL.split()]
        result = launch_ranks(ROOT / "step1_sft/main.py", 1, tmp_path, arguments, port=port)
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert f"port {port}" in output and "--master_port" in output
    assert "Traceback" not in output


def test_a_mistake_ends_with_a_sentence_and_not_a_traceback(tmp_path):
    command = [sys.executable, "-m", "step1_sft.main", "--output_dir", str(tmp_path), "--config", "no_such.yaml"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: configuration file not found: no_such.yaml")
    assert "Traceback" not in result.stderr
