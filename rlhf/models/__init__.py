"""Language models: loading, a scalar head for rewards and values, LoRA adapters, the embedded tiny base."""

from rlhf.models.loading import check_vocabulary, load_causal_lm, load_tokenizer
from rlhf.models.lora import adapter_disabled, apply_lora, has_adapter, merge_adapter
from rlhf.models.scalar import ScalarModel
from rlhf.models.tiny_base import build_tiny_base

__all__ = [
    "ScalarModel",
    "adapter_disabled",
    "apply_lora",
    "build_tiny_base",
    "check_vocabulary",
    "has_adapter",
    "load_causal_lm",
    "load_tokenizer",
    "merge_adapter",
]
