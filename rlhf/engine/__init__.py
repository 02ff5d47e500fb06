"""Training and inference engines over DeepSpeed ZeRO; works in a notebook and under the `deepspeed` launcher."""

from rlhf.engine.batch_plan import BatchPlan, partition
from rlhf.engine.deepspeed_config import compute_dtype, zero_config
from rlhf.engine.engine_state import load_engine_state, save_engine_state
from rlhf.engine.factory import (
    build_optimizer,
    build_schedule,
    device_of,
    inference_engine,
    training_engine,
    zero3_loading,
)
from rlhf.engine.rlhf_engine import RLHFEngine
from rlhf.engine.whole_weights import gathered_weights

__all__ = [
    "BatchPlan",
    "RLHFEngine",
    "build_optimizer",
    "build_schedule",
    "compute_dtype",
    "device_of",
    "gathered_weights",
    "inference_engine",
    "load_engine_state",
    "partition",
    "save_engine_state",
    "training_engine",
    "zero3_loading",
    "zero_config",
]
