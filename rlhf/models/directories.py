"""What a directory or hub name holds: a model, an adapter, a scalar model; and errors that say where was looked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.config import ConfigError

ADAPTER_CONFIG_FILE = "adapter_config.json"
SCALAR_HEAD_FILE = "scalar_head.safetensors"
"""The file beside a backbone that makes a directory a reward model or a critic."""


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
    """ConfigError for a local path that holds no model, or a reward model or critic."""
    check_model_path(path)
    if is_scalar_directory(path):
        raise ConfigError(
            f"{path} is a reward model or critic ({SCALAR_HEAD_FILE} is there) and has no language-modelling head; "
            f"give the directory of a causal language model, such as the output of step1_sft"
        )


def is_scalar_directory(path: str | Path) -> bool:
    """True for the directory of a saved reward model or critic."""
    return (Path(path) / SCALAR_HEAD_FILE).is_file()


def check_scalar_directory(path: str | Path) -> None:
    """ConfigError when `path` is no saved reward model or critic."""
    if not is_scalar_directory(path):
        raise ConfigError(f"{path} is not a reward model: {SCALAR_HEAD_FILE} is not there; make one with step2_reward")


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
