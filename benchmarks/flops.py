"""The floating-point operations that a PPO iteration of a GPT-NeoX cannot do without.

Counted are matrix products, 2 operations per multiplication and addition, over real tokens: no padding, nothing
computed twice. Norms, activations, softmax, sampling and the optimizer are left out: they are small beside the rest.

For each token that passes through the blocks: 2 operations per weight of their matrices (4 h^2 in the attention,
2 h i in the feed-forward), and 4 h per layer for each position it attends to, itself included (causal: n (n + 1) / 2
of them in n tokens). The language-modelling head (2 h V) runs on the r positions that predict a response token. A
backward pass takes twice the operations of its forward pass.

With p prompt tokens and r response tokens:
- generation: the prompt once, then every response token but the last once with the keys and values of those before
  it: p + r - 1 tokens through the blocks, r through the head;
- scoring: the reference's log-probabilities the same; values without the head; the reward model all p + r tokens,
  since it reads the last one. The actor's log-probabilities are known from sampling;
- update, for each epoch: actor and critic forward and backward, 3 times a forward pass.
The heads to one number (2 h per position) are counted too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The sizes of a GPT-NeoX."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    positions: int = 2048

    @property
    def parameters(self) -> int:
        """Weights of the causal LM: blocks with biases and norms, the two embeddings, the final norm."""
        h, i = self.hidden, self.intermediate
        block = 4 * h * h + 4 * h + 2 * h * i + h + i + 4 * h
        return self.layers * block + 2 * self.vocabulary * h + 2 * h


def block_flops(shape: Shape, tokens: int) -> int:
    """Forward of one sequence of `tokens` tokens through the blocks."""
    matrices = 2 * tokens * (4 * shape.hidden**2 + 2 * shape.hidden * shape.intermediate)
    attention = 4 * shape.hidden * (tokens * (tokens + 1) // 2)
    return shape.layers * (matrices + attention)


def necessary_flops(shape: Shape, lengths: Iterable[tuple[int, int]], ppo_epochs: int) -> dict[str, int]:
    """Operations of one iteration: {"generation", "scoring", "update", "total"}.

    `lengths` are (prompt tokens, response tokens) of each sequence; a response includes its end-of-sequence token.
    """
    generation = scoring = update = 0
    for prompt, response in lengths:
        states = block_flops(shape, prompt + response - 1)
        head = 2 * shape.hidden * shape.vocabulary * response
        values = states + 2 * shape.hidden * response
        generation += states + head
        scoring += (states + head) + values + block_flops(shape, prompt + response) + 2 * shape.hidden
        update += ppo_epochs * 3 * ((states + head) + values)
    return {
        "generation": generation,
        "scoring": scoring,
        "update": update,
        "total": generation + scoring + update,
    }
