"""The architectures the fast decoder knows: which of a model's modules it calls, and in what order.

A module is a *leaf* when it is called as it is, so that whatever stands in its place (a LoRA layer, a 4-bit layer)
keeps working; *glue* (blocks, attention, feed-forward) is what the fast decoder computes itself. A model is known only
if all its glue is the library's own, without hooks, and its configuration asks for nothing the glue does not do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rlhf.models.inner_model import innermost
from rlhf.numerics.cpu import LinearCall
from rlhf.numerics.packed_rows import PACKED_SDPA

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and signed sines [N, 1, R] of N tokens' positions; the sines of the first R / 2 dimensions are negated."""

LLAMA_LIKE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone; "dynamic" and "longrope" look at the longest row."""
ATTENTION = (None, "eager", "sdpa", PACKED_SDPA, "flash_attention_2", "flash_attention_3")
"""Implementations of one and the same attention; another may be a user's own."""


@dataclass(frozen=True)
class Block:
    """One layer as functions of N tokens' hidden states [N, H].

    `project(x, rotation)` gives queries [N, heads, D], keys and values [N, kv_heads, D], queries and keys rotated;
    `output` takes the attended values [N, heads * D]. `parallel`: attention and feed-forward read the same input.
    """

    attention_norm: Callable[[torch.Tensor], torch.Tensor]
    project: Callable[[torch.Tensor, Rotation], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    output: Callable[[torch.Tensor], torch.Tensor]
    mlp_norm: Callable[[torch.Tensor], torch.Tensor]
    mlp: Callable[[torch.Tensor], torch.Tensor]
    parallel: bool


@dataclass(frozen=True)
class Anatomy:
    """A causal LM taken apart. `rotary(x, positions [1, L])` gives cosines and sines [1, L, R] in the dtype of x."""

    embed: Callable[[torch.Tensor], torch.Tensor]
    rotary: Callable[[torch.Tensor, torch.Tensor], Rotation]
    blocks: list[Block]
    final_norm: Callable[[torch.Tensor], torch.Tensor]
    head: Callable[[torch.Tensor], torch.Tensor]
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float


def take_apart(
    model: nn.Module, *, capacity: int, linear: Callable[[nn.Module], LinearCall] = lambda layer: layer
) -> Anatomy | None:
    """The parts of a model, a peft model or an engine around one, or None when it is not known.

    `capacity` is the longest row: a sliding window that reaches over all of it changes nothing. `linear` gives what
    to call in the place of each linear layer.
    """
    peft = getattr(model, "module", model)
    adapter = getattr(peft, "active_peft_config", None)
    if adapter is not None and getattr(adapter, "is_prompt_learning", False):
        return None  # virtual tokens come in through the wrapper's forward
    core: Any = innermost(model)
    config = getattr(core, "config", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in STATIC_ROPE:
        return None
    if getattr(config, "_attn_implementation", None) not in ATTENTION:
        return None
    if _is(core, "gpt_neox", "GPTNeoXForCausalLM"):
        return _gpt_neox(core, linear)
    name = getattr(config, "model_type", None)
    if name in LLAMA_LIKE and _is(core, name, LLAMA_LIKE[name]) and not _window_applies(config, capacity):
        return _llama_like(core, linear)
    return None


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotary embedding (Su et al. 2021) of x [N, heads, D], in place, on its first R dimensions."""
    cosines, sines = rotation
    size = cosines.shape[-1]
    turned = x if x.shape[-1] == size else x[..., :size]
    half = size // 2
    swapped = torch.cat((turned[..., half:], turned[..., :half]), dim=-1)
    turned.mul_(cosines).addcmul_(swapped, sines)
    return x


def _gpt_neox(core: Any, linear: Callable[[nn.Module], LinearCall]) -> Anatomy | None:
    body = core.gpt_neox
    layers = list(body.layers)
    first = layers[0].attention
    if not _own_glue(core, [body, *layers, *(layer.attention for layer in layers), *(layer.mlp for layer in layers)]):
        return None
    heads = core.config.num_attention_heads
    return Anatomy(
        embed=body.embed_in,
        rotary=body.rotary_emb,
        blocks=[_gpt_neox_block(layer, heads, first.head_size, linear) for layer in layers],
        final_norm=body.final_layer_norm,
        head=linear(core.get_output_embeddings()),
        heads=heads,
        kv_heads=heads,
        head_dim=first.head_size,
        scaling=first.scaling,
    )


def _gpt_neox_block(layer: Any, heads: int, head_dim: int, linear: Callable[[nn.Module], LinearCall]) -> Block:
    joint, mlp = linear(layer.attention.query_key_value), layer.mlp
    rise, act, fall = linear(mlp.dense_h_to_4h), mlp.act, linear(mlp.dense_4h_to_h)

    def project(x: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mixed = joint(x).view(len(x), heads, 3, head_dim)
        rotate(mixed[:, :, :2], (rotation[0].unsqueeze(1), rotation[1].unsqueeze(1)))
        query, key, value = mixed.unbind(2)
        return query, key, value

    return Block(
        attention_norm=layer.input_layernorm,
        project=project,
        output=linear(layer.attention.dense),
        mlp_norm=layer.post_attention_layernorm,
        mlp=lambda x: fall(act(rise(x))),
        parallel=bool(layer.use_parallel_residual),
    )


def _llama_like(core: Any, linear: Callable[[nn.Module], LinearCall]) -> Anatomy | None:
    body = core.model
    layers = list(body.layers)
    first = layers[0].self_attn
    if not _own_glue(core, [body, *layers, *(layer.self_attn for layer in layers), *(layer.mlp for layer in layers)]):
        return None
    return Anatomy(
        embed=body.embed_tokens,
        rotary=body.rotary_emb,
        blocks=[_llama_block(layer, first.head_dim, linear) for layer in layers],
        final_norm=body.norm,
        head=linear(core.get_output_embeddings()),
        heads=core.config.num_attention_heads,
        kv_heads=core.config.num_key_value_heads,
        head_dim=first.head_dim,
        scaling=first.scaling,
    )


def _llama_block(layer: Any, head_dim: int, linear: Callable[[nn.Module], LinearCall]) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    query_of, key_of, value_of = linear(attention.q_proj), linear(attention.k_proj), linear(attention.v_proj)
    query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    gate, up, down, act = linear(mlp.gate_proj), linear(mlp.up_proj), linear(mlp.down_proj), mlp.act_fn

    def project(x: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key = query_of(x).view(len(x), -1, head_dim), key_of(x).view(len(x), -1, head_dim)
        if query_norm is not None and key_norm is not None:
            query, key = query_norm(query), key_norm(key)
        return rotate(query, rotation), rotate(key, rotation), value_of(x).view(len(x), -1, head_dim)

    return Block(
        attention_norm=layer.input_layernorm,
        project=project,
        output=linear(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm,
        mlp=lambda x: down(act(gate(x)) * up(x)),
        parallel=False,
    )


def _is(core: Any, package: str, name: str) -> bool:
    """Exactly the library's class: a subclass may compute something else."""
    kind = type(core)
    return kind.__name__ == name and kind.__module__ == f"transformers.models.{package}.modeling_{package}"


def _own_glue(core: Any, modules: Iterable[nn.Module]) -> bool:
    """True when every module is of the model's own file and nothing hangs on it that only its forward would run.

    Hooks of the model itself do not count: a DeepSpeed engine puts some there that prepare a training step.
    """
    return "forward" not in vars(core) and all(
        type(module).__module__ == type(core).__module__
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        for module in modules
    )


def _window_applies(config: Any, capacity: int) -> bool:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    windowed = window is not None if kinds is None else any(kind != "full_attention" for kind in kinds)
    return windowed and (window is None or window < capacity)
