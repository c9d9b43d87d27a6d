# SPDX-License-Identifier: Apache-2.0
"""The ways to renew the subspace inside `update`, as values in a registry.

A way is what `refresh=` names. Before each step it may renew the subspace, or do a part
of that; and it says which curvature products the step may use for the rate's probes.
Another way is a file with such a function and a line in `WAYS`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from dho2_jax._refresh import at_once, staggered
from dho2_jax._refresh.products import Products, products_at
from dho2_jax._state.states import CurvatureState, Probe, layout_of_state
from dho2_jax._types import Params


class Given(NamedTuple):
    """What `update` was given for the curvature."""

    params: Params | None  # all that `value_fn` takes
    value_fn: Any
    matvec_fn: Any
    product: Any


class Ready(NamedTuple):
    """What a step is to go on with."""

    state: CurvatureState
    products: Products | None  # at the parameters, for the rate's probes
    probe: Probe | None  # what was measured along the last step instead


def _periodic(state: CurvatureState, given: Given) -> Ready:
    part, products = _products(state, given)
    return Ready(at_once.maybe_refresh(state, part, products), products, None)


def _staggered(state: CurvatureState, given: Given) -> Ready:
    product = given.product
    if product is None:
        product = staggered.make_product(
            state, given.params, given.value_fn, given.matvec_fn
        )
    state, probe = staggered.advance(state, given.params, product)
    return Ready(state, None, probe)


def _external(state: CurvatureState, given: Given) -> Ready:
    if given.value_fn is None and given.matvec_fn is None:
        return Ready(state, None, None)
    return Ready(state, _products(state, given)[1], None)


def _products(state: CurvatureState, given: Given) -> tuple[Any, Products]:
    layout = layout_of_state(state)
    return products_at(
        state.config, layout, given.params, given.value_fn, given.matvec_fn
    )


WAYS: dict[str, Callable[[CurvatureState, Given], Ready]] = {
    "periodic": _periodic,
    "staggered": _staggered,
    "external": _external,
}
"""What `refresh=` may be."""
