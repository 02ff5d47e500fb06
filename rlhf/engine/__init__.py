"""Training and inference engines over DeepSpeed ZeRO; works in a notebook and under the `deepspeed` launcher."""

from rlhf.engine.averaged_weights import AveragedWeights
from rlhf.engine.batch_plan import BatchPlan, partition
from rlhf.engine.deepspeed_config import compute_dtype, deepspeed_settings
from rlhf.engine.engine_state import load_engine_state, save_engine_state
from rlhf.engine.factory import (
    build_optimizer,
    build_schedule,
    check_engine,
    device_of,
    inference_engine,
    training_engine,
    zero3_loading,
)
from rlhf.engine.rlhf_engine import RLHFEngine
from rlhf.engine.whole_weights import whole_weights_of

__all__ = [
    "AveragedWeights",
    "BatchPlan",
    "RLHFEngine",
    "build_optimizer",
    "build_schedule",
    "check_engine",
    "compute_dtype",
    "deepspeed_settings",
    "device_of",
    "inference_engine",
    "load_engine_state",
    "partition",
    "save_engine_state",
    "training_engine",
    "whole_weights_of",
    "zero3_loading",
]
