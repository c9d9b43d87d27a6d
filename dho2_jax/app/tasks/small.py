# SPDX-License-Identifier: Apache-2.0
"""The small tasks; the larger ones have a file each."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dho2_jax.app.data import hub, images, stdlib
from dho2_jax.app.data.dataset import Dataset
from dho2_jax.app.tasks import models
from dho2_jax.app.tasks.interface import (
    Task,
    check_heads,
    check_sizes,
    classification,
    cross_entropy,
    split_module,
)


def patch_autoencoder(
    batch_size: int,
    *,
    patch_size: int = 16,
    tile_size: int = 64,
    num_validation: int = 2048,
    widths: Sequence[int] = (128, 64, 16),
) -> Task:
    """Builds a tanh autoencoder of photograph patches under squared error.

    Args:
      batch_size: Patches in a training batch.
      patch_size: Edge of a patch in pixels.
      tile_size: Edge of the held-out image regions in pixels.
      num_validation: Patches in the validation batch.
      widths: Hidden units of the encoder, code last; the decoder mirrors them.

    Returns:
      The task; its loss sums over pixels and averages over patches.
    """
    dataset = images.patches(
        batch_size,
        patch_size=patch_size,
        tile_size=tile_size,
        num_validation=num_validation,
    )
    encoder = (patch_size**2, *check_sizes("widths", widths))
    sizes = encoder + encoder[-2::-1]
    init, apply = split_module(lambda rngs: models.MLP(sizes, rngs=rngs))

    def output_loss(outputs: jax.Array, batch: jax.Array) -> jax.Array:
        return jnp.mean(jnp.sum((outputs - batch) ** 2, axis=-1))

    return Task(init, apply, output_loss, dataset, "squared error per patch")


def digits_mlp(
    batch_size: int,
    *,
    num_validation: int = 360,
    widths: Sequence[int] = (64, 64),
) -> Task:
    """Builds a tanh classifier of handwritten digits under cross-entropy.

    Args:
      batch_size: Images in a training batch.
      num_validation: Images held out.
      widths: Hidden units, layer by layer.

    Returns:
      The task; its loss is in nats per image.
    """
    sizes = (64, *check_sizes("widths", widths), 10)
    init, apply = split_module(lambda rngs: models.MLP(sizes, rngs=rngs))

    dataset = images.digits(batch_size, num_validation=num_validation)
    return classification(init, apply, dataset)


def char_lm(
    batch_size: int,
    *,
    length: int = 64,
    max_bytes: int = 4_000_000,
    num_validation: int = 256,
    width: int = 96,
    num_layers: int = 2,
    num_heads: int = 4,
) -> Task:
    """Builds a character transformer on the standard library's source.

    Args:
      batch_size: Windows in a training batch.
      length: Characters in a window.
      max_bytes: Upper bound on the text that is read, to within one file.
      num_validation: Windows in the validation batch.
      width: Features of the residual stream.
      num_layers: Number of transformer blocks.
      num_heads: Attention heads in a block.

    Returns:
      The task; its loss is in nats per character.

    Raises:
      UserError: If the heads do not divide the width.
    """
    check_heads(width, num_heads)
    dataset = stdlib.characters(
        batch_size, length=length, max_bytes=max_bytes, num_validation=num_validation
    )
    number = len(stdlib.VOCABULARY)
    return _language_model(
        dataset, number, "character", length, width, num_layers, num_heads
    )


def hub_text(
    batch_size: int,
    *,
    path: str = "Salesforce/wikitext",
    subset: str = "wikitext-2-raw-v1",
    train_split: str = "train",
    validation_split: str = "validation",
    text_column: str = "text",
    length: int = 128,
    max_bytes: int = 20_000_000,
    num_validation: int = 256,
    width: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
) -> Task:
    """Builds a transformer on the bytes of any text of the Hugging Face hub.

    Args:
      batch_size: Windows in a training batch.
      path: The dataset's name on the hub, or a directory of Parquet or text files.
      subset: Which of its configurations; "" if it has one only.
      train_split: The split to train with; "train[:-5%]" is a part of one.
      validation_split: The split to validate with; "train[-5%:]" where there is none.
      text_column: The column of the text.
      length: Bytes in a window.
      max_bytes: Bytes of each split to read at most.
      num_validation: Windows in the validation batch.
      width: Features of the residual stream.
      num_layers: Number of transformer blocks.
      num_heads: Attention heads in a block.

    Returns:
      The task; its loss is in nats per byte.

    Raises:
      UserError: If the heads do not divide the width, or the data cannot be loaded, are
        something else or too few.
    """
    check_heads(width, num_heads)
    dataset = hub.byte_windows(
        batch_size,
        path=path,
        subset=subset,
        splits=(train_split, validation_split),
        text_column=text_column,
        length=length,
        max_bytes=max_bytes,
        num_validation=num_validation,
    )
    return _language_model(dataset, 256, "byte", length, width, num_layers, num_heads)


def _language_model(
    dataset: Dataset,
    vocabulary_size: int,
    unit: str,
    length: int,
    width: int,
    num_layers: int,
    num_heads: int,
) -> Task:
    """Builds a transformer that predicts each next token of a window."""

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return models.CharTransformer(
            vocabulary_size,
            length,
            width=width,
            num_layers=num_layers,
            num_heads=num_heads,
            rngs=rngs,
        )

    init, apply = split_module(build)
    return Task(
        init,
        lambda params, tokens: apply(params, tokens[:, :-1]),
        lambda logits, tokens: cross_entropy(logits, tokens[:, 1:]),
        dataset,
        f"cross-entropy (nats per {unit})",
    )
