"""Step 2: the reward model, from preference pairs and rankings.

deepspeed step2_reward/main.py [--config FILE] [--field value ...]
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlhf.pipeline.command_line import check_command_line

if __name__ == "__main__":
    check_command_line("reward")  # a mistake is told before torch is loaded

from rlhf.algorithms.cross_prompt import cross_prompt_pairs
from rlhf.algorithms.reward import RewardTrainer, length_balance
from rlhf.algorithms.shortcuts import log_shortcuts
from rlhf.checkpoint.atomic import write_json
from rlhf.checkpoint.export import export_scalar_model
from rlhf.checkpoint.fingerprint import model_fingerprint
from rlhf.engine import compute_dtype
from rlhf.models.loading import load_tokenizer
from rlhf.models.odin import OdinModel
from rlhf.models.scalar import ScalarModel
from rlhf.pipeline.stage_run import StageRun, run_as_script, stage_main
from rlhf.pipeline.stages import RewardStageConfig


@stage_main("reward")
def main(stage: StageRun[RewardStageConfig]) -> dict:
    config = stage.config
    base_model = stage.base_model()
    tokenizer = load_tokenizer(base_model, trust_remote_code=config.model.trust_remote_code)
    data = stage.load_data("comparison", config.data.preference_data, config.data.preference_eval_data, tokenizer)
    added = cross_prompt_pairs(data.train, config.reward.cross_prompt_share, config.run.seed)
    balance = length_balance([*data.train, *added]) if config.reward.length_control == "balance" else None
    total_steps = stage.planned_steps(data, added=len(added))
    dtype = compute_dtype(config.engine.precision)
    kind = OdinModel if config.reward.length_control == "odin" else ScalarModel
    engine = stage.training_engine(
        lambda: kind.from_base(base_model, config.model, dtype=dtype, seed=config.run.seed),
        tokenizer,
        total_steps=total_steps,
    )
    trainer = RewardTrainer(
        engine,
        data,
        config.reward,
        pad_token_id=tokenizer.pad_token_id,
        decode=partial(tokenizer.decode, skip_special_tokens=True),
        added=added,
        balance=balance,
        plan=stage.plan,
        total_steps=total_steps,
        export=lambda: export_scalar_model(engine, tokenizer, stage.directory / "model"),
        context=stage.context(base=model_fingerprint(base_model), data=data.fingerprint),
    )
    outcome = trainer.fit()
    after = outcome["after"]
    log_shortcuts(after.get("shortcuts"))
    write_json(stage.directory / "evaluation.json", after)
    by_category = after.get("by_category", {})
    return {
        "accuracy": after.get("eval_accuracy"),
        "accuracy_low": after.get("eval_accuracy_low"),
        "accuracy_high": after.get("eval_accuracy_high"),
        "held_out_pairs": int(after.get("eval_pairs", 0)),
        "held_out_prompts": int(after["eval_rows"]),
        "length_baseline_accuracy": after.get("eval_length_baseline_accuracy"),
        "over_shortcut": after.get("eval_over_shortcut"),
        "over_shortcut_low": after.get("eval_over_shortcut_low"),
        "over_shortcut_high": after.get("eval_over_shortcut_high"),
        "shortcuts": after.get("shortcuts"),
        "accuracy_by_category": {name: entry["accuracy"] for name, entry in by_category.items()},
        "pairs_by_category": {name: entry["pairs"] for name, entry in by_category.items()},
        "mean_margin": after.get("eval_margin"),
        "best_step": outcome["best_step"],
        "seconds": outcome["seconds"],
        "health": outcome["health"],
    }


if __name__ == "__main__":
    run_as_script(main)
