# SPDX-License-Identifier: Apache-2.0
"""Flax NNX: the loss of a model as a loss of its parameters, and refreshes in place.

Not imported by `dho2_jax` itself, which needs no Flax: `import dho2_jax.nnx`.
"""

from typing import Any

import jax
from flax import nnx

import dho2_jax


def value_fn(
    loss_fn: Any,
    model: Any,
    *args: Any,
    wrt: nnx.filterlib.Filter = nnx.Param,
    has_aux: bool = False,
) -> Any:
    """Returns the loss of a model as a function of its parameters alone.

    For `optimizer.update(model, grads, value_fn=dho2_jax.nnx.value_fn(loss_fn, model,
    batch))`. Each call works on a copy of the model as it is now: what the loss changes
    in it (batch statistics, the counts of dropout keys) is dropped, and all products of
    a refresh are of one function, with one dropout mask. To let the curvature see the
    model in evaluation mode pass a view of it, `nnx.view(model, deterministic=True,
    use_running_average=True)`.

    Args:
      loss_fn: `(model, *args) -> ()`, or `(model, *args) -> ((), aux)` with `has_aux`;
        for curvature="ggn" the pair of `(model, *args) -> outputs` and `(outputs,
        *args) -> ()`.
      model: The module, or a view of it.
      *args: The batch, and whatever else both take.
      wrt: The filter that `nnx.Optimizer` was given.
      has_aux: Whether the loss comes with auxiliary outputs, to be dropped.

    Returns:
      `params -> ()`, for the state that `nnx.state(model, wrt)` is, with or without
      its variables; for a pair of functions, a pair.

    Raises:
      ValueError: If `loss_fn` is no function, or `model` holds nothing that `wrt`
        selects.
    """
    is_pair = isinstance(loss_fn, tuple | dho2_jax.SplitLoss)
    fns: list[Any] = list(loss_fn) if is_pair else [loss_fn]
    for fn in fns:
        if not callable(fn) or isinstance(fn, nnx.Module | nnx.Optimizer):
            raise ValueError(
                "`loss_fn` must be a function (model, *args) -> loss, or the pair "
                "(outputs_fn, loss_fn) for curvature='ggn', got "
                f"{type(fn).__name__}; call value_fn(loss_fn, model, *args)."
            )
    _check_model(model, wrt)
    graphdef, _, rest = nnx.split(model, wrt, ...)
    rest = nnx.as_pure(rest)  # as it is now: variables would change with the model

    def of_params(params: Any) -> Any:
        out = fns[0](nnx.merge(graphdef, nnx.as_pure(params), rest), *args)
        return out[0] if has_aux else out

    if not is_pair:
        return of_params
    if has_aux:
        raise ValueError(
            "`has_aux` must be False with a pair of functions, got True; return the "
            "outputs and the loss alone."
        )
    return dho2_jax.SplitLoss(of_params, lambda outputs: fns[1](outputs, *args))


def refresh(
    optimizer: nnx.Optimizer,
    model: Any,
    loss_fn: Any,
    *args: Any,
    has_aux: bool = False,
) -> None:
    """Computes the subspace of an `nnx.Optimizer` anew, in place; call under `nnx.jit`.

    For `dho2(..., refresh="external")`, when `dho2_jax.should_refresh` says so.

    Args:
      optimizer: The optimizer, around any nest of Optax transformations with one DHO².
      model: The module, or a view of it.
      loss_fn: As for `value_fn`.
      *args: As for `value_fn`.
      has_aux: As for `value_fn`.

    Raises:
      ValueError: As for `value_fn`, and if `optimizer` is not an `nnx.Optimizer` with
        one DHO² state.
    """
    if not isinstance(optimizer, nnx.Optimizer):
        raise ValueError(
            "`optimizer` must be a flax.nnx.Optimizer, got "
            f"{type(optimizer).__name__}; call refresh(optimizer, model, loss_fn, "
            "*args)."
        )
    fn = value_fn(loss_fn, model, *args, wrt=optimizer.wrt, has_aux=has_aux)
    state = nnx.as_pure(optimizer.opt_state)
    params = nnx.as_pure(nnx.state(model, optimizer.wrt))
    nnx.update(optimizer.opt_state, nnx.state(dho2_jax.refresh(state, params, fn)))


def _check_model(model: Any, wrt: nnx.filterlib.Filter) -> None:
    """Raises unless the model has variables that `wrt` selects."""
    if not jax.tree.leaves(nnx.state(model, wrt)):
        raise ValueError(
            f"`model` must be a flax.nnx.Module with variables that wrt={wrt} selects, "
            f"got a {type(model).__name__} without any; pass the model, and the filter "
            "that nnx.Optimizer was given."
        )
