"""Adapters merged into their base: on first use, or by hand.

python -m rlhf.models.merge ADAPTER_DIR OUT_DIR [--dtype float32]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import deepspeed as hf_deepspeed

from rlhf.checkpoint.atomic import replaced_directory
from rlhf.checkpoint.export import save_tokenizer, save_whole_model
from rlhf.config import ConfigError
from rlhf.distributed.collectives import rank_zero_first
from rlhf.models.adapters import load_adapter
from rlhf.models.classifier import (
    CLASSIFIER_CONFIG_FILE,
    LENGTH_CURVE_FILE,
    SCORE_RANGE_FILE,
    read_head,
    save_classifier,
)
from rlhf.models.directories import ADAPTER_CONFIG_FILE, SCALAR_HEAD_FILE, adapter_config_file, explain_read_errors
from rlhf.models.padding import with_own_padding
from rlhf.models.pretrained import PLAIN, from_pretrained


def merged_path(path: str | Path, *, dtype: torch.dtype, trust_remote_code: bool = False) -> str:
    """`path` itself, or for an adapter directory the plain model directory that it is merged into (once, by rank 0).

    The name of the merged directory follows the adapter's content, so a changed adapter is merged anew.
    """
    with explain_read_errors(path, "model"):
        config_file = adapter_config_file(path)
    if config_file is None:
        return str(path)
    adapter = Path(config_file).absolute().parent
    digest = hashlib.sha256()
    for file in sorted([*adapter.glob("adapter_*"), *adapter.glob(CLASSIFIER_CONFIG_FILE)]):
        digest.update(file.name.encode() + file.read_bytes())
    merged = adapter / "merged" / f"{digest.hexdigest()[:12]}-{str(dtype).removeprefix('torch.')}"
    if not merged.exists() and not os.access(adapter, os.W_OK):
        raise ConfigError(
            f"the adapter {path} must be merged before use and {adapter} cannot be written; merge it yourself with "
            f"`python -m rlhf.models.merge {path} OUT_DIR` and use OUT_DIR"
        )
    rank_zero_first(merged, lambda: merge_adapter(adapter, merged, dtype, trust_remote_code=trust_remote_code))
    return str(merged)


def merge_adapter(
    adapter_dir: str | Path, out_dir: str | Path, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> None:
    """Add an adapter to its base in float32 and write the sum as a plain Hugging Face directory in `dtype`.

    The tokenizer beside the adapter goes along, and a head: of a sequence classifier in float32. The directory appears
    complete or not at all. Raises ConfigError when `adapter_dir` is no adapter, its base cannot be found, or `out_dir`
    is not new.
    """
    from peft import PeftConfig, PeftModel

    adapter_dir, out_dir = Path(adapter_dir), Path(out_dir)
    if not (adapter_dir / ADAPTER_CONFIG_FILE).is_file():
        raise ConfigError(f"{adapter_dir} is not an adapter directory: {ADAPTER_CONFIG_FILE} is not there")
    if out_dir.is_file() or (out_dir.is_dir() and any(out_dir.iterdir())):
        raise ConfigError(f"{out_dir} is there already; name a new directory or remove it first")
    config = PeftConfig.from_pretrained(str(adapter_dir))
    base_path = config.base_model_name_or_path
    if not base_path:
        raise ConfigError(f"{adapter_dir / ADAPTER_CONFIG_FILE} names no base model; set base_model_name_or_path")
    headless = config.task_type in ("FEATURE_EXTRACTION", "SEQ_CLS")
    auto_class = AutoModel if headless else AutoModelForCausalLM
    with _whole_weights():
        base_path = merged_path(base_path, dtype=torch.float32, trust_remote_code=trust_remote_code)
        base = from_pretrained(
            auto_class, base_path, replace(PLAIN, trust_remote_code=trust_remote_code), dtype=torch.float32
        )
        if config.task_type == "SEQ_CLS":
            adapted = load_adapter(base, adapter_dir, trainable=False)
        else:
            adapted = PeftModel.from_pretrained(base, str(adapter_dir), is_trainable=False)
        merged: Any = adapted.merge_and_unload()
    for parameter in merged.parameters():  # buffers such as rotary frequencies stay in float32
        parameter.data = parameter.data.to(dtype)
    merged.config.dtype = dtype
    with replaced_directory(out_dir) as part:
        source = adapter_dir if (adapter_dir / "tokenizer_config.json").is_file() else base_path
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        if config.task_type == "SEQ_CLS":
            tokenizer = with_own_padding(tokenizer, merged.get_input_embeddings().weight.shape[0])
            save_classifier(
                merged, merged.state_dict(), read_head(adapter_dir), part, pad_token_id=tokenizer.pad_token_id
            )
        else:
            save_whole_model(merged, part)
        for beside_adapter in (SCALAR_HEAD_FILE, SCORE_RANGE_FILE, LENGTH_CURVE_FILE):
            if (adapter_dir / beside_adapter).is_file():
                shutil.copy2(adapter_dir / beside_adapter, part / beside_adapter)
        save_tokenizer(tokenizer, part)


@contextmanager
def _whole_weights() -> Iterator[None]:
    """Inside a ZeRO-3 loading context, load whole weights on this rank alone."""
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    active = reference() if reference is not None else None
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if active is not None:
            hf_deepspeed.set_hf_deepspeed_config(active)


def main(argv: list[str] | None = None) -> None:
    """Merge an adapter into its base and write the sum as a plain model directory."""
    parser = argparse.ArgumentParser(prog="python -m rlhf.models.merge", description=main.__doc__)
    parser.add_argument("adapter_dir")
    parser.add_argument("out_dir")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--trust_remote_code", action="store_true")
    arguments = parser.parse_args(argv)
    dtype = getattr(torch, arguments.dtype)
    try:
        merge_adapter(arguments.adapter_dir, arguments.out_dir, dtype, trust_remote_code=arguments.trust_remote_code)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(f"merged {arguments.adapter_dir} into {arguments.out_dir} ({dtype})")


if __name__ == "__main__":
    main()
