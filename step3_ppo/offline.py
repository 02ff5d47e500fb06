"""Step 3 without sampling: preference optimisation on responses that are there (DPO and its relatives).

deepspeed step3_ppo/offline.py [--algorithm dpo | ipo | rrhf | orpo | simpo] [--config FILE] [--field value ...]
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlhf.pipeline.command_line import check_command_line

if __name__ == "__main__":
    check_command_line("offline")  # a mistake is told before torch is loaded

from rlhf.algorithms.offline_losses import OFFLINE_LOSSES
from rlhf.algorithms.preference import PreferenceTrainer
from rlhf.checkpoint.export import export_causal_lm
from rlhf.checkpoint.fingerprint import model_fingerprint
from rlhf.engine import compute_dtype
from rlhf.evaluation.gold import gold_before_and_after
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.pipeline.offline import held_out_prompts, sampled_evaluation
from rlhf.pipeline.stage_run import StageRun, run_as_script, stage_main
from rlhf.pipeline.stages import OfflineStageConfig
from rlhf.training.data_order import visited
from rlhf.training.reference_logprobs import with_reference, without_reference


@stage_main("offline")
def main(stage: StageRun[OfflineStageConfig]) -> dict:
    config = stage.config
    actor = stage.starting_model("actor_model", config.offline.actor_model)
    tokenizer = load_tokenizer(actor, trust_remote_code=config.model.trust_remote_code)
    data = stage.load_data(
        "comparison", config.data.preference_data, config.data.preference_eval_data, tokenizer, stage="reward"
    )
    prompts = held_out_prompts(stage, tokenizer)
    total_steps = stage.planned_steps(data)
    dtype = compute_dtype(config.engine.precision)
    engine = stage.training_engine(
        lambda: load_causal_lm(actor, config.model, dtype=dtype), tokenizer, total_steps=total_steps
    )
    base = model_fingerprint(actor)

    def referenced(rankings):
        if not OFFLINE_LOSSES[config.offline.algorithm].needs_reference:
            return without_reference(rankings)
        identity = {"model": base, "precision": config.engine.precision, "quantization": config.model.quantization}
        return with_reference(
            engine, rankings, stage.plan, pad_token_id=tokenizer.pad_token_id, cache_dir=Path(config.run.cache_dir),
            identity=identity,
        )  # fmt: skip

    used = visited(len(data.train), stage.plan, config.run.seed, steps=total_steps)
    train = without_reference(data.train)
    for index, row in zip(used, referenced([data.train[index] for index in used]), strict=True):
        train[index] = row
    trainer = PreferenceTrainer(
        engine,
        replace(data, train=train, evaluation=referenced(data.evaluation)),
        config.offline,
        pad_token_id=tokenizer.pad_token_id,
        sample=sampled_evaluation(stage, engine, tokenizer, prompts),
        plan=stage.plan,
        total_steps=total_steps,
        export=lambda: export_causal_lm(engine, tokenizer, stage.directory / "actor"),
        context=stage.context(actor=base, data=data.fingerprint),
    )
    outcome = trainer.fit()
    before, after = outcome["before"], outcome["after"]
    names = ("loss", "accuracy", "margin", "chosen_logprob", "rejected_logprob", "eos_rate", "response_tokens")
    figures = {f"{name}_{when}": found.get(f"eval_{name}") for name in names
               for when, found in (("before", before), ("after", after))}  # fmt: skip
    return {
        "algorithm": config.offline.algorithm,
        **figures,
        "gold": gold_before_and_after(before.get("sampled", {}), after.get("sampled", {})),
        "sampled_prompts": len(prompts),
        "held_out_prompts": int(after["eval_rows"]),
        "best_step": outcome["best_step"],
        "seconds": outcome["seconds"],
        "health": outcome["health"],
    }


if __name__ == "__main__":
    run_as_script(main)
