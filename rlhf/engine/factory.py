"""Engines: a model, an optimizer and a schedule under DeepSpeed. The only place that names deepspeed.initialize."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from rlhf.config import ConfigError, EngineConfig, OptimizerConfig
from rlhf.distributed.log import logger
from rlhf.distributed.place import world_size
from rlhf.distributed.world import init_world
from rlhf.engine.batch_plan import BatchPlan
from rlhf.engine.deepspeed_config import compute_dtype, deepspeed_settings
from rlhf.models.experts import check_no_experts
from rlhf.numerics.cpu import speed_up_linears


def training_engine(
    model: nn.Module,
    *,
    engine: EngineConfig,
    optimizer: OptimizerConfig,
    plan: BatchPlan,
    total_steps: int,
    learning_rate: float | None = None,
    gradient_checkpointing: bool = False,
) -> Any:
    """A DeepSpeed engine that trains `model`; called like the model, with `backward(loss)` and `step()`.

    DeepSpeed averages over ranks: `backward(loss, scale_wrt_gas=False)` of a sum over this micro-batch's tokens, times
    world_size / tokens of the global batch, gives the gradient of the token mean of the global batch. How many
    micro-batches make a step is told with `set_gradient_accumulation_boundary`. `learning_rate` replaces that of
    `optimizer`.
    """
    import deepspeed

    device = init_world()
    check_engine(engine, optimizer, plan)
    _check(model, engine, plan)
    model_config = getattr(model, "config", None)
    if model_config is not None:
        check_no_experts(model_config)
    if gradient_checkpointing:
        # ZeRO-3 frees a block's weights after its forward pass, which the non-reentrant form does not survive
        model.gradient_checkpointing_enable(  # type: ignore[operator]
            gradient_checkpointing_kwargs={"use_reentrant": engine.zero_stage == 3}
        )
    if engine.zero_stage < 3 and device.type != "cpu" and not _quantized(model):
        model.to(device)  # before the optimizer, which keeps references to the parameters
    _cast_new_weights(model, compute_dtype(engine.precision))
    if device.type == "cpu" and engine.zero_stage < 3:
        speed_up_linears(model)
    client = build_optimizer(model, optimizer, learning_rate=learning_rate, offload=engine.offload)
    schedule = build_schedule(client, optimizer, total_steps)
    wrapped, *_ = deepspeed.initialize(
        model=model,
        optimizer=client,
        lr_scheduler=schedule,
        config=_settings(engine, plan, getattr(model, "config", None)),
    )
    wrapped.train()
    return wrapped


def inference_engine(model: nn.Module, *, engine: EngineConfig, plan: BatchPlan) -> nn.Module:
    """`model` frozen and in eval mode: on this rank's device, or under ZeRO-3 partitioned over the ranks."""
    import deepspeed

    device = init_world()
    _check(model, engine, plan, trains=False)
    model.requires_grad_(False)
    _cast_new_weights(model, compute_dtype(engine.precision))
    if engine.zero_stage < 3:
        if not _quantized(model):
            model.to(device)
        if device.type == "cpu":
            speed_up_linears(model)
        return model.eval()
    wrapped, *_ = deepspeed.initialize(
        model=model, config=_settings(engine, plan, getattr(model, "config", None), trains=False)
    )
    wrapped.eval()  # an engine's eval() returns nothing
    return wrapped


def check_engine(engine: EngineConfig, optimizer: OptimizerConfig, plan: BatchPlan) -> None:
    """ConfigError for an engine or an optimizer that could not be made, before there is a model."""
    _settings(engine, plan, None)
    _check_eight_bit(optimizer, engine.offload)


def _check_eight_bit(optimizer: OptimizerConfig, offload: str) -> None:
    if optimizer.optimizer == "adamw":
        return
    if offload != "none":
        raise ConfigError(
            f"optimizer={optimizer.optimizer} does not go with offload={offload}; use offload=none, which learns the "
            "same, or optimizer=adamw, whose states are not rounded to 8 bits"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"optimizer={optimizer.optimizer} needs bitsandbytes: pip install 'rlhf[quantization]', or use adamw"
        )


@contextmanager
def zero3_loading(engine: EngineConfig, plan: BatchPlan) -> Iterator[None]:
    """Within the block `from_pretrained` partitions weights over the ranks as it loads them, under ZeRO-3 alone.

    Without it every rank would hold the whole model first.
    """
    if engine.zero_stage != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    init_world()
    # transformers keeps a weak reference: the name must stay until the block ends
    settings = HfDeepSpeedConfig(_settings(engine, plan, None))
    try:
        yield
    finally:
        del settings
        unset_hf_deepspeed_config()


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, learning_rate: float | None = None, offload: str = "none"
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; weight decay on matrices only (GPT-3, appendix B; biases and norms none).

    Raises ConfigError when nothing trains.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ConfigError("the model has no trainable parameter; with a quantised base set lora_rank above 0")
    matrices = [parameter for parameter in trainable if len(_full_shape(parameter)) >= 2]
    vectors = [parameter for parameter in trainable if len(_full_shape(parameter)) < 2]
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if parameters
    ]
    _check_eight_bit(config, offload)
    arguments: dict[str, Any] = {
        "lr": config.learning_rate if learning_rate is None else learning_rate,
        "betas": tuple(config.adam_betas),
        "eps": config.adam_eps,
    }
    if config.optimizer in ("adamw_8bit", "paged_adamw_8bit"):
        import bitsandbytes as bnb

        kind = bnb.optim.AdamW8bit if config.optimizer == "adamw_8bit" else bnb.optim.PagedAdamW8bit
        built: torch.optim.Optimizer = kind(groups, **arguments)
        return built
    if config.optimizer != "adamw":
        raise ConfigError(f"optimizer={config.optimizer!r} is not one of adamw, adamw_8bit, paged_adamw_8bit")
    if offload != "none" and _cpu_adam_builds():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        offloaded: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **arguments)
        return offloaded
    return torch.optim.AdamW(groups, fused=True, **arguments)


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig, total_steps: int) -> LambdaLR:
    """Linear warm-up, then cosine or linear to 0, or constant, over `total_steps` optimizer steps.

    Step k (from 0) of w warm-up steps learns at (k + 1) / w of the peak, so that the first step is not wasted. The
    decay reaches 0 after the last step: all steps of the run learn, and a step beyond `total_steps` does not.
    """
    if total_steps < 1:
        raise ConfigError(f"total_steps={total_steps} must be at least 1: no batch to train on")
    warmup = config.warmup_steps if config.warmup_steps > 0 else math.ceil(config.warmup_ratio * total_steps)
    if warmup >= total_steps and warmup > 1:
        logger.warning("warm-up of %d steps and a run of %d: the peak learning rate comes late", warmup, total_steps)
    return LambdaLR(optimizer, learning_rate_factor(config.lr_schedule, warmup, total_steps))


def learning_rate_factor(schedule: str, warmup: int, total_steps: int) -> Callable[[int], float]:
    """Share of the peak learning rate at step k (from 0)."""
    if schedule not in ("cosine", "linear", "constant"):
        raise ConfigError(f"lr_schedule={schedule!r} is not one of cosine, linear, constant")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


def device_of(engine: nn.Module) -> torch.device:
    """The device an engine or a module computes on."""
    device = getattr(engine, "device", None)
    if device is not None:
        return torch.device(device)
    return next(engine.parameters()).device


def read_deepspeed_config(path: str | None) -> dict[str, Any] | None:
    """A user's DeepSpeed json file; ConfigError when it is missing or no json object."""
    if path is None:
        return None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"deepspeed_config {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"deepspeed_config {path} is not json: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"deepspeed_config {path} must hold a json object, not a {type(content).__name__}")
    return content


def _settings(engine: EngineConfig, plan: BatchPlan, model_config: Any, *, trains: bool = True) -> dict[str, Any]:
    settings = deepspeed_settings(
        zero_stage=engine.zero_stage,
        offload=engine.offload,
        dtype=compute_dtype(engine.precision),
        plan=plan,
        max_grad_norm=engine.max_grad_norm,
        hidden_size=getattr(model_config, "hidden_size", None),
        user_config=read_deepspeed_config(engine.deepspeed_config),
    )
    if not trains:
        settings["zero_optimization"].pop("offload_optimizer", None)
    return settings


def _cast_new_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Give `dtype` to the weights that were not loaded with it (a scalar head, an adapter): ZeRO-3 needs one dtype.

    Masters stay in float32 inside the engine, buffers such as rotary frequencies in the model. A fp32 engine leaves
    frozen weights as they are.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "ds_id") and dtype != torch.float32:
            parameter.data = parameter.data.to(dtype)


def _check(model: nn.Module, engine: EngineConfig, plan: BatchPlan, *, trains: bool = True) -> None:
    """ConfigError for a batch plan of another number of processes, and for a model of another precision."""
    if plan.world_size != world_size():
        raise ConfigError(f"the batch plan is for {plan.world_size} processes and {world_size()} run")
    dtype = compute_dtype(engine.precision)
    if trains and dtype == torch.float32:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.dtype != dtype:
                raise ConfigError(
                    f"precision=fp32 and the trainable weight {name} is {parameter.dtype}; load the model with "
                    f"dtype=compute_dtype(precision)"
                )


def _quantized(model: nn.Module) -> bool:
    return any(parameter.dtype in (torch.int8, torch.uint8) for parameter in model.parameters())


def _full_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter, also where ZeRO-3 has partitioned it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _cpu_adam_builds() -> bool:
    from deepspeed.ops.op_builder import CPUAdamBuilder

    try:
        CPUAdamBuilder().load(verbose=False)
    except Exception as error:  # the builder lets through whatever its compiler and loader raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning("DeepSpeedCPUAdam cannot be built (%s); offloaded states use torch's AdamW, slower", reason[0])
        return False
    return True
