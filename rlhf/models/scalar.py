"""A base model with one number per position: the reward model and the critic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf.checkpoint.export import save_tokenizer
from rlhf.config import ConfigError, ModelConfig
from rlhf.models.classifier import (
    LENGTH_CURVE_FILE,
    SCORE_RANGE_FILE,
    HeadWeights,
    read_head,
    read_length_curve,
    read_score_range,
    save_classifier,
)
from rlhf.models.directories import check_scalar_directory
from rlhf.models.forward import hidden_states
from rlhf.models.loading import load_backbone
from rlhf.models.padding import with_own_padding
from rlhf.models.pretrained import PLAIN
from rlhf.numerics.local_regression import Curve


class ScalarHead(nn.Linear):
    """A linear layer to `outputs` numbers, computed in float32 whatever the dtype of its input and weights.

    Weights ~ N(0, 1/sqrt(hidden + 1)) (the second argument is the standard deviation), bias 0: Stiennon et al. 2020;
    Huang et al., "The N implementation details of RLHF with PPO". The first output starts alike however many there are.
    """

    def __init__(self, hidden_size: int, *, seed: int, outputs: int = 1) -> None:
        super().__init__(hidden_size, outputs)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            rows = [torch.randn(1, hidden_size, generator=generator) for _ in range(outputs)]
            self.weight.copy_(torch.cat(rows) / (hidden_size + 1) ** 0.5)
            self.bias.zero_()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., H] -> [..., outputs] float32."""
        return nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float())


class ScalarModel(nn.Module):
    """`backbone` (no language-modelling head) and a `scalar_head`: one number for each position.

    A model that was loaded speaks in normalised scores. While a reward model trains its scores are raw; what
    `set_normalisation` was told is folded into the head that `save_pretrained` writes.
    Where a reward model has a `length_curve`, in units of normalised scores, what it says of the response's tokens is
    to be taken off them.
    """

    head_class: type[ScalarHead] = ScalarHead

    def __init__(self, backbone: Any, *, seed: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        self.scalar_head = self.head_class(_hidden_size(backbone.config), seed=seed).to(backbone.device)
        self.score_mean = 0.0
        self.score_std = 1.0
        self.score_range: dict[str, Any] | None = None
        self.length_curve: Curve | None = None
        self._scores_measured = False

    @classmethod
    def from_base(
        cls, path: str | Path, config: ModelConfig = PLAIN, *, dtype: torch.dtype, seed: int = 0
    ) -> ScalarModel:
        """A new head on the base of a causal LM directory or adapter directory; `config` as in `load_causal_lm`."""
        return cls(load_backbone(path, config, dtype=dtype), seed=seed)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, config: ModelConfig = PLAIN, *, dtype: torch.dtype, as_critic: bool = False
    ) -> ScalarModel:
        """A saved reward model or critic, or any sequence classifier of one label that scores the last token.

        `config` as in `load_causal_lm`, `as_critic` as in `read_head`. Raises ConfigError when `path` holds no such
        model.
        """
        check_scalar_directory(path)
        return cls.on_backbone(load_backbone(path, config, dtype=dtype), path, as_critic=as_critic)

    @classmethod
    def on_backbone(cls, backbone: Any, path: str | Path, *, as_critic: bool = False) -> ScalarModel:
        """`backbone` under the head saved in `path`. Otherwise as `from_pretrained`."""
        model = cls(backbone)
        head = read_head(path, as_critic=as_critic)
        if head.weight.shape != model.scalar_head.weight.shape:
            raise ConfigError(
                f"{path} has a head for hidden size {head.weight.shape[1]} and the backbone has "
                f"{model.scalar_head.weight.shape[1]}; the directory mixes two models"
            )
        with torch.no_grad():
            model.scalar_head.weight.copy_(head.weight)
            model.scalar_head.bias.copy_(head.bias)
        model.score_range = read_score_range(path)
        model.length_curve = None if as_critic else read_length_curve(path)
        return model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Values [B, L] float32 of rows padded on either side; at padding they mean nothing."""
        hidden, padded = hidden_states(self.backbone, input_ids, attention_mask)
        values: torch.Tensor = padded(self.scalar_head(hidden).squeeze(-1))
        return values

    def set_normalisation(self, mean: float, std: float) -> None:
        """Have scores saved as (score - mean) / std, those less the length curve where there is one.

        Raises ValueError for a `std` that is not above 0.
        """
        if not std > 0:
            raise ValueError(f"score_std={std} must be above 0: the reward model says the same of every response")
        self.score_mean, self.score_std = float(mean), float(std)

    def zero_head(self) -> None:
        """Make every value 0: a critic that knows nothing yet, in whatever units the rewards are."""
        with torch.no_grad():
            self.scalar_head.weight.zero_()
            self.scalar_head.bias.zero_()

    def set_score_range(self, scores: torch.Tensor) -> None:
        """Note how far normalised `scores` [N] of training responses reach; `save_pretrained` writes it."""
        shares = (0.01, 0.05, 0.5, 0.95, 0.99)
        ordered = scores.double().sort().values
        at = {str(share): float(ordered[round(share * (len(ordered) - 1))]) for share in shares}
        self.score_range = {
            "responses": len(ordered), "minimum": float(ordered[0]), "maximum": float(ordered[-1]), "quantiles": at
        }  # fmt: skip
        self._scores_measured = True

    def save_pretrained(self, directory: Path, state: dict[str, torch.Tensor], tokenizer: Any) -> None:
        """Write this model with the weights `state`, normalised, its tokenizer, and the range of measured scores.

        The tokenizer pads with a token of its own, see `rlhf.models.padding`. A range that was loaded is not written:
        the critic that grows from a reward model no longer has its scores. Nor is a head beside the first one.
        """
        prefix = "backbone."
        backbone = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        raw = HeadWeights(state["scalar_head.weight"][:1].float(), state["scalar_head.bias"][:1].float())
        weight: Any = self.backbone.get_input_embeddings().weight
        tokenizer = with_own_padding(tokenizer, int(getattr(weight, "ds_shape", weight.shape)[0]))
        save_classifier(
            self.backbone,
            backbone,
            raw.normalised(self.score_mean, self.score_std),
            directory,
            pad_token_id=tokenizer.pad_token_id,
        )
        save_tokenizer(tokenizer, directory)
        if self._scores_measured:
            # Scores as they were trained are what Bradley and Terry's probabilities are of.
            units = {"raw_mean": self.score_mean, "raw_std": self.score_std}
            text = json.dumps({**(self.score_range or {}), **units}, indent=2) + "\n"
            (directory / SCORE_RANGE_FILE).write_text(text, encoding="utf-8")
        if self.length_curve is not None:
            text = json.dumps(self.length_curve.content(), indent=2) + "\n"
            (directory / LENGTH_CURVE_FILE).write_text(text, encoding="utf-8")

    @property
    def config(self) -> Any:
        """The configuration of the backbone."""
        return self.backbone.config

    def gradient_checkpointing_enable(self, **arguments: Any) -> None:
        """Recompute the backbone's activations in the backward pass."""
        self.backbone.gradient_checkpointing_enable(**arguments)

    def gradient_checkpointing_disable(self) -> None:
        """Keep the backbone's activations again."""
        self.backbone.gradient_checkpointing_disable()


def _hidden_size(config: Any) -> int:
    config = config.get_text_config()
    # OPT-350m projects its hidden states to another width before the language-modelling head
    return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)
