# SPDX-License-Identifier: Apache-2.0
"""What a task is: a dataset, a network and a loss; and what all tasks are made with.

The training loop sees pytrees and a loss only.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

from dho2_jax.app.data.dataset import Batch, Dataset
from dho2_jax.app.errors import UserError

Params = Any  # a pytree of arrays


class Task(NamedTuple):
    """What a training loop needs to know."""

    init: Callable[[int], Params]  # seed -> parameters, nested dicts of arrays
    outputs_fn: Callable[[Params, Batch], jax.Array]  # what the network says
    output_loss: Callable[[jax.Array, Batch], jax.Array]  # mean over the batch
    dataset: Dataset
    loss_label: str  # what the loss is, with its unit, for axes and tables

    def loss_fn(self, params: Params, batch: Batch) -> jax.Array:
        """Returns the mean loss of `params` over `batch`."""
        return self.output_loss(self.outputs_fn(params, batch), batch)

    def value_fn(self, batch: Batch, *, gauss_newton: bool) -> Any:
        """Returns what dho2 takes for `value_fn`: the loss of the parameters alone.

        Args:
          batch: To measure the curvature on.
          gauss_newton: Whether to return it in two parts, as curvature="ggn" needs.
        """
        if gauss_newton:
            return (
                lambda params: self.outputs_fn(params, batch),
                lambda outputs: self.output_loss(outputs, batch),
            )
        return lambda params: self.loss_fn(params, batch)


def split_module(
    build: Callable[[nnx.Rngs], nnx.Module],
) -> tuple[Callable[[int], Params], Callable[[Params, jax.Array], jax.Array]]:
    """Separates a module into a function of the seed and one of the parameters.

    The module is split once. From here on parameters are nested dicts of arrays, so
    that optimizers need to know nothing about Flax.

    Args:
      build: Builds a module of one argument whose only state is its parameters.

    Returns:
      `init(seed) -> params`, which `jax.eval_shape` takes too, and
      `apply(params, inputs)`.
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


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy in nats.

    Args:
      logits: Scores, the classes along the last axis.
      labels: Integers, of one axis less.

    Returns:
      A scalar.
    """
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


def classification(
    init: Callable[[int], Params],
    apply: Callable[[Params, jax.Array], jax.Array],
    dataset: Dataset,
) -> Task:
    """Builds a task from a network that classifies images.

    Args:
      init: From `split_module`.
      apply: From `split_module`.
      dataset: Its batches are pairs of images and labels.

    Returns:
      The task; its loss is in nats per image.
    """
    return Task(
        init,
        lambda params, batch: apply(params, batch[0]),
        lambda logits, batch: cross_entropy(logits, batch[1]),
        dataset,
        "cross-entropy (nats per image)",
    )


def check_heads(width: int, num_heads: int) -> None:
    """Checks that a transformer's heads divide its width.

    Args:
      width: Features of the residual stream.
      num_heads: Attention heads.

    Raises:
      UserError: If they do not.
    """
    if num_heads < 1 or width % num_heads:
        raise UserError(
            "config.task.num_heads must divide config.task.width, "
            f"got {num_heads} and {width}."
        )


def check_sizes(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """Checks layer sizes: a non-empty sequence of positive integers.

    Args:
      name: The field of `config.task`.
      sizes: What it holds.

    Returns:
      The sizes as a tuple.

    Raises:
      UserError: If they are none.
    """
    sizes = tuple(sizes)
    if not sizes or not all(isinstance(one, int) and one >= 1 for one in sizes):
        raise UserError(
            f"config.task.{name} must hold positive integers, such as (128, 64), "
            f"got {sizes}."
        )
    return sizes
