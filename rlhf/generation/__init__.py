"""Sample responses from an actor: PromptBatch -> Rollout.

`backend` names what samples, `token_sampling` says how a token is drawn, `decoders` how logits are computed, and
`continuous_batching` which prompts are decoded together.
"""

from rlhf.generation.backend import BACKENDS, Backend, make_backend
from rlhf.generation.continuous_batching import generate
from rlhf.generation.token_sampling import Sampling

__all__ = ["BACKENDS", "Backend", "Sampling", "generate", "make_backend"]
