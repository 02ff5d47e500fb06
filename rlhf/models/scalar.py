"""A base model with one number per position: the reward model and the critic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlhf.config import ConfigError, ModelConfig
from rlhf.models.directories import SCALAR_HEAD_FILE, check_scalar_directory
from rlhf.models.forward import hidden_states
from rlhf.models.loading import load_backbone
from rlhf.models.pretrained import PLAIN

SCORE_RANGE_FILE = "score_range.json"
"""Beside the head of a reward model: how far the scores reached in its training."""


class ScalarHead(nn.Linear):
    """A linear layer to one number, computed in float32 whatever the dtype of its input and weights.

    Weights ~ N(0, 1/sqrt(hidden + 1)) (the second argument is the standard deviation), bias 0: Stiennon et al. 2020;
    Huang et al., "The N implementation details of RLHF with PPO".
    """

    def __init__(self, hidden_size: int, *, seed: int) -> None:
        super().__init__(hidden_size, 1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.weight.copy_(torch.randn(1, hidden_size, generator=generator) / (hidden_size + 1) ** 0.5)
            self.bias.zero_()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., H] -> [..., 1] float32."""
        return nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float())


class ScalarModel(nn.Module):
    """`backbone` (no language-modelling head) and a `scalar_head`; a reward model normalises what the head says."""

    score_mean: torch.Tensor
    score_std: torch.Tensor

    def __init__(self, backbone: Any, *, seed: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        self.scalar_head = ScalarHead(_hidden_size(backbone.config), seed=seed).to(backbone.device)
        for name, value in (("score_mean", 0.0), ("score_std", 1.0)):
            self.register_buffer(name, torch.tensor(value, device=backbone.device))
        self.score_range: dict[str, Any] | None = None
        self._scores_measured = False

    @classmethod
    def from_base(
        cls, path: str | Path, config: ModelConfig = PLAIN, *, dtype: torch.dtype, seed: int = 0
    ) -> ScalarModel:
        """A new head on the base of a causal LM directory or adapter directory; `config` as in `load_causal_lm`."""
        return cls(load_backbone(path, config, dtype=dtype), seed=seed)

    @classmethod
    def from_pretrained(cls, path: str | Path, config: ModelConfig = PLAIN, *, dtype: torch.dtype) -> ScalarModel:
        """A saved reward model or critic: the same scores, bit for bit, as when it was saved.

        `config` as in `load_causal_lm`. Raises ConfigError when `path` holds no scalar head.
        """
        check_scalar_directory(path)
        return cls.on_backbone(load_backbone(path, config, dtype=dtype), path)

    @classmethod
    def on_backbone(cls, backbone: Any, path: str | Path) -> ScalarModel:
        """`backbone` under the head and normalisation saved in `path`. Raises ConfigError as `from_pretrained`."""
        check_scalar_directory(path)
        model = cls(backbone)
        model.load_head(load_file(Path(path) / SCALAR_HEAD_FILE))
        known = Path(path) / SCORE_RANGE_FILE
        if known.is_file():
            model.score_range = json.loads(known.read_text(encoding="utf-8"))
        return model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Values [B, L] float32 of rows padded on either side; at padding they mean nothing."""
        hidden, padded = hidden_states(self.backbone, input_ids, attention_mask)
        values: torch.Tensor = padded(self.scalar_head(hidden).squeeze(-1))
        return values

    def normalise(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B] with mean 0 and variance 1 on the responses that `set_normalisation` measured."""
        return (scores.float() - self.score_mean) / self.score_std

    def set_normalisation(self, mean: float, std: float) -> None:
        """Set what `normalise` subtracts and divides by. Raises ValueError for a `std` that is not above 0."""
        if not std > 0:
            raise ValueError(f"score_std={std} must be above 0: the reward model says the same of every response")
        self.score_mean.fill_(mean)
        self.score_std.fill_(std)

    def zero_head(self) -> None:
        """Make every value 0: a critic that knows nothing yet, in whatever units the rewards are."""
        with torch.no_grad():
            self.scalar_head.weight.zero_()
            self.scalar_head.bias.zero_()

    def set_score_range(self, scores: torch.Tensor) -> None:
        """Note how far normalised `scores` [N] of training responses reach; `save_head` writes it beside the head."""
        shares = (0.01, 0.05, 0.5, 0.95, 0.99)
        ordered = scores.double().sort().values
        at = {str(share): float(ordered[round(share * (len(ordered) - 1))]) for share in shares}
        self.score_range = {
            "responses": len(ordered), "minimum": float(ordered[0]), "maximum": float(ordered[-1]), "quantiles": at
        }  # fmt: skip
        self._scores_measured = True

    def load_head(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set head and normalisation from the tensors of a scalar head file."""
        if tensors["weight"].shape != self.scalar_head.weight.shape:
            raise ConfigError(
                f"{SCALAR_HEAD_FILE} has a head for hidden size {tensors['weight'].shape[1]} and the backbone has "
                f"{self.scalar_head.weight.shape[1]}; the directory mixes two models"
            )
        with torch.no_grad():
            self.scalar_head.weight.copy_(tensors["weight"])
            self.scalar_head.bias.copy_(tensors["bias"])
        self.score_mean.copy_(tensors["score_mean"])
        self.score_std.copy_(tensors["score_std"])

    def save_head(self, directory: Path, state: dict[str, torch.Tensor]) -> None:
        """Write the scalar head file from the state dict `state` of this model, and the range of measured scores.

        A range that was loaded is not written: the critic that grows from a reward model no longer has its scores.
        """
        tensors = {
            "weight": state["scalar_head.weight"],
            "bias": state["scalar_head.bias"],
            "score_mean": self.score_mean.float(),
            "score_std": self.score_std.float(),
        }
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                  directory / SCALAR_HEAD_FILE, metadata={"format": "pt"})  # fmt: skip
        if self._scores_measured:
            (directory / SCORE_RANGE_FILE).write_text(json.dumps(self.score_range, indent=2) + "\n", encoding="utf-8")

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
