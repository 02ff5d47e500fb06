"""Write the configuration reference: `python -m rlhf.cli.config_reference > docs/configuration.md`.

Everything in it comes from the dataclasses of the stages: names, types and defaults from their fields, explanations
from the string literal that stands under each field in the source.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.config import field_docstrings
from rlhf.config.explain import class_text, concern, default_of, root_class, type_text, value_text
from rlhf.pipeline.stages import STAGES

INTRODUCTION = """\
# Configuration reference

Written by `python -m rlhf.cli.config_reference > docs/configuration.md` from the dataclasses in `rlhf/config/` and
`rlhf/algorithms/`; change it there.

A field is given on the command line or in a YAML file. The command line wins over the file, a stage's section of the
file over its top level, and both over the defaults below.

```bash
deepspeed step3_ppo/main.py --config my.yaml --kl_coef 0.05 --prompt_data data/a.jsonl data/b.csv --no_tensorboard
bash training_scripts/run_all.sh --config my.yaml --zero_stage 2 --reward.learning_rate 5e-5
```

```yaml
base_model: EleutherAI/polyglot-ko-1.3b   # top level: every stage that has the field
zero_stage: 2
sft:                                      # one stage only
  sft_data:
    - data/instructions.jsonl
    - {path: data/상담.csv, columns: {prompt: 질의, response: 답변}, weight: 0.3}
  learning_rate: 2e-5
ppo:
  kl_coef: 0.05
```

- Without `--config` and without a model of your own (`--base_model`, `--actor_model`, `--reward_model`,
  `--critic_model`), a stage reads `training_scripts/configs/default.yaml`, which suits the embedded tiny model. With
  any of them, only what you give and the defaults below count; the log says what that file would have set.
- `extends: default` at the top of a file builds on that preset, or any other of `training_scripts/configs/` by its bare
  name, or on a file of your own (`extends: ./base.yaml`). Every field of the file wins over those of the extended one.
  Evaluation data of the extended file is left out where the file names other training data.
- A section named after a method (`grpo:`, `orpo:`) is read after `ppo:` or `offline:` where `advantage` or `algorithm`
  has that value.
- `python -m step3_ppo.main --help` shows each field with the value in force and where it comes from.
- A name that no stage has is an error with the nearest names. A field of another stage in a shared file is passed over.
- A list takes several values on the command line (`--lora_targets q_proj v_proj`); a data set that needs more than a
  path is a mapping in YAML and the same as JSON text on the command line (see [data.md](data.md)).
- A yes/no field is `--field true` or `--field false`; one that is on by default also has `--no_field`.
- Each stage writes the configuration in force to `<output_dir>/<stage>/config.yaml`, which `--config` reads back.
"""


@dataclass(frozen=True)
class FieldEntry:
    """One field as one stage has it; `default` and `type` are as they appear in the table."""

    name: str
    type: str
    default: str
    text: str


def entries(config_class: type) -> list[FieldEntry]:
    """The fields of a configuration class, in the order of its definition."""
    texts = field_docstrings(config_class)
    return [
        FieldEntry(item.name, type_text(item.type), default_text(default_of(item)), texts[item.name])
        for item in dataclasses.fields(config_class)
    ]


def default_text(value: Any) -> str:
    """A default as code, and the words `unset` and `empty` as they are."""
    return value_text(value) if value is None or value == [] else f"`{value_text(value)}`"


def reference(stage_configs: Mapping[str, Iterable[type]]) -> str:
    """The whole page as Markdown: a table for each concern, the fields of all stages side by side."""
    families: dict[type, dict[str, type]] = {}
    for stage, classes in stage_configs.items():
        for config_class in classes:
            families.setdefault(root_class(config_class), {})[stage] = config_class
    return "\n".join([INTRODUCTION, *(_section(members, len(stage_configs)) for members in families.values())])


def _section(members: Mapping[str, type], stages: int) -> str:
    classes = list(dict.fromkeys(members.values()))
    lines = [f"## {concern(classes[0])}", "", class_text(root_class(classes[0])), ""]
    lines += ["| field | stages | type | default | meaning |", "|---|---|---|---|---|"]
    fields: dict[str, dict[str, FieldEntry]] = {}
    for stage, config_class in members.items():
        for entry in entries(config_class):
            fields.setdefault(entry.name, {})[stage] = entry
    for name, per_stage in fields.items():
        cells = [
            f"`{name}`",
            "all" if len(per_stage) == stages else ", ".join(per_stage),
            *(_merged(per_stage, attribute) for attribute in ("type", "default", "text")),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _merged(per_stage: Mapping[str, FieldEntry], attribute: str) -> str:
    """One value where all stages agree; else the first, and what the others have instead."""
    values = {stage: getattr(entry, attribute) for stage, entry in per_stage.items()}
    first = next(iter(values.values()))
    others: dict[str, list[str]] = {}
    for stage, value in values.items():
        if value != first:
            others.setdefault(value, []).append(stage)
    return "<br>".join([first, *(f"In {', '.join(stages)}: {value}" for value, stages in others.items())])


def main() -> None:
    """Print the reference."""
    sys.stdout.write(reference({name: stage.config_classes().values() for name, stage in STAGES.items()}))


if __name__ == "__main__":
    main()
