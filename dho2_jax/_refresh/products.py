# SPDX-License-Identifier: Apache-2.0
"""The loss a caller hands over, as curvature products on the state's own leaves."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dho2_jax._numerics import linalg, losses, operators
from dho2_jax._state.config import Config
from dho2_jax._types import Array, MatVec, Params, PyTree, ValueFn
from dho2_jax._vectors import axes, layouts, slices
from dho2_jax._vectors.layouts import Packed


class Products(NamedTuple):
    """The curvature at one point, as functions of vectors in slices."""

    matvec: Callable[[], MatVec]  # built where it is used: it may hold intermediates
    bend: Callable[[Packed], tuple[Array, Array]]  # d -> |d . H d| / |d|^2, |d|^2


def products_at(
    config: Config,
    layout: layouts.Layout,
    params: Params,
    value_fn: ValueFn | None,
    matvec_fn: Callable[[Params], MatVec] | None,
) -> tuple[tuple[Array, ...], Products]:
    """Returns the parameters' leaves that belong to the state, and their products."""
    operators.check_not_empty(params, "a curvature product")
    if config.axis_name:
        # A derivative with respect to parameters that are equal on all devices would
        # be summed over them; each device shall have that of its own loss.
        params = axes.varying(jax.tree.map(jnp.asarray, params), config.axis_name)
    leaves, merge = layouts.restrict(params, layout)
    part = tuple(jnp.asarray(x) for x in leaves)
    operators.check_params(part, "a curvature product")
    if matvec_fn is not None:
        build, along = _own_products(matvec_fn, params, part, layout)
    else:
        # For any other operator a bare pair is a mistake; a `SplitLoss` serves.
        if config.curvature == "ggn":
            value_fn = losses.as_loss(value_fn)
        of_part = _of_part(value_fn, params, merge)

        def build() -> MatVec:
            return operators.curvature_matvec(config.curvature, of_part, part)

        def along(d: PyTree) -> Array:
            return operators.directional_curvature(config.curvature, of_part, part, d)

    return part, Products(
        matvec=lambda: _in_slices(config, layout, part, build()),
        bend=lambda d: _bend(config, layout, part, along, d),
    )


def check_source(
    config: Config,
    params: Params | None,
    value_fn: ValueFn | None,
    matvec_fn: Callable[[Params], MatVec] | None,
    product: Any,
) -> None:
    """Raises unless `update` was given what its refresh needs."""
    given = value_fn is not None or matvec_fn is not None
    if product is not None:
        if config.refresh != "staggered" or given:
            raise ValueError(
                "`product` must be given to update with refresh='staggered' and in "
                f"place of `value_fn`, got it with refresh='{config.refresh}'"
                f"{' and both' if given else ''}; drop one."
            )
    elif config.refresh == "external" and not given:
        return
    else:
        check_one_source(value_fn, matvec_fn, f"update with refresh='{config.refresh}'")
    if params is None:
        name = "value_fn" if given else "product"
        raise ValueError(
            f"`params` must be given to update together with `{name}`, got None; call "
            f"tx.update(grads, state, params, {name}=...)."
        )
    if value_fn is not None and layouts.has_holes(params):
        _check_takes_holes(value_fn, params)


def check_one_source(value_fn, matvec_fn, where: str) -> None:
    """Raises unless exactly one of the two functions is given."""
    if value_fn is None and matvec_fn is None:
        raise ValueError(
            f"`value_fn` must be given to {where}, got None; pass "
            "value_fn=lambda p: loss(p, batch) (or, staggered, product=), or use "
            "refresh='external' and call dho2_jax.refresh outside update."
        )
    if value_fn is not None and matvec_fn is not None:
        raise ValueError(
            f"`value_fn` and `matvec_fn` must not both be given to {where}, got both; "
            "drop one."
        )


def _of_part(value_fn: Any, params: Params, merge: Callable) -> Any:
    """Returns the loss as a function of the state's leaves.

    Anything else is returned as it is: the curvature products say what is wrong.
    """
    if not callable(value_fn):
        return value_fn
    is_split = isinstance(value_fn, losses.SplitLoss)
    takes_params = value_fn.outputs_fn if is_split else value_fn
    operators.check_takes_params(takes_params, params)
    return losses.of_part(value_fn, merge)


def _check_takes_holes(value_fn: Any, params: Params) -> None:
    """Raises when a loss of all parameters meets the masked tree of `optax.masked`."""
    value_fn = losses.as_loss(value_fn)
    try:
        jax.eval_shape(value_fn, params)
    except Exception as error:
        raise ValueError(
            "`value_fn` must take the masked parameters inside optax.masked or "
            f"optax.partition, got {type(error).__name__} from it; pass all "
            "parameters too, as whole_params=, or use refresh='external' and "
            "dho2_jax.refresh(state, params, value_fn)."
        ) from error


def _in_slices(config: Config, layout, part, matvec: MatVec) -> MatVec:
    """Returns the product as a map between vectors in slices.

    With `axis_name=` each device's product is of its own share of the batch, and their
    mean is taken as it is cut into slices.
    """

    def product(v: Packed) -> Packed:
        leaves = jax.tree.leaves(matvec(_whole(config, v, part)))
        return slices.scatter(layout, leaves, mean=bool(config.axis_name))

    return product


def _whole(config: Config, v: Packed, part: tuple[Array, ...]) -> tuple[Array, ...]:
    """Returns a vector's leaves where and as the parameters are."""
    leaves = tuple(slices.gather(v, [x.dtype for x in part]))
    return axes.varying(leaves, config.axis_name) if config.axis_name else leaves


def _own_products(matvec_fn, params, part, layout) -> tuple[Callable, Callable]:
    if not callable(matvec_fn):
        raise ValueError(
            "`matvec_fn` must be a function of the parameters, got "
            f"{type(matvec_fn).__name__}; pass lambda params: matvec."
        )

    def build():
        matvec = matvec_fn(params)
        if not callable(matvec):
            raise ValueError(
                "`matvec_fn` must map parameters to a product v -> H v, got "
                f"{type(matvec).__name__}; wrap yours as lambda params: matvec."
            )

        def on_part(v):
            _, merge = layouts.restrict(jax.tree.map(jnp.zeros_like, params), layout)
            out = matvec(merge(linalg.cast_like(tuple(v), part)))
            leaves, _ = layouts.restrict(out, layout, "the result of `matvec_fn`")
            return linalg.as_float32(tuple(leaves))

        return on_part

    return build, lambda v: linalg.vdot(v, build()(v))


def _bend(
    config: Config, layout, part, along: Callable[[PyTree], Array], d: Packed
) -> tuple[Array, Array]:
    """Measures along d / |d|: a step of a small rate squared underflows in float16."""

    def normed(inner, d: Packed) -> tuple[Packed, Array]:
        length = linalg.vdot(d, d, inner)
        scale = jax.lax.rsqrt(jnp.where(length > 0, length, 1.0))
        return jax.tree.map(lambda x: scale * x, linalg.as_float32(d)), length

    unit, length = slices.on_slices(layout, normed, d)
    bend = along(_whole(config, unit, part))
    if config.axis_name:
        bend = axes.mean(bend, config.axis_name)
    return jnp.abs(bend), length
