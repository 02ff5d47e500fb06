"""Mixtures of experts: known by their configuration, and not trained here."""

from __future__ import annotations

from typing import Any

from rlhf.config import ConfigError

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Names that configurations of `transformers` give to the number of experts of a layer."""


def check_no_experts(config: Any) -> None:
    """ConfigError for the configuration of a mixture of experts that is to train.

    Its router needs a load-balancing loss beside that of the task (Shazeer et al. 2017; Fedus et al. 2021), over the
    tokens of a whole batch. None of the losses here has one: all tokens would drift to a few experts, with adapters
    on a frozen router too.
    """
    experts = number_of_experts(config)
    if experts > 1:
        raise ConfigError(
            f"a {config.model_type} model has {experts} experts to a layer, and the load-balancing loss of their "
            f"router is not computed here: train a dense model (such a model can serve frozen, as a reward model)"
        )


def number_of_experts(config: Any) -> int:
    """Experts that a router chooses from in a layer; 1 for a dense model."""
    config = config.get_text_config()
    if getattr(config, "is_moe", True) is False:  # Doge names a number of experts in its dense form, too
        return 1
    counts = [getattr(config, name, None) for name in EXPERT_COUNTS]
    counts.append(getattr(getattr(config, "ffn_config", None), "moe_num_experts", None))  # DBRX
    return max((count for count in counts if isinstance(count, int)), default=1)
