"""A decoder-only transformer on bytes, in Flax NNX, whose MLP is down(act(up(x)))."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

BYTES = 256


class Attention(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        q, k, v = (part.reshape(*x.shape[:2], self.heads, -1) for part in jnp.split(self.qkv(x), 3, -1))
        return self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))


class Mlp(nnx.Module):
    def __init__(self, width: int, act: Callable[[Array], Array], rngs: nnx.Rngs):
        self.act = act
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.down(self.act(self.up(x)))


class Block(nnx.Module):
    def __init__(self, width: int, heads: int, act: Callable[[Array], Array], rngs: nnx.Rngs):
        self.norm1, self.attention = nnx.LayerNorm(width, rngs=rngs), Attention(width, heads, rngs)
        self.norm2, self.mlp = nnx.LayerNorm(width, rngs=rngs), Mlp(width, act, rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LanguageModel(nnx.Module):
    def __init__(self, layers: int, width: int, heads: int, tokens: int, act: Callable[[Array], Array], rngs: nnx.Rngs):
        self.embed = nnx.Embed(BYTES, width, rngs=rngs)
        self.place = nnx.Embed(tokens, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, act, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, BYTES, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        x = self.embed(tokens) + self.place(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def cross_entropy(logits: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
