# SPDX-License-Identifier: Apache-2.0
"""A bold step is tried on the loss before it is taken."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dho2_jax._numerics import reaches
from dho2_jax._numerics.losses import as_loss
from dho2_jax._state.config import Config
from dho2_jax._step.proposals import Proposal
from dho2_jax._types import Array, Params
from dho2_jax._vectors import axes, layouts

Value = Callable[[list[Array] | None], Array]


def value_at(
    config: Config, layout: layouts.Layout, params: Params | None, value_fn: Any
) -> Value | None:
    """Returns the loss as a function of the update of what has curvature, or of None.

    Not of what `curvature_mask` leaves out: that has the base's own update, whatever a
    trial says. There is no such function where a caller gives products in place of the
    loss, and with a rule that measures nothing, as FOSI's.
    """
    if value_fn is None or params is None or not config.rule.measures:
        return None
    leaves, merge = layouts.restrict(params, layout)
    loss = as_loss(value_fn)

    def value(updates: list[Array] | None) -> Array:
        part: Any = leaves
        new: Any = updates
        if new is not None:
            part = optax.apply_updates(part, new)
        at = merge(part)
        found = jnp.asarray(loss(at), jnp.float32)
        return axes.mean(found, config.axis_name) if config.axis_name else found

    return value


def attempt(
    reach: reaches.Reach | None,
    proposal: Proposal,
    part: list[Array],
    value: Value | None,
) -> tuple[list[Array], reaches.Fit | None]:
    """Tries a bold step, and shortens it where the loss would rise too far.

    Two evaluations of the loss, in a bold step only.

    Args:
      reach: What is proved safe.
      proposal: The step.
      part: Its leaves that take part in the curvature.
      value: From `value_at`.

    Returns:
      The leaves, shortened or not, and what the trial says; None where nothing can be
      tried.
    """
    if value is None or reach is None:
        return part, None

    def attempted(part: list[Array]) -> tuple[list[Array], reaches.Fit]:
        before, after = value(None), value(part)
        found = reaches.fit(reach, before, after, proposal.slope, proposal.proved)
        return [(found.share * x).astype(x.dtype) for x in part], found

    def taken(part: list[Array]) -> tuple[list[Array], reaches.Fit]:
        no = jnp.zeros((), bool)
        return part, reaches.Fit(jnp.ones((), jnp.float32), reach.level, no, no)

    # The identity is `false_fun`, as in `maybe_refresh`.
    return jax.lax.cond(proposal.bold, attempted, taken, part)
