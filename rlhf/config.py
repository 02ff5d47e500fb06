"""One dataclass per concern with flat, unique field names, and the parser that fills them.

A configuration file is YAML. Its top level holds fields shared by the stages; the sections `sft:`, `reward:`
and `ppo:` hold fields of one stage and win over the shared ones. The command line wins over both.
The docstring under a field is its entry in `docs/configuration.md`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import json
import logging
import math
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from rlhf.yaml_file import WrittenFloat, WrittenInt, read_yaml, write_yaml

logger = logging.getLogger("rlhf")


class ConfigError(ValueError):
    """A configuration that cannot be used, with what was given, what is needed and what to do."""


def require_at_least(config: Any, least: float, *names: str) -> None:
    """ConfigError for a field of `config` below `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise ConfigError(f"{name}={getattr(config, name)} must be at least {least}")


STAGES = ("sft", "reward", "ppo")
EMBEDDED_BASE = "default"
"""`base_model` of the embedded tiny GPT-NeoX."""


@dataclass
class RunConfig:
    """Where a run writes, its seed, and how often it logs."""

    output_dir: str = "runs/default"
    """Directory of the whole run; each stage writes into a subdirectory (`sft`, `reward`, `ppo`)."""
    cache_dir: str = "runs/.cache"
    """Tokenised data and the embedded base model are kept here under content keys."""
    seed: int = 1
    """Seed of initialisation, data order and sampling."""
    log_every_steps: int = 10
    """Optimizer steps (PPO: iterations) between two lines of `metrics.jsonl`."""
    tensorboard: bool = True
    """Write TensorBoard event files beside `metrics.jsonl`."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project; needs the `wandb` package."""
    resume: Literal["auto", "never"] | None = None
    """`auto` goes on from the newest whole training state of `output_dir`, or starts where there is none; `never`
    starts anew and removes what an unfinished run left. Unset starts, and refuses where an unfinished run lies."""
    save_every_steps: int = 0
    """Optimizer steps (PPO: iterations) between two saved training states; 0 saves ten times in a run."""
    keep_last: int = 2
    """Training states kept, the newest ones; 0 saves none, and a killed run is lost."""
    keep_every: int = 0
    """Keep for good the training states whose step is a multiple of this, also after the run; 0 keeps none."""
    rank_timeout_minutes: float = 30.0
    """End the whole job when no process has made progress in training for so long (a hang); 0 waits for ever."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "log_every_steps")
        require_at_least(self, 0, "save_every_steps", "keep_last", "keep_every", "rank_timeout_minutes")
        if self.wandb_project and importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                f"wandb_project={self.wandb_project!r} needs the wandb package, which is not installed; "
                "run `pip install wandb` or leave wandb_project unset"
            )


@dataclass
class ModelConfig:
    """Which base model, and which of its weights train."""

    base_model: str = EMBEDDED_BASE
    """Model directory or hub name to start from; `default` is the embedded tiny Korean GPT-NeoX."""
    trust_remote_code: bool = False
    """Allow model code shipped with a hub repository to run."""
    attn_implementation: str = "sdpa"
    """Attention kernel by its `transformers` name: sdpa, eager, flash_attention_2."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Load the frozen base in 8-bit (LLM.int8) or 4-bit NF4 with double quantisation (QLoRA); needs LoRA."""
    lora_rank: int = 0
    """Rank r of LoRA; 0 trains every weight."""
    lora_alpha: int = 16
    """LoRA scaling numerator (KULLM: 16)."""
    lora_dropout: float = 0.0
    """Dropout on LoRA inputs (KULLM: 0.05)."""
    lora_targets: list[str] = field(default_factory=list)
    """Names of the linear modules to adapt; empty picks the attention projections of the architecture."""
    share_base: bool = True
    """With LoRA, keep one copy of a base that several of PPO's models stand on; off loads each its own."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    model_dropout: float = 0.0
    """Dropout probability set on the base model while it trains (KULLM-RLHF: none)."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "lora_rank")
        if self.quantization != "none" and self.lora_rank == 0:
            raise ConfigError(
                f"quantization={self.quantization} needs lora_rank above 0: a quantised base is frozen and only an "
                "adapter can train on it"
            )


@dataclass
class EngineConfig:
    """DeepSpeed: how states are partitioned and in which precision they live."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO stage (Rajbhandari et al. 2020): 1 partitions optimizer states, 2 gradients too, 3 weights too."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Keep optimizer states (`optimizer`) and, under ZeRO-3, the weights too (`all`) in CPU memory."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Compute precision; `auto` is bf16 where the accelerator has it, else fp32."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global L2 norm; 0 turns clipping off."""
    gather_for_generation: bool = True
    """PPO under ZeRO-3: gather the actor's weights once for a rollout, as DeepSpeed-Chat's hybrid engine does; off
    fetches them for every token, in the memory of one layer."""
    side_by_side: bool = True
    """PPO on a CPU, one process, not ZeRO-3: run independent models at the same time, each on half of the threads."""
    deepspeed_config: str | None = None
    """A DeepSpeed json file merged into the generated settings; a contradiction is an error."""


@dataclass
class OptimizerConfig:
    """AdamW and its schedule."""

    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """AdamW in full precision, or bitsandbytes' 8-bit states, also paged (LawBot)."""
    learning_rate: float = 1e-5
    """Peak learning rate (PPO: of the actor)."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices; biases and norms have none."""
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Adam's beta1 and beta2 (DeepSpeed-Chat: 0.9, 0.95)."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up; cosine and linear end at 0."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up; wins over `warmup_ratio` when above 0."""
    warmup_ratio: float = 0.0
    """Share of all optimizer steps used for linear warm-up."""

    def __post_init__(self) -> None:
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ConfigError(f"adam_betas={self.adam_betas} must be two numbers in [0, 1), such as 0.9 0.95")
        require_at_least(self, 0, "learning_rate", "weight_decay", "warmup_steps", "warmup_ratio")


@dataclass
class BatchConfig:
    """How many sequences make a step, and for how long."""

    global_batch_size: int = 32
    """Sequences (reward: prompts) of one optimizer step over all devices."""
    micro_batch_size: int = 8
    """Sequences (reward: prompts) of one forward pass on one device, were all as long as the longest of the step."""
    micro_batch_tokens: int = 0
    """Tokens of one forward pass on one device; 0 takes micro_batch_size times the longest sequence of the step."""
    epochs: float = 1.0
    """Passes over the training data."""
    max_steps: int = 0
    """Stop after this many optimizer steps (PPO: iterations); 0 means `epochs` decides."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "global_batch_size", "micro_batch_size")
        require_at_least(self, 0, "epochs", "max_steps", "micro_batch_tokens")


@dataclass
class DataConfig:
    """How rows become tokens; the data sets themselves are named by each stage's own field."""

    template: str = "kullm"
    """Prompt template: kullm, alpaca, koalpaca, law_polyglot, chat (the tokenizer's own), none, or a file."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be used stops the run, or is counted and listed in `skipped_rows.jsonl`."""
    max_prompt_tokens: int = 256
    """Longer prompts lose their beginning (KULLM-RLHF: 256)."""
    max_response_tokens: int = 256
    """Longer responses lose their end; PPO samples at most this many tokens (KULLM-RLHF: 256)."""
    eval_fraction: float = 0.05
    """Share of the prompts held out (by a hash of the prompt) where no evaluation data is named."""
    stage_split: str | None = None
    """Split each data set over sft, reward and ppo by a hash of the prompt, such as `2,4,4`; unset uses all of it."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "max_prompt_tokens", "max_response_tokens")
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(f"eval_fraction={self.eval_fraction} must lie in [0, 1): a share of the prompts")


@dataclass
class SFTDataConfig(DataConfig):
    """Data of supervised fine-tuning."""

    sft_data: list[str] = field(default_factory=lambda: ["sample:sft_train"])
    """Data sets: a path, a hub name, `sample:NAME`, or a mapping {path, columns, format, weight, split}."""
    sft_eval_data: list[str] = field(default_factory=list)
    """Held-out data sets; empty holds out `eval_fraction` of `sft_data`."""


@dataclass
class RewardDataConfig(DataConfig):
    """Data of the reward model."""

    preference_data: list[str] = field(default_factory=lambda: ["sample:preference_train"])
    """Data sets of pairs or rankings (the two may be blended); the same forms as `sft_data`."""
    preference_eval_data: list[str] = field(default_factory=list)
    """Held-out data sets; empty holds out `eval_fraction` of `preference_data`."""


@dataclass
class PPODataConfig(DataConfig):
    """Data of PPO."""

    prompt_data: list[str] = field(default_factory=lambda: ["sample:prompts_train"])
    """Data sets of prompts; the same forms as `sft_data`."""
    prompt_eval_data: list[str] = field(default_factory=list)
    """Held-out prompts; empty holds out `eval_fraction` of `prompt_data`."""
    ptx_data: list[str] = field(default_factory=list)
    """Data sets of the ptx mixture (prompt and response); needed when `ptx_coef` is above 0."""


MODEL_OPTIONS = ("base_model", "actor_model", "reward_model", "critic_model")


MAX_CONFIG_BYTES = 200_000

T = TypeVar("T")


def field_docstrings(config_class: type) -> dict[str, str]:
    """Field name -> the string literal under it, over the class and its bases; the class's own one wins.

    Raises ValueError that names the class and the field where a field of the dataclass has none.
    """
    found: dict[str, str] = {}
    for owner in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        definition = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(definition, ast.ClassDef)
        for statement, following in zip(definition.body, definition.body[1:], strict=False):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                found[statement.target.id] = " ".join(str(following.value.value).split())
    for item in dataclasses.fields(config_class):
        if not found.get(item.name):
            raise ValueError(
                f"{config_class.__module__}.{config_class.__name__}.{item.name} has no docstring under it; "
                "write what it means, its unit and where its default comes from"
            )
    return found


def load_config_file(path: str | Path, stage: str) -> dict[str, Any]:
    """Read a YAML file into the flat fields of one stage (shared fields, overlaid by the stage's section).

    Raises ConfigError when the file is missing, cannot be read, is not YAML, repeats a key, or is not a mapping.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ConfigError(f"configuration file not found: {path} (looked in {Path.cwd()})")
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path} is not a configuration file: it has more than {MAX_CONFIG_BYTES} bytes")
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a YAML file: {error}") from error
    except OSError as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error.strerror or error}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of field names to values, not {type(content).__name__}")
    shared = {name: value for name, value in content.items() if name not in STAGES}
    section = {} if content.get(stage) is None else content[stage]
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: section `{stage}:` must hold a mapping of field names to values")
    return {**shared, **section}


def parse_config(
    stage: str,
    config_classes: Sequence[type],
    argv: Sequence[str] | None = None,
    *,
    default_config: str | Path | None = None,
    known_fields: AbstractSet[str] = frozenset(),
) -> tuple[Any, ...]:
    """Fill `config_classes` from the defaults, then `--config FILE`, then the command line.

    `default_config` is read when the command line names neither `--config` nor a model: it tunes the embedded
    default and would not suit another one. `known_fields` are names of other stages that a shared file may hold and
    this stage passes over. `--local_rank`, which launchers add, is dropped: the rank is read from the environment.
    `--help` explains every field and exits. Returns one instance per class, in order.
    Raises ConfigError for an unknown field (with the nearest known names) or a value of the wrong type.
    """
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"command line: {message}")

    arguments = _without_local_rank(list(sys.argv[1:] if argv is None else argv))
    parser = Parser(list[Any](config_classes), prog=f"step {stage}", allow_abbrev=False)
    if {"-h", "--help"} & set(arguments):
        texts = {name: text for config in config_classes for name, text in field_docstrings(config).items()}
        for action in parser._actions:
            action.help = texts.get(action.dest, action.help or "").replace("%", "%%")
    config_path, arguments = _take_config_option(arguments)
    implicit = config_path is None and default_config is not None and not _given(arguments, *MODEL_OPTIONS)
    if implicit:
        config_path = str(default_config)
    if config_path is not None:
        logger.info("configuration: %s", config_path)
    own = {name: kind for config in config_classes for name, kind in get_type_hints(config).items()}
    if config_path is not None:
        values = load_config_file(config_path, stage)
        _check_names(values, known_fields | own.keys(), config_path)
        values = {name: value for name, value in values.items() if name in own}
        if implicit:  # its held-out data belongs to its training data
            values = {
                name: value
                for name, value in values.items()
                if not (name.endswith("_eval_data") and _given(arguments, name.replace("_eval_data", "_data")))
            }
        parser.set_defaults_with_config(
            **{name: _checked(name, value, own[name], config_path) for name, value in values.items()}
        )
    *configs, unknown = parser.parse_args_into_dataclasses(
        args=arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        _check_names([unknown[0].split("=")[0].removeprefix("--")], own.keys(), "command line")
        raise ConfigError(f"command line: cannot read {unknown[0]!r}; fields are given as `--name value`")
    for config in configs:
        _check_values(config)
    return tuple(configs)


def save_config(path: Path, configs: Sequence[Any]) -> None:
    """Write the configuration in force as YAML that `--config` reads back."""
    merged = {name: value for config in configs for name, value in dataclasses.asdict(config).items()}
    path.write_text(write_yaml(merged), encoding="utf-8")


def _given(arguments: Sequence[str], *names: str) -> bool:
    given = {argument.split("=")[0].removeprefix("--").replace("-", "_") for argument in arguments}
    return not given.isdisjoint(names)


def _take_config_option(arguments: list[str]) -> tuple[str | None, list[str]]:
    for index, argument in enumerate(arguments):
        if argument == "--config":
            if index + 1 == len(arguments):
                raise ConfigError("--config needs the path of a YAML file after it")
            return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
        if argument.startswith("--config="):
            return argument.split("=", 1)[1], arguments[:index] + arguments[index + 1 :]
    return None, arguments


def _without_local_rank(arguments: list[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--local_rank", "--local-rank"):
            skip = True
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            kept.append(argument)
    return kept


def _check_names(names: Iterable[str], known: AbstractSet[str], source: str) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "see docs/configuration.md for every field"
            raise ConfigError(f"{source}: unknown field `{name}`; {hint}")


def _check_values(config: Any) -> None:
    """ConfigError for a number that is not finite and for a text that no file name and no file could hold."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, float) and not (math.isfinite(entry) or _turns_off(item.name, entry)):
                raise ConfigError(f"{item.name}={entry} must be a finite number")
            if isinstance(entry, str) and not _can_be_written(entry):
                raise ConfigError(f"{item.name}={entry!r} holds a character that cannot be written (NUL, half a pair)")


def _turns_off(name: str, value: float) -> bool:
    """Whether `value` is infinity and means something: a clip range that clips nothing."""
    return name in ("clip_range", "value_clip_range") and value == math.inf


def _can_be_written(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _checked(name: str, value: Any, kind: Any, path: str) -> Any:
    """Convert a YAML value to the type `kind` of its field where that loses nothing (1 -> 1.0, "5e-5" -> 5e-5)."""
    needed = str(kind) if get_origin(kind) else kind.__name__
    shown = repr(value) if len(repr(value)) <= 200 else repr(value)[:200] + "..."
    wrong = ConfigError(f"{path}: field `{name}` needs {needed}, got {shown} ({_type_name(value)})")
    if get_origin(kind) in (UnionType, Union):  # the second one where a Literal is part of it
        if value is None:
            return None
        kind = next(part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is list:
        if value is None:
            raise wrong
        convert = _number if get_args(kind) == (float,) else _list_entry
        return [convert(entry, wrong) for entry in (value if isinstance(value, list) else [value])]
    if get_origin(kind) is Literal:
        for choice in get_args(kind):
            if str(value) == str(choice):
                return choice
        raise ConfigError(f"{path}: field `{name}`={shown} is not one of {', '.join(map(str, get_args(kind)))}")
    if kind is float:
        return value if isinstance(value, float) and _turns_off(name, value) else _number(value, wrong)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    if kind is str:
        return _text(value, wrong)
    if type(value) is not kind:
        raise wrong
    return value


def _type_name(value: Any) -> str:
    return type(value).__name__.removeprefix("Written").lower()


def _list_entry(value: Any, wrong: ConfigError) -> str:
    return _text(json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value, wrong)


def _text(value: Any, wrong: ConfigError) -> str:
    if isinstance(value, WrittenInt | WrittenFloat):
        return value.text  # a name that YAML reads as a number
    if not isinstance(value, str) or not _can_be_written(value):
        raise wrong
    return value


def _number(value: Any, wrong: ConfigError) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    try:
        number = float(value)  # YAML reads 5e-5 as a string
    except (ValueError, OverflowError):
        raise wrong from None
    if not math.isfinite(number):
        raise wrong
    return number
