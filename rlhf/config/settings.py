"""One dataclass per concern with flat, unique field names.

The docstring under a field is its entry in `docs/configuration.md`; facts about it stand in its `setting`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Literal

from rlhf.config.errors import ConfigError, require_at_least
from rlhf.config.facts import setting

EMBEDDED_BASE = "default"
"""`base_model` of the embedded tiny GPT-NeoX."""


@dataclass
class RunConfig:
    """Where a run writes, its seed, and how often it logs."""

    output_dir: str = setting("runs/default", may_change_on_resume=True, path="written")
    """Directory of the whole run; each stage writes into a subdirectory (`sft`, `reward`, `ppo`)."""
    cache_dir: str = setting("runs/.cache", may_change_on_resume=True, path="written")
    """Tokenised data and the embedded base model are kept here under content keys."""
    seed: int = 1
    """Seed of initialisation, data order and sampling."""
    log_every_steps: int = setting(10, may_change_on_resume=True)
    """Optimizer steps (PPO: iterations) between two lines of `metrics.jsonl`."""
    tensorboard: bool = setting(True, may_change_on_resume=True)
    """Write TensorBoard event files beside `metrics.jsonl`."""
    wandb_project: str | None = setting(None, may_change_on_resume=True)
    """Also log to this Weights & Biases project; needs the `wandb` package."""
    resume: Literal["auto", "never"] | None = setting(None, may_change_on_resume=True)
    """`auto` resumes from the newest whole training state of `output_dir`, or starts where there is none; `never`
    starts anew and removes what an unfinished run left. Unset starts, and refuses where an unfinished run lies."""
    overwrite: bool = setting(False, may_change_on_resume=True)
    """Start anew where a run lies, also a finished one, and remove it first, whole; off refuses."""
    save_every_steps: int = setting(0, may_change_on_resume=True)
    """Optimizer steps (PPO: iterations) between two saved training states; 0 saves ten times in a run."""
    keep_last: int = setting(2, may_change_on_resume=True)
    """Training states kept, the newest ones; 0 saves none, and a killed run is lost."""
    keep_every: int = setting(0, may_change_on_resume=True)
    """Keep for good the training states whose step is a multiple of this, also after the run; 0 keeps none."""
    rank_timeout_minutes: float = setting(30.0, may_change_on_resume=True)
    """End the whole job when no process has made progress in training for so long (a hang); 0 waits for ever."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "log_every_steps")
        require_at_least(self, 0, "save_every_steps", "keep_last", "keep_every", "rank_timeout_minutes")
        if self.overwrite and self.resume == "auto":
            raise ConfigError(
                "overwrite and resume=auto contradict each other: use --overwrite to remove the run that lies there, "
                "or --resume auto to go on with it"
            )
        if self.wandb_project and importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                f"wandb_project={self.wandb_project!r} needs the wandb package, which is not installed; "
                "run `pip install wandb` or leave wandb_project unset"
            )


@dataclass
class ModelConfig:
    """Which base model, and which of its weights train."""

    base_model: str = setting(EMBEDDED_BASE, may_change_on_resume=True, path="read", names_model=True)
    """Model directory or hub name to start from; `default` is the embedded tiny Korean GPT-NeoX."""
    trust_remote_code: bool = setting(False, may_change_on_resume=True)
    """Allow model code shipped with a hub repository to run."""
    attn_implementation: str = setting("sdpa", may_change_on_resume=True)
    """Attention kernel by its `transformers` name: sdpa, eager, flash_attention_2."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Load the frozen base in 8-bit (LLM.int8) or 4-bit NF4 with double quantisation (QLoRA); needs LoRA."""
    lora_rank: int = 0
    """Rank r of LoRA; 0 trains every weight."""
    lora_alpha: int = 16
    """LoRA scaling numerator (KULLM: 16)."""
    lora_dropout: float = 0.0
    """Dropout on LoRA inputs (KULLM: 0.05)."""
    lora_targets: list[str] = field(default_factory=list)
    """Names of the linear modules to adapt; empty picks the attention projections of the architecture."""
    share_base: bool = setting(True, may_change_on_resume=True)
    """With LoRA, keep one copy of a base that several of PPO's models stand on; off loads each its own."""
    gradient_checkpointing: bool = setting(False, may_change_on_resume=True)
    """Recompute activations in the backward pass: less memory, about a third more time."""
    model_dropout: float = 0.0
    """Dropout probability set on the base model while it trains (KULLM-RLHF: none)."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "lora_rank")
        if self.quantization != "none" and self.lora_rank == 0:
            raise ConfigError(
                f"quantization={self.quantization} needs lora_rank above 0: a quantised base is frozen and only an "
                "adapter can train on it"
            )


@dataclass
class EngineConfig:
    """DeepSpeed: how states are partitioned and in which precision they live."""

    zero_stage: Literal[0, 1, 2, 3] = setting(0, may_change_on_resume=True)
    """ZeRO stage (Rajbhandari et al. 2020): 1 partitions optimizer states, 2 gradients too, 3 weights too."""
    offload: Literal["none", "optimizer", "all"] = setting("none", may_change_on_resume=True)
    """Keep optimizer states (`optimizer`) and, under ZeRO-3, the weights too (`all`) in CPU memory."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Compute precision; `auto` is bf16 where the accelerator has it, else fp32."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global L2 norm; 0 turns clipping off."""
    side_by_side: bool = setting(True, may_change_on_resume=True)
    """PPO on a CPU, one process, not ZeRO-3: run independent models at the same time, each on half of the threads."""
    deepspeed_config: str | None = setting(None, may_change_on_resume=True, path="read")
    """A DeepSpeed json file merged into the generated settings; a contradiction is an error."""


def check_together(model: ModelConfig, engine: EngineConfig) -> None:
    """ConfigError for a model and an engine that each are right and do not go together."""
    if model.quantization != "none" and engine.zero_stage == 3:
        raise ConfigError(
            f"quantization={model.quantization} does not go with zero_stage=3: quantised weights cannot be "
            "partitioned; use zero_stage 0, 1 or 2, which learns the same, or quantization=none, which does not"
        )


@dataclass
class OptimizerConfig:
    """AdamW and its schedule."""

    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """AdamW in full precision, or bitsandbytes' 8-bit states, also paged (LawBot)."""
    learning_rate: float = 1e-5
    """Peak learning rate (PPO: of the actor)."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices; biases and norms have none."""
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Adam's beta1 and beta2 (DeepSpeed-Chat: 0.9, 0.95)."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up; cosine and linear end at 0."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up; wins over `warmup_ratio` when above 0."""
    warmup_ratio: float = 0.0
    """Share of all optimizer steps used for linear warm-up."""

    def __post_init__(self) -> None:
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ConfigError(f"adam_betas={self.adam_betas} must be two numbers in [0, 1), such as 0.9 0.95")
        require_at_least(self, 0, "learning_rate", "weight_decay", "warmup_steps", "warmup_ratio")


@dataclass
class BatchConfig:
    """How many sequences make a step, and for how long."""

    global_batch_size: int = 32
    """Sequences (reward: prompts) of one optimizer step over all devices."""
    micro_batch_size: int = setting(8, may_change_on_resume=True)
    """Sequences (reward: prompts) of one forward pass on one device at most, were all as long as the step's longest;
    fewer where a device has fewer. It changes memory and speed, not what is learnt."""
    micro_batch_tokens: int = setting(0, may_change_on_resume=True)
    """Tokens of one forward pass on one device; 0 takes micro_batch_size times the longest sequence of the step."""
    epochs: float = 1.0
    """Passes over the training data."""
    max_steps: int = 0
    """Stop after this many optimizer steps (PPO: iterations); 0 means `epochs` decides."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "global_batch_size", "micro_batch_size")
        require_at_least(self, 0, "epochs", "max_steps", "micro_batch_tokens")


@dataclass
class DataConfig:
    """How rows become tokens; the data sets themselves are named by each stage's own field."""

    template: str = setting("kullm", path="read")
    """Prompt template: kullm, alpaca, koalpaca, law_polyglot, chat (the tokenizer's own), none, or a file."""
    on_bad_row: Literal["error", "skip"] = setting("error", may_change_on_resume=True)
    """A row that cannot be used stops the run, or is counted and listed in `skipped_rows.jsonl`."""
    max_prompt_tokens: int = 256
    """Longer prompts lose their beginning (KULLM-RLHF: 256)."""
    max_response_tokens: int = 256
    """Longer responses lose their end; PPO samples at most this many tokens (KULLM-RLHF: 256)."""
    eval_fraction: float = 0.05
    """Share of the prompts held out (by a hash of the prompt) where no evaluation data is named."""
    stage_split: str | None = None
    """Split each data set over sft, reward and ppo by a hash of the prompt, such as `2,4,4`; unset uses all of it."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "max_prompt_tokens", "max_response_tokens")
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(f"eval_fraction={self.eval_fraction} must lie in [0, 1): a share of the prompts")


@dataclass
class SFTDataConfig(DataConfig):
    """Data of supervised fine-tuning."""

    sft_data: list[str] = setting(["sample:sft_train"], may_change_on_resume=True, path="read")
    """Data sets: a path, a hub name, `sample:NAME`, or a mapping {path, columns, format, weight, split}."""
    sft_eval_data: list[str] = setting([], may_change_on_resume=True, path="read")
    """Held-out data sets; empty holds out `eval_fraction` of `sft_data`."""


@dataclass
class RewardDataConfig(DataConfig):
    """Data of the reward model."""

    preference_data: list[str] = setting(["sample:preference_train"], may_change_on_resume=True, path="read")
    """Data sets of pairs or rankings (the two may be blended); the same forms as `sft_data`."""
    preference_eval_data: list[str] = setting([], may_change_on_resume=True, path="read")
    """Held-out data sets; empty holds out `eval_fraction` of `preference_data`."""


@dataclass
class OfflineDataConfig(RewardDataConfig):
    """Data of preference optimisation without sampling."""

    prompt_eval_data: list[str] = setting([], may_change_on_resume=True, path="read")
    """Held-out prompts to which responses are sampled at every evaluation, to see what they are like; none by
    default."""


@dataclass
class PPODataConfig(DataConfig):
    """Data of PPO."""

    prompt_data: list[str] = setting(["sample:prompts_train"], may_change_on_resume=True, path="read")
    """Data sets of prompts; the same forms as `sft_data`."""
    prompt_eval_data: list[str] = setting([], may_change_on_resume=True, path="read")
    """Held-out prompts; empty holds out `eval_fraction` of `prompt_data`."""
    ptx_data: list[str] = setting([], may_change_on_resume=True, path="read")
    """Data sets of the ptx mixture (prompt and response); needed when `ptx_coef` is above 0."""


REMOVED_FIELDS = {
    "top_k": "PPO scores the distribution it samples from, which a filter would change; lower `temperature` instead",
    "top_p": "PPO scores the distribution it samples from, which a filter would change; lower `temperature` instead",
    "gather_for_generation": "under ZeRO-3 the actor's weights are always gathered once for a rollout; leave it out",
}
"""Names that were fields of an earlier release, and what to do instead."""
