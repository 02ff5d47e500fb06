"""Step 3 without sampling: preference optimisation on responses that are there (DPO and its relatives).

deepspeed step3_ppo/offline.py [--algorithm dpo | ipo | kto | rrhf | orpo | simpo] [--config FILE] [--field value ...]
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlhf.pipeline.command_line import check_command_line

if __name__ == "__main__":
    check_command_line("offline")  # a mistake is told before torch is loaded

from rlhf.checkpoint.export import export_causal_lm
from rlhf.checkpoint.fingerprint import model_fingerprint
from rlhf.engine import compute_dtype
from rlhf.evaluation.gold import gold_before_and_after
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.pipeline.offline import (
    OFFLINE_ALGORITHMS,
    held_out_prompts,
    live_reference,
    prepared_data,
    referenced_data,
    sampled_evaluation,
)
from rlhf.pipeline.stage_run import StageRun, run_as_script, stage_main
from rlhf.pipeline.stages import OfflineStageConfig


@stage_main("offline")
def main(stage: StageRun[OfflineStageConfig]) -> dict:
    config = stage.config
    actor = stage.starting_model("actor_model", config.offline.actor_model)
    tokenizer = load_tokenizer(actor, trust_remote_code=config.model.trust_remote_code)
    algorithm = OFFLINE_ALGORITHMS[config.offline.algorithm]
    prompts, kept_apart = held_out_prompts(stage, tokenizer)
    data = stage.load_data(
        algorithm.kind,
        config.data.preference_data,
        config.data.preference_eval_data,
        tokenizer,
        stage="reward",
        kept_apart=kept_apart,
    )
    data = prepared_data(config, data)
    total_steps = stage.planned_steps(data)
    dtype = compute_dtype(config.engine.precision)
    load = partial(load_causal_lm, actor, config.model, dtype=dtype)
    engine = stage.training_engine(load, tokenizer, total_steps=total_steps)
    base = model_fingerprint(actor)
    trainer = algorithm.trainer(
        engine,
        referenced_data(stage, engine, data, tokenizer.pad_token_id, base=base, steps=total_steps),
        config.offline,
        pad_token_id=tokenizer.pad_token_id,
        sample=sampled_evaluation(stage, engine, tokenizer, prompts),
        live_reference=live_reference(stage, engine, load),
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
