# SPDX-License-Identifier: Apache-2.0
"""A loss, whole or split at the network's outputs, and what can be made of either."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from dho2_jax._types import Params


@dataclasses.dataclass(frozen=True)
class SplitLoss:
    """A loss in two parts, split at the network's outputs, as curvature="ggn" needs.

    Called, it is the loss: serves wherever a `value_fn` or a `loss_fn` does.

    Args:
      outputs_fn: `(params, *args) -> outputs`.
      loss_fn: `(outputs, *args) -> ()`, convex in the outputs.
    """

    outputs_fn: Callable[..., Any]
    loss_fn: Callable[..., Any]

    def __call__(self, params: Params, *args: Any) -> Any:
        """Returns the loss."""
        return self.loss_fn(self.outputs_fn(params, *args), *args)

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        """Yields both functions, as the bare pair does."""
        return iter((self.outputs_fn, self.loss_fn))

    def __getitem__(self, index: int) -> Callable[..., Any]:
        """Returns one of them, as of the bare pair."""
        return (self.outputs_fn, self.loss_fn)[index]


def as_loss(value_fn: Any) -> Any:
    """Returns what a caller handed over, a bare pair of functions as a `SplitLoss`."""
    if type(value_fn) is not tuple or len(value_fn) != 2:
        return value_fn
    return SplitLoss(*value_fn) if all(map(callable, value_fn)) else value_fn


def of_part(value_fn: Any, whole: Callable[[Any], Params]) -> Any:
    """Returns the loss as a function of what `whole` makes the parameters of."""
    if isinstance(value_fn, SplitLoss):
        return SplitLoss(of_part(value_fn.outputs_fn, whole), value_fn.loss_fn)
    return lambda part, *args: value_fn(whole(part), *args)


def on_batch(value_fn: Any, *args: Any) -> Any:
    """Returns the loss with all arguments but the parameters bound."""
    if isinstance(value_fn, SplitLoss):
        return SplitLoss(*(on_batch(fn, *args) for fn in value_fn))
    return lambda x: value_fn(x, *args)


def without_aux(value_fn: Any) -> Any:
    """Returns a loss that comes with auxiliary outputs without them."""
    if isinstance(value_fn, SplitLoss):
        return SplitLoss(value_fn.outputs_fn, without_aux(value_fn.loss_fn))
    return lambda *args: value_fn(*args)[0]
