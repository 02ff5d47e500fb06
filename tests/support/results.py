"""Made-up results of a finished run."""

import json

from rlhf.pipeline.stages import STAGES


def made_up_results():
    """What each stage leaves as `result.json`, by stage."""
    sample = {"prompt": "안녕?", "sft": "응", "ppo": "안녕하세요!\n반가워요", "score_sft": -0.5, "score_ppo": 1.25}
    figures = [key for figure in STAGES["ppo"].figures for key in figure.needed_keys()]
    ppo = dict.fromkeys([*figures, "score_std_before"], 0.5)
    ppo |= {"score_before": 0.1, "score_after": 1.3, "score_gain_error": 0.1, "held_out_prompts": 64}
    healthy = {"healthy": True, "lines": 3, "findings": []}
    results = {
        "sft": {
            "eval_loss_before": 3.0,
            "eval_loss_after": 2.0,
            "held_out_rows": 52,
            "best_step": 7,
            "seconds": 10.0,
            "seed": 3,
        },
        "reward": {
            "accuracy": 0.85,
            "accuracy_low": 0.78,
            "accuracy_high": 0.9,
            "held_out_pairs": 112,
            "held_out_prompts": 110,
            "length_baseline_accuracy": 0.5,
            "over_shortcut": 0.35,
            "over_shortcut_low": 0.25,
            "over_shortcut_high": 0.45,
            "accuracy_by_category": {"일상 대화": 0.9, "law": 0.8},
            "pairs_by_category": {"일상 대화": 80, "law": 32},
            "mean_margin": 1.5,
            "seconds": 20.0,
            "seed": 3,
        },
        "ppo": {**ppo, "samples": [{**sample, "id": "extra"}], "seconds": 30.5, "seed": 3},
    }
    return {stage: {**result, "health": healthy} for stage, result in results.items()}


def write_results(directory, results):
    """Lay results down as a run does."""
    for stage, result in results.items():
        (directory / stage).mkdir(parents=True, exist_ok=True)
        (directory / stage / "result.json").write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
