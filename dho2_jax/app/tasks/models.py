# SPDX-License-Identifier: Apache-2.0
"""Networks of several tasks, as Flax NNX modules.

They know nothing about data, losses or optimizers: `tasks` puts these together.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

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
    """Self-attention and a feed-forward part, each after a layer norm."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        is_causal: bool = True,
        use_bias: bool = False,
        epsilon: float = 1e-6,
        kernel_init: nnx.Initializer | None = None,
        residual_init: nnx.Initializer | None = None,
        dtype: jax.typing.DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        """Builds the two parts.

        Args:
          width: Features of the residual stream, a multiple of `num_heads`.
          num_heads: Attention heads.
          is_causal: Whether a position sees only those before it.
          use_bias: Whether the attention's matrices have biases, as the others do.
          epsilon: Added to the variances in the layer norms.
          kernel_init: Initial matrices; default: normal with variance 1 / fan-in.
          residual_init: Those that write into the residual stream; default: the same.
          dtype: Of the arithmetic; default: the parameters' own.
          rngs: Source of the initial weights.
        """
        self.num_heads = num_heads
        self.is_causal = is_causal
        kernel_init = kernel_init or nnx.initializers.lecun_normal()
        residual_init = residual_init or kernel_init

        def norm() -> nnx.LayerNorm:
            return nnx.LayerNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)

        def linear(fan_in: int, fan_out: int, use_bias: bool) -> nnx.Linear:
            return nnx.Linear(
                fan_in,
                fan_out,
                use_bias=use_bias,
                kernel_init=residual_init if fan_out == width else kernel_init,
                dtype=dtype,
                rngs=rngs,
            )

        self.attention_norm = norm()
        self.query_key_value = linear(width, 3 * width, use_bias)
        self.attention_out = linear(width, width, use_bias)
        self.mlp_norm = norm()
        self.mlp_in = linear(width, 4 * width, True)
        self.mlp_out = linear(4 * width, width, True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(batch, length, width)` to the same shape."""
        batch, length, width = x.shape
        heads = (batch, length, self.num_heads, width // self.num_heads)
        projected = self.query_key_value(self.attention_norm(x))
        query, key, value = (
            one.reshape(heads) for one in jnp.split(projected, 3, axis=-1)
        )
        mixed = jax.nn.dot_product_attention(
            query, key, value, is_causal=self.is_causal
        )
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


def apply_in_turn(blocks: Iterable[nnx.Module], x: jax.Array, remat: bool) -> jax.Array:
    """Sends `x` through one block after the other.

    Args:
      blocks: Modules of one argument.
      x: What the first of them takes.
      remat: Whether derivatives compute each block again instead of storing it.

    Returns:
      What the last block gives.
    """
    call = nnx.remat(_call) if remat else _call
    for block in blocks:
        x = call(block, x)
    return x


def _call(block: Any, x: jax.Array) -> jax.Array:
    return block(x)
