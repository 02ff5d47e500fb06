"""Sample responses from an actor: PromptBatch -> Rollout.

`sampling` says how a token is drawn, `decoders` how logits are computed, and `sampler` which prompts are decoded
together.
"""

from rlhf.generation.continuous_batching import generate
from rlhf.generation.token_sampling import Sampling, draw, filter_logits, row_uniforms

__all__ = ["Sampling", "draw", "filter_logits", "generate", "row_uniforms"]
