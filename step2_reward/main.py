"""Step 2: the reward model, from preference pairs and rankings.

deepspeed step2_reward/main.py [--config FILE] [--field value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlhf.algorithms.reward import RewardTrainer
from rlhf.checkpoint.atomic import write_json
from rlhf.checkpoint.export import export_scalar_model
from rlhf.checkpoint.fingerprint import model_fingerprint
from rlhf.data import load_stage_data
from rlhf.distributed import world_size
from rlhf.engine import BatchPlan, compute_dtype, training_engine, zero3_loading
from rlhf.models.loading import check_vocabulary, load_tokenizer
from rlhf.models.lora import apply_lora
from rlhf.models.scalar import ScalarModel
from rlhf.pipeline.run_stage import Stage, stage_main
from rlhf.pipeline.stages import resolve_base_model, run_stage


@stage_main("reward")
def main(stage: Stage) -> dict:
    run, model_config, engine_config, optimizer_config, batch, data_config, config = stage.configs
    directory = stage.directory
    plan = BatchPlan(batch.global_batch_size, batch.micro_batch_size, world_size(), batch.micro_batch_tokens)
    base_model = resolve_base_model(model_config.base_model, Path(run.cache_dir))

    tokenizer = load_tokenizer(base_model, trust_remote_code=model_config.trust_remote_code)
    data = load_stage_data(
        "comparison",
        data_config.preference_data,
        data_config.preference_eval_data,
        config=data_config,
        stage="reward",
        tokenizer=tokenizer,
        seed=run.seed,
        cache_dir=Path(run.cache_dir),
        report_dir=directory,
    )
    with zero3_loading(engine_config, plan):
        model = ScalarModel.from_base(
            base_model, model_config, dtype=compute_dtype(engine_config.precision), seed=run.seed
        )
    check_vocabulary(model.backbone, tokenizer)
    if model_config.lora_rank:
        model = apply_lora(model, model_config, seed=run.seed)

    def export() -> None:
        trainer.engine.module.set_normalisation(*trainer.calibrate())
        export_scalar_model(trainer.engine, tokenizer, directory / "model")

    trainer = RewardTrainer(
        None,
        data.train,
        data.evaluation,
        plan=plan,
        batch=batch,
        run=run,
        directory=directory,
        config=config,
        pad_token_id=tokenizer.pad_token_id,
        export=export,
        states=stage.states(base=model_fingerprint(base_model), data=data.fingerprint),
    )
    trainer.engine = training_engine(
        model,
        engine=engine_config,
        optimizer=optimizer_config,
        plan=plan,
        total_steps=trainer.total_steps,
        gradient_checkpointing=model_config.gradient_checkpointing,
    )
    outcome = trainer.fit()
    after = outcome["after"]
    write_json(directory / "evaluation.json", after)
    return {
        "accuracy": after.get("eval_accuracy"),
        "length_baseline_accuracy": after.get("eval_length_baseline_accuracy"),
        "accuracy_by_category": {name: entry["accuracy"] for name, entry in after.get("by_category", {}).items()},
        "mean_margin": after.get("eval_margin"),
        "best_step": outcome["best_step"],
        "seconds": outcome["seconds"],
        "health": outcome["health"],
    }


if __name__ == "__main__":
    run_stage(main)
