"""What a run is made of, so that a training state of another model, tokenizer or setting is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.config import ConfigError

_WHOLE = (
    *("config.json", "adapter_config.json", "classifier_config.json", "length_curve.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges.txt", "*.model", "chat_template*"),
)
"""Small files of a model directory that decide what the model and its tokenizer do."""
_WEIGHTS = ("*.safetensors", "*.bin")
_SAMPLES = 16
_SAMPLE_BYTES = 2**20
_MAX_HEADER_BYTES = 100 * 2**20
"""The safetensors format's own limit."""


def model_fingerprint(path: str) -> dict[str, str]:
    """What tells one model from another: name of each file that matters -> its size and a sha256.

    Configuration and tokenizer files are hashed whole. Of a weight file it is the header and 16 MiB spread evenly
    over it, the first and the last among them, so that a model of many GB takes seconds; a change in none of these
    bytes is not seen. A name that is no directory is a model of the hub and stands for itself.
    """
    directory = Path(path)
    if not directory.is_dir():
        return {"hub name": path}
    found: dict[str, str] = {}
    for pattern in (*_WHOLE, *_WEIGHTS):
        for file in directory.glob(pattern):
            if file.is_file():
                digest = _sampled_digest(file) if pattern in _WEIGHTS else hashlib.sha256(file.read_bytes()).hexdigest()
                found[file.name] = f"{file.stat().st_size} bytes, sha256 {digest}"
    return dict(sorted(found.items()))


def check_identity(saved: Mapping[str, Any], current: Mapping[str, Any], directory: Path) -> None:
    """ConfigError that names every difference between the run that saved `directory` and the one that is starting.

    Both are JSON, nested as they like; a tuple is a list and a key a string, as after a round trip.
    """
    was, now = _flat(json.loads(json.dumps(saved))), _flat(json.loads(json.dumps(current)))
    names = [*was, *(name for name in now if name not in was)]
    differences = [
        f"{name} was {was.get(name, 'not there')} and is {now.get(name, 'not there')}"
        for name in names
        if was.get(name) != now.get(name)
    ]
    if differences:
        raise ConfigError(
            f"the training state in {directory} is of another run: {'; '.join(differences)}. Go on with the old "
            "settings, choose another --output_dir, or start anew with --resume never"
        )


def _flat(content: Any, name: str = "") -> dict[str, str]:
    """Each scalar of nested JSON as text under its path: {"data": ["a"]} -> {"data[0]": '"a"'}."""
    if isinstance(content, dict) and content:
        parts = [(f"{name}.{key}" if name else key, value) for key, value in content.items()]
    elif isinstance(content, list) and content:
        parts = [(f"{name}[{index}]", value) for index, value in enumerate(content)]
    else:
        return {name: json.dumps(content, ensure_ascii=False)}
    return {path: text for part, value in parts for path, text in _flat(value, part).items()}


def _sampled_digest(path: Path) -> str:
    """sha256 of a file of up to 16 MiB, or of its safetensors header and 16 MiB of a larger one."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        if path.suffix == ".safetensors":
            header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header, _MAX_HEADER_BYTES)))
        for sample in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
