"""The four models of PPO in one object: actor and critic that train, reference and reward model that do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from rlhf.config import ConfigError, EngineConfig, ModelConfig, OptimizerConfig
from rlhf.distributed import is_main, logger
from rlhf.engine.batch_plan import BatchPlan
from rlhf.engine.deepspeed_config import compute_dtype
from rlhf.engine.factory import inference_engine, training_engine, zero3_loading
from rlhf.models.directories import check_scalar_directory, is_scalar_directory
from rlhf.models.loading import load_causal_lm
from rlhf.models.lora import adapter_disabled, has_adapter
from rlhf.models.scalar import ScalarModel
from rlhf.models.shared import Roles, adapted_roles


class RLHFEngine:
    """Holds `actor`, `critic` (training engines), `reference`, `reward` (frozen), and knows which share weights.

    With `reference` None the actor carries a LoRA adapter and the reference is the actor with its adapter off.
    """

    def __init__(
        self, actor: Any, critic: Any, reference: nn.Module | None, reward: nn.Module, *, ema_decay: float = 0.0
    ) -> None:
        if reference is None and not has_adapter(actor):
            raise ConfigError("a reference is needed: only an actor with a LoRA adapter can be its own")
        if not 0.0 <= ema_decay < 1.0:
            raise ConfigError(f"ema_decay={ema_decay} must be at least 0 (off) and below 1")
        self.actor = actor
        self.critic = critic
        self.reference = reference
        self.reward = reward
        self.ema_decay = ema_decay
        self._ema: dict[str, torch.Tensor] = {}
        if ema_decay > 0:
            self._visit_trainable(self._start_ema)

    @classmethod
    def build(
        cls,
        actor_model: str | Path,
        reward_model: str | Path,
        critic_model: str | Path | None = None,
        *,
        model: ModelConfig,
        engine: EngineConfig,
        actor_optimizer: OptimizerConfig,
        critic_learning_rate: float,
        plan: BatchPlan,
        total_steps: int,
        ema_decay: float = 0.0,
        seed: int = 0,
    ) -> Self:
        """All four from directories.

        The critic starts as a copy of the reward model, head included, or from `critic_model`: another reward model
        or critic, or a causal LM, which gets a new head drawn with `seed`. The reference is the actor as it starts.
        With LoRA, models that stand on one base share it: see `rlhf.models.shared.adapted_roles`.
        """
        if model.quantization != "none":
            if model.lora_rank < 1:
                raise ConfigError(f"quantization={model.quantization} needs lora_rank above 0: its base is frozen")
            if engine.zero_stage == 3:
                raise ConfigError(
                    f"quantization={model.quantization} does not go with zero_stage=3: quantised weights cannot be "
                    f"partitioned; use zero_stage 0, 1 or 2, or quantization=none"
                )
        dtype = compute_dtype(engine.precision)
        if model.model_dropout or model.lora_dropout:
            logger.info("PPO: dropout is off (with it the ratio would not start at 1), whatever the configuration says")
        model = replace(model, model_dropout=0.0, lora_dropout=0.0)
        critic_path = reward_model if critic_model is None else critic_model
        check_scalar_directory(reward_model)
        loading = partial(zero3_loading, engine, plan)
        if model.lora_rank:
            roles = adapted_roles(
                actor_model, reward_model, critic_path, config=model, dtype=dtype, seed=seed, loading=loading
            )
        else:
            with loading():
                critic_class = (
                    partial(ScalarModel.from_pretrained, as_critic=True)
                    if is_scalar_directory(critic_path)
                    else partial(ScalarModel.from_base, seed=seed)
                )
                roles = Roles(
                    actor=load_causal_lm(actor_model, model, dtype=dtype),
                    critic=critic_class(critic_path, model, dtype=dtype),
                    reference=load_causal_lm(actor_model, model, dtype=dtype),
                    reward=ScalarModel.from_pretrained(reward_model, model, dtype=dtype),
                )
        critic_optimizer = replace(actor_optimizer, learning_rate=critic_learning_rate)
        shared: dict[str, Any] = {
            "engine": engine,
            "plan": plan,
            "total_steps": total_steps,
            "gradient_checkpointing": model.gradient_checkpointing,
        }
        return cls(
            training_engine(roles.actor, optimizer=actor_optimizer, **shared),
            training_engine(roles.critic, optimizer=critic_optimizer, **shared),
            None if roles.reference is None else inference_engine(roles.reference, engine=engine, plan=plan),
            inference_engine(roles.reward, engine=engine, plan=plan),
            ema_decay=ema_decay,
        )

    @contextmanager
    def reference_model(self) -> Iterator[Any]:
        """Yield the model that reference log-probabilities are computed with; it must not train in the block."""
        if self.reference is not None:
            yield self.reference
            return
        with adapter_disabled(self.actor):
            yield self.actor

    def train(self) -> None:
        """Actor and critic in training mode (dropout on where there is any)."""
        self.actor.train()
        self.critic.train()

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

    def update_ema(self) -> None:
        """Move the averaged actor: average = decay * average + (1 - decay) * weights. A collective under ZeRO-3."""
        if self.ema_decay <= 0:
            raise ConfigError("update_ema needs ema_decay above 0")
        self._visit_trainable(self._average)

    def ema_state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged trainable weights in float32 by name, on rank 0 ({} on the others)."""
        return dict(self._ema)

    def load_ema_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take up an average again (rank 0; the others pass {}). Raises ValueError when the names differ."""
        if is_main() and state.keys() != self._ema.keys():
            raise ValueError(
                f"the averaged actor has {len(self._ema)} weights and the state {len(state)}; "
                f"differing: {', '.join(sorted(state.keys() ^ self._ema.keys())[:4])}"
            )
        self._ema = {name: tensor.float().clone() for name, tensor in state.items()} if is_main() else {}

    def _modules(self) -> list[nn.Module]:
        return [module for module in (self.actor, self.critic, self.reference, self.reward) if module is not None]

    def _start_ema(self, name: str, weight: torch.Tensor) -> None:
        self._ema[name] = weight.clone()

    def _average(self, name: str, weight: torch.Tensor) -> None:
        self._ema[name].lerp_(weight, 1.0 - self.ema_decay)

    @torch.no_grad()
    def _visit_trainable(self, visit: Any) -> None:
        """Call `visit(name, float32 copy on the CPU)` on rank 0 for each trainable weight of the actor."""
        import deepspeed

        for name, parameter in self.actor.module.named_parameters():
            if parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                    if is_main():
                        visit(name, parameter.detach().to("cpu", torch.float32))
