"""What the doctor can find: what was measured, what it means, since when, and what to try."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["warning", "critical"]


@dataclass(frozen=True)
class Sickness:
    """A sickness in words that hold for every run: its title, what it means and what to try.

    `of_the_model`: it is one of the model as last evaluated, not something that happened in the run. A later evaluation
    without it leaves no trace.
    """

    title: str
    meaning: str
    remedy: str
    of_the_model: bool = False


@dataclass(frozen=True)
class Finding:
    """A sickness found in a run; `message` says what was measured.

    `since` is the first step (PPO: iteration) it was seen at, `step` the last one. `badness` is how far the measure is
    beyond its limit (1: just reached); a finding whose badness doubles is told again.
    """

    check: str
    severity: Severity
    step: int
    since: int
    message: str
    badness: float = 1.0
    advice: str = ""
    """What to try in this very case; where it is empty, what always holds."""

    @property
    def title(self) -> str:
        return SICKNESSES[self.check].title

    @property
    def meaning(self) -> str:
        return SICKNESSES[self.check].meaning

    @property
    def remedy(self) -> str:
        return self.advice or SICKNESSES[self.check].remedy

    def as_dict(self) -> dict[str, Any]:
        """Everything of it for a json line."""
        return {
            "check": self.check,
            "severity": self.severity,
            "step": self.step,
            "since": self.since,
            "message": self.message,
            "meaning": self.meaning,
            "try": self.remedy,
        }


def finding(
    check: str, severity: Severity, since: int, step: int, message: str, badness: float = 1.0, advice: str = ""
) -> Finding:
    """A finding of a known check. Raises KeyError for a check that has no entry in SICKNESSES."""
    if check not in SICKNESSES:
        raise KeyError(f"check {check!r} is not one of {', '.join(SICKNESSES)}")
    return Finding(
        check=check, severity=severity, step=step, since=since, message=message, badness=badness, advice=advice
    )


SICKNESSES: Mapping[str, Sickness] = {
    "not_finite": Sickness(
        "a number is not finite",
        "From here on the weights are, or would be, worthless.",
        "a lower learning rate, a longer warm-up, bf16 or fp32 in place of fp16; look at the batch that did it.",
    ),
    "loss_diverges": Sickness(
        "the loss has risen far above its start",
        "The steps are too large: training destroys what the model knew.",
        "a learning rate 3 to 10 times lower, a longer warm-up, max_grad_norm 1.0 or below.",
    ),
    "learning_rate_zero": Sickness(
        "the learning rate is 0",
        "Nothing is learnt; the remaining steps are wasted. Only the last step of a schedule ends at 0.",
        "a learning_rate above 0, and a schedule as long as the run (a user's deepspeed_config may bring its own).",
    ),
    "ratio_not_one": Sickness(
        "the ratio is not 1 on the first minibatch",
        "Before the first update the new and the old policy are the same: their log-probabilities must agree. They do "
        "not: the scoring and the training pass differ, as by dropout left on, another temperature, a mask or labels "
        "shifted by one, or positions that count padding. PPO then clips and weighs by noise.",
        "model_dropout 0 and lora_dropout 0; the same temperature, mask and positions in both passes; "
        "old_logprobs=recomputed; precision fp32 for a few iterations to tell a mistake from rounding.",
    ),
    "sampling_mismatch": Sickness(
        "what samples is not what is scored",
        "Log-probabilities captured while sampling and those of a forward pass differ by more than rounding does: the "
        "responses come from another distribution than the one that PPO corrects for. Another temperature, a filter "
        "(top-k, top-p), stale weights in the sampler, or a cache that is read wrongly.",
        "one temperature for sampling and scoring, generation_backend=own, precision fp32.",
    ),
    "kl_negative": Sickness(
        "the KL to the reference is negative",
        "A KL divergence cannot be negative; its estimate is when the responses were not sampled from the actor that "
        "is scored. The penalty then rewards what it should hold back.",
        "the same temperature for sampling and scoring, the reference the actor started from.",
    ),
    "kl_explodes": Sickness(
        "the actor runs away from the reference",
        "The actor chooses tokens the reference hardly would: it has left the texts the reward model can judge, and "
        "the score no longer says that they are good.",
        "a lower learning rate, fewer ppo_epochs, a higher kl_coef, or kl_target for an adaptive one.",
    ),
    "kl_dead": Sickness(
        "the actor does not move",
        "The KL to the reference stays at 0: no update reaches the actor's weights, or updates are lost in rounding.",
        "a higher learning rate; check that the weights train (LoRA targets, frozen layers) and that bf16 has float32 "
        "master weights.",
    ),
    "clip_fraction_high": Sickness(
        "many tokens are clipped",
        "The updates of one rollout move the policy further than the clip range allows; clipped tokens teach nothing.",
        "a lower learning rate, fewer ppo_epochs, larger minibatches.",
    ),
    "value_function_useless": Sickness(
        "the value function is worse than a constant",
        "Explained variance stays below 0: its errors add noise to every advantage instead of taking it away.",
        "a higher critic_learning_rate, critic_warmup_iterations, a larger value_clip_range, whiten_rewards.",
    ),
    "entropy_collapse": Sickness(
        "the entropy has collapsed",
        "The actor has nearly one answer to every prompt: it no longer explores, and cannot learn anything else.",
        "a higher kl_coef, a lower learning rate, entropy_coef above 0, temperature 1.",
    ),
    "eos_rate_falls": Sickness(
        "fewer responses end",
        "Responses run to max_response_tokens without an end: the actor has learnt that longer pays, or unlearnt eos.",
        "missing_eos_penalty 1.0, a longer max_response_tokens, SFT data whose responses are not cut off; check the "
        "length correlation of the score.",
    ),
    "length_exploited": Sickness(
        "responses grow while scores rise",
        "The reward model pays for length, and the actor collects: the score rises without better answers.",
        "length_calibration_prompts 128, a reward model with length_control, a higher kl_coef; read samples of both "
        "ends.",
    ),
    "score_is_length": Sickness(
        "the score follows the length alone",
        "Within a rollout the score is nearly a function of the response's length: the reward model has learnt length.",
        "compare the reward model's accuracy with length_baseline_accuracy; balance its pairs in length.",
    ),
    "score_follows_length": Sickness(
        "the score follows the length of the actor's responses",
        "Whatever a held-out prompt asks, longer responses to it score higher (or shorter ones): PPO will collect that "
        "before anything else. The reward stage's audit is of the responses in its data and may not show it.",
        "length_calibration_prompts 128, which takes that off the scores; preference data about responses of this "
        "actor; keep_best by a measure that training does not see.",
    ),
    "repetition": Sickness(
        "responses repeat themselves",
        "A large share of 4-grams stand earlier in the same response: loops that the reward model does not see.",
        "a higher kl_coef, a lower learning rate, missing_eos_penalty; add repetitive answers as rejected ones.",
    ),
    "empty_responses": Sickness(
        "responses are empty",
        "Most responses end at once: silence pays best, or the SFT model has learnt it.",
        "SFT data without empty responses, a lower missing_eos_penalty, a lower kl_coef.",
    ),
    "score_out_of_range": Sickness(
        "scores lie outside the reward model's training range",
        "The reward model gives scores it never gave to a training response: it extrapolates, and the actor is on its "
        "way to exploit that (over-optimisation).",
        "a higher kl_coef, fewer iterations, score_clip; train the reward model on samples of this actor.",
    ),
    "scores_alike": Sickness(
        "all responses get the same score",
        "The spread of the scores is next to nothing: no response is better than another, so nothing can be learnt.",
        "another reward model (its held-out accuracy and eval_score_std), a higher score_clip, a higher temperature.",
    ),
    "reward_fails": Sickness(
        "a reward gives no score",
        "Responses got the fallback in the place of a score: what the actor learns from them is not the reward's.",
        "the warnings in the log say why; an endpoint's timeout_seconds, retries and concurrency, or no fallback, so "
        "that the run stops in the place of learning from it.",
    ),
    "reward_part_falls": Sickness(
        "one reward is paid for with another",
        "The sum of the rewards rises while one of them, which counts with a weight above 0, falls: the actor has "
        "found that giving it up pays.",
        "a higher weight for it, normalize where their scales differ, a higher kl_coef.",
    ),
    "groups_alike": Sickness(
        "the responses to a prompt score alike",
        "At most prompts all responses have the same score, so that estimators that compare them learn nothing there.",
        "resample_equal_groups, prompts of another difficulty, more samples_per_prompt, a higher temperature, a reward "
        "that tells more than right and wrong.",
    ),
    "chosen_collapses": Sickness(
        "the better responses become less likely",
        "The held-out better responses have lost probability: the loss is lowered by pushing both down, the worse ones "
        "further, and what they lose goes to texts that nobody judged.",
        "a lower learning rate, a higher beta, fewer steps; orpo or rrhf, which imitate the best response too.",
    ),
    "margin_saturated": Sickness(
        "the training pairs are learnt by heart",
        "Every pair is right and its loss next to nothing: further steps only move the actor away from the reference.",
        "fewer epochs, a lower learning rate, a smaller beta, label_smoothing where labels may be wrong, ipo.",
    ),
    "reward_model_saturated": Sickness(
        "the reward model is saturated",
        "Every pair is right by a huge margin: the loss is 0, the scores grow without meaning, and small differences "
        "between responses become large rewards.",
        "fewer epochs, weight_decay, centering_coef 0.01, a lower learning rate; look for a leak (one side of the "
        "pairs recognisable by its form).",
    ),
    "reward_model_blind": Sickness(
        "the reward model gives every response the same score",
        "After training its scores hardly differ on held-out responses: PPO would amplify noise.",
        "a higher learning rate, more epochs; check that chosen and rejected differ and that the head trains.",
    ),
    "reward_model_at_chance": Sickness(
        "the reward model is not shown to be better than chance",
        "Which of two held-out responses is the preferred one it guesses about as well as a coin does: PPO on its "
        "scores learns noise, however high they rise.",
        "read some pairs: do the labels say what they should, is enough of each response within max_response_tokens? "
        "Then more pairs, more steps, a larger base. A run of a few steps ends here.",
        of_the_model=True,
    ),
    "reward_model_is_shortcut": Sickness(
        "the reward model is not shown to be better than length alone",
        "A rule that reads no word chooses as well on the same pairs: what the model has learnt may be that rule, and "
        "PPO would then make responses longer (or shorter), not better.",
        "pairs balanced in length; more steps; where the interval is wide, more held-out pairs.",
        of_the_model=True,
    ),
    "too_few_held_out": Sickness(
        "too few held-out rows to say",
        "Chance alone may move the held-out figures, and the choice of the best model with them, by as much as they "
        "are read for.",
        "a larger eval_fraction, or evaluation files (sft_eval_data, preference_eval_data, prompt_eval_data); some "
        "hundred rows where there are.",
    ),
    "score_below_start": Sickness(
        "the held-out score is below its start",
        "On held-out prompts the trained actor gets a lower score than the model it started from, by more than chance: "
        "the run did harm, or gave the score up for the penalties (a missing end, the KL divergence).",
        "a lower learning rate, more iterations, smaller penalties where they ate the gain; until then the model "
        "before PPO is the better one.",
        of_the_model=True,
    ),
    "over_optimised": Sickness(
        "the score rises and the answers get worse",
        "A measure that training does not see has turned down while the optimised score goes on rising: the actor now "
        "earns the score by what the reward model gets wrong (over-optimisation, arXiv 2210.10760).",
        "keep_best and stop_when by that measure; a higher kl_coef, fewer iterations; a reward model of more and "
        "better pairs.",
        of_the_model=True,
    ),
    "run_incomplete": Sickness(
        "the stage has not come to its end",
        "Nothing runs any more and there is no result: the model is missing, or is that of an evaluation on the way.",
        "the same command with --resume auto (in place of --overwrite).",
    ),
    "advantages_equal": Sickness(
        "all advantages are equal",
        "Before whitening the advantages do not differ: whitening then scales rounding errors up to variance 1, and "
        "the actor learns noise.",
        "check scores (all alike?), score_clip, kl_coef and the critic; a rollout needs answers of different worth.",
    ),
}
