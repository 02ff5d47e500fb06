"""The limits of the checks, each with its reason. A line is a line of `metrics.jsonl`."""

from __future__ import annotations

START = 3
"""Lines whose mean stands for the beginning of a run, and lines at the end that must agree unless said otherwise."""
KEPT_FIRST, KEPT_LAST = 6, 24
"""Lines of each kind (training, evaluation) at either end of a history that some check looks at."""

LOSS_RISE, LOSS_RISE_FIRST = 1.5, 3.0
"""Times its start at which a loss has diverged: each of the last 5 lines against the mean of the first 5, so that hard
batches do not count, or against the first line or the held-out loss at step 0, where the first 5 are in it already."""
RATIO_MEAN, RATIO_LOG_MEAN, RATIO_LOG_MAX = 0.02, 0.05, 1.0
"""Deviation of the mean ratio, mean and largest |log ratio| on a first minibatch. Two 16-bit passes over one batch
differ by about 0.01 to 0.02 nats a token, unbiased, and single tokens by a few tenths."""
EXACT_ERROR = 1e-3
"""Largest captured error in nats at which a run counts as exact (float32 stays below 1e-4): tighter limits hold."""
EXACT_LOG_MEAN, EXACT_LOG_MAX = 1e-3, 0.02
"""Limits of |log ratio| in an exact run: ten times and more what float32 passes of other shapes differ by."""
SAMPLING_ERROR_MEAN = 0.05
"""Mean |captured - recomputed| log-probability in nats: 16 bits stay below 0.02; temperature 0.9 for 1 is near 0.1."""
KL_NEGATIVE = 0.02
"""Nats per token below 0: at a true KL of 0.01 a rollout of 500 tokens has a standard error of 0.006."""
KL_HIGH, KL_HUGE = 1.0, 3.0
"""Nats per token, two lines in a row. At 1 the reference gives the actor's tokens a third of the probability; healthy
runs of large models end below 0.1, of the embedded tiny one below 0.5."""
KL_DEAD, KL_DEAD_LINES = 1e-6, 8
"""Nats per token below which an actor has not moved, in so many lines after the first: sampling noise alone is more."""
CLIP_FRACTION = 0.4
"""Share of clipped tokens, three lines in a row. Around 0.1 to 0.2 is common in the first iterations."""
VALUE_LINES, VALUE_PATIENCE = 10, 20
"""Explained variance below 0 over so many lines, once a run has so many: a fresh value function starts below 0."""
ENTROPY_LEFT = 0.2
"""Share of the entropy at the start that must be left."""
EOS_LEFT, EOS_START = 0.6, 0.2
"""Share of the eos rate at the start that must be left; a run that starts below EOS_START tells nothing by it."""
LENGTH_GROWTH, SCORE_GAIN, CORRELATION = 1.5, 0.5, 0.3
"""Growth of the length, gain of the score in standard deviations of the first rollouts, and correlation of score and
length (within rollouts over the last 5 lines, or of their means over time) that together say length is exploited."""
SCORE_IS_LENGTH = 0.9
"""Correlation (of either sign) within rollouts, five lines in a row, that leaves next to nothing but length."""
FOLLOWS_LENGTH = 0.5
"""Correlation (of either sign) of score and length among the responses to one held-out prompt. On the embedded world
it is below 0.1 with an annotator who has no taste for length."""
REPEATED = 0.3
"""Share of repeated 4-grams, three lines in a row: prose stays below 0.05, lists and code below 0.2."""
EMPTY = 0.5
"""Share of empty responses, three lines in a row."""
OUT_OF_RANGE = 0.5
"""Share of scores beyond every training response's, three lines in a row. A run that gains two standard deviations has
a quarter of them there; from a half on the typical response is one the reward model knows nothing of."""
SCORES_ALIKE = 0.05
"""Spread of scores that are normalised to 1 on reference responses, three lines in a row."""
SATURATED_MARGIN, SATURATED_ACCURACY = 20.0, 0.999
"""Mean margin at which -log sigmoid is below 1e-8, with every pair right, three lines in a row."""
BLIND_SPREAD = 0.01
"""Spread of raw held-out scores after training; an untrained head of the embedded model already has 0.04."""
ADVANTAGES_EQUAL = 1e-4
"""Standard deviation of advantages before whitening, two lines in a row: whitening adds 1e-8 to their variance."""
FEW_ROWS = 30
"""Held-out rows (rankings: prompts) below which a figure says little: the 95% interval of an accuracy of 0.75 on 30
prompts is 0.30 wide, that of a mean 0.7 standard deviations of the rows."""
JUDGED_FROM = 0.5
"""Share of a run's steps from which a reward model is judged: a healthy one is no better than chance at first."""
FALL_SPREADS = 0.1
"""Standard deviations of the first held-out scores that a fall must have, so that it matters."""
FALL_ERRORS, FALL_ERRORS_FEW = 1.0, 3.0
"""Standard errors that it must have too, on FEW_ROWS prompts or more, and on fewer, whose error is itself uncertain
(Student's t with 3 degrees of freedom: 3.2). One error is passed by chance 16 times in 100: PPO is to raise the score,
and a run that did not is worth a look."""
PAST_BEST_LINES = 2
"""Evaluations in a row that lie below the best by more than luck. On a plateau 3 to 9 runs of 100 with 4 to 20
evaluations are found so by chance (simulated, the error paired by prompt), and half of those have a falling score."""
FALLBACKS, FALLBACK_MANY = 0.01, 0.5
"""Share of the responses that got the fallback in the newest rollout: above the first a warning, from the second on
critical, since most of what is learnt is then not the reward's."""
PART_FALL = 1.0
"""Standard deviations of its first rollouts by which one of several rewards has fallen while their sum has risen."""
GROUPS_ALIKE = 0.5
"""Share of prompts whose responses all score alike, three lines in a row: half of the sampling teaches nothing."""
CHOSEN_FALL = 0.25
"""Nats by token by which the better responses have become less likely: e^-0.25 = 0.78 of the probability at every
token. What is given up goes to texts that nobody judged: DPO on the embedded default lost 0.33, and two thirds of its
answers were no longer well-formed."""
PREFERENCE_SATURATED = 0.01
"""Loss of a pair, three lines in a row with every pair right: what is learnt from then on is the rows by heart."""
