"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.checkpoint.manifest import sync_directory, sync_file
from rlhf.distributed import is_main


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a json file from rank 0, readable by people (indented, Korean as it is): whole or not at all."""
    if is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.part-{os.getpid()}")
        try:
            beside.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            sync_file(beside)
            os.replace(beside, path)
            sync_directory(path.parent)
        finally:
            beside.unlink(missing_ok=True)
