# SPDX-License-Identifier: Apache-2.0
"""GPT-2 in its published sizes (124M to 1.5B) as a network and as a task.

The network is the published one; the text is not: see `gpt2`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dho2_jax.app.data import stdlib
from dho2_jax.app.errors import UserError
from dho2_jax.app.tasks.interface import Task, check_heads, cross_entropy, split_module
from dho2_jax.app.tasks.models import Block, apply_in_turn

DTYPES = ("float32", "bfloat16")


class GPT2(nnx.Module):
    """Pre-norm blocks with biases; the output matrix is the token embedding."""

    def __init__(
        self,
        vocabulary_size: int,
        length: int,
        *,
        width: int,
        num_layers: int,
        num_heads: int,
        remat: bool = False,
        scan_layers: bool = False,
        dtype: jax.typing.DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        """Builds embeddings and blocks, initialized as published.

        Args:
          vocabulary_size: Number of distinct tokens.
          length: Longest input.
          width: Features of the residual stream.
          num_layers: Number of blocks.
          num_heads: Attention heads in a block.
          remat: Whether derivatives compute each block again instead of storing it.
          scan_layers: Whether the blocks are one block, with a leading axis of layers
            on each parameter: compiled once, and optimizers see stacked matrices.
          dtype: Of the arithmetic; parameters are float32 always.
          rngs: Source of the initial weights.
        """
        normal = nnx.initializers.normal
        self.remat, self.scan_layers = remat, scan_layers
        self.token_embedding = nnx.Embed(
            vocabulary_size, width, embedding_init=normal(0.02), dtype=dtype, rngs=rngs
        )
        self.position_embedding = nnx.Embed(
            length, width, embedding_init=normal(0.01), dtype=dtype, rngs=rngs
        )

        def block(rngs: nnx.Rngs) -> Block:
            return Block(
                width,
                num_heads,
                use_bias=True,
                epsilon=1e-5,
                kernel_init=normal(0.02),
                # So that the residual stream does not grow with the depth.
                residual_init=normal(0.02 * (2 * num_layers) ** -0.5),
                dtype=dtype,
                rngs=rngs,
            )

        self.blocks: Any = (
            nnx.vmap(block)(rngs.split(num_layers))
            if scan_layers
            else nnx.List(block(rngs) for _ in range(num_layers))
        )
        self.final_norm = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens `(batch, length)` to logits `(batch, length, vocabulary)`."""
        x = self.token_embedding(tokens)
        x = x + self.position_embedding(jnp.arange(tokens.shape[-1]))
        if self.scan_layers:
            x = nnx.scan(
                lambda x, block: apply_in_turn([block], x, self.remat),
                in_axes=(nnx.Carry, 0),
                out_axes=nnx.Carry,
            )(x, self.blocks)
        else:
            x = apply_in_turn(self.blocks, x, self.remat)
        logits = self.token_embedding.attend(self.final_norm(x))
        return logits.astype(jnp.float32)


def gpt2(
    batch_size: int,
    *,
    length: int = 1024,
    vocabulary_size: int = 50257,
    max_bytes: int = 4_000_000,
    num_validation: int = 64,
    width: int = 768,
    num_layers: int = 12,
    num_heads: int = 12,
    remat: bool = False,
    scan_layers: bool = False,
    dtype: str = "float32",
) -> Task:
    """Builds GPT-2 on the standard library's source, as a stand-in for WebText.

    The text needs no download. Its tokens are single characters, so only the first 96
    of the vocabulary occur: shapes, memory and time are those of GPT-2, losses are not.

    Args:
      batch_size: Windows in a training batch.
      length: Tokens in a window.
      vocabulary_size: Rows of the token embedding.
      max_bytes: Upper bound on the text that is read, to within one file.
      num_validation: Windows in the validation batch.
      width: Features of the residual stream.
      num_layers: Number of transformer blocks.
      num_heads: Attention heads in a block.
      remat: Whether derivatives compute each block again instead of storing it.
      scan_layers: Whether to stack the blocks, which are then compiled once.
      dtype: Of the arithmetic, "float32" or "bfloat16"; parameters are float32.

    Returns:
      The task; its loss is in nats per character.

    Raises:
      UserError: If the heads do not divide the width, the vocabulary is too small or
        the type unknown.
    """
    check_heads(width, num_heads)
    if vocabulary_size < len(stdlib.VOCABULARY):
        raise UserError(
            "config.task.vocabulary_size must be at least the text's "
            f"{len(stdlib.VOCABULARY)}, got {vocabulary_size}."
        )
    if dtype not in DTYPES:
        raise UserError(
            f"config.task.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}."
        )
    init, apply = split_module(
        lambda rngs: GPT2(
            vocabulary_size,
            length,
            width=width,
            num_layers=num_layers,
            num_heads=num_heads,
            remat=remat,
            scan_layers=scan_layers,
            dtype=jnp.dtype(dtype),
            rngs=rngs,
        )
    )
    return Task(
        init,
        lambda params, tokens: apply(params, tokens[:, :-1]),
        lambda logits, tokens: cross_entropy(logits, tokens[:, 1:]),
        stdlib.characters(
            batch_size,
            length=length,
            max_bytes=max_bytes,
            num_validation=num_validation,
        ),
        "cross-entropy (nats per character)",
    )
