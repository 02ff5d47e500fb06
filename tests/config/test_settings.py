"""What each field of the configuration may be: the last value that is taken and the first that is refused."""

from dataclasses import replace

import pytest

from rlhf.algorithms.config import PPOBatchConfig
from rlhf.config import BatchConfig, ConfigError, DataConfig, ModelConfig, OptimizerConfig, RunConfig

RANGES = [
    (RunConfig(), "log_every_steps", [1], [0]),
    (RunConfig(), "save_every_steps", [0], [-1]),
    (RunConfig(), "keep_last", [0], [-1]),
    (RunConfig(), "keep_every", [0], [-1]),
    (RunConfig(), "rank_timeout_minutes", [0.0], [-0.1]),
    (ModelConfig(), "lora_rank", [0, 1], [-1]),
    (OptimizerConfig(), "adam_betas", [[0.0, 0.0], [0.9, 0.999]], [[-0.1, 0.9], [0.9, 1.0], [0.9], [0.9, 0.9, 0.9]]),
    (OptimizerConfig(), "learning_rate", [0.0], [-1e-9]),
    (OptimizerConfig(), "weight_decay", [0.0], [-0.1]),
    (OptimizerConfig(), "warmup_steps", [0], [-1]),
    (OptimizerConfig(), "warmup_ratio", [0.0], [-0.1]),
    (BatchConfig(), "global_batch_size", [1], [0]),
    (BatchConfig(), "micro_batch_size", [1], [0]),
    (BatchConfig(), "epochs", [0.0], [-0.1]),
    (BatchConfig(), "max_steps", [0], [-1]),
    (BatchConfig(), "micro_batch_tokens", [0], [-1]),
    (PPOBatchConfig(), "micro_batch_size", [1], [0]),
    (PPOBatchConfig(), "epochs", [0.0], [-0.1]),
    (PPOBatchConfig(), "rollout_batch_size", [1], [0]),
    (PPOBatchConfig(), "samples_per_prompt", [1], [0]),
    (PPOBatchConfig(), "generation_batch_size", [0], [-1]),
    (DataConfig(), "max_prompt_tokens", [1], [0]),
    (DataConfig(), "max_response_tokens", [1], [0]),
    (DataConfig(), "eval_fraction", [0.0, 0.99], [-0.01, 1.0]),
]


@pytest.mark.parametrize(("config", "field", "taken", "refused"), RANGES, ids=[row[1] for row in RANGES])
def test_a_number_outside_its_range_is_refused_by_name(config, field, taken, refused):
    for value in taken:
        assert getattr(replace(config, **{field: value}), field) == value
    for value in refused:
        with pytest.raises(ConfigError, match=field):
            replace(config, **{field: value})


def test_quantized_weights_need_adapters():
    with pytest.raises(ConfigError, match="lora_rank"):
        ModelConfig(quantization="4bit", lora_rank=0)
    assert ModelConfig(quantization="4bit", lora_rank=1).lora_rank == 1
