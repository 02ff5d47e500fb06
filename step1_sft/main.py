"""Step 1: supervised fine-tuning of the actor.

deepspeed step1_sft/main.py [--config FILE] [--field value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlhf.pipeline.command_line import check_command_line

if __name__ == "__main__":
    check_command_line("sft")  # a mistake is told before torch is loaded

from rlhf.algorithms.sft import SFTTrainer
from rlhf.checkpoint.export import export_causal_lm
from rlhf.checkpoint.fingerprint import model_fingerprint
from rlhf.engine import compute_dtype
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.pipeline.stage_run import StageRun, run_as_script, stage_main
from rlhf.pipeline.stages import SFTStageConfig


@stage_main("sft")
def main(stage: StageRun[SFTStageConfig]) -> dict:
    config = stage.config
    base_model = stage.base_model(with_head=True)
    tokenizer = load_tokenizer(base_model, trust_remote_code=config.model.trust_remote_code)
    data = stage.load_data("response", config.data.sft_data, config.data.sft_eval_data, tokenizer)
    total_steps = stage.planned_steps(data)
    dtype = compute_dtype(config.engine.precision)
    engine = stage.training_engine(
        lambda: load_causal_lm(base_model, config.model, dtype=dtype), tokenizer, total_steps=total_steps
    )
    trainer = SFTTrainer(
        engine,
        data,
        config.sft,
        pad_token_id=tokenizer.pad_token_id,
        plan=stage.plan,
        total_steps=total_steps,
        export=lambda: export_causal_lm(engine, tokenizer, stage.directory / "model"),
        context=stage.context(base=model_fingerprint(base_model), data=data.fingerprint),
    )
    outcome = trainer.fit()
    return {
        "eval_loss_before": outcome["before"].get("eval_loss"),
        "eval_loss_after": outcome["after"].get("eval_loss"),
        "eval_perplexity_after": outcome["after"].get("eval_perplexity"),
        "held_out_rows": len(data.evaluation),
        "best_step": outcome["best_step"],
        "seconds": outcome["seconds"],
        "health": outcome["health"],
    }


if __name__ == "__main__":
    run_as_script(main)
