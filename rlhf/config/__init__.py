"""What a user sets: dataclasses with a docstring under every field, and the parser that fills them.

A configuration file is YAML. Its top level holds fields shared by the stages; a section named after a stage holds
fields of that stage and wins over the shared ones. The command line wins over both.
"""

from rlhf.config.errors import ConfigError, require_at_least
from rlhf.config.explain import field_docstrings
from rlhf.config.facts import FieldFacts, facts_of, setting
from rlhf.config.files import load_config_file, save_config
from rlhf.config.parsing import parse_config, read_options
from rlhf.config.settings import (
    EMBEDDED_BASE,
    REMOVED_FIELDS,
    BatchConfig,
    DataConfig,
    EngineConfig,
    ModelConfig,
    OfflineDataConfig,
    OptimizerConfig,
    PPODataConfig,
    RewardDataConfig,
    RunConfig,
    SFTDataConfig,
    check_together,
)

__all__ = [
    "EMBEDDED_BASE",
    "REMOVED_FIELDS",
    "BatchConfig",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "FieldFacts",
    "ModelConfig",
    "OfflineDataConfig",
    "OptimizerConfig",
    "PPODataConfig",
    "RewardDataConfig",
    "RunConfig",
    "SFTDataConfig",
    "check_together",
    "facts_of",
    "field_docstrings",
    "load_config_file",
    "parse_config",
    "read_options",
    "require_at_least",
    "save_config",
    "setting",
]
