# SPDX-License-Identifier: Apache-2.0
"""A loss in parts, for curvature batches whose activations do not fit at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dho2_jax._checks import check_integer
from dho2_jax._numerics.losses import SplitLoss, as_loss
from dho2_jax._types import Array, Params, PyTree


def chunked_value_fn(loss_fn: Any, batch: PyTree, *, num_chunks: int) -> Any:
    """Returns the mean loss of a batch, computed over one part of it at a time.

    Each part is computed again where a derivative needs it, so that a curvature product
    holds the activations of one part only, for about one more gradient of time. Part j
    is every `num_chunks`-th example, from the j-th on: a batch that is sharded over its
    examples stays where it is, if the devices divide the examples of a part. For every
    `curvature=`.

    Args:
      loss_fn: `(params, batch) -> ()`, the mean loss of the examples it is given; for
        curvature="ggn" the pair of `(params, batch) -> outputs` and `(outputs, batch)
        -> ()`, where the outputs of all parts are held. All parts weigh the same: with
        weights (a padding mask) divide by the mean weight of the whole batch, not of
        the part.
      batch: A pytree of arrays, the examples along the first dimension of each.
      num_chunks: How many parts; a divisor of the number of examples. Static.

    Returns:
      `value_fn`, `params -> ()` in float32; for a pair of functions, a pair.

    Raises:
      ValueError: If `loss_fn` is neither a function nor a pair of them, or `num_chunks`
        does not divide the examples; in `value_fn`, if the loss is not one scalar.
    """
    check_integer("num_chunks", num_chunks, 1)
    _check_batch(batch, num_chunks)
    chunks = jax.tree.map(lambda x: _parts(x, num_chunks), batch)

    def mean(losses: Any) -> Array:
        if jax.tree.map(jnp.shape, losses) != (num_chunks,):
            found = jax.tree.map(lambda x: x.shape[1:], losses)
            raise ValueError(
                "`loss_fn` must return one scalar, the mean loss of a part, got shapes "
                f"{found}; drop auxiliary outputs, as in lambda p, b: loss(p, b)[0]."
            )
        return jnp.mean(losses, dtype=jnp.float32)

    loss_fn = as_loss(loss_fn)
    if isinstance(loss_fn, SplitLoss):
        outputs_fn, loss_of_outputs = loss_fn

        def of_both(_, both: tuple[PyTree, PyTree]) -> Array:
            return loss_of_outputs(*both)

        return SplitLoss(
            lambda params: _one_by_one(outputs_fn, params, chunks),
            lambda outputs: mean(_one_by_one(of_both, None, (outputs, chunks))),
        )
    if callable(loss_fn):
        return lambda params: mean(_one_by_one(loss_fn, params, chunks))
    raise ValueError(
        "`loss_fn` must be a function (params, batch) -> loss, or for curvature='ggn' "
        f"the pair (outputs_fn, loss_fn), got {type(loss_fn).__name__}; pass one."
    )


def _one_by_one(fn: Callable[..., Any], params: Params, chunks: PyTree) -> Any:
    """Returns what `fn` makes of each part, stacked; derivatives compute it again."""
    # Inside a loop the compiler cannot undo the recomputation, and needs no barrier.
    again = jax.checkpoint(fn, prevent_cse=False)
    return jax.lax.map(lambda chunk: again(params, chunk), chunks)


def _parts(x: Any, num_chunks: int) -> Array:
    """Returns `(num_chunks, examples, ...)`: row j is `x[j::num_chunks]`."""
    x = jnp.asarray(x)
    return jnp.swapaxes(x.reshape(-1, num_chunks, *x.shape[1:]), 0, 1)


def _check_batch(batch: PyTree, num_chunks: int) -> None:
    shapes = [jnp.shape(x) for x in jax.tree.leaves(batch)]
    if not shapes:
        raise ValueError(
            "`batch` must have at least one array, got an empty pytree; pass what the "
            "loss is computed from."
        )
    for shape in shapes:
        if shape[:1] != shapes[0][:1] or not shape or shape[0] % num_chunks:
            raise ValueError(
                "`batch` must have arrays with one number of examples, a multiple of "
                f"num_chunks={num_chunks}, along the first dimension, got shapes "
                f"{shapes}; choose a num_chunks that divides it, or a smaller batch."
            )
