# SPDX-License-Identifier: Apache-2.0
"""Many runs of one optimizer as one program: what is learned in steps, not in seconds.

Every setting of a sweep is a lane of a `vmap`, the whole run one loop on the device.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import contenders as who
import jax
import jax.numpy as jnp
import numpy as np
from contenders import Contender
from workloads import Workload

import dho2_jax


class Setting(NamedTuple):
    """One run's choices."""

    seed: int
    rate: float
    cosine: bool = False


class Fleet(NamedTuple):
    """What a sweep gave: `losses[i]` are of setting i at `steps`."""

    settings: list[Setting]
    steps: np.ndarray
    losses: np.ndarray  # validation
    cuts: np.ndarray  # of the guard


def sail(
    workload: Workload,
    contender: Contender,
    settings: Sequence[Setting],
    at_once: int | None = None,
) -> Fleet:
    """Runs all settings for the workload's steps; `at_once` of them in one go."""
    task, every = workload.task, workload.eval_every
    validation = jax.device_put(task.dataset.validation)
    hybrid = contender.refreshes is not None

    def start(params, seed, rate, cosine):
        return contender.make(rate, 1.0).init(params)

    def refresh(i, params, state, seed, rate, cosine):
        return who.refresh(workload, params, state, workload.batch(seed, i))

    def step(i, params, state, seed, rate, cosine):
        factor = jnp.where(cosine, who.cosine(i, workload.steps, jnp), 1.0)
        batch = workload.batch(seed, i)
        return who.step(workload, contender, rate, factor, params, state, batch)

    def each(fn):
        return jax.vmap(fn, in_axes=(None, 0, 0, 0, 0, 0))

    def evaluate(params):
        return jax.vmap(lambda one: task.loss_fn(one, validation))(params)

    @jax.jit
    def run(params, arrays):
        def advance(carry, i):
            params, state = carry
            if hybrid:
                state = jax.lax.cond(
                    contender.refreshes(i),
                    lambda state: each(refresh)(i, params, state, *arrays),
                    lambda state: state,
                    state,
                )
            return each(step)(i, params, state, *arrays), None

        def stretch(carry, first):
            carry, _ = jax.lax.scan(advance, carry, first + jnp.arange(every))
            return carry, evaluate(carry[0])

        state = jax.vmap(start)(params, *arrays)
        firsts = jnp.arange(0, workload.steps, every)
        (_, state), losses = jax.lax.scan(stretch, (params, state), firsts)
        cuts = jnp.zeros(len(settings))
        if hybrid:
            cuts = jax.vmap(_cuts)(state)
        return jnp.concatenate([evaluate(params)[None], losses]).T, cuts

    found = []
    for first in range(0, len(settings), at_once or len(settings)):
        lanes = settings[first : first + (at_once or len(settings))]
        starts = {one.seed: task.init(one.seed) for one in lanes}
        params = jax.tree.map(
            lambda *x: jnp.stack(x), *(starts[one.seed] for one in lanes)
        )
        arrays = (
            jnp.array([one.seed for one in lanes], jnp.uint32),
            jnp.array([one.rate for one in lanes], jnp.float32),
            jnp.array([one.cosine for one in lanes]),
        )
        found.append(jax.device_get(run(params, arrays)))
    losses, cuts = map(np.concatenate, zip(*found, strict=True))
    steps = np.arange(0, workload.steps + 1, every)
    return Fleet(list(settings), steps, losses, cuts)


def _cuts(state: Any) -> jax.Array:
    return dho2_jax.metrics(state).get("rate_cuts", jnp.zeros(())) * 1.0


def grid(contender: Contender, seeds: Sequence[int]) -> list[Setting]:
    """Returns the budget of every contender: its rates, constant and with a cosine."""
    return [
        Setting(seed, rate, cosine)
        for rate in contender.rates
        for cosine in (False, True)
        for seed in seeds
    ]


def steps_to(fleet: Fleet, target: float) -> list[int | None]:
    """Returns the first evaluated step of each run at or below the target."""
    below = fleet.losses <= target
    return [int(fleet.steps[row.argmax()]) if row.any() else None for row in below]
