# SPDX-License-Identifier: Apache-2.0
"""No step goes much farther than the last ones proved safe; each guard by itself."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dho2_jax
from dho2_jax._numerics import reaches
from dho2_jax._step import proposals

EIGENVALUES = jnp.concatenate([jnp.linspace(0.5, 1.5, 14), jnp.array([40.0, 50.0])])


def quadratic(x):
    return 0.5 * jnp.sum(EIGENVALUES * x**2)


def rosenbrock(x):
    return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def jumping(rate, at, factor):
    """Gradient descent whose updates are `factor` times as long from step `at` on."""
    schedule = optax.piecewise_constant_schedule(1.0, {at: factor})
    return optax.chain(optax.sgd(rate), optax.scale_by_schedule(schedule))


def run(tx, loss, x, steps, *, value=False, refresh_at=(0,), change=None):
    """Returns parameters and lengths of updates; refreshes by hand."""
    state = tx.init(x)
    refresh = jax.jit(lambda state, x: dho2_jax.refresh(state, x, loss))

    @jax.jit
    def step(x, state, grads):
        extra = {"value_fn": loss} if value else {}
        updates, state = tx.update(grads, state, x, **extra)
        return optax.apply_updates(x, updates), state, optax.tree.norm(updates)

    lengths, states = [], []
    for i in range(steps):
        if i in refresh_at:
            state = refresh(state, x)
        grads = jax.grad(loss)(x)
        grads = change(i, grads) if change else grads
        x, state, length = step(x, state, grads)
        lengths.append(float(length))
        states.append(state)
    return x, np.array(lengths), states


def rate_of(state):
    return state.curvature.rate


# --- the bound on the length ---------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("factor", [3.0, 1e6])
def test_a_base_that_leaps_is_held_back(factor):
    tx = dho2_jax.dho2(jumping(1e-3, 30, factor), num_largest=2, refresh="external")
    _, lengths, states = run(tx, quadratic, jnp.ones(16), 60)
    before = lengths[:30].max()
    assert lengths[30] <= 1.2001 * before
    # Then s is set down to what was taken: it does not grow step by step.
    assert lengths[31:].max() <= 1.45 * before
    assert float(rate_of(states[-1]).scale) < 1.5 / factor
    assert int(dho2_jax.metrics(states[-1])["bounds"]) >= 2


def test_one_odd_gradient_sets_nothing_down():
    def odd(i, grads):
        return grads * (100.0 if i == 30 else 1.0)

    tx = dho2_jax.dho2(optax.sgd(1e-3), num_largest=2, refresh="external")
    _, lengths, states = run(tx, quadratic, jnp.ones(16), 40, change=odd)
    assert lengths[30] <= 1.2001 * lengths[:30].max()
    assert float(rate_of(states[-1]).scale) == float(rate_of(states[29]).scale)


def test_steps_of_no_length_do_not_shorten_the_next():
    base = optax.MultiSteps(optax.sgd(1e-3), 20).gradient_transformation()
    tx = dho2_jax.dho2(base, num_largest=2, refresh="external")
    _, _, states = run(tx, quadratic, jnp.ones(16), 100)
    assert int(dho2_jax.metrics(states[-1])["bounds"]) == 0


@pytest.mark.slow
def test_what_a_probe_found_may_be_gone():
    """Growth by measured curvature is no leap, with or without a loss to try it on."""
    tx = dho2_jax.dho2(optax.sgd(1e-7), num_largest=2, refresh="external")
    x, _, states = run(tx, quadratic, jnp.ones(16), 60, value=True)
    assert float(quadratic(x)) < 0.1 * float(quadratic(jnp.ones(16)))
    assert float(rate_of(states[-1]).scale) > 1e5
    # Here only a refresh probes: s grows fourfold there, and so does the step.
    states = run(tx, quadratic, jnp.ones(16), 32, refresh_at=(0, 30))[2]
    outside = [float(rate_of(state).reach.base) for state in states]
    assert outside[30] > 3.9 * outside[29]


@pytest.mark.slow
@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("base", [optax.sgd(1e-2, momentum=0.9), optax.adam(1e-2)])
@pytest.mark.parametrize("factor", [1e6, 1e18, 1e30])
def test_no_gradient_is_too_large(base, factor, value):
    def huge(i, grads):
        return grads * (factor if i == 20 else 1.0)

    tx = dho2_jax.dho2(base, num_largest=2, refresh="external")
    start = jnp.ones(16)
    x, lengths, states = run(tx, quadratic, start, 60, value=value, change=huge)
    chex.assert_tree_all_finite(lengths)
    limit = 4.001 if value else 1.2001
    assert lengths[20] <= np.sqrt(2) * limit * lengths[:20].max()
    assert float(quadratic(x)) < float(quadratic(start))
    leaves = jax.tree.leaves(states[-1].curvature)
    chex.assert_tree_all_finite([leaf for leaf in leaves if leaf.ndim < 2])


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("many", [1, 10])
def test_gradients_that_are_not_finite_are_survived(bad, many):
    """Optax's own remedy keeps them from the base; here they must leave no trace."""

    def broken(i, grads):
        return grads * (bad if 20 <= i < 20 + many else 1.0)

    base = optax.apply_if_finite(optax.adam(1e-2), 20)
    tx = dho2_jax.dho2(base, num_largest=2, refresh="external")
    x, lengths, states = run(tx, quadratic, jnp.ones(16), 120, change=broken)
    chex.assert_tree_all_finite(lengths)
    assert float(quadratic(x)) < 0.2 * float(quadratic(jnp.ones(16)))
    assert int(rate_of(states[-1]).cuts) <= 1


# --- the part in the subspace --------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("k", [4, 3])
@pytest.mark.parametrize("value", [False, True])
def test_the_newton_part_is_bounded_where_the_base_has_nothing_to_do(k, value):
    """k = n leaves the base no gradient; without a bound this is NaN in 18 steps."""
    tx = dho2_jax.dho2(optax.adam(1e-2), num_largest=k, refresh="external")
    start = jnp.array([-1.2, 1.0, -1.2, 1.0])
    every = range(0, 200, 10)
    x, lengths, _ = run(tx, rosenbrock, start, 200, value=value, refresh_at=every)
    chex.assert_tree_all_finite(lengths)
    assert lengths.max() < 1.0
    assert float(rosenbrock(x)) < 0.1 * float(rosenbrock(start))


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("base", [optax.sgd(1e-2, momentum=0.9), optax.adam(1e-2)])
def test_a_loss_that_changes_its_scale_is_survived(base, factor):
    """The momentum is of the old scale and 1 / |lambda| of the new one."""
    tx = dho2_jax.dho2(base, num_largest=2, refresh_period=25)
    x = jnp.ones(16)
    state, losses = tx.init(x), []

    @jax.jit
    def step(x, state, scale):
        def loss(x):
            return scale * quadratic(x)

        updates, state = tx.update(jax.grad(loss)(x), state, x, value_fn=loss)
        return optax.apply_updates(x, updates), state

    for i in range(120):
        x, state = step(x, state, jnp.float32(factor if i >= 30 else 1.0))
        losses.append(float(quadratic(x)))
    assert max(losses[30:]) < 0.25 * float(quadratic(jnp.ones(16)))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_the_loss_does_not_matter(scale):
    def scaled(x):
        return scale * rosenbrock(x)

    start = jnp.array([-1.2, 1.0, -1.2, 1.0, 0.5, -0.5])
    found = []
    for loss, rate in ((rosenbrock, 1e-4), (scaled, 1e-4 / scale)):
        tx = dho2_jax.dho2(optax.sgd(rate, momentum=0.9), num_largest=2)
        found.append(run_periodic(tx, loss, start, 60))
    np.testing.assert_allclose(*found, rtol=2e-2)


def run_periodic(tx, loss, x, steps):
    state = tx.init(x)

    @jax.jit
    def step(x, state):
        updates, state = tx.update(jax.grad(loss)(x), state, x, value_fn=loss)
        return optax.apply_updates(x, updates), state

    for _ in range(steps):
        x, state = step(x, state)
    return x


@pytest.mark.slow
@pytest.mark.parametrize("base", [optax.sgd(0.1, momentum=0.9), optax.adam(1e-2)])
def test_a_minimum_at_infinity_is_not_walked_to(base):
    """Where labels are told apart x goes on with log(steps), not with steps."""
    points = jax.random.normal(jax.random.key(0), (32, 6))
    labels = jnp.sign(points @ jnp.ones(6))

    def separable(x):
        return jnp.mean(jax.nn.softplus(-labels * (points @ x)))

    tx = dho2_jax.dho2(base, num_largest=2, refresh="external")
    args = {"value": True, "refresh_at": range(0, 600, 20)}
    lengths = run(tx, separable, jnp.zeros(6), 600, **args)[1]
    assert lengths[300:].sum() < 0.2 * lengths[:300].sum()  # 0.6 without


def test_a_minimum_somewhere_is():
    tx = dho2_jax.dho2(optax.adam(1e-2), num_largest=2, refresh="external")
    args = {"value": True, "refresh_at": range(0, 200, 20)}
    states = run(tx, quadratic, jnp.ones(16), 200, **args)[2]
    assert not any(float(rate_of(state).reach.limit) for state in states)


# --- the brake -----------------------------------------------------------------------


def test_momentum_is_braked_uphill():
    """Its charge cannot carry a run uphill much farther than one step."""
    reach, taken = reaches.start(), []
    for uphill in (False, True, True, True, True, True, True, False, True):
        brake = reaches.braked(reach, jnp.asarray(uphill))
        reach = reach._replace(brake=brake)
        taken.append(float(brake))
    halved = [0.5, 0.25, 0.125, 0.0625, 0.0625, 0.0625]
    assert taken == [1.0, *halved, 1.0, 0.5]


def test_a_charged_base_does_not_carry_the_run_away():
    """A constant push uphill, after the run has reached the bottom of a bowl."""

    def push(updates, state, params=None, **_):
        del params
        return jax.tree.map(lambda g: -1e-2 * g + 0.05, updates), state

    base = optax.GradientTransformation(lambda _: optax.EmptyState(), push)
    tx = dho2_jax.dho2(base, num_largest=2, refresh="external")
    _, lengths, states = run(tx, quadratic, jnp.full(16, 1e-3), 30)
    free = 0.05 * np.sqrt(14)
    assert lengths[10:].max() < 0.1 * free
    assert float(rate_of(states[-1]).reach.brake) == 1 / 16


# --- the trial -----------------------------------------------------------------------


def test_the_first_step_after_a_refresh_is_tried():
    start = jnp.ones(16)

    def wall(x):
        """Without slope or curvature at the start, and steep a little further on."""
        return 1 + 1e6 * jnp.maximum(jnp.sum((x - start) ** 2) - 1e-6, 0.0)

    tx = dho2_jax.dho2(optax.sgd(1e-2), num_largest=2, refresh="external")
    state = dho2_jax.refresh(tx.init(start), start, quadratic)
    grads = jax.grad(quadratic)(start)
    free, _ = tx.update(grads, state, start)
    tried, state = tx.update(grads, state, start, value_fn=wall)
    assert float(wall(start + free)) > 1e2
    assert 0 < float(wall(start + tried)) < 10
    found = dho2_jax.metrics(state)
    assert (int(found["trials"]), int(found["refusals"])) == (1, 1)
    assert float(found["base_scaling"]) == 1 / 64
    # The step that was refused is not in the momentum either.
    assert float(found["momentum_norm"]) < 0.5 * float(0.1 * jnp.sqrt(40**2 + 50**2))


PLAIN = reaches.start()._replace(trials=jnp.int32(1), level=jnp.float32(1.0))


def fit(before, after, slope, proved=1.0, level=1.0):
    reach = PLAIN._replace(level=jnp.float32(level))
    found = reaches.fit(reach, *map(jnp.float32, (before, after, slope, proved)))
    return jax.tree.map(lambda x: x.item(), found)


def test_what_a_trial_decides():
    assert fit(1.0, 0.9, -0.2).share == 1.0
    assert fit(1.0, 1.2, -0.2).share == 1.0  # within the noise of other examples
    # The parabola through 1 with slope -1, and 3: 1 - t + 3 t^2.
    np.testing.assert_allclose(fit(1.0, 3.0, -1.0).share, 1 / 6, rtol=1e-6)
    # A slope that is wrong: without it 1 + 2 t^2 is 1.25 there.
    np.testing.assert_allclose(fit(1.0, 3.0, -1e9).share, 0.125**0.5, rtol=1e-6)
    assert fit(1.0, 3.0, -1.0).refused
    assert fit(1.0, np.inf, -1.0).share == fit(1.0, np.nan, -1.0).share == 1 / 64
    assert fit(np.nan, np.nan, -1.0).share == 1.0  # nothing to compare with
    # Bold: only to where the loss has been; a fall from a height is not enough.
    assert fit(5.0, 0.9, -1.0, proved=0.3).share == 1.0
    assert fit(5.0, 2.0, -1.0, proved=0.3)[2:] == (True, False)
    np.testing.assert_allclose(fit(5.0, 2.0, -1.0, proved=0.3).share, 0.3)


def test_the_level_follows_the_loss():
    assert fit(1.0, 0.5, -1.0).level == pytest.approx(0.8 * 1.0 + 0.2 * 0.5)
    assert fit(10.0, 9.0, -1.0).level == pytest.approx(0.8 * 1.0 + 0.2 * 9.0)
    assert fit(np.nan, 9.0, -1.0).level == 1.0


def test_norms_do_not_overflow():
    for scale in (1e-30, 1.0, 1e30):
        found = proposals.norm(scale * jnp.array([3.0, -4.0]))
        np.testing.assert_allclose(found, 5 * scale, rtol=1e-6)
    assert float(proposals.norm(jnp.zeros(3))) == 0.0
    assert float(proposals.norm(jnp.array([jnp.inf, 1.0]))) == np.inf


@pytest.mark.slow
def test_a_loss_in_two_parts_is_tried_too():
    def outputs(x):
        return jnp.sqrt(EIGENVALUES) * x

    pair = (outputs, lambda out: 0.5 * jnp.sum(out**2))
    x = jnp.ones(16)
    found = []
    for curvature, value in (("ggn", pair), ("hessian", quadratic)):
        tx = dho2_jax.dho2(optax.sgd(1e-2), num_largest=2, curvature=curvature)
        state, at = tx.init(x), x
        step = jax.jit(lambda g, s, p, tx=tx, f=value: tx.update(g, s, p, value_fn=f))
        for _ in range(5):
            updates, state = step(jax.grad(quadratic)(at), state, at)
            at = optax.apply_updates(at, updates)
        found.append(dho2_jax.metrics(state))
    assert int(found[0]["trials"]) == int(found[1]["trials"]) > 0


def test_a_fixed_rate_has_no_bound():
    """It is FOSI's formula and nothing else."""
    tx = dho2_jax.dho2(
        jumping(1e-3, 30, 10.0),
        num_largest=2,
        refresh="external",
        base_rate="fixed",
    )
    _, lengths, states = run(tx, quadratic, jnp.ones(16), 32)
    assert lengths[30] > 2 * lengths[29]
    assert int(dho2_jax.metrics(states[-1])["bounds"]) == 0
