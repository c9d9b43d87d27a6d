# SPDX-License-Identifier: Apache-2.0
"""Many runs of one optimizer as one program: what is learned in steps, not in seconds.

Every setting of a sweep is a lane of a `vmap`, the whole run one loop on the device.
"""

import math
import statistics
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


Choice = tuple[float, bool]  # rate and cosine: a setting but for its seed


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


def finals(fleet: Fleet) -> dict[Choice, float]:
    """Returns the final loss of each choice, a mean over seeds."""
    last = fleet.losses[:, -1]
    return _means(fleet, np.where(np.isfinite(last), last, math.inf))


def steps_to(fleet: Fleet, target: float) -> dict[Choice, float]:
    """Returns the first evaluated step at or below the target, a mean over seeds."""
    below = fleet.losses <= target
    first = fleet.steps[below.argmax(axis=1)]
    return _means(fleet, np.where(below.any(axis=1), first, math.inf))


def best(fleet: Fleet, goal: float = math.nan) -> tuple[Choice, float]:
    """Returns the choice that was best, and its final loss.

    At the end; or, with a goal, soonest at it, if any choice ever was.
    """
    ends, steps = finals(fleet), steps_to(fleet, goal)
    found = min(ends, key=lambda choice: (steps[choice], ends[choice]))
    return found, ends[found]


def _means(fleet: Fleet, values: np.ndarray) -> dict[Choice, float]:
    each: dict[Choice, list[float]] = {}
    for setting, value in zip(fleet.settings, values, strict=True):
        each.setdefault((setting.rate, setting.cosine), []).append(float(value))
    return {choice: statistics.mean(x) for choice, x in each.items()}
