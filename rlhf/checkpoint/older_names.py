"""Names that transformers 5 changed, as transformers 4 and what stands on it read them.

transformers 5 writes rotary embeddings as `rope_parameters` alone. transformers 4 does not know that key and takes its
own defaults without a word: a GPT-NeoX with rotary_pct 0.5 (Polyglot-ko) is then another model. Nor does it know the
class under which transformers 5 writes a tokenizer without a class of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# model types whose settings have names of their own for (rope_theta, partial_rotary_factor)
_OWN_NAMES = {
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
    "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct"),
}


def add_older_names(directory: Path) -> None:
    """Write the settings of `directory`/config.json under the names of transformers 4 too; what stands there stays.

    `rope_theta`, `partial_rotary_factor` and `rope_scaling` (GPT-NeoX: `rotary_emb_base`, `rotary_pct`), and
    `torch_dtype`. transformers 5 drops them as it reads. Rotary settings by layer type have no older form and are left.
    """
    path = directory / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for part in (settings, settings.get("text_config")):
        if isinstance(part, dict):
            for name, value in _older(part).items():
                part.setdefault(name, value)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def name_older_tokenizer(directory: Path, model_input_names: Sequence[str]) -> None:
    """Give the tokenizer of `directory` the class that transformers 4 knows, where transformers 5 wrote its own.

    Both read the same tokenizer.json with it. What it gives a model is written out: the older class has one input more.
    """
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": list(model_input_names)}
        path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _older(settings: dict[str, Any]) -> dict[str, Any]:
    older = {"torch_dtype": settings["dtype"]} if isinstance(settings.get("dtype"), str) else {}
    rotary = settings.get("rope_parameters")
    if not isinstance(rotary, dict) or "rope_type" not in rotary:
        return older
    names = _OWN_NAMES.get(settings.get("model_type", ""), ("rope_theta", "partial_rotary_factor"))
    own = dict(zip(("rope_theta", "partial_rotary_factor"), names, strict=True))
    older |= {own[name]: rotary[name] for name in own if rotary.get(name) is not None}
    if rotary["rope_type"] != "default":
        older["rope_scaling"] = {name: value for name, value in rotary.items() if name not in own}
    return older
