"""What an on-policy stage is put together from: its models and tokenizers, its rollouts, its ptx mixture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.algorithms.advantages import ESTIMATORS
from rlhf.algorithms.config import PPOConfig
from rlhf.algorithms.ppo import PtxMixture
from rlhf.checkpoint.fingerprint import model_fingerprint
from rlhf.config import ConfigError
from rlhf.data import StageData
from rlhf.distributed.log import logger
from rlhf.engine import RLHFEngine
from rlhf.evaluation.gold import GOLD, measure_gold, of_the_world
from rlhf.generation.backend import make_backend
from rlhf.generation.token_sampling import Sampling
from rlhf.models.architecture import check_trainable, check_weights_there
from rlhf.models.directories import check_causal_directory, check_scalar_directory
from rlhf.models.inner_model import eos_token_ids
from rlhf.models.loading import check_vocabulary, load_tokenizer
from rlhf.pipeline.stage_run import StageRun
from rlhf.pipeline.stages import PPOStageConfig
from rlhf.rewards.reward import RewardSources
from rlhf.rewards.reward_model import ChatPrompts, RewardModel, same_tokenizer
from rlhf.rewards.table import build_reward, check_rewards, needs_reward_model, reward_parts
from rlhf.training.rollouts import RolloutWorker
from rlhf.types import TokenizedPrompt


@dataclass(frozen=True)
class OnPolicyModels:
    """Where the models of a run come from, None for one that it does not need, and the tokenizers they read."""

    actor: str
    critic: str | None
    reward: str | None
    tokenizer: Any
    reward_tokenizer: Any
    held_out_reward: str | None = None
    held_out_tokenizer: Any = None

    @classmethod
    def find(cls, stage: StageRun[PPOStageConfig]) -> OnPolicyModels:
        """The models that the configuration names or that earlier stages saved.

        The critic starts from the reward model (InstructGPT), or from the actor where the two read other tokens. Raises
        ConfigError for one that is not there, is of another kind, cannot train as the configuration says, or cannot
        read as many tokens as a prompt and its response may have.
        """
        ppo, trust = stage.config.ppo, stage.config.model.trust_remote_code
        actor = stage.earlier_model("actor_model", ppo.actor_model)
        check_causal_directory(actor)
        check_trainable(actor, stage.config.model, what="actor_model")
        tokenizer = load_tokenizer(actor, trust_remote_code=trust)
        reward, reward_tokenizer = None, None
        if needs_reward_model(ppo.reward_specs()):
            reward = stage.earlier_model("reward_model", ppo.reward_model)
            check_weights_there(reward)
            if stage.dry_run is None or reward not in stage.dry_run.bases.values():
                check_scalar_directory(reward)
            reward_tokenizer = load_tokenizer(reward, trust_remote_code=trust)
        critic = None
        if ESTIMATORS[ppo.advantage].needs_critic:
            shared = reward if reward and same_tokenizer(reward_tokenizer, tokenizer) else actor
            critic = ppo.critic_model or shared
            check_trainable(critic, stage.config.model, what="critic_model")
        stage.check_positions(actor, "actor_model")
        if critic is not None:
            stage.check_positions(critic, "critic_model")
        if reward is not None and same_tokenizer(reward_tokenizer, tokenizer):
            stage.check_positions(reward, "reward_model")  # with another one its prompts lose their beginning
        held_out, held_out_tokenizer = ppo.held_out_reward_model, None
        if held_out is not None:
            held_out_tokenizer = _held_out_tokenizer(stage, held_out, reward, tokenizer)
        return cls(actor, critic, reward, tokenizer, reward_tokenizer, held_out, held_out_tokenizer)

    def fingerprints(self) -> dict[str, Any]:
        """What tells these models from others, by role; None for one that is not there."""
        paths = {"actor": self.actor, "reward": self.reward, "critic": self.critic, "held_out": self.held_out_reward}
        return {name: None if path is None else model_fingerprint(path) for name, path in paths.items()}

    def trained(self, stage: StageRun[PPOStageConfig]) -> dict[str, str]:
        """The models that train and are saved, by role."""
        roles = {"actor": self.actor, "critic": self.critic}
        if stage.config.ppo.ema_decay > 0:
            roles["averaged actor"] = self.actor
        return {role: path for role, path in roles.items() if path is not None}

    def build(self, stage: StageRun[PPOStageConfig], *, optimizer_steps: tuple[int, int]) -> RLHFEngine:
        """The engines of these models; `optimizer_steps` are those of the actor and of the critic in the whole run."""
        config = stage.config
        stage.end_dry_run(self.trained(stage), self.tokenizer, optimizer_steps[1])
        if self.critic is not None:
            head = "a head of zeros" if config.ppo.zero_critic_head else "the head there"
            logger.info("critic: starts from %s with %s (critic_init)", self.critic, head)
        engine = RLHFEngine.build(
            self.actor,
            critic_model=self.critic,
            reward_model=self.reward,
            held_out_reward_model=self.held_out_reward,
            model=config.model,
            engine=config.engine,
            optimizer=config.optimizer,
            critic_learning_rate=config.optimizer.critic_learning_rate,
            plan=stage.plan,
            total_steps=optimizer_steps[0],
            critic_total_steps=optimizer_steps[1],
            zero_critic_head=config.ppo.zero_critic_head,
            ema_decay=config.ppo.ema_decay,
            seed=config.run.seed,
        )
        check_vocabulary(engine.actor, self.tokenizer)
        if engine.critic is not None:
            check_vocabulary(engine.critic.module.backbone, self.tokenizer)
        return engine

    def check_prompts(self, stage: StageRun[PPOStageConfig], prompts: StageData) -> None:
        """ConfigError for a prompt that a reward could not read or score, or held-out prompts that cannot tell which
        actor is the best, before any model is loaded."""
        check_selection(stage.config.ppo, prompts.evaluation)
        check_rewards(stage.config.ppo.reward_specs(), [*prompts.train, *prompts.evaluation])
        if stage.config.data.template != "chat":
            return
        tokenizers = {self.reward: self.reward_tokenizer, self.held_out_reward: self.held_out_tokenizer}
        for path, tokenizer in tokenizers.items():
            chats = None if path is None else ChatPrompts.for_reward_model(tokenizer, self.tokenizer)
            if chats is not None:
                for prompt in [*prompts.train, *prompts.evaluation]:
                    chats.text(prompt)

    def rollouts(self, stage: StageRun[PPOStageConfig], engine: RLHFEngine) -> RolloutWorker:
        """What samples with the actor and scores with every model."""
        config, ppo, tokenizer = stage.config, stage.config.ppo, self.tokenizer
        eos_ids = eos_token_ids(engine.actor, tokenizer)
        backend = make_backend(
            ppo.generation_backend,
            engine.actor,
            eos_ids=eos_ids,
            pad_token_id=tokenizer.pad_token_id,
            seed=config.run.seed,
            slots=config.batch.generation_batch_size,
        )
        chat = config.data.template == "chat"
        sources = RewardSources(tokenizer, tuple(eos_ids), engine.reward, self.reward_tokenizer, chat)
        held_out = replace(sources, engine=engine.held_out_reward, reward_tokenizer=self.held_out_tokenizer)
        return RolloutWorker(
            engine,
            backend,
            build_reward(ppo.reward_specs(), sources),
            Sampling(config.data.max_response_tokens, temperature=ppo.temperature, vocabulary_size=len(tokenizer)),
            tokenizer=tokenizer,
            eos_ids=eos_ids,
            plan=stage.plan,
            scoring_tokens=config.batch.scoring_batch_tokens,
            old_logprobs=ppo.old_logprobs,
            measure=measure_gold,
            parts=reward_parts(ppo.reward_specs()),
            held_out_reward=None if engine.held_out_reward is None else RewardModel(held_out),
        )


def check_selection(ppo: PPOConfig, evaluation: Sequence[TokenizedPrompt]) -> None:
    """ConfigError where `keep_best` or `stop_when` names a figure that these held-out prompts do not give."""
    for name, measure in (("keep_best", ppo.keep_best), ("stop_when", ppo.stop_when)):
        if measure is not None and not evaluation:
            raise ConfigError(
                f"{name}={measure} needs held-out prompts: name some in prompt_eval_data, set eval_fraction above 0, "
                f"or leave {name} out"
            )
        if measure == GOLD and not all(map(of_the_world, evaluation)):
            raise ConfigError(
                f"{name}=gold needs held-out prompts of the embedded world, which alone have a gold, and not all are: "
                "take held_out_score with held_out_reward_model, or reward"
            )


def _held_out_tokenizer(stage: StageRun[PPOStageConfig], path: str, reward: str | None, tokenizer: Any) -> Any:
    """The tokenizer of the held-out reward model in `path`. ConfigError where it is none, is the model that is
    optimised, or cannot read as many tokens as a prompt and its response may have."""
    check_weights_there(path)
    check_scalar_directory(path)
    if reward is not None and Path(reward).is_dir() and model_fingerprint(path) == model_fingerprint(reward):
        raise ConfigError(
            f"held_out_reward_model {path} holds the same model as the reward model {reward}, which training "
            "optimises: train another one on other data, or leave it out"
        )
    found = load_tokenizer(path, trust_remote_code=stage.config.model.trust_remote_code)
    if same_tokenizer(found, tokenizer):
        stage.check_positions(path, "held_out_reward_model")
    return found


def load_ptx(stage: StageRun[PPOStageConfig], tokenizer: Any) -> PtxMixture | None:
    """The ptx mixture, or None where it is off."""
    ptx_coef, ptx_data = stage.config.ppo.ptx_coef, stage.config.data.ptx_data
    if ptx_coef == 0:
        return None
    data = stage.load_data("response", ptx_data, [], tokenizer, stage="sft", report_name="ptx", field="ptx_data")
    return PtxMixture(data, stage.plan, coef=ptx_coef, pad_token_id=tokenizer.pad_token_id, seed=stage.run.seed)
