"""GPU memory of every preset, by stage: calculated, not measured.

python benchmarks/preset_memory.py [FILE ...]

Prints the table that training_scripts/configs/README.md holds, in GB (1e9 bytes) for each device. Parameters are
counted on models without memory (`meta` device) of the published sizes, adapters as `apply_lora` puts them there.
What lies in memory, of T weights in all, n of them trained, b bytes each (bf16 2, fp32 4), on W devices:

  weights      b T; 4bit: 1/2 + 1/64 + 4/16384 bytes for each weight of a linear layer (NF4 in blocks of 64, the scales
               in 8 bits with a float32 for each 256), 8bit: 1 and a float32 for each row; ZeRO-3 divides by W
  optimizer    float32 masters 4 n (not in fp32 at stage 0) and Adam's moments 8 n (8-bit: 2 n + 8 n / 256), divided by
               W from stage 1 on; none on the device with offload. 16-bit stage 0 runs as stage 1
  gradients    4 n in float32, divided by W from stage 2 on; on the CPU with offload
  buckets      of stages 2 and 3 while an engine's gradients are computed, b bytes an element: `deepspeed_settings`;
               stage 3 also gathers two blocks at a time
  cache        keys and values of generation_batch_size responses of full length: 2 b layers kv_heads head_dim tokens;
               under ZeRO-3 also the whole actor, gathered for the rollout
  activations  an estimate, of t tokens in a micro-batch of rows of full length (reward: two responses to a prompt):
               34 h t bytes a block in 16 bits (Korthikanti et al. 2022, arXiv 2205.05198, eq. 2, without the scores of
               attention, which sdpa does not keep), of one block with gradient checkpointing and b h t a block besides;
               and three pieces of logits in float32, and the gradient of a trained vocabulary head in float32. PPO's
               scoring passes take four times the tokens without gradients: 12 b h bytes each; the larger counts

Peak: weights + optimizer + gradients + the larger of cache (sampling) and activations + buckets (training), which is
a little too much where gradients are gone while PPO samples (stages 2 and 3, fp32). Not counted: the CUDA context
(about 0.5 GB for each process), fragmentation, temporary copies while loading. Stages follow one another and share
nothing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from rlhf.config import ModelConfig
from rlhf.engine import BatchPlan, deepspeed_settings
from rlhf.models.lora import apply_lora, linear_module_names
from rlhf.models.tiny_base import TinyRecipe
from rlhf.numerics.vocabulary_head import PIECE_ELEMENTS
from rlhf.pipeline.stages import default_run, parse_stage

CONFIGS = Path(__file__).resolve().parents[1] / "training_scripts" / "configs"
BYTES_4BIT = 1 / 2 + 1 / 64 + 4 / (64 * 256)
BLOCK_BYTES = 34
"""Bytes of activations that a block keeps for each token and hidden unit in 16 bits."""
FORWARD_VALUES = 12
"""Values that a block holds for each token and hidden unit while it computes without gradients: its input and output
(1 each), query, key, value and what attention gives (4), the feed-forward layer's input, product and result (6)."""
RECIPE = TinyRecipe()


def _polyglot(hidden: int, layers: int, heads: int) -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=30_080, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * hidden, max_position_embeddings=2048,
    )  # fmt: skip


ARCHITECTURES: dict[str, Any] = {
    # the model cards of EleutherAI/polyglot-ko-*: n_layers, d_model, n_heads, n_vocab 30,003 / 30,080
    "EleutherAI/polyglot-ko-1.3b": _polyglot(2048, 24, 16),
    "EleutherAI/polyglot-ko-3.8b": _polyglot(3072, 32, 24),
    "EleutherAI/polyglot-ko-5.8b": _polyglot(4096, 28, 16),
    "EleutherAI/polyglot-ko-12.8b": _polyglot(5120, 40, 40),
    # Llama 2 7B (arXiv 2307.09288) with the longer Korean vocabulary of Llama-2-ko
    "beomi/llama-2-ko-7b": LlamaConfig(
        vocab_size=46_336, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32,
    ),
    "default": GPTNeoXConfig(
        vocab_size=RECIPE.vocabulary_size, hidden_size=RECIPE.hidden_size, num_hidden_layers=RECIPE.layers,
        num_attention_heads=RECIPE.heads, intermediate_size=RECIPE.intermediate_size,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """Weights of one model by what becomes of them: in `linear` layers that may be quantised (`rows` outputs), in the
    vocabulary `head`, elsewhere; those of its adapter."""

    linear: int
    rows: int
    head: int
    elsewhere: int
    adapter: int = 0

    @property
    def base(self) -> int:
        """All weights but the adapter's."""
        return self.linear + self.head + self.elsewhere

    def bytes(self, size: int, quantization: str) -> float:
        """Bytes of the base with `size` bytes to a weight that is not quantised."""
        if quantization == "none":
            return size * self.base
        linear = BYTES_4BIT * self.linear if quantization == "4bit" else self.linear + 4 * self.rows
        return linear + size * (self.head + self.elsewhere)

    def without_head(self) -> Parts:
        """The backbone of a scalar model."""
        return replace(self, head=0)


@cache
def _model_parts(name: str, rank: int, targets: tuple[str, ...]) -> Parts:
    return count_parts(ARCHITECTURES[name], rank, targets)


def count_parts(config: Any, rank: int = 0, targets: tuple[str, ...] = ()) -> Parts:
    """The weights of a causal LM of this configuration with an adapter of `rank` on `targets` (empty: the default)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        linear = [model.get_submodule(name) for name in linear_module_names(model)]
        head = model.get_output_embeddings().weight.numel()
        quantised = sum(layer.weight.numel() for layer in linear)
        total = sum(weight.numel() for weight in model.parameters())
        rows = sum(layer.weight.shape[0] for layer in linear)
        adapter = 0
        if rank:
            adapted = apply_lora(model, ModelConfig(lora_rank=rank, lora_targets=list(targets)))
            adapter = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    return Parts(quantised, rows, head, total - quantised - head, adapter)


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each device in one stage."""

    weights: float
    optimizer: float
    gradients: float
    buckets: float
    cache: float
    activations: float

    @property
    def peak(self) -> float:
        """The larger of sampling and training."""
        return self.weights + self.optimizer + self.gradients + max(self.cache, self.activations + self.buckets)


def stage_memory(stages: Mapping[str, Any], name: str, devices: int) -> StageMemory:
    """The memory of stage `name`; `stages` are the configurations of all stages of the run."""
    config = stages[name]
    size = 4 if config.engine.precision == "fp32" else 2
    weights, trained = _models(stages, name, size)
    stage = config.engine.zero_stage if size == 4 else max(config.engine.zero_stage, 1)
    over = {least: devices if stage >= least else 1 for least in (1, 2, 3)}
    on_device = config.engine.offload == "none"
    moments = 8 if config.optimizer.optimizer == "adamw" else 2 + 8 / 256
    masters = 0 if stage == 0 else 4
    architecture = ARCHITECTURES[config.model.base_model]
    return StageMemory(
        weights=weights / over[3] if config.engine.offload != "all" else 0.0,
        optimizer=on_device * (masters + moments) * sum(trained) / over[1],
        gradients=on_device * 4 * sum(trained) / over[2],
        buckets=_buckets(config, stage, size, devices),
        cache=_cache(config, architecture, size, devices) if name == "ppo" else 0.0,
        activations=_activations(config, architecture, size, 2 if name == "reward" else 1),
    )


def _models(stages: Mapping[str, Any], name: str, size: int) -> tuple[float, list[int]]:
    """Bytes of all weights of a stage before ZeRO divides them, and how many weights each of its engines trains."""
    config = stages[name]
    model = config.model
    own = _adapted(model.base_model, model)
    head = getattr(ARCHITECTURES[model.base_model], "hidden_size", 0) + 1
    if name != "ppo":
        own = own if name == "sft" else own.without_head()
        extra = 0 if name == "sft" else head
        trained = own.adapter + extra if model.lora_rank else own.base + extra
        return own.bytes(size, model.quantization) + size * (own.adapter + extra), [trained]
    reward = stages["reward"].model
    scalar = _adapted(reward.base_model, reward).without_head()
    head = ARCHITECTURES[reward.base_model].hidden_size + 1
    if not model.lora_rank:  # four whole models
        return size * (2 * own.base + 2 * (scalar.base + head)), [own.base, scalar.base + head]
    if reward.lora_rank:  # reward model and critic: one base, an adapter each
        base, adapters = scalar.bytes(size, model.quantization), 2 * scalar.adapter
        critic = scalar.adapter + head
    else:  # the reward model is whole and lends its weights; quantised, the critic has a base of its own
        fresh = _adapted(reward.base_model, model).without_head()
        base, adapters = scalar.bytes(size, "none"), fresh.adapter
        base += scalar.bytes(size, model.quantization) if model.quantization != "none" else 0
        critic = fresh.adapter + head
    actor = own.bytes(size, model.quantization) + size * own.adapter
    return actor + base + size * (adapters + 2 * head), [own.adapter, critic]


def _adapted(name: str, model: ModelConfig) -> Parts:
    return _model_parts(name, model.lora_rank, tuple(model.lora_targets))


def _buckets(config: Any, stage: int, size: int, devices: int) -> float:
    """Bytes of the communication buffers of one engine."""
    if stage < 2:
        return 0.0
    hidden = ARCHITECTURES[config.model.base_model].hidden_size
    settings = deepspeed_settings(
        zero_stage=stage, offload=config.engine.offload, dtype=torch.bfloat16 if size == 2 else torch.float32,
        plan=BatchPlan(devices, 1, devices), max_grad_norm=1.0, hidden_size=hidden,
    )["zero_optimization"]  # fmt: skip
    gathered = 0 if stage < 3 else settings["stage3_prefetch_bucket_size"] + 24 * hidden**2
    return float(size * (settings["reduce_bucket_size"] + gathered))


def _cache(config: Any, architecture: Any, size: int, devices: int) -> float:
    """Bytes of keys and values of all responses that are sampled side by side, and of what sampling gathers."""
    batch, data = config.batch, config.data
    responses = -(-batch.rollout_batch_size * batch.samples_per_prompt // devices)
    slots = min(batch.generation_batch_size or responses, responses)
    heads = getattr(architecture, "num_key_value_heads", None) or architecture.num_attention_heads
    head_dim = architecture.hidden_size // architecture.num_attention_heads
    tokens = slots * (data.max_prompt_tokens + data.max_response_tokens)
    whole = size * _model_parts(config.model.base_model, 0, ()).base if config.engine.zero_stage == 3 else 0
    return 2 * size * architecture.num_hidden_layers * heads * head_dim * tokens + whole


def _activations(config: Any, architecture: Any, size: int, responses: int) -> float:
    """Bytes of the activations and logits of one micro-batch."""
    data, batch = config.data, config.batch
    length = data.max_prompt_tokens + data.max_response_tokens
    tokens = batch.micro_batch_tokens or batch.micro_batch_size * length * responses
    block = BLOCK_BYTES * size / 2 * architecture.hidden_size * tokens
    layers = architecture.num_hidden_layers
    if config.model.gradient_checkpointing:
        kept = layers * size * architecture.hidden_size * tokens + block
    else:
        kept = layers * block
    scored = getattr(batch, "scoring_batch_tokens", None)
    if scored is not None:
        kept = max(kept, FORWARD_VALUES * size * architecture.hidden_size * (scored or 4 * tokens))
    if responses == 2:  # a scalar model has no vocabulary head
        return kept
    logits = 3 * 4 * min(PIECE_ELEMENTS, tokens * architecture.vocab_size)
    head = 0 if config.model.lora_rank else 4 * architecture.hidden_size * architecture.vocab_size
    return kept + logits + head


def presets(paths: list[Path]) -> Iterator[tuple[str, int, str, StageMemory]]:
    """Name, devices, stage and memory, stage by stage, of configuration files."""
    for path in paths:
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        found = re.fullmatch(r"# devices: (\d+)", first)
        if found is None:
            raise SystemExit(f"{path} must begin with `# devices: N`, not {first!r}")
        stages = {stage.name: parse_stage(stage.name, ["--config", str(path)]) for stage in default_run()}
        for name in stages:
            yield path.stem, int(found[1]), name, stage_memory(stages, name, int(found[1]))


def table(paths: list[Path]) -> str:
    """The Markdown table of configuration files."""
    lines = [
        "| preset | devices | stage | weights | optimizer | gradients | buckets | cache | activations | peak |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for preset, devices, stage, memory in presets(paths):
        columns = (*vars(memory).values(), memory.peak)
        shown = " | ".join(f"{value / 1e9:.2f}" if value >= 5e6 else "0" for value in columns)
        first = f"`{preset}` | {devices}" if stage == "sft" else " | "
        lines.append(f"| {first} | {stage} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([Path(name) for name in sys.argv[1:]] or sorted(CONFIGS.glob("*.yaml"))))
