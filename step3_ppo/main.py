"""Step 3: PPO with actor, critic, reference and reward.

deepspeed step3_ppo/main.py [--config FILE] [--field value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlhf.algorithms.ppo import PPOTrainer, ppo_optimizer_steps
from rlhf.checkpoint.atomic import write_json
from rlhf.checkpoint.export import export_causal_lm, export_scalar_model
from rlhf.checkpoint.fingerprint import model_fingerprint
from rlhf.config import ConfigError
from rlhf.data import load_stage_data
from rlhf.distributed import world_size
from rlhf.engine import BatchPlan, RLHFEngine
from rlhf.models.loading import check_vocabulary, load_tokenizer
from rlhf.models.model_call import eos_token_ids
from rlhf.pipeline.run_stage import Stage, stage_main
from rlhf.pipeline.stages import find_stage_model, paired_samples, run_stage
from rlhf.rewards.reward_model import RewardScorer, same_tokenizer


@stage_main("ppo")
def main(stage: Stage) -> dict:
    run, model_config, engine_config, optimizer_config, batch, data_config, config = stage.configs
    directory = stage.directory
    actor_model = find_stage_model(config.actor_model, "actor_model", run.output_dir, "sft")
    reward_model = find_stage_model(config.reward_model, "reward_model", run.output_dir, "reward")
    if config.ptx_coef > 0 and not data_config.ptx_data:
        raise ConfigError(f"ptx_coef={config.ptx_coef} needs data: name it in `ptx_data`, or set ptx_coef to 0")
    if config.ptx_coef == 0 and data_config.ptx_data:
        raise ConfigError("ptx_data is given and ptx_coef is 0: set ptx_coef (InstructGPT: 27.8) or leave ptx_data out")
    plan = BatchPlan(batch.global_batch_size, batch.micro_batch_size, world_size(), batch.micro_batch_tokens)

    tokenizer = load_tokenizer(actor_model, trust_remote_code=model_config.trust_remote_code)
    reward_tokenizer = load_tokenizer(reward_model, trust_remote_code=model_config.trust_remote_code)
    shared = dict(
        config=data_config, tokenizer=tokenizer, seed=run.seed, cache_dir=Path(run.cache_dir), report_dir=directory
    )
    prompts = load_stage_data("prompt", data_config.prompt_data, data_config.prompt_eval_data, stage="ppo", **shared)
    ptx = None
    if config.ptx_coef > 0:
        ptx = load_stage_data("response", data_config.ptx_data, [], stage="sft", report_name="ptx", **shared)
    # a critic reads the actor's tokens: a reward model of another tokenizer cannot lend it its weights
    critic_model = config.critic_model or (reward_model if same_tokenizer(reward_tokenizer, tokenizer) else actor_model)
    engine = RLHFEngine.build(
        actor_model,
        reward_model,
        critic_model,
        model=model_config,
        engine=engine_config,
        actor_optimizer=optimizer_config,
        critic_learning_rate=optimizer_config.critic_learning_rate,
        plan=plan,
        total_steps=ppo_optimizer_steps(batch, plan, len(prompts.train)),
        ema_decay=config.ema_decay,
        seed=run.seed,
    )
    check_vocabulary(engine.actor, tokenizer)
    check_vocabulary(engine.critic.module.backbone, tokenizer)

    def export() -> None:
        export_causal_lm(engine.actor, tokenizer, directory / "actor")
        export_scalar_model(engine.critic, tokenizer, directory / "critic")
        if config.ema_decay > 0:
            export_causal_lm(engine.actor, tokenizer, directory / "actor_ema", state_dict=engine.ema_state_dict())

    trainer = PPOTrainer(
        engine,
        prompts.train,
        prompts.evaluation,
        tokenizer=tokenizer,
        scorer=RewardScorer(engine.reward, reward_tokenizer, tokenizer, eos_ids=eos_token_ids(engine.actor, tokenizer)),
        plan=plan,
        batch=batch,
        config=config,
        run=run,
        directory=directory,
        max_response_tokens=data_config.max_response_tokens,
        synchronised=engine_config.zero_stage == 3,
        export=export,
        concurrent=engine_config.side_by_side,
        ptx=ptx.train if ptx else (),
        states=stage.states(
            actor=model_fingerprint(actor_model),
            reward=model_fingerprint(reward_model),
            critic=model_fingerprint(critic_model),
            data=[prompts.fingerprint, ptx and ptx.fingerprint],
        ),
    )
    outcome = trainer.fit()
    before, after = outcome["before"], outcome["after"]
    samples = paired_samples(before.get("samples", []), after.get("samples", []))
    write_json(directory / "samples.json", {"samples": samples})
    return {
        "score_before": before.get("score"),
        "score_after": after.get("score"),
        "score_std_before": before.get("score_std"),
        "kl_per_token": after.get("kl_per_token"),
        "eos_rate_before": before.get("eos_rate"),
        "eos_rate_after": after.get("eos_rate"),
        "mean_response_tokens_before": before.get("response_tokens"),
        "mean_response_tokens_after": after.get("response_tokens"),
        "samples": samples,
        "seconds": outcome["seconds"],
        "health": outcome["health"],
    }


if __name__ == "__main__":
    run_stage(main)
