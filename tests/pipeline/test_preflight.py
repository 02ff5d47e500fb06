"""Everything that can be wrong with a run is found before its first stage, by the stages' own code."""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import transformers

from rlhf.config import ConfigError, RunConfig
from rlhf.distributed.log import logger
from rlhf.models.architecture import ModelSize
from rlhf.pipeline import preflight
from rlhf.pipeline.dry_run import STATE_BYTES, disk_use
from tests.support.tiny_models import save_tiny_model

GIB = 2**30


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Run the check as run_all.sh does: (status, standard output, standard error)."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def run(*words):
        monkeypatch.chdir(tmp_path)
        status = preflight.main(["--output_dir", "out", "--cache_dir", "cache", *map(str, words)])
        said = capsys.readouterr()
        return status, said.out, said.err

    before = logger.handlers, logger.propagate, logger.level
    yield run
    logger.handlers, logger.propagate = before[:2]  # other tests of this process read the log
    logger.setLevel(before[2])


def entries(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_the_default_run_is_well_and_nothing_is_left_but_tokens(check, tmp_path):
    status, out, _ = check()
    assert status == 0
    lines = out.splitlines()
    weights = re.search(r"model (\S+M) weights$", lines[1])[1]  # of the embedded base, which is not trained for this
    assert lines[1:4] == [
        f"SFT: 375 optimizer steps; 3000 rows to train on and 200 held out; model {weights} weights",
        f"reward: 500 optimizer steps; 4000 rows to train on and 400 held out; model {weights} weights",
        "PPO: 160 optimizer steps; 3000 rows to train on and 100 held out; "
        f"actor {weights} weights, critic {weights} weights",
    ]
    assert re.fullmatch(
        rf"disk: about \d\.\d GiB for models and \d\.\d GiB for training states; \S+ GiB free in {tmp_path}/out",
        lines[4],
    )
    assert re.fullmatch(r"nothing is wrong; checked in \d+ s", lines[5]) and len(lines) == 6
    assert out.count("configuration: ") == 1  # the three stages read one file
    assert entries(tmp_path / "out") == []
    assert entries(tmp_path / "cache")


def test_tokens_are_kept_for_the_stages(check, tmp_path):
    check()
    made = {name: (tmp_path / "cache" / name).stat().st_mtime_ns for name in entries(tmp_path / "cache")}
    check()
    assert {name: (tmp_path / "cache" / name).stat().st_mtime_ns for name in entries(tmp_path / "cache")} == made


def test_a_bad_row_at_the_end_of_the_prompts_is_found(check, tmp_path):
    rows = [json.dumps({"prompt": f"질문 {number}"}, ensure_ascii=False) for number in range(40)]
    (tmp_path / "prompts.jsonl").write_text("\n".join([*rows, '{"prompt": 3}']), encoding="utf-8")
    status, out, err = check("--prompt_data", "prompts.jsonl")
    assert status == 2 and out.startswith("configuration: ")
    assert err.startswith("error: stage ppo: ") and "prompts.jsonl:41" in err
    assert not (tmp_path / "out" / "ppo").exists()


def test_rows_that_are_skipped_are_listed_where_the_message_says(check, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": 3}\n' * 3, encoding="utf-8")
    status, _, err = check("--prompt_data", "prompts.jsonl", "--on_bad_row", "skip")
    assert status == 2 and "stage ppo: " in err and "no usable `prompt` re" in err
    listed = tmp_path / "out" / preflight.REPORTS / "ppo" / "skipped_rows.jsonl"
    assert len(listed.read_text(encoding="utf-8").splitlines()) == 3
    assert check()[0] == 0 and not listed.exists()  # a check that passes leaves nothing


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt_data", "nowhere.jsonl"], "stage ppo: no such file: nowhere.jsonl"),
        (["--ppo.prompt_eval_data", "nowhere.jsonl"], "stage ppo: no such file: nowhere.jsonl"),
        (["--preference_data", "sample:prompts_train"], "stage reward: sample:prompts_train"),
        (["--reward.template", "nowhere"], "stage reward: unknown template `nowhere`"),
        (["--lora_rank", "4", "--lora_targets", "foo"], "stage sft: lora_targets: 'foo' matches no linear module"),
        (["--ppo.rollout_batch_size", "33"], "stage ppo: rollout_batch_size=33"),
        (["--num_devices", "64"], "stage sft: global_batch_size=16 leaves 48 of 64 devices without a sequence"),
        (
            ["--ppo.max_prompt_tokens", "500"],
            r"stage ppo: .*512 positions, and max_prompt_tokens \+ max_response_tokens is 564",
        ),
        (["--reward.offload", "all"], "stage reward: offload=all needs zero_stage 3"),
        (["--ppo.reward_model", "."], "stage ppo: .* is not a model directory"),
        (["--stages", "ppo"], "stage ppo: .*sft/model not found"),
        (
            ["--rewards", '{"name": "keywords", "column": "x"}'],
            "stage ppo: keywords: prompt 'prompts-.*' has no text",
        ),
        (["--learning_rat", "1"], "unknown option --learning_rat"),
    ],
)
def test_a_mistake_of_any_stage_names_it_and_the_first_stage_has_not_begun(check, tmp_path, words, message):
    status, _, err = check(*words)
    assert status == 2
    assert err.startswith("error: ") and err.count("error: ") == 1
    assert re.search(message, err), err
    assert not [path for path in (tmp_path / "out").glob("*") if path.name != preflight.REPORTS]


def test_pairs_that_no_weights_balance_are_found(check, tmp_path):
    rows = [{"prompt": f"질문 {n}", "chosen": "길게 대답합니다" * 2, "rejected": "짧게"} for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    status, _, said = check("--reward.preference_data", "pairs.jsonl", "--length_control", "balance")
    assert status == 2
    assert "length_control=balance: the longer response is the chosen one in all" in said


def test_models_of_the_wrong_kind_are_found(check, tmp_path, tokenizer):
    causal = save_tiny_model(tmp_path / "causal", "gpt_neox", tokenizer, max_position_embeddings=512)
    status, _, err = check("--ppo.reward_model", "causal", "--ppo.actor_model", "causal")
    assert status == 2 and "stage ppo: " in err and "causal is not a reward model" in err
    (causal / "model.safetensors").unlink()
    status, _, err = check("--base_model", "causal", "--learning_rate", "1e-3")
    assert status == 2 and "stage sft: " in err and "has a configuration and no weights" in err


def test_a_stage_that_is_finished_and_resumed_is_not_checked_again(check, tmp_path):
    for stage in ("sft", "reward"):
        (tmp_path / "out" / stage).mkdir(parents=True)
        (tmp_path / "out" / stage / "result.json").write_text('{"seconds": 1}')
    status, _, err = check("--resume", "auto")
    assert status == 2 and "stage ppo: " in err and "not found: PPO needs the model that step1_sft/main.py saves" in err
    (tmp_path / "out" / "sft" / "result.json").write_text("{")  # broken: it runs anew, and so does what follows
    status, out, _ = check("--resume", "auto")
    assert status == 0 and "SFT: " in out and "reward: " in out


def test_a_disk_that_is_too_small_is_told_before_it_is_full(check, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=GIB // 64))
    status, _, err = check()
    assert status == 2 and "has 0.0 GiB free, and the run takes about" in err and "--keep_last 1" in err
    assert check("--keep_last", "0")[0] == 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=GIB))
    assert check()[0] == 0


def test_what_every_stage_says_of_the_shared_file_is_said_once(caplog):
    log = logging.Logger("of this test")
    log.addFilter(preflight._Once())
    log.addHandler(caplog.handler)
    for name in ("a", "b", "a"):
        log.warning("configuration: %s", name)
    assert caplog.messages == ["configuration: a", "configuration: b"]


def test_disk_use_by_hand():
    whole, adapter = {"a": ModelSize(100, 100), "b": ModelSize(50, 50)}, {"a": ModelSize(100, 8)}
    run = RunConfig(keep_last=2)
    assert disk_use(whole, run, steps=10, weight_bytes=2, adapted=False) == (300, 150 * STATE_BYTES * 3)
    assert disk_use(adapter, run, steps=10, weight_bytes=2, adapted=True) == (32, 8 * STATE_BYTES * 3)
    assert disk_use(whole, RunConfig(keep_last=0, keep_every=1), steps=9, weight_bytes=4, adapted=False) == (600, 0)
    kept = RunConfig(keep_last=1, keep_every=4)
    assert disk_use(whole, kept, steps=9, weight_bytes=4, adapted=False)[1] == 150 * STATE_BYTES * (1 + 1 + 2)


def test_the_number_of_processes_is_that_of_the_launcher(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# ours\na slots=8\nb slots=4 # half\n\n#c slots=8\n", encoding="utf-8")
    assert preflight._devices(["--num_gpus", "3", "--master_port", "29500"]) == 3
    assert preflight._devices(["--hostfile", str(hosts)]) == 12
    assert preflight._devices(["--hostfile", str(hosts), "--num_nodes", "1"]) == 8
    assert preflight._devices(["--hostfile", str(hosts), "--num_gpus", "2"]) == 4
    hosts.write_text("a slots=8\nb\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--hostfile .*hosts: 'b' does not name a host and its devices"):
        preflight._devices(["--hostfile", str(hosts)])


def test_what_an_overwritten_run_would_remove_is_not_its_input(check, tmp_path, tokenizer):
    save_tiny_model(tmp_path / "out" / "ppo" / "actor", "gpt_neox", tokenizer, max_position_embeddings=512)
    words = ["--overwrite", "--ppo.actor_model", "out/ppo/actor", "--ppo.reward_model", "out/ppo/actor"]
    status, _, err = check(*words)
    assert status == 2 and "stage ppo: --actor_model" in err and "which this run overwrites: copy it elsewhere" in err
    (tmp_path / "out" / "sft").mkdir()
    (tmp_path / "out" / "sft" / "mine.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 20)
    status, _, err = check("--overwrite", "--sft_data", '{"path": "out/sft/mine.jsonl", "weight": 2}')
    assert status == 2 and "stage sft: --sft_data" in err
    assert check("--sft_data", "out/sft/mine.jsonl")[0] == 0  # nothing is removed


def test_a_configuration_that_an_overwritten_run_would_remove_is_not_its_input(check, tmp_path):
    (tmp_path / "out" / "sft").mkdir(parents=True)
    (tmp_path / "out" / "sft" / "config.yaml").write_text("base_model: default\n")
    status, _, err = check("--config", "out/sft/config.yaml", "--overwrite")
    assert status == 2 and "--config" in err and "which this run overwrites" in err
    (tmp_path / "mine.yaml").write_text("extends: out/sft/config.yaml\n")
    status, _, err = check("--config", "mine.yaml", "--overwrite")
    assert status == 2 and "out/sft/config.yaml lies in" in err


def test_columns_that_offer_no_choice_are_a_sentence_too(check, tmp_path):
    (tmp_path / "cols.csv").write_text("foo,bar\n1,2\n3,4\n")
    status, _, err = check("--prompt_data", "cols.csv")
    assert status == 2 and err.startswith("error: stage ppo: ") and "the file's columns: foo, bar" in err


def test_models_that_lack_tokens_or_look_ahead_are_found(check, tmp_path, tokenizer):
    save_tiny_model(tmp_path / "small", "gpt_neox", tokenizer, max_position_embeddings=512)
    status, _, err = check("--ppo.critic_model", "small")
    assert status == 2 and "stage ppo: critic " in err and "has an embedding of 96 rows" in err
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=5000))
    bert.save_pretrained(tmp_path / "bert")
    for field in ("base_model", "critic_model"):
        status, _, err = check(f"--{field}", "bert", "--stages", "sft,reward,ppo")
        assert status == 2 and f"{field} {tmp_path / 'bert'} is a bert model" in err


def test_a_reward_model_is_no_base_of_sft(check, tmp_path, tokenizer):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.GPTNeoXConfig(**sizes, num_labels=1, vocab_size=96, max_position_embeddings=512)
    transformers.GPTNeoXForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    status, _, err = check("--stages", "sft", "--base_model", "rm")
    assert status == 2 and "stage sft: " in err and "is a reward model or critic" in err


def test_a_disk_that_refuses_the_tokens_is_told_in_one_sentence(check, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "cache/tokens")

    monkeypatch.setattr("rlhf.data.token_cache.replaced_file", refuse, raising=False)
    monkeypatch.setattr("rlhf.data.token_cache.replaced_directory", refuse, raising=False)
    status, _, err = check()
    assert status == 2 and err.startswith("error: ") and "No space left on device" in err and err.count("\n") == 1
