"""What a model cannot do is said before anything loads: too few positions, routers without their loss."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from rlhf.checkpoint.export import export_causal_lm, export_scalar_model
from rlhf.config import ConfigError, EngineConfig, ModelConfig, OptimizerConfig
from rlhf.engine import BatchPlan, inference_engine, training_engine
from rlhf.generation.decoders import HuggingFaceDecoder
from rlhf.models.experts import check_no_experts, number_of_experts
from rlhf.models.forward import forward_logits
from rlhf.models.loading import load_causal_lm
from rlhf.models.lora import apply_lora
from rlhf.models.positions import check_positions, max_positions
from rlhf.models.scalar import ScalarModel
from rlhf.models.token_logprobs import token_logprobs
from tests.support.tiny_models import ROWS

FP32 = torch.float32
SIZES = {
    "vocab_size": ROWS, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen2_moe": transformers.Qwen2MoeConfig(
        **SIZES, num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8
    ),
    "olmoe": transformers.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": transformers.GptOssConfig(**SIZES, num_local_experts=4, head_dim=8),
}


def save(config: transformers.PreTrainedConfig, directory: Path, tokenizer) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


# ------------------------------------------------------------------------------------------------------------ positions


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gpt_neox", "llama", "gemma"])
def test_more_tokens_than_positions_is_an_error_before_anything_loads(architecture, tiny_models, tmp_path):
    path = tmp_path / "model"  # no weights: they cannot be read
    path.mkdir()
    (path / "config.json").write_bytes((tiny_models[architecture] / "config.json").read_bytes())
    check_positions(path, 64, what="the actor")
    with pytest.raises(ConfigError) as raised:
        check_positions(path, 80, what="the actor")
    said = str(raised.value)
    assert f"the actor {path} has 64 positions, and max_prompt_tokens + max_response_tokens is 80" in said
    assert (
        0 < said.index("together they may be 64") < said.index("changes nothing") < said.index("changes the training")
    )


def test_positions_of_an_adapter_are_those_of_its_base(tiny_models, tokenizer, tmp_path):
    config = ModelConfig(lora_rank=2)
    export_causal_lm(apply_lora(load_causal_lm(tiny_models["gpt2"], dtype=FP32), config), tokenizer, tmp_path / "actor")
    reward = apply_lora(ScalarModel.from_base(tiny_models["gpt2"], dtype=FP32), config)
    export_scalar_model(reward, tokenizer, tmp_path / "reward")
    for name in ("actor", "reward"):
        check_positions(tmp_path / name, 64, what=f"the {name}")
        with pytest.raises(ConfigError, match=f"the {name} .*has 64 positions"):
            check_positions(tmp_path / name, 65, what=f"the {name}")
    with pytest.raises(ConfigError, match="is not there"):
        check_positions(tmp_path / "nothing", 1, what="the actor")


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (transformers.LlamaConfig(**SIZES), 64),
        (transformers.LlamaConfig(**SIZES, rope_parameters={
            "rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), 128),
        (transformers.Qwen2Config(**SIZES, rope_parameters={
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}), 128),
        (transformers.LlamaConfig(**SIZES, rope_parameters={
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 8,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0}), 64),
        (transformers.Gemma3TextConfig(**SIZES), 64),
        (transformers.BloomConfig(), None),
        (transformers.FalconConfig(alibi=True), None),
        (transformers.FalconConfig(alibi=False), 2048),
        (transformers.MptConfig(max_seq_len=128), None),  # ALiBi by default
        (transformers.MptConfig(max_seq_len=128, attn_config={"alibi": False}), 128),
        (transformers.MambaConfig(), None),
    ],
)  # fmt: skip
def test_positions_by_configuration(config, limit):
    assert max_positions(config) == limit
    check_positions(config, limit or 10**9, what="the critic")
    if limit is not None:
        with pytest.raises(ConfigError, match=f"the critic has {limit} positions"):
            check_positions(config, limit + 1, what="the critic")


def test_gpt2_beyond_its_positions_fails_without_the_check(tiny_models):
    """What the check is for."""
    model = load_causal_lm(tiny_models["gpt2"], dtype=FP32)
    with pytest.raises(IndexError):
        forward_logits(model, torch.ones(1, 65, dtype=torch.long), torch.ones(1, 65))


# -------------------------------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize(("experts", "refused"), [(1, False), (2, True)])
def test_two_experts_are_a_mixture_and_one_is_a_dense_model(experts, refused):
    config = transformers.MixtralConfig(**SIZES, num_local_experts=experts)
    assert number_of_experts(config) == experts
    with pytest.raises(ConfigError, match="has 2 experts") if refused else nullcontext():
        check_no_experts(config)


@pytest.mark.parametrize("architecture", EXPERTS)
def test_a_mixture_of_experts_does_not_train(architecture, tokenizer, tmp_path):
    assert number_of_experts(EXPERTS[architecture]) == 4
    path = save(EXPERTS[architecture], tmp_path / "model", tokenizer)
    expected = f"a {architecture} model has 4 experts .*load-balancing loss"
    with pytest.raises(ConfigError, match=expected):
        apply_lora(load_causal_lm(path, dtype=FP32), ModelConfig(lora_rank=2, lora_targets=["q_proj"]))
    with pytest.raises(ConfigError, match=expected):
        apply_lora(ScalarModel.from_base(path, dtype=FP32), ModelConfig(lora_rank=2, lora_targets=["q_proj"]))
    plan, engine = BatchPlan(1, 1, 1), EngineConfig(precision="fp32")
    for model in (load_causal_lm(path, dtype=FP32), ScalarModel.from_base(path, dtype=FP32)):
        with pytest.raises(ConfigError, match=expected):
            training_engine(model, engine=engine, optimizer=OptimizerConfig(), plan=plan, total_steps=1)
    frozen = inference_engine(ScalarModel.from_base(path, dtype=FP32), engine=engine, plan=plan)
    ids = torch.tensor([[3, 4, 5]])
    assert frozen(ids, torch.ones_like(ids)).shape == (1, 3)


def test_dense_models_have_one_expert():
    names = ("LlamaConfig", "GPTNeoXConfig", "DogeConfig", "OPTConfig", "Gemma3Config", "Qwen3Config")
    dense = [getattr(transformers, name)() for name in names]
    assert [number_of_experts(config) for config in dense] == [1] * len(dense)
    assert number_of_experts(transformers.DbrxConfig()) == 4


# ------------------------------------------------------------------------------------------------------------ attention


def gemma(kind: str) -> transformers.PreTrainedConfig:
    made = {"gemma2": transformers.Gemma2Config, "gemma3": transformers.Gemma3TextConfig}[kind]
    # a low cap and a short window: both are heard
    cap = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0} if kind == "gemma2" else {}
    return made(**SIZES, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"], **cap)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_gemma_scores_and_generates_under_the_default_attention(kind, tokenizer, tmp_path, ragged, caplog):
    path = save(gemma(kind), tmp_path / kind, tokenizer)
    with caplog.at_level("INFO", logger="rlhf"):
        model = load_causal_lm(path, dtype=FP32).eval()
    wanted = "eager" if kind == "gemma2" else "sdpa"
    assert model.config._attn_implementation == wanted
    assert ("eager is taken" in caplog.text) == (kind == "gemma2")
    reference = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    right_ids, right_mask, left_ids, left_mask = ragged
    for ids, mask in ((right_ids, right_mask), (left_ids, left_mask)):
        scored = mask.clone()
        scored[torch.arange(len(mask)), mask.long().argmax(1)] = False  # nothing comes before the first token
        with torch.no_grad():
            found, _ = token_logprobs(model, ids, mask, scored)
            for row in range(len(ids)):
                alone = ids[row][mask[row]]
                logprobs = reference(alone[None]).logits[0, :-1].log_softmax(-1).gather(1, alone[1:, None])[:, 0]
                torch.testing.assert_close(found[row][scored[row]], logprobs, atol=2e-5, rtol=1e-4)
    prompt = left_ids[:1][left_mask[:1]][None]
    decoder = HuggingFaceDecoder(model, 0)
    with torch.no_grad():
        logits, chosen = decoder.prefill(prompt, [prompt.shape[1]]), []
        for _ in range(6):
            chosen.append(logits.argmax(-1))
            logits = decoder.step(chosen[-1])
        theirs = reference.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.cat(chosen).tolist() == theirs[0, prompt.shape[1] :].tolist()


def test_a_named_attention_is_kept(tokenizer, tmp_path):
    path = save(gemma("gemma3"), tmp_path / "gemma3", tokenizer)
    assert (
        load_causal_lm(path, ModelConfig(attn_implementation="eager"), dtype=FP32).config._attn_implementation
        == "eager"
    )


def test_a_gemma2_reward_model_and_adapter(tokenizer, tmp_path, ragged):
    path = save(gemma("gemma2"), tmp_path / "gemma2", tokenizer)
    model: nn.Module = apply_lora(ScalarModel.from_base(path, dtype=FP32), ModelConfig(lora_rank=2))
    values = model(ragged[0], ragged[1])[ragged[1]]
    values.pow(2).sum().backward()
    torch.testing.assert_close(values, model(ragged[2], ragged[3])[ragged[3]], atol=2e-5, rtol=1e-4)
