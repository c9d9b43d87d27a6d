# SPDX-License-Identifier: Apache-2.0
"""The vision transformer (ViT-B/16 by default) as a network and as a task."""

import jax
import jax.numpy as jnp
from flax import nnx

from dho2_jax.app.data import images
from dho2_jax.app.errors import UserError
from dho2_jax.app.tasks.interface import Task, check_heads, classification, split_module
from dho2_jax.app.tasks.models import Block, apply_in_turn


class ViT(nnx.Module):
    """Patches as tokens, one more token for the class, and pre-norm blocks."""

    def __init__(
        self,
        num_classes: int,
        image_size: int,
        *,
        patch_size: int,
        width: int,
        num_layers: int,
        num_heads: int,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        """Builds embeddings, blocks and the output layer.

        Args:
          num_classes: Number of classes.
          image_size: Edge of an image in pixels, a multiple of `patch_size`.
          patch_size: Edge of a patch in pixels.
          width: Features of the residual stream.
          num_layers: Number of blocks.
          num_heads: Attention heads in a block.
          remat: Whether derivatives compute each block again instead of storing it.
          rngs: Source of the initial weights.
        """
        self.remat = remat
        kernel_init = nnx.initializers.xavier_uniform()
        self.patch_embedding = nnx.Conv(
            3, width, (patch_size,) * 2, strides=patch_size, rngs=rngs
        )
        self.class_token = nnx.Param(jnp.zeros(width))
        length = 1 + (image_size // patch_size) ** 2
        self.position_embedding = nnx.Param(
            nnx.initializers.normal(0.02)(rngs.params(), (length, width))
        )
        self.blocks = nnx.List(
            Block(
                width,
                num_heads,
                is_causal=False,
                use_bias=True,
                kernel_init=kernel_init,
                rngs=rngs,
            )
            for _ in range(num_layers)
        )
        self.final_norm = nnx.LayerNorm(width, rngs=rngs)
        self.output = nnx.Linear(
            width, num_classes, kernel_init=nnx.initializers.normal(0.01), rngs=rngs
        )

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Maps images `(batch, height, width, 3)` to logits `(batch, classes)`."""
        x = self.patch_embedding(pixels)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        first = jnp.broadcast_to(self.class_token[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.position_embedding
        x = apply_in_turn(self.blocks, x, self.remat)
        return self.output(self.final_norm(x[:, 0]))


def vit(
    batch_size: int,
    *,
    image_size: int = 224,
    patch_size: int = 16,
    num_classes: int = 1000,
    num_validation: int = 256,
    width: int = 768,
    num_layers: int = 12,
    num_heads: int = 12,
    remat: bool = False,
) -> Task:
    """Builds ViT-B/16, or another size, on images from `images.scenes`.

    Args:
      batch_size: Images in a training batch.
      image_size: Edge of an image in pixels, a multiple of `patch_size`.
      patch_size: Edge of a patch in pixels.
      num_classes: Logits; the data has ten classes.
      num_validation: Images held out.
      width: Features of the residual stream.
      num_layers: Number of transformer blocks.
      num_heads: Attention heads in a block.
      remat: Whether derivatives compute each block again instead of storing it.

    Returns:
      The task; its loss is in nats per image.

    Raises:
      UserError: If the heads do not divide the width, or the patches the images.
    """
    check_heads(width, num_heads)
    if image_size % patch_size:
        raise UserError(
            "config.task.patch_size must divide config.task.image_size, "
            f"got {patch_size} and {image_size}."
        )
    init, apply = split_module(
        lambda rngs: ViT(
            num_classes,
            image_size,
            patch_size=patch_size,
            width=width,
            num_layers=num_layers,
            num_heads=num_heads,
            remat=remat,
            rngs=rngs,
        )
    )
    dataset = images.scenes(
        batch_size,
        image_size=image_size,
        num_classes=num_classes,
        num_validation=num_validation,
    )
    return classification(init, apply, dataset)
