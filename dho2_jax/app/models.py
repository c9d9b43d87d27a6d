# SPDX-License-Identifier: Apache-2.0
"""The small networks of the experiments, as Flax NNX modules.

They know nothing about data, losses or optimizers: `tasks` puts these together.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


class MLP(nnx.Module):
    """Dense layers with tanh between them and a linear end."""

    def __init__(self, sizes: Sequence[int], *, rngs: nnx.Rngs):
        """Builds the layers.

        Args:
          sizes: Numbers of units from the input to the output.
          rngs: Source of the initial weights.
        """
        self.layers = nnx.List(
            nnx.Linear(fan_in, fan_out, rngs=rngs)
            for fan_in, fan_out in itertools.pairwise(sizes)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(batch, sizes[0])` to `(batch, sizes[-1])`."""
        for layer in self.layers[:-1]:
            x = jnp.tanh(layer(x))
        return self.layers[-1](x)


class Block(nnx.Module):
    """Causal self-attention and a feed-forward part, each after a layer norm."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        """Builds the two parts.

        Args:
          width: Features of the residual stream, a multiple of `num_heads`.
          num_heads: Attention heads.
          rngs: Source of the initial weights.
        """
        self.num_heads = num_heads
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.query_key_value = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.attention_out = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.mlp_in = nnx.Linear(width, 4 * width, rngs=rngs)
        self.mlp_out = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(batch, length, width)` to the same shape."""
        batch, length, width = x.shape
        heads = (batch, length, self.num_heads, width // self.num_heads)
        projected = self.query_key_value(self.attention_norm(x))
        query, key, value = (
            one.reshape(heads) for one in jnp.split(projected, 3, axis=-1)
        )
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.reshape(x.shape))
        return x + self.mlp_out(jax.nn.gelu(self.mlp_in(self.mlp_norm(x))))


class CharTransformer(nnx.Module):
    """A pre-norm transformer over characters with learned positions."""

    def __init__(
        self,
        vocabulary_size: int,
        length: int,
        *,
        width: int,
        num_layers: int,
        num_heads: int,
        rngs: nnx.Rngs,
    ):
        """Builds embeddings, blocks and the output layer.

        Args:
          vocabulary_size: Number of distinct characters.
          length: Longest input.
          width: Features of the residual stream.
          num_layers: Number of blocks.
          num_heads: Attention heads in a block.
          rngs: Source of the initial weights.
        """
        self.token_embedding = nnx.Embed(vocabulary_size, width, rngs=rngs)
        self.position_embedding = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List(
            Block(width, num_heads, rngs=rngs) for _ in range(num_layers)
        )
        self.final_norm = nnx.LayerNorm(width, rngs=rngs)
        self.output = nnx.Linear(width, vocabulary_size, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens `(batch, length)` to logits `(batch, length, vocabulary)`."""
        x = self.token_embedding(tokens)
        x = x + self.position_embedding(jnp.arange(tokens.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.output(self.final_norm(x))
