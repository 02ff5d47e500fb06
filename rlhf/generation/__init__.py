"""Sample responses from an actor: PromptBatch -> Rollout.

`backend` names what samples, `token_sampling` says how a token is drawn, `decoders` how logits are computed, and
`continuous_batching` which prompts are decoded together.
"""
