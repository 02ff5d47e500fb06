"""Reward models and critics on the disk: what `AutoModelForSequenceClassification` loads with one label.

The classes of `transformers` have a linear layer without bias, `score`, on the last token. What our head adds to it is
`score_bias` in the configuration: score = logits + score_bias.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification
from transformers.utils import cached_file

from rlhf.checkpoint.export import adapter_weights, is_adapted, save_model, save_whole_model
from rlhf.config import ConfigError
from rlhf.distributed.log import logger
from rlhf.models.directories import (
    ADAPTER_CONFIG_FILE,
    SCALAR_HEAD_FILE,
    adapter_config_file,
    check_scalar_directory,
    config_content,
    explain_read_errors,
    scalar_layout,
)
from rlhf.numerics.local_regression import Curve

SCORE_BIAS = "score_bias"
"""The field of the configuration that holds the constant to add to the logits."""
CLASSIFIER_CONFIG_FILE = "classifier_config.json"
"""Beside an adapter, which may have no config.json: the configuration of the classifier that it makes of its base."""
SCORE_RANGE_FILE = "score_range.json"
"""Beside a reward model: how far the scores reached in its training."""
LENGTH_CURVE_FILE = "length_curve.json"
"""Beside a reward model with a length curve: what is taken off a score, by the tokens of the response."""
ADAPTER_PREFIX = "base_model.model."
HEAD_NAMES = ("score", "value_head")
"""The head in a classifier of `transformers`, and in older models of OpenRLHF."""


class HeadWeights(NamedTuple):
    """score = weight [1, H] . hidden + bias [1], both float32; nothing is left to normalise."""

    weight: torch.Tensor
    bias: torch.Tensor

    def normalised(self, mean: float | torch.Tensor, std: float | torch.Tensor) -> HeadWeights:
        """The head whose scores are (score - mean) / std."""
        return HeadWeights(self.weight / std, (self.bias - mean) / std)


def empty_classifier(backbone: Any) -> Any:
    """A sequence classifier without weights on the architecture of `backbone`, or None.

    None where `transformers` has no class that puts one linear layer without bias, called `score`, on this backbone.
    """
    config = copy.deepcopy(backbone.config)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return None
    config.num_labels = 1
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    prefix = f"{classifier.base_model_prefix}."
    beside = [name for name, _ in classifier.named_parameters() if not name.startswith(prefix)]
    if beside != ["score.weight"] or type(classifier.base_model) is not type(backbone):
        return None
    return classifier


def save_classifier(
    backbone: Any, state: dict[str, torch.Tensor], head: HeadWeights, directory: Path, *, pad_token_id: int | None
) -> None:
    """Write `backbone` with the weights `state`, or its adapter, and `head` into `directory`.

    The head is float32 in the file whatever the dtype of the rest. An architecture without a classifier gets the head
    in a file of its own, which only this library reads.
    """
    adapted = is_adapted(backbone)
    inner = backbone.get_base_model() if adapted else backbone
    classifier = empty_classifier(inner)
    if classifier is None:
        logger.info(
            "transformers has no sequence classifier for a %s model: the head is saved in %s, for this library alone",
            inner.config.model_type,
            SCALAR_HEAD_FILE,
        )
        save_model(backbone, state, directory)
        tensors = {**head._asdict(), "score_mean": torch.tensor(0.0), "score_std": torch.tensor(1.0)}
        save_file(tensors, directory / SCALAR_HEAD_FILE, metadata={"format": "pt"})
        return
    for config in (classifier.config, classifier.config.get_text_config()):
        config.pad_token_id = pad_token_id
        setattr(config, SCORE_BIAS, float(head.bias))
    prefix = classifier.base_model_prefix
    if adapted:
        _save_adapter(backbone, state, head, directory, prefix)
        classifier.config.architectures = [type(classifier).__name__]
        classifier.config.to_json_file(directory / CLASSIFIER_CONFIG_FILE)
        return
    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    named = {f"{prefix}.{name}": tensor for name, tensor in state.items()}
    save_whole_model(classifier.to(dtype), directory, {**named, "score.weight": head.weight})


def _save_adapter(
    adapted: Any, state: dict[str, torch.Tensor], head: HeadWeights, directory: Path, prefix: str
) -> None:
    """As `peft` saves an adapter of a sequence classifier whose head trained in full."""
    named = {
        ADAPTER_PREFIX + f"{prefix}." + name.removeprefix(ADAPTER_PREFIX): tensor.contiguous()
        for name, tensor in adapter_weights(adapted, state).items()
    }
    settings = copy.deepcopy(adapted.peft_config["default"])
    settings.task_type = "SEQ_CLS"
    settings.modules_to_save = ["score"]
    settings.inference_mode = True
    settings.save_pretrained(str(directory))
    tensors = {**named, f"{ADAPTER_PREFIX}score.weight": head.weight}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def read_head(path: str | Path, *, as_critic: bool = False) -> HeadWeights:
    """The head of the reward model or critic in `path`, its normalisation folded in.

    An older release kept the normalisation apart. Its critics carry that of the reward model they grew from, which
    their values, of normalised rewards from the start, have nothing to do with: `as_critic` leaves it out where no
    score range says that the directory is a reward model. Raises ConfigError when `path` has no head of one score.
    """
    check_scalar_directory(path)
    layout = scalar_layout(path)
    with explain_read_errors(path, "scalar head"):
        if layout == "head file":
            tensors = {name: tensor.float() for name, tensor in load_file(Path(path) / SCALAR_HEAD_FILE).items()}
            head = HeadWeights(tensors["weight"], tensors["bias"])
            if as_critic and not (Path(path) / SCORE_RANGE_FILE).is_file():
                return head
            return head.normalised(tensors["score_mean"], tensors["score_std"])
        head, config = _adapter_head(path) if layout == "adapter" else (_model_head(path), config_content(path))
    if head.weight.shape[0] != 1:
        raise ConfigError(
            f"{path} is a classifier with num_labels={head.weight.shape[0]}; a reward model has num_labels=1"
        )
    head = HeadWeights(head.weight, head.bias + torch.tensor(float(config.get(SCORE_BIAS, 0.0))))
    if layout == "OpenRLHF" and {"mean", "std"} <= config.keys():
        logger.info("%s: scores are normalised with mean %s and standard deviation %s of its config.json",
                    path, config["mean"], config["std"])  # fmt: skip
        head = head.normalised(float(config["mean"]), float(config["std"]))
    return head


def read_score_range(path: str | Path) -> dict[str, Any] | None:
    """How far the scores of a reward model reached in its training; None where that was not measured."""
    known = Path(path) / SCORE_RANGE_FILE
    if not known.is_file():
        return None
    content: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))
    return content


def read_length_curve(path: str | Path) -> Curve | None:
    """What is taken off the scores of a reward model by the tokens of the response; None where nothing is.

    Raises ConfigError for a file that holds no curve.
    """
    known = Path(path) / LENGTH_CURVE_FILE
    if not known.is_file():
        return None
    with explain_read_errors(path, "length curve"):
        return Curve.read(json.loads(known.read_text(encoding="utf-8")))


def _adapter_head(path: str | Path) -> tuple[HeadWeights, dict[str, Any]]:
    from peft.utils import load_peft_weights

    directory = Path(adapter_config_file(path) or "").parent
    weights = load_peft_weights(str(directory), device="cpu")
    found = [name for name in weights if name.startswith(f"{ADAPTER_PREFIX}score.") and name.endswith("weight")]
    if not found:
        raise ConfigError(
            f"the adapter {path} has no trained head: its {ADAPTER_CONFIG_FILE} must name score in modules_to_save"
        )
    bias = weights.get(found[0].removesuffix("weight") + "bias")
    known = directory / CLASSIFIER_CONFIG_FILE
    config = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    return _head(weights[found[0]], bias), config


def _model_head(path: str | Path) -> HeadWeights:
    for name in HEAD_NAMES:
        weight = _stored_tensor(path, f"{name}.weight")
        if weight is not None:
            return _head(weight, _stored_tensor(path, f"{name}.bias"))
    names = ", ".join(config_content(path).get("architectures") or ())
    raise ConfigError(
        f"{path} ({names}) has no linear head called {' or '.join(HEAD_NAMES)}: it does not score the last token, "
        f"and only models that do can be a reward model here"
    )


def _head(weight: torch.Tensor, bias: torch.Tensor | None) -> HeadWeights:
    return HeadWeights(weight.float(), torch.zeros(weight.shape[0]) if bias is None else bias.float())


def _stored_tensor(path: str | Path, name: str) -> torch.Tensor | None:
    """One tensor of a model directory or hub name, from one file or from shards; None where it is not there."""
    from safetensors import safe_open

    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = _file(path, f"{whole}.index.json")
        shard = whole
        if index is not None:
            shard = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].get(name)
            if shard is None:
                return None
        file = _file(path, shard)
        if file is None:
            continue
        if file.endswith(".bin"):
            found: torch.Tensor | None = torch.load(file, map_location="cpu", weights_only=True, mmap=True).get(name)
            return found
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name) if name in opened.keys() else None  # noqa: SIM118
    return None


def _file(path: str | Path, name: str) -> str | None:
    found: str | None = cached_file(
        str(path), name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False
    )
    return found
