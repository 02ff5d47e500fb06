"""The models of PPO in one object: an actor, and beside it what the algorithm needs of critic, reference and reward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from rlhf.config import ConfigError, EngineConfig, ModelConfig, OptimizerConfig, check_together
from rlhf.distributed.log import logger
from rlhf.distributed.place import world_size
from rlhf.engine.averaged_weights import AveragedWeights
from rlhf.engine.batch_plan import BatchPlan
from rlhf.engine.deepspeed_config import compute_dtype
from rlhf.engine.factory import device_of, inference_engine, training_engine, zero3_loading
from rlhf.models.directories import check_scalar_directory, is_scalar_directory
from rlhf.models.loading import load_causal_lm
from rlhf.models.lora import adapter_disabled, has_adapter
from rlhf.models.scalar import ScalarModel
from rlhf.models.shared import Roles, adapted_roles
from rlhf.numerics.cpu import WORKERS, can_run_side_by_side, side_by_side


class RLHFEngine:
    """Holds `actor` and `critic` (training engines), `reference`, `reward` and `held_out_reward` (frozen), and
    `averaged_actor`.

    All but the actor may be None: an algorithm without a critic or a reference has none in memory. With
    `reference_is_actor_without_adapter` the actor carries a LoRA adapter, and is the reference while that is off.
    """

    def __init__(
        self,
        actor: Any,
        *,
        critic: Any = None,
        reference: nn.Module | None = None,
        reward: nn.Module | None = None,
        held_out_reward: nn.Module | None = None,
        reference_is_actor_without_adapter: bool = False,
        ema_decay: float = 0.0,
        side_by_side: bool = False,
    ) -> None:
        if reference_is_actor_without_adapter and reference is not None:
            raise ConfigError("one reference is enough: a model, or the actor without its adapter")
        if reference_is_actor_without_adapter and not has_adapter(actor):
            raise ConfigError("the actor has no LoRA adapter to switch off: give a model as its reference")
        self.actor = actor
        self.critic = critic
        self.reference = reference
        self.reward = reward
        self.held_out_reward = held_out_reward
        self.reference_is_actor_without_adapter = reference_is_actor_without_adapter
        self.averaged_actor = AveragedWeights(actor, ema_decay) if ema_decay != 0.0 else None
        pays = side_by_side and can_run_side_by_side(device_of(actor), ranks=world_size())
        self.jobs_at_a_time = WORKERS if pays and not _quantized(actor, critic) else 1
        """Models that compute at the same time and share the memory of a training pass; see `run_jobs`."""

    @classmethod
    def build(
        cls,
        actor_model: str | Path,
        *,
        critic_model: str | Path | None = None,
        reward_model: str | Path | None = None,
        held_out_reward_model: str | Path | None = None,
        with_reference: bool = True,
        model: ModelConfig,
        engine: EngineConfig,
        optimizer: OptimizerConfig,
        critic_learning_rate: float | None = None,
        plan: BatchPlan,
        total_steps: int,
        critic_total_steps: int | None = None,
        zero_critic_head: bool = False,
        ema_decay: float = 0.0,
        seed: int = 0,
    ) -> Self:
        """The models that are named, from their directories; the reference is the actor as it starts.

        The critic starts from another critic or a reward model, head included, or from a causal LM, which gets a new
        head drawn with `seed`; with `zero_critic_head` its values start at 0. It learns at `critic_learning_rate` over
        `critic_total_steps`, None: as the actor does.
        With LoRA, models on one base share it: see `rlhf.models.shared.adapted_roles`; the held-out reward model is a
        whole one of its own, unquantised. Raises ConfigError for what
        cannot be loaded or does not go together.
        """
        check_together(model, engine)
        for directory in (reward_model, held_out_reward_model):
            if directory is not None:
                check_scalar_directory(directory)
        if model.model_dropout or model.lora_dropout:
            logger.info("PPO: dropout is off (with it the ratio would not start at 1), whatever the configuration says")
        model = replace(model, model_dropout=0.0, lora_dropout=0.0)
        dtype = compute_dtype(engine.precision)
        loading = partial(zero3_loading, engine, plan)
        if model.lora_rank:
            roles = adapted_roles(
                actor_model, reward_model, critic_model, with_reference=with_reference, config=model, dtype=dtype,
                seed=seed, loading=loading,
            )  # fmt: skip
        else:
            with loading():
                roles = _whole_models(actor_model, reward_model, critic_model, with_reference, model, dtype, seed)
        held_out_reward = None
        if held_out_reward_model is not None:
            with loading():
                whole = replace(model, quantization="none")
                held_out_reward = ScalarModel.from_pretrained(held_out_reward_model, whole, dtype=dtype)
        if zero_critic_head and isinstance(roles.critic, ScalarModel):
            roles.critic.zero_head()
        training = partial(
            training_engine, engine=engine, optimizer=optimizer, plan=plan,
            gradient_checkpointing=model.gradient_checkpointing,
        )  # fmt: skip
        frozen = partial(inference_engine, engine=engine, plan=plan)
        return cls(
            training(roles.actor, total_steps=total_steps),
            critic=None
            if roles.critic is None
            else training(
                roles.critic, learning_rate=critic_learning_rate, total_steps=critic_total_steps or total_steps
            ),
            reference=None if roles.reference is None else frozen(roles.reference),
            reward=None if roles.reward is None else frozen(roles.reward),
            held_out_reward=None if held_out_reward is None else frozen(held_out_reward),
            reference_is_actor_without_adapter=with_reference and roles.reference is None,
            ema_decay=ema_decay,
            # ZeRO-3 keeps process-wide notes of the module that runs: two models at a time would mix them up
            side_by_side=engine.side_by_side and engine.zero_stage != 3,
        )

    @property
    def has_reference(self) -> bool:
        """Whether there is a model to take the KL divergence to."""
        return self.reference is not None or self.reference_is_actor_without_adapter

    @contextmanager
    def reference_model(self) -> Iterator[Any]:
        """Yield the model that reference log-probabilities are computed with; it must not train in the block.

        Raises ConfigError when the engine was built without a reference.
        """
        if self.reference is not None:
            yield self.reference
        elif self.reference_is_actor_without_adapter:
            with adapter_disabled(self.actor):
                yield self.actor
        else:
            raise ConfigError(
                "this engine has no reference model, and a KL penalty needs one: build it with with_reference=True"
            )

    def eval(self) -> None:
        """Every model in evaluation mode."""
        for module in self._modules():
            module.eval()

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Every model in evaluation mode within the block; each of their modules has its mode back after it."""
        modes = [(part, part.training) for module in self._modules() for part in module.modules()]
        self.eval()
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training

    def run_jobs(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Run jobs that do not depend on one another: in order, or side by side where the hardware gains by it."""
        side_by_side(jobs, together=self.jobs_at_a_time > 1)

    @contextmanager
    def updating(self, engine: Any) -> Iterator[None]:
        """`engine` in training mode within the block (gradient checkpointing needs it), as it was after it."""
        modes = [(part, part.training) for part in engine.modules()]
        engine.train()
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training

    def _modules(self) -> list[nn.Module]:
        models = (self.actor, self.critic, self.reference, self.reward, self.held_out_reward)
        return [module for module in models if module is not None]


def _whole_models(
    actor_model: str | Path,
    reward_model: str | Path | None,
    critic_model: str | Path | None,
    with_reference: bool,
    config: ModelConfig,
    dtype: torch.dtype,
    seed: int,
) -> Roles:
    """The models without adapters, a copy of its weights for each."""
    actor = load_causal_lm(actor_model, config, dtype=dtype)
    critic: nn.Module | None = None
    if critic_model is not None and is_scalar_directory(critic_model):
        critic = ScalarModel.from_pretrained(critic_model, config, dtype=dtype, as_critic=True)
    elif critic_model is not None:
        critic = ScalarModel.from_base(critic_model, config, dtype=dtype, seed=seed)
    return Roles(
        actor=actor,
        critic=critic,
        reference=load_causal_lm(actor_model, config, dtype=dtype) if with_reference else None,
        reward=None if reward_model is None else ScalarModel.from_pretrained(reward_model, config, dtype=dtype),
    )


def _quantized(*models: nn.Module | None) -> bool:
    """True when a weight is in 8 or 4 bits: bitsandbytes keeps scratch state beside it, which serves one thread."""
    return any(not weight.is_floating_point() for model in models if model is not None for weight in model.parameters())
