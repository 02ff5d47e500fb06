"""Reward models and critics as sequence classifiers: `transformers` alone computes our scores from what was saved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from rlhf.checkpoint.export import export_scalar_model
from rlhf.config import ConfigError, ModelConfig
from rlhf.models.directories import check_scalar_directory, is_scalar_directory
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.models.lora import apply_lora
from rlhf.models.merge import merge_adapter
from rlhf.models.padding import PAD_TEXT, with_own_padding
from rlhf.models.scalar import ScalarModel
from rlhf.numerics.statistics import score_last
from tests.support.tiny_models import ARCHITECTURES, ROWS, TOKENS, make_tokenizer, save_tiny_model

FP32 = torch.float32
SIZES = {
    "vocab_size": ROWS, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GPT_SIZES = {"vocab_size": ROWS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "rotary_dim": 4}
FURTHER: dict[str, transformers.PreTrainedConfig] = {
    "mistral": transformers.MistralConfig(**SIZES, num_key_value_heads=1),
    "qwen3": transformers.Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=8),
    "gemma2": transformers.Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=8),
    "phi3": transformers.Phi3Config(**SIZES, num_key_value_heads=1),
    "stablelm": transformers.StableLmConfig(**SIZES, num_key_value_heads=1),
    "olmo2": transformers.Olmo2Config(**SIZES, num_key_value_heads=1),
    "falcon": transformers.FalconConfig(**SIZES, multi_query=True, new_decoder_architecture=False),
    "gptj": transformers.GPTJConfig(**GPT_SIZES, bos_token_id=0, eos_token_id=0),
    "gpt_bigcode": transformers.GPTBigCodeConfig(**GPT_SIZES, bos_token_id=0, eos_token_id=0, pad_token_id=0),
    "bloom": transformers.BloomConfig(
        vocab_size=ROWS, hidden_size=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    ),
    "gpt_neo": transformers.GPTNeoConfig(
        vocab_size=ROWS, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    ),
}  # fmt: skip
EVERY = (*ARCHITECTURES, *FURTHER)
ALONE = """
import sys
sys.modules["rlhf"] = None  # may not be imported
import json, torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
found = {}
for path, given in json.loads(sys.argv[1]).items():
    ids, lengths = torch.tensor(given["ids"]), given["lengths"]
    model, report = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), (path, report)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert model.config.num_labels == 1 and model.config.pad_token_id == tokenizer.pad_token_id, path
    rows = {"input_ids": [row[:length] for row, length in zip(given["ids"], lengths)]}
    found[path] = {"dtype": str(model.dtype)}
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = tokenizer.pad(rows, return_tensors="pt")
        more = {}
        if side == "left" and model.config.model_type in ("gpt2", "gpt_neo", "gpt_bigcode"):  # they count padding
            more["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **more).logits
        found[path][side] = (logits[:, 0].float() + model.config.score_bias).tolist()
json.dump(found, open(sys.argv[2], "w"))
"""


def base_model(architecture: str, directory: Path, tokenizer: Any) -> Path:
    if architecture in ARCHITECTURES:
        return save_tiny_model(directory, architecture, tokenizer)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FURTHER[architecture])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def trained_reward(path: Path, config: ModelConfig | None = None, *, dtype: torch.dtype = FP32, seed: int = 7) -> Any:
    """A reward model with a bias, a normalisation and, with `config`, an adapter."""
    model: Any = ScalarModel.from_base(path, dtype=dtype, seed=seed)
    if config is not None:
        model = apply_lora(model, config, seed=1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and (config is not None or parameter.dim() == 1):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.scalar_head.bias.fill_(0.123)
    model.set_normalisation(0.377, 1.93)
    return model.eval()


def rows() -> tuple[torch.Tensor, list[int]]:
    """Right-padded rows that end in the end of sequence, which also stands in the padding, and one that does not."""
    ids = torch.randint(1, TOKENS, (4, 9), generator=torch.Generator().manual_seed(3))
    lengths = [9, 4, 6, 2]
    for row, length in enumerate(lengths[:3]):
        ids[row, length - 1 :] = 0
    ids[3, 2:] = 0
    return ids, lengths


def scores(model: Any) -> torch.Tensor:
    ids, lengths = rows()
    mask = torch.arange(9)[None] < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        return score_last(model.eval()(ids, mask), mask)


def scores_by_transformers(directories: list[Path], place: Path, code: str = ALONE) -> dict[str, Any]:
    ids, lengths = rows()
    given = {str(path): {"ids": ids.tolist(), "lengths": lengths} for path in directories}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(given), str(place / "scores.json")],
        cwd=place, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((place / "scores.json").read_text())


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A saved reward model of every architecture, and what `transformers` alone says of them."""
    place = tmp_path_factory.mktemp("classifiers")
    for name in EVERY:
        base = base_model(name, place / "base" / name, tokenizer)
        export_scalar_model(trained_reward(base), tokenizer, place / name)
    return place, scores_by_transformers([place / name for name in EVERY], place)


@pytest.mark.parametrize("architecture", EVERY)
def test_transformers_alone_computes_our_normalised_scores(architecture, saved):
    place, found = saved
    raw = scores(trained_reward(place / "base" / architecture))
    wanted = (raw - 0.377) / 1.93
    loaded = scores(ScalarModel.from_pretrained(place / architecture, dtype=FP32))
    torch.testing.assert_close(loaded, wanted, atol=2e-5, rtol=1e-4)
    assert wanted.std() > 0.1
    theirs = found[str(place / architecture)]
    torch.testing.assert_close(torch.tensor(theirs["right"]), wanted, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(theirs["left"]), wanted, atol=2e-5, rtol=1e-4)
    assert not (place / architecture / "scalar_head.safetensors").exists()


def test_in_bf16_the_head_stays_float32_in_the_file(tiny_models, tokenizer, tmp_path):
    model = trained_reward(tiny_models["llama"], dtype=torch.bfloat16)
    export_scalar_model(model, tokenizer, tmp_path / "reward")
    stored = load_file(tmp_path / "reward" / "model.safetensors")
    assert stored["score.weight"].dtype == FP32
    assert {tensor.dtype for name, tensor in stored.items() if name != "score.weight"} == {torch.bfloat16}
    again = ScalarModel.from_pretrained(tmp_path / "reward", dtype=torch.bfloat16)
    torch.testing.assert_close(scores(again), (scores(model) - 0.377) / 1.93, atol=1e-6, rtol=1e-5)
    theirs = scores_by_transformers([tmp_path / "reward"], tmp_path)[str(tmp_path / "reward")]
    assert theirs["dtype"] == "torch.bfloat16"
    torch.testing.assert_close(torch.tensor(theirs["right"]), scores(again), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("adapted", [False, True])
def test_scores_are_folded_once_and_for_all(adapted, tiny_models, tokenizer, tmp_path):
    config = ModelConfig(lora_rank=2) if adapted else None
    model = trained_reward(tiny_models["llama"], config)
    export_scalar_model(model, tokenizer, tmp_path / "first")
    weight = model.scalar_head.weight.detach().clone()
    first = ScalarModel.from_pretrained(tmp_path / "first", dtype=FP32)
    assert (first.score_mean, first.score_std) == (0.0, 1.0)
    torch.testing.assert_close(scores(first), (scores(model) - 0.377) / 1.93, atol=2e-5, rtol=1e-4)
    for as_critic in (False, True):  # a critic that grows from it speaks in the same units
        loaded = ScalarModel.from_pretrained(tmp_path / "first", dtype=FP32, as_critic=as_critic)
        export_scalar_model(loaded, tokenizer, tmp_path / f"second {as_critic}")
        second = ScalarModel.from_pretrained(tmp_path / f"second {as_critic}", dtype=FP32)
        assert torch.equal(scores(second), scores(first))
    export_scalar_model(model, tokenizer, tmp_path / "again")  # writing leaves the model as it is
    assert torch.equal(model.scalar_head.weight, weight)
    assert torch.equal(scores(ScalarModel.from_pretrained(tmp_path / "again", dtype=FP32)), scores(first))


# ------------------------------------------------------------------------------------------------------------- adapters

PEFT_ALONE = """
import sys
sys.modules["rlhf"] = None  # may not be imported
import json, torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
found = {}
for path, given in json.loads(sys.argv[1]).items():
    config = AutoConfig.from_pretrained(path + "/classifier_config.json")
    tokenizer = AutoTokenizer.from_pretrained(path)
    options = {"num_labels": 1, "pad_token_id": config.pad_token_id}
    models = {
        "peft": AutoPeftModelForSequenceClassification.from_pretrained(path, **options),
        "transformers": AutoModelForSequenceClassification.from_pretrained(path, **options),
        "transformers, config": AutoModelForSequenceClassification.from_pretrained(path, config=config),
    }
    rows = {"input_ids": [row[:length] for row, length in zip(given["ids"], given["lengths"])]}
    batch = tokenizer.pad(rows, return_tensors="pt")
    with torch.no_grad():
        found[path] = {
            name: (model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
                   + config.score_bias).tolist()
            for name, model in models.items()
        }
json.dump(found, open(sys.argv[2], "w"))
"""


def test_peft_and_transformers_alone_load_the_adapter_as_a_classifier(tiny_models, tokenizer, tmp_path):
    directories = []
    for architecture in ARCHITECTURES:
        model = trained_reward(tiny_models[architecture], ModelConfig(lora_rank=2, lora_alpha=8))
        export_scalar_model(model, tokenizer, tmp_path / architecture)
        directories.append(tmp_path / architecture)
        settings = json.loads((tmp_path / architecture / "adapter_config.json").read_text())
        assert settings["task_type"] == "SEQ_CLS" and settings["modules_to_save"] == ["score"]
        assert settings["base_model_name_or_path"] == str(tiny_models[architecture])
    found = scores_by_transformers(directories, tmp_path, PEFT_ALONE)
    for architecture, directory in zip(ARCHITECTURES, directories, strict=True):
        model = trained_reward(tiny_models[architecture], ModelConfig(lora_rank=2, lora_alpha=8))
        wanted = (scores(model) - 0.377) / 1.93
        base_alone = (scores(ScalarModel.from_base(tiny_models[architecture], dtype=FP32, seed=7)) - 0.377) / 1.93
        assert (wanted - base_alone).abs().max() > 1e-2  # the adapter is heard
        for name, theirs in found[str(directory)].items():
            torch.testing.assert_close(torch.tensor(theirs), wanted, atol=2e-5, rtol=1e-4, msg=f"{architecture} {name}")


def test_a_merged_adapter_is_a_plain_classifier(tiny_models, tokenizer, tmp_path):
    export_scalar_model(trained_reward(tiny_models["llama"], ModelConfig(lora_rank=2)), tokenizer, tmp_path / "adapter")
    wanted = scores(ScalarModel.from_pretrained(tmp_path / "adapter", dtype=FP32))
    merge_adapter(tmp_path / "adapter", tmp_path / "plain", FP32)
    assert not (tmp_path / "plain" / "adapter_config.json").exists()
    torch.testing.assert_close(scores(ScalarModel.from_pretrained(tmp_path / "plain", dtype=FP32)), wanted)
    theirs = scores_by_transformers([tmp_path / "plain"], tmp_path)[str(tmp_path / "plain")]
    torch.testing.assert_close(torch.tensor(theirs["right"]), wanted, atol=2e-5, rtol=1e-4)
    merge_adapter(tmp_path / "adapter", tmp_path / "half", torch.bfloat16)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert stored["score.weight"].dtype == FP32 and stored["model.norm.weight"].dtype == torch.bfloat16


def test_an_adapter_of_an_older_release_is_folded_on_loading(tiny_models, tokenizer, tmp_path):
    from rlhf.models.adapters import load_adapter
    from rlhf.models.loading import load_backbone

    model = trained_reward(tiny_models["llama"], ModelConfig(lora_rank=2))
    older = save_as_older_release(model, tokenizer, tmp_path / "older")
    assert json.loads((older / "adapter_config.json").read_text())["task_type"] == "FEATURE_EXTRACTION"
    wanted = (scores(model) - 0.377) / 1.93
    torch.testing.assert_close(scores(ScalarModel.from_pretrained(older, dtype=FP32)), wanted, atol=2e-5, rtol=1e-4)
    backbone = load_adapter(load_backbone(tiny_models["llama"], dtype=FP32), older, trainable=False)
    unmerged = ScalarModel.on_backbone(backbone, older)
    torch.testing.assert_close(scores(unmerged), wanted, atol=2e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------- directories from elsewhere


def save_as_older_release(model: Any, tokenizer: Any, directory: Path) -> Path:
    """A backbone, or its adapter, beside a raw head and its statistics."""
    model.backbone.save_pretrained(directory)
    head = {"weight": model.scalar_head.weight, "bias": model.scalar_head.bias}
    statistics = {"score_mean": torch.tensor(model.score_mean), "score_std": torch.tensor(model.score_std)}
    save_file({name: tensor.detach() for name, tensor in {**head, **statistics}.items()},
              directory / "scalar_head.safetensors")  # fmt: skip
    tokenizer.save_pretrained(directory)
    return directory


def test_a_directory_of_an_older_release(tiny_models, tokenizer, tmp_path):
    model = trained_reward(tiny_models["gpt_neox"])
    older = save_as_older_release(model, tokenizer, tmp_path / "older")
    raw, folded = scores(model), (scores(model) - 0.377) / 1.93
    loaded = ScalarModel.from_pretrained(older, dtype=FP32)
    torch.testing.assert_close(scores(loaded), folded, atol=2e-6, rtol=1e-5)
    export_scalar_model(loaded, tokenizer, tmp_path / "newer")
    assert torch.equal(scores(ScalarModel.from_pretrained(tmp_path / "newer", dtype=FP32)), scores(loaded))
    # its critics, which have no score range, always spoke in normalised units
    assert torch.equal(scores(ScalarModel.from_pretrained(older, dtype=FP32, as_critic=True)), raw)
    (older / "score_range.json").write_text("{}")
    torch.testing.assert_close(
        scores(ScalarModel.from_pretrained(older, dtype=FP32, as_critic=True)), folded, atol=2e-6, rtol=1e-5
    )


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin"])
def test_a_classifier_that_transformers_saved(form, tiny_models, tokenizer, tmp_path):
    """As TRL's RewardTrainer writes them: no score range, no constant."""
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_models["llama"], num_labels=1).eval()
    with torch.no_grad():
        theirs.score.weight.normal_(0.0, 0.3)
    theirs.save_pretrained(tmp_path / "trl", max_shard_size="5KB" if form == "shards" else "50GB")
    if form == "bin":
        torch.save(load_file(tmp_path / "trl" / "model.safetensors"), tmp_path / "trl" / "pytorch_model.bin")
        (tmp_path / "trl" / "model.safetensors").unlink()
    assert (form == "shards") == (tmp_path / "trl" / "model.safetensors.index.json").exists()
    tokenizer.save_pretrained(tmp_path / "trl")
    assert is_scalar_directory(tmp_path / "trl")
    loaded = ScalarModel.from_pretrained(tmp_path / "trl", dtype=FP32)
    ids, lengths = rows()
    with torch.no_grad():
        wanted = torch.stack(
            [theirs(ids[row : row + 1, :length]).logits[0, 0] for row, length in enumerate(lengths[3:], 3)]
        )
    torch.testing.assert_close(scores(loaded)[3:], wanted, atol=2e-5, rtol=1e-4)
    assert loaded.score_range is None
    with pytest.raises(ConfigError, match="is a reward model or critic"):
        load_causal_lm(tmp_path / "trl", dtype=FP32)


@pytest.mark.parametrize("name", ["score", "value_head"])
def test_a_reward_model_of_openrlhf(name, tiny_models, tokenizer, tmp_path):
    """A backbone under its usual prefix, a head, and the mean and standard deviation of its scores in config.json."""
    model = ScalarModel.from_base(tiny_models["llama"], dtype=FP32, seed=2)
    tensors = {f"model.{key}": tensor.contiguous() for key, tensor in model.backbone.state_dict().items()}
    config = json.loads((tiny_models["llama"] / "config.json").read_text())
    config.update(architectures=["RewardModel"], mean=0.5, std=2.0, normalize_reward=True)
    place = tmp_path / "openrlhf"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    save_file({**tensors, f"{name}.weight": model.scalar_head.weight.detach()}, place / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    loaded = ScalarModel.from_pretrained(place, dtype=FP32)
    torch.testing.assert_close(scores(loaded), (scores(model) - 0.5) / 2.0, atol=2e-6, rtol=1e-5)


def test_classifiers_that_are_no_reward_model(tiny_models, tmp_path):
    two = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_models["llama"], num_labels=2)
    two.save_pretrained(tmp_path / "two")
    for load in (check_scalar_directory, lambda path: ScalarModel.from_pretrained(path, dtype=FP32)):
        with pytest.raises(ConfigError, match="two is a classifier with num_labels=2; a reward model has num_labels=1"):
            load(tmp_path / "two")
    bert = transformers.BertConfig(
        vocab_size=ROWS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1
    )
    transformers.BertForSequenceClassification(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match="BertForSequenceClassification.*does not score the last token"):
        ScalarModel.from_pretrained(tmp_path / "bert", dtype=FP32)


def test_an_architecture_without_a_classifier_keeps_its_head_apart(tokenizer, tmp_path, caplog):
    config = transformers.CohereConfig(**SIZES, num_key_value_heads=1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = trained_reward(tmp_path / "base")
    with caplog.at_level("INFO", logger="rlhf"):
        export_scalar_model(model, tokenizer, tmp_path / "reward")
    assert "no sequence classifier for a cohere model" in caplog.text
    loaded = ScalarModel.from_pretrained(tmp_path / "reward", dtype=FP32)
    torch.testing.assert_close(scores(loaded), (scores(model) - 0.377) / 1.93, atol=2e-6, rtol=1e-5)
    export_scalar_model(loaded, tokenizer, tmp_path / "again")
    assert torch.equal(scores(ScalarModel.from_pretrained(tmp_path / "again", dtype=FP32)), scores(loaded))


# -------------------------------------------------------------------------------------------------------------- padding


def test_padding_apart_from_the_end_of_sequence(tokenizer, tmp_path):
    spare = with_own_padding(tokenizer, ROWS)
    assert spare.pad_token == PAD_TEXT and spare.pad_token_id == TOKENS and tokenizer.pad_token_id == 0
    tight = with_own_padding(tokenizer, TOKENS)
    assert tight.pad_token is None or tight.pad_token_id < TOKENS and tight.pad_token_id != tight.eos_token_id
    spare.save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.pad_token_id == TOKENS and with_own_padding(loaded, ROWS) is loaded
    text = "What is it?"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_special_token_that_is_there_pads(tokenizer):
    known = make_tokenizer()
    known.add_special_tokens({"additional_special_tokens": ["<|finetune_right_pad_id|>"]})
    changed = with_own_padding(known, ROWS)
    assert changed.pad_token == "<|finetune_right_pad_id|>" and len(changed) == len(known)


def test_a_token_that_was_added_for_padding_pads_though_nobody_says_that_it_is_special(tokenizer):
    known = make_tokenizer()
    known.add_tokens(["<pad>"])
    changed = with_own_padding(known, ROWS)
    assert changed.pad_token == "<pad>" and len(changed) == len(known)


@pytest.mark.parametrize(("bytes_there", "rows", "pad"), [
    (("\u0121",), 3, "\u0121"), (("<0x00>",), 3, "<0x00>"), (("\u0121", "<0x00>"), 4, "<0x00>"),
    (("\u0121", "<0x00>"), 3, "\u0121"), (("\u0121", "<0x00>"), 2, None), ((), 2, None), ((), 3, PAD_TEXT),
])  # fmt: skip
def test_where_no_row_is_to_spare_a_byte_that_ends_no_text_pads(bytes_there, rows, pad):
    """DEL of a byte-level tokenizer, NUL of a SentencePiece one; a token without a row of the embedding is none."""
    words = ["</s>", "a", *bytes_there]
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, "a"))
    known = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")
    changed = with_own_padding(known, rows)
    assert changed.pad_token == pad and known.pad_token == "</s>"
    assert len(changed) == len(known) + (pad == PAD_TEXT)


def test_the_end_of_sequence_does_not_pad_whatever_its_name_says(tokenizer):
    known = make_tokenizer()
    known.add_special_tokens({"eos_token": "<|end_or_pad|>", "pad_token": "<|end_or_pad|>"})
    changed = with_own_padding(known, ROWS)
    assert changed.pad_token == PAD_TEXT and changed.pad_token_id == TOKENS + 1
    known.add_tokens(["<pad>"])
    assert with_own_padding(known, ROWS).pad_token == "<pad>"


def test_without_any_room_rows_are_scored_one_by_one(tokenizer, tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama", tokenizer, vocab_size=TOKENS)
    export_scalar_model(trained_reward(base), tokenizer, tmp_path / "reward")
    config = json.loads((tmp_path / "reward" / "config.json").read_text())
    assert config.get("pad_token_id") is None
    assert load_tokenizer(tmp_path / "reward").pad_token_id == 0  # ours masks, and pads with the end as ever
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    ids, lengths = rows()
    with torch.no_grad():
        alone = [model(ids[row : row + 1, :length]).logits[0, 0] for row, length in enumerate(lengths)]
    wanted = scores(ScalarModel.from_pretrained(tmp_path / "reward", dtype=FP32))
    torch.testing.assert_close(torch.stack(alone) + model.config.score_bias, wanted, atol=2e-5, rtol=1e-4)


def test_the_saved_tokenizer_counts_as_the_one_it_was(tiny_models, tokenizer, tmp_path):
    """Else a critic could not grow from the reward model, which would be given texts anew."""
    from rlhf.rewards.reward_model import same_tokenizer

    export_scalar_model(trained_reward(tiny_models["llama"]), tokenizer, tmp_path / "reward")
    saved = load_tokenizer(tmp_path / "reward")
    assert saved.pad_token_id != tokenizer.pad_token_id and same_tokenizer(saved, tokenizer)
    other = make_tokenizer()
    other.add_special_tokens({"additional_special_tokens": ["<|sep|>"]})
    assert not same_tokenizer(saved, other)


# --------------------------------------------------------------------------------------------------------- saved states


class OlderScalarModel(torch.nn.Module):
    """The names that reward models and critics had: `head`, and their statistics as buffers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone, self.head, self.config = model.backbone, model.scalar_head, model.config
        self.register_buffer("score_mean", torch.tensor(0.5))
        self.register_buffer("score_std", torch.tensor(2.0))


def test_a_training_state_of_an_older_release_is_refused_by_name(tiny_models, tmp_path):
    """Its critic is not in the units of the rewards, so that going on from it would mix the two."""
    from rlhf.config import EngineConfig, OptimizerConfig
    from rlhf.engine import BatchPlan, training_engine
    from rlhf.engine.engine_state import load_engine_state, save_engine_state

    def engine(model: torch.nn.Module) -> Any:
        return training_engine(
            model, engine=EngineConfig(precision="fp32"), optimizer=OptimizerConfig(), plan=BatchPlan(1, 1, 1),
            total_steps=2,
        )  # fmt: skip

    older = OlderScalarModel(ScalarModel.from_base(tiny_models["gpt_neox"], dtype=FP32))
    save_engine_state(engine(older), tmp_path, "critic")
    fresh = engine(ScalarModel.from_base(tiny_models["gpt_neox"], dtype=FP32))
    with pytest.raises(ConfigError, match=r"another model: trainable weight head.weight \[1, 16\] is not in the model"):
        load_engine_state(fresh, tmp_path, "critic")


def test_an_adapter_that_peft_saved(tiny_models, tokenizer, tmp_path):
    """As TRL's RewardTrainer writes one: no classifier_config.json beside it."""
    from peft import LoraConfig, get_peft_model

    from rlhf.models.adapters import load_adapter
    from rlhf.models.loading import load_backbone

    base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_models["llama"], num_labels=1)
    theirs: Any = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"])).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    ids, lengths = rows()
    with torch.no_grad():
        wanted = theirs(input_ids=ids[3:, : lengths[3]]).logits[:, 0]
    merged = ScalarModel.from_pretrained(tmp_path / "adapter", dtype=FP32)
    torch.testing.assert_close(scores(merged)[3:], wanted, atol=2e-5, rtol=1e-4)
    backbone = load_adapter(load_backbone(tiny_models["llama"], dtype=FP32), tmp_path / "adapter", trainable=True)
    unmerged = ScalarModel.on_backbone(backbone, tmp_path / "adapter")
    torch.testing.assert_close(scores(unmerged), scores(merged), atol=2e-5, rtol=1e-4)
