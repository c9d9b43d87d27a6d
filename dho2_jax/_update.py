# SPDX-License-Identifier: Apache-2.0
"""`init` and `update` of the transformation: where all the parts meet."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dho2_jax._numerics.operators import check_params
from dho2_jax._refresh.products import check_source
from dho2_jax._refresh.ways import WAYS, Given
from dho2_jax._state import bases
from dho2_jax._state.config import Config
from dho2_jax._state.states import DHO2State, init_curvature, layout_of_state
from dho2_jax._step import algebra, proposals, trials
from dho2_jax._types import Array, ScalarOrSchedule
from dho2_jax._vectors import layouts
from dho2_jax._vectors.slices import gather, lay_out, scatter


class Settings(NamedTuple):
    """What a transformation was made of."""

    base: optax.GradientTransformationExtraArgs
    config: Config
    newton_learning_rate: ScalarOrSchedule
    subspace_decay: ScalarOrSchedule
    damping: ScalarOrSchedule
    max_base_scaling: ScalarOrSchedule
    rate_schedule: ScalarOrSchedule
    curvature_mask: Any
    linear_base: bool

    def at(self, count: Array) -> algebra.Hyper:
        """Returns the hyper-parameters of a step."""

        def now(rate: ScalarOrSchedule) -> Array:
            return jnp.asarray(rate(count) if callable(rate) else rate, jnp.float32)

        return algebra.Hyper(
            newton=now(self.newton_learning_rate),
            decay=now(self.subspace_decay),
            damping=now(self.damping),
            cap=now(self.max_base_scaling),
            schedule=now(self.rate_schedule),
        )


def init_fn(made_of: Settings, params: optax.Params) -> Any:
    """Returns the state before the first step."""
    base, config = made_of.base, made_of.config
    if not jax.tree.leaves(params):
        return DHO2State(base.init(params), init_curvature(config, params))
    outside = ()
    if made_of.curvature_mask is not None:
        outside = _masked_out(params, made_of.curvature_mask)
    layout = layouts.layout_of(params, outside)
    check_params(layouts.map_outside(_nothing, params, layout), "init")
    if config.size > layout.size:
        raise ValueError(
            "`num_largest` + `num_smallest` must be at most the number of "
            f"parameters, got {config.size} for {layout.size}; lower them."
        )
    ours = init_curvature(config, params, outside)
    layout = layout_of_state(ours)
    base_state = bases.init(base, config, layout, params)
    return DHO2State(base_state, lay_out(layout, ours))


def update_fn(
    made_of: Settings,
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    *,
    value_fn=None,
    matvec_fn=None,
    product=None,
    whole_params=None,
    **extra_args,
) -> tuple[optax.Updates, Any]:
    """Returns the updates of one step, and the state after it.

    In this order: renew the subspace, or a part of it; split the gradient; ask the base
    for its update of the complement; join both, with the rate; try a bold step.
    """
    if value_fn is not None:
        extra_args["value_fn"] = value_fn
    if whole_params is not None:
        extra_args["whole_params"] = whole_params
    base, config, ours = made_of.base, made_of.config, state.curvature
    if not jax.tree.leaves(updates):
        updates, base_state = base.update(
            updates, state.base_state, params, **extra_args
        )
        ours = ours._replace(count=optax.safe_increment(ours.count))
        return updates, DHO2State(base_state, ours)

    layout = layout_of_state(ours)
    grads, _ = layouts.restrict(updates, layout, "`updates`")
    shown = layouts.map_outside(_nothing, updates, layout)
    check_params(shown, "update", "updates")
    point = params if whole_params is None else whole_params
    check_source(config, point, value_fn, matvec_fn, product)
    given = Given(point, value_fn, matvec_fn, product)
    ours, products, probe = WAYS[config.refresh](ours, given)

    hyper = made_of.at(ours.count)
    parts = algebra.split(ours, scatter(layout, grads), made_of.linear_base)
    dtypes, merge, steps, base_state = bases.update(
        base, ours.config, updates, parts.given, state.base_state, params, extra_args
    )
    value = trials.value_at(ours.config, layout, point, value_fn)
    vector, proposal, ours = algebra.join(
        ours, parts, steps, hyper, products, probe, tried=value is not None
    )

    reach = ours.rate.reach if ours.config.rule.measures else None
    part = gather(vector, dtypes)
    part, trial = trials.attempt(reach, proposal, part, value)
    new_updates = layouts.map_outside(
        lambda x: (hyper.schedule * x).astype(x.dtype), merge(part), layout
    )
    ours = proposals.settle(ours, proposal, hyper.schedule, trial)
    ours = ours._replace(count=optax.safe_increment(ours.count))
    return new_updates, DHO2State(base_state, lay_out(layout, ours))


def _masked_out(params: optax.Params, mask: Any) -> tuple[int, ...]:
    """Returns which leaves of `params` a `curvature_mask` leaves out, by number.

    Raises:
      ValueError: If it is no prefix of the parameters' tree that holds bools, or leaves
        out everything.
    """
    mask = mask(params) if callable(mask) else mask
    for leaf in jax.tree.leaves(mask):
        if not isinstance(leaf, bool | np.bool_):
            raise ValueError(
                "`curvature_mask` must hold bools, got "
                f"{type(leaf).__name__}; True for what takes part in the curvature."
            )
    try:
        spread = jax.tree.map(
            lambda flag, part: [bool(flag)] * len(jax.tree.leaves(part)), mask, params
        )
    except ValueError as error:
        raise ValueError(
            "`curvature_mask` must be a prefix of the parameters' tree, got "
            f"{jax.tree.structure(mask)} for {jax.tree.structure(params)}; give one "
            "bool for each parameter or subtree."
        ) from error
    flags = jax.tree.leaves(spread)
    if flags and not any(flags):
        raise ValueError(
            "`curvature_mask` must be True somewhere, got False for all parameters; to "
            "train without curvature use the base optimizer alone."
        )
    return tuple(i for i, flag in enumerate(flags) if not flag)


def _nothing(_: Any) -> None:
    """Stands for a leaf that is left out."""
