"""Arithmetic of the network by formula: XLA counts a scanned layer once, and a kernel not at all.

Norms, biases, softmax, rotary embedding, loss and optimizer are left out: they are no matrix
products, and small beside them.
"""

from __future__ import annotations

from aspo_jax.model.parameters import ModelConfig


def layer_weights(config: ModelConfig) -> int:
    """Weights of all blocks' matrices: Y (D C (H + 2 K) + H C D + 3 D F)."""
    D, C, H, K = config.hidden_size, config.head_dim, config.heads, config.kv_heads
    return config.layers * (D * C * (H + 2 * K) + H * C * D + 3 * D * config.intermediate_size)


def attention_flops(config: ModelConfig, pairs: float) -> float:
    """Scores and weighted values of ``pairs`` (query, visible key) pairs: 4 Y H C each."""
    return 4.0 * config.layers * config.heads * config.head_dim * pairs


def head_flops(config: ModelConfig, tokens: float) -> float:
    """Projection of ``tokens`` hidden states to the vocabulary: 2 V D each."""
    return 2.0 * config.vocab_size * config.hidden_size * tokens


def forward_flops(config: ModelConfig, tokens: float, pairs: float) -> float:
    """FLOP of one forward pass, the output layer on every token included.

        2 (Y (D C (H + 2 K) + H C D + 3 D F) + V D) tokens + 4 Y H C pairs

    with Y layers, width D, H query and K key heads of width C, feed-forward F, vocabulary V.
    A sequence of L tokens has `causal_pairs` (L) pairs.
    """
    products = 2.0 * layer_weights(config) * tokens
    return products + attention_flops(config, pairs) + head_flops(config, tokens)


def causal_pairs(length: float) -> float:
    """(query, visible key) pairs of a sequence of ``length`` tokens, L (L + 1) / 2."""
    return length * (length + 1) / 2
