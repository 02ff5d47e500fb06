"""What a directory or hub name holds: a model, an adapter, a scalar model; and errors that say where was looked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rlhf.config import ConfigError

ADAPTER_CONFIG_FILE = "adapter_config.json"
SCALAR_HEAD_FILE = "scalar_head.safetensors"
"""The head beside a backbone: reward models and critics of architectures that have no sequence classifier."""
OPENRLHF_CLASSES = frozenset({"RewardModel", "CriticModel"})
"""The `architectures` entry of a reward model or critic that OpenRLHF saved."""

ScalarLayout = Literal["head file", "adapter", "classifier", "OpenRLHF"]


def check_model_path(path: str | Path) -> None:
    """ConfigError for what looks like a local path and is not a model directory."""
    text = str(path)
    local = Path(text)
    if local.is_dir():
        if not any((local / name).is_file() for name in ("config.json", ADAPTER_CONFIG_FILE)):
            held = ", ".join(sorted(entry.name for entry in local.iterdir())[:8]) or "nothing"
            raise ConfigError(
                f"{local} is not a model directory: it has neither config.json nor {ADAPTER_CONFIG_FILE} "
                f"(it holds {held})"
            )
    elif local.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1 or local.exists():
        if text.count("/") == 0 and not local.exists() and not text.startswith((".", "~")):
            return  # a hub name without an owner, such as gpt2
        kind = "a file, not a directory" if local.exists() else "not there"
        raise ConfigError(f"model directory {local} is {kind} (looked in {Path.cwd()})")


def check_causal_directory(path: str | Path) -> None:
    """ConfigError for a local path that holds no model, or for a reward model, critic or other classifier."""
    check_model_path(path)
    if is_scalar_directory(path):
        raise ConfigError(
            f"{path} is a reward model or critic and has no language-modelling head; "
            f"give the directory of a causal language model, such as the output of step1_sft"
        )


def scalar_layout(path: str | Path) -> ScalarLayout | None:
    """How the reward model, critic or other sequence classifier in `path` is stored; None for any other model.

    Raises ConfigError when nothing can be read there.
    """
    if (Path(path) / SCALAR_HEAD_FILE).is_file():
        return "head file"
    with explain_read_errors(path, "model"):
        adapter = adapter_config_file(path)
        if adapter is not None:
            task = json.loads(Path(adapter).read_text(encoding="utf-8")).get("task_type")
            return "adapter" if task == "SEQ_CLS" else None
        names = set(config_content(path).get("architectures") or ())
    if names & OPENRLHF_CLASSES:
        return "OpenRLHF"
    return "classifier" if any(name.endswith("ForSequenceClassification") for name in names) else None


def is_scalar_directory(path: str | Path) -> bool:
    """True for a reward model, a critic or another sequence classifier."""
    return scalar_layout(path) is not None


def check_scalar_directory(path: str | Path) -> None:
    """ConfigError when `path` is no reward model or critic: no classifier, or one of several labels."""
    check_model_path(path)
    layout = scalar_layout(path)
    if layout is None:
        raise ConfigError(
            f"{path} is not a reward model: it is neither a sequence classifier of one label nor has it a "
            f"{SCALAR_HEAD_FILE}; make one with step2_reward"
        )
    if layout == "classifier":
        labels = len(config_content(path).get("id2label") or range(2))  # two is the default of transformers
        if labels != 1:
            raise ConfigError(f"{path} is a classifier with num_labels={labels}; a reward model has num_labels=1")


def config_content(path: str | Path) -> dict[str, Any]:
    """The model configuration of a directory or hub name as it is written, {} where there is none."""
    from transformers import PreTrainedConfig

    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        return {}
    content: dict[str, Any] = PreTrainedConfig.get_config_dict(str(path))[0]
    return content


def adapter_config_file(path: str | Path) -> str | None:
    """The adapter configuration of a directory or hub name, or None; an adapter of the hub is downloaded whole."""
    if Path(path).is_dir():
        file = Path(path) / ADAPTER_CONFIG_FILE
        return str(file) if file.is_file() else None
    from transformers.utils import find_adapter_config_file

    found: str | None = find_adapter_config_file(str(path))
    if found is None:
        return None
    from huggingface_hub import snapshot_download

    return str(Path(snapshot_download(str(path))) / ADAPTER_CONFIG_FILE)  # the adapter's weights as well


def adapter_base(path: str | Path) -> str | None:
    """The base that the adapter directory `path` names, or None: no adapter, or its base is not there any more."""
    file = Path(path) / ADAPTER_CONFIG_FILE
    if not file.is_file():
        return None
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    return None if not base or (Path(base).is_absolute() and not Path(base).is_dir()) else str(base)


def base_key(path: str | Path) -> str:
    """Equal for two names of one directory: links are followed, merges of one adapter differ in dtype alone."""
    if not Path(path).is_dir():
        return str(path)
    real = Path(path).resolve()
    if real.parent.name == "merged" and (real.parent.parent / ADAPTER_CONFIG_FILE).is_file():
        return str(real.parent / re.sub(r"^([0-9a-f]{12})-\w+$", r"\1", real.name))
    return str(real)


@contextmanager
def explain_read_errors(path: str | Path, what: str) -> Iterator[None]:
    """Turn an error of reading the `what` of `path` into a ConfigError that says where was looked."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        if Path(path).is_dir():
            raise ConfigError(f"cannot read the {what} in {path}: {error}") from error
        raise ConfigError(
            f"cannot load the {what} {path}: there is no such directory in {Path.cwd()}, and the hub has no such name "
            f"or cannot be reached ({str(error).splitlines()[0]}); give a model directory, or download it first"
        ) from error
