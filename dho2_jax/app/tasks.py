# SPDX-License-Identifier: Apache-2.0
"""A task is a dataset, a model and a loss; `TASKS` has those a config may name.

Sits between `data`, `models` and the training loop, which sees pytrees and a loss only.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dho2_jax.app import data, models
from dho2_jax.app.errors import UserError

Params = Any  # a pytree of arrays


class Task(NamedTuple):
    """What a training loop needs to know."""

    init: Callable[[int], Params]  # seed -> parameters, nested dicts of arrays
    outputs_fn: Callable[[Params, data.Batch], jax.Array]  # what the network says
    output_loss: Callable[[jax.Array, data.Batch], jax.Array]  # mean over the batch
    dataset: data.Dataset
    loss_label: str  # what the loss is, with its unit, for axes and tables

    def loss_fn(self, params: Params, batch: data.Batch) -> jax.Array:
        """Returns the mean loss of `params` over `batch`."""
        return self.output_loss(self.outputs_fn(params, batch), batch)


def _split(build: Callable[[nnx.Rngs], nnx.Module]):
    """Separates a module into `init(seed) -> params` and `apply(params, x)`.

    The module is split once. From here on parameters are nested dicts of arrays, so
    that optimizers need to know nothing about Flax.
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    # Compiled as one program: far quicker than one program an initializer.
    @jax.jit
    def from_key(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))

    def init(seed: int) -> Params:
        return from_key(jax.random.key(seed))

    def apply(params: Params, inputs: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(inputs)

    return init, apply


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
    dataset = data.patches(
        batch_size,
        patch_size=patch_size,
        tile_size=tile_size,
        num_validation=num_validation,
    )
    encoder = (patch_size**2, *_sizes("widths", widths))
    sizes = encoder + encoder[-2::-1]
    init, apply = _split(lambda rngs: models.MLP(sizes, rngs=rngs))

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
    sizes = (64, *_sizes("widths", widths), 10)
    init, apply = _split(lambda rngs: models.MLP(sizes, rngs=rngs))

    dataset = data.digits(batch_size, num_validation=num_validation)
    return Task(
        init,
        lambda params, batch: apply(params, batch[0]),
        lambda logits, batch: _cross_entropy(logits, batch[1]),
        dataset,
        "cross-entropy (nats per image)",
    )


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
    if num_heads < 1 or width % num_heads:
        raise UserError(
            "config.task.num_heads must divide config.task.width, "
            f"got {num_heads} and {width}."
        )

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return models.CharTransformer(
            len(data.VOCABULARY),
            length,
            width=width,
            num_layers=num_layers,
            num_heads=num_heads,
            rngs=rngs,
        )

    init, apply = _split(build)

    dataset = data.characters(
        batch_size, length=length, max_bytes=max_bytes, num_validation=num_validation
    )
    return Task(
        init,
        lambda params, tokens: apply(params, tokens[:, :-1]),
        lambda logits, tokens: _cross_entropy(logits, tokens[:, 1:]),
        dataset,
        "cross-entropy (nats per character)",
    )


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy in nats."""
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


def _sizes(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """Checks layer sizes: a non-empty sequence of positive integers."""
    sizes = tuple(sizes)
    if not sizes or not all(isinstance(one, int) and one >= 1 for one in sizes):
        raise UserError(
            f"config.task.{name} must hold positive integers, such as (128, 64), "
            f"got {sizes}."
        )
    return sizes


TASKS: dict[str, Callable[..., Task]] = {
    "patch_autoencoder": patch_autoencoder,
    "digits_mlp": digits_mlp,
    "char_lm": char_lm,
}
