"""What the recipes say of decay, clipping and loss scaling, against dense algebra."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import flat, flat_rows, jit, outlying, quadratic, split, symmetric

import dho2_jax

DECAY, RATE = 0.3, 0.01
MATRIX, _ = symmetric(outlying(16))
PLAIN = quadratic(MATRIX, np.arange(16.0))
START = split(np.linspace(-1.0, 2.0, 16))
GRADS = jax.grad(PLAIN)(START)


def with_l2(params):
    squares = (jnp.sum(x**2) for x in jax.tree.leaves(params))
    return PLAIN(params) + 0.5 * DECAY * sum(squares)


def make(base, **kwargs):
    kwargs = {
        "num_largest": 3,
        "num_matvecs": 12,
        "refresh": "external",
        "base_rate": "fixed",
        "max_base_scaling": 1.0,
        "subspace_decay": 0.0,
    } | kwargs
    return dho2_jax.dho2(base, **kwargs)


def refreshed(tx, value_fn=PLAIN, params=START):
    return jit(lambda: dho2_jax.refresh(tx.init(params), params, value_fn))()


@functools.cache
def plain_state():
    """The curvature of the plain loss, for every base: a refresh knows none."""
    return refreshed(make(optax.sgd(RATE)))


def state_of(tx):
    """The state of `tx` with that curvature."""

    def is_ours(node):
        return isinstance(node, dho2_jax.DHO2State)

    def visit(node):
        if is_ours(node):
            return node._replace(curvature=plain_state().curvature)
        return node

    return jax.tree.map(visit, tx.init(START), is_leaf=is_ours)


def first_update(tx, grads=GRADS):
    return flat(tx.update(grads, state_of(tx), START)[0])


def rows():
    return flat_rows(dho2_jax.subspace(plain_state()).eigenvectors)


def inside(x):
    """The part of a vector that lies in the subspace."""
    return rows().T @ (rows() @ x)


def assert_close(found, expected, tolerance=1e-4):
    assert np.max(np.abs(found - expected)) <= tolerance * np.max(np.abs(expected))


# --- weight decay ------------------------------------------------------------------


def test_l2_in_the_loss_is_in_the_curvature():
    plain = dho2_jax.subspace(plain_state()).eigenvalues
    decayed = refreshed(make(optax.sgd(RATE)), with_l2)
    found = dho2_jax.subspace(decayed).eigenvalues
    np.testing.assert_allclose(found, plain + DECAY, rtol=1e-5)


def test_decay_before_with_the_same_damping_is_l2_in_the_loss():
    inner = make(optax.sgd(RATE), damping=DECAY)
    before = optax.chain(optax.add_decayed_weights(DECAY), inner)
    expected = make(optax.sgd(RATE))
    state = refreshed(expected, with_l2)
    wanted = flat(expected.update(jax.grad(with_l2)(START), state, START)[0])
    assert_close(first_update(before), wanted)
    undamped = optax.chain(optax.add_decayed_weights(DECAY), make(optax.sgd(RATE)))
    assert np.max(np.abs(first_update(undamped) - wanted)) > 1e-3


@pytest.mark.parametrize("cap", [1.0, 1.25])
def test_decay_of_the_base_acts_on_the_complement_times_the_scale(cap):
    kwargs = {"max_base_scaling": cap, "rate_schedule": 0.5}
    decayed = make(optax.adamw(RATE, weight_decay=DECAY), **kwargs)
    plain = make(optax.adam(RATE), **kwargs)
    x = flat(START)
    found = first_update(decayed) - first_update(plain)
    assert_close(found, -0.5 * cap * RATE * DECAY * (x - inside(x)), 1e-3)


def test_decay_afterwards_acts_everywhere_and_needs_the_minus_sign():
    plain = make(optax.sgd(RATE))
    after = optax.chain(plain, optax.add_decayed_weights(-RATE * DECAY))
    x = flat(START)
    found = first_update(after) - first_update(plain)
    assert_close(found, -RATE * DECAY * x, 1e-3)
    assert np.linalg.norm(inside(found)) > 1e-4


# --- clipping ----------------------------------------------------------------------


def test_clipping_before_shortens_the_newton_step_too():
    before = optax.chain(optax.clip_by_global_norm(0.1), make(optax.sgd(RATE)))
    factor = 0.1 / np.linalg.norm(flat(GRADS))
    plain = first_update(make(optax.sgd(RATE)))
    assert_close(first_update(before), factor * plain)


def test_clipping_in_the_base_leaves_the_newton_step():
    base = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(RATE))
    found, plain = first_update(make(base)), first_update(make(optax.sgd(RATE)))
    assert_close(inside(found), inside(plain))
    outside = found - inside(found)
    np.testing.assert_allclose(np.linalg.norm(outside), 0.1 * RATE, rtol=1e-3)


def test_clipping_afterwards_bounds_the_whole_step():
    after = optax.chain(make(optax.sgd(RATE)), optax.clip_by_global_norm(0.05))
    plain = first_update(make(optax.sgd(RATE)))
    assert np.linalg.norm(plain) > 0.05
    assert_close(first_update(after), 0.05 / np.linalg.norm(plain) * plain)


def test_the_curvature_set_rate_undoes_a_clip_that_always_acts():
    """Of two clips inside, one ten times tighter, both end in the same place."""
    convex = quadratic(symmetric(np.linspace(0.5, 4.0, 16))[0])

    @jit
    def run(bound):
        base = optax.chain(optax.clip_by_global_norm(bound), optax.sgd(1e3))
        tx = make(base, base_rate="curvature", max_base_scaling=None)
        state = dho2_jax.refresh(tx.init(START), START, convex)

        def step(carry, _):
            params, state = carry
            grads = jax.grad(convex)(params)
            updates, state = tx.update(grads, state, params, value_fn=convex)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (START, state), length=12)
        return params, dho2_jax.metrics(state)["base_scaling"]

    (wide, scale), (tight, larger) = run(0.1), run(0.01)
    assert_close(flat(tight), flat(wide), 1e-3)
    np.testing.assert_allclose(larger / scale, 10, rtol=1e-3)


# --- loss scaling ------------------------------------------------------------------


def test_a_scaled_value_fn_shortens_the_newton_step():
    tx, factor = make(optax.sgd(RATE)), 64.0
    state = refreshed(tx, lambda p: factor * PLAIN(p))
    found = flat(tx.update(GRADS, state, START)[0])
    assert_close(inside(found), inside(first_update(tx)) / factor, 1e-3)


# --- accumulation ------------------------------------------------------------------


def test_under_multi_steps_the_loss_may_be_handed_over():
    """Probes of the mini-steps are dropped; that of the last one counts."""
    tx = make(optax.sgd(RATE), base_rate="curvature", max_base_scaling=None)
    many = optax.MultiSteps(tx, every_k_schedule=2)

    @functools.partial(jax.jit, static_argnums=0)
    def step(which, state):
        return which.update(GRADS, state, START, value_fn=PLAIN)[1]

    one, two = state_of(tx), many.init(START)
    two = two._replace(inner_opt_state=state_of(tx))
    for _ in range(2):
        one = step(tx, one)
        two = step(many, step(many, two))
    for name, value in dho2_jax.metrics(one).items():
        np.testing.assert_allclose(dho2_jax.metrics(two)[name], value, rtol=1e-5)
