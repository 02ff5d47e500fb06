"""Step 3: PPO with actor, critic, reference and reward.

deepspeed step3_ppo/main.py [--config FILE] [--field value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlhf.pipeline.command_line import check_command_line

if __name__ == "__main__":
    check_command_line("ppo")  # a mistake is told before torch is loaded

from rlhf.algorithms.ppo import PPOTrainer, ppo_optimizer_steps
from rlhf.checkpoint.atomic import write_json
from rlhf.checkpoint.export import export_causal_lm, export_scalar_model
from rlhf.evaluation.gold import gold_before_and_after
from rlhf.pipeline.on_policy import OnPolicyModels, load_ptx
from rlhf.pipeline.stage_run import StageRun, run_as_script, stage_main
from rlhf.pipeline.stages import PPOStageConfig
from rlhf.report.samples import paired_samples
from rlhf.rewards.table import reward_fingerprints


@stage_main("ppo")
def main(stage: StageRun[PPOStageConfig]) -> dict:
    config = stage.config
    models = OnPolicyModels.find(stage)
    tokenizer = models.tokenizer
    prompts = stage.load_data("prompt", config.data.prompt_data, config.data.prompt_eval_data, tokenizer)
    models.check_prompts(stage, prompts)
    ptx = load_ptx(stage, tokenizer)
    steps = ppo_optimizer_steps(config.ppo, config.batch, stage.plan, len(prompts.train))
    engine = models.build(stage, optimizer_steps=steps)

    def export() -> None:
        export_causal_lm(engine.actor, tokenizer, stage.directory / "actor")
        if engine.critic is not None:
            export_scalar_model(engine.critic, tokenizer, stage.directory / "critic")
        if engine.averaged_actor is not None:
            averaged = engine.averaged_actor.state_dict()
            export_causal_lm(engine.actor, tokenizer, stage.directory / "actor_ema", state_dict=averaged)

    trainer = PPOTrainer(
        models.rollouts(stage, engine),
        prompts,
        config.ppo,
        batch=config.batch,
        ptx=ptx,
        export=export,
        context=stage.context(
            **models.fingerprints(),
            rewards=reward_fingerprints(config.ppo.reward_specs()),
            data=[prompts.fingerprint, ptx and ptx.fingerprint],
        ),
    )
    outcome = trainer.fit()
    before, after = outcome["before"], outcome["after"]
    samples = paired_samples(before.get("samples", []), after.get("samples", []))
    write_json(stage.directory / "samples.json", {"samples": samples})
    return {
        "score_before": before.get("score"),
        "score_after": after.get("score"),
        "score_std_before": before.get("score_std"),
        "score_gain_error": after.get("score_gain_error"),
        "held_out_prompts": int(after["rows"]),
        "held_out_score_before": before.get("held_out_score"),
        "held_out_score_after": after.get("held_out_score"),
        "iterations": outcome["iterations"],
        "planned_iterations": trainer.total_steps,
        "kept_iteration": outcome["kept_iteration"],
        "keep_best": config.ppo.keep_best,
        "stop_when": config.ppo.stop_when,
        "reward_before": before.get("reward"),
        "reward_after": after.get("reward"),
        "kl_per_token": after.get("kl_per_token"),
        "eos_rate_before": before.get("eos_rate"),
        "eos_rate_after": after.get("eos_rate"),
        "mean_response_tokens_before": before.get("response_tokens"),
        "mean_response_tokens_after": after.get("response_tokens"),
        "gold": gold_before_and_after(before, after),
        "samples": samples,
        "seconds": outcome["seconds"],
        "health": outcome["health"],
    }


if __name__ == "__main__":
    run_as_script(main)
