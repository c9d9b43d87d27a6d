"""A rule for the rate is one value in a registry: two that the library lacks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dho2_jax
from dho2_jax._numerics import rules

CURVATURE = jnp.array([1.0, 2.0, 3.0, 5.0, 8.0, 40.0])
START = jnp.array([1.0, -1.0, 0.5, 2.0, -0.5, 1.0])


def value(x):
    return 0.5 * jnp.sum(CURVATURE * x**2)


def greedy(rate, bend, length, cap):
    """The best scale along the last direction, by its slope at its start alone."""
    best = -rate.ahead / (bend * length)
    return rate._replace(scale=jnp.minimum(best, cap), probed=rate.steps)


@pytest.fixture
def two_rules(monkeypatch):
    fixed, curvature = rules.RULES["fixed"], rules.RULES["curvature"]
    half = fixed._replace(scale=lambda state, spread, cap: jnp.float32(0.5))
    # While a sweep is under way a probe would take its turn.
    eager = curvature._replace(
        later_probe=greedy, wants_probe=lambda state, often=True: jnp.asarray(often)
    )
    monkeypatch.setitem(rules.RULES, "half", half)
    monkeypatch.setitem(rules.RULES, "greedy", eager)


def make(base_rate, refresh="external", **kwargs):
    base = optax.sgd(1e-2)
    return dho2_jax.dho2(
        base,
        num_largest=1,
        num_matvecs=6,
        refresh=refresh,
        base_rate=base_rate,
        **kwargs,
    )


def test_a_rule_that_measures_nothing(two_rules):
    tx = make("half")
    state = dho2_jax.refresh(tx.init(START), START, value)
    updates, state = jax.jit(tx.update)(jax.grad(value)(START), state, START)
    expected = -0.5 * 1e-2 * CURVATURE * START
    np.testing.assert_allclose(updates[:5], expected[:5], rtol=1e-4)
    np.testing.assert_allclose(dho2_jax.metrics(state)["base_scaling"], 0.5)


@pytest.mark.parametrize("refresh", ["external", "periodic"])
def test_a_rule_that_measures(two_rules, refresh):
    tx = make("greedy", refresh)
    x, last, state = START, START, tx.init(START)
    if refresh == "external":
        state = dho2_jax.refresh(state, x, value)
    step = jax.jit(lambda g, s, x: tx.update(g, s, x, value_fn=value))
    for i in range(6):
        updates, state = step(jax.grad(value)(x), state, x)
        if i > 0:
            # Gradient descent's last direction, off the largest eigenvector.
            d = -1e-2 * np.asarray(CURVATURE * last)[:5]
            best = np.sum(1e2 * d**2) / np.sum(np.asarray(CURVATURE)[:5] * d**2)
            np.testing.assert_allclose(state.curvature.rate.scale, best, rtol=1e-3)
        x, last = x + updates, x
    assert value(x) < 0.2 * value(START)


@pytest.mark.parametrize("refresh", ["staggered", "periodic"])
@pytest.mark.parametrize("base_rate", ["half", "greedy"])
@pytest.mark.slow
def test_both_train_however_the_subspace_is_renewed(two_rules, base_rate, refresh):
    tx = make(base_rate, refresh, refresh_period=20)

    @jax.jit
    def run(x):
        def one(carry, _):
            x, state = carry
            updates, state = tx.update(jax.grad(value)(x), state, x, value_fn=value)
            return (x + updates, state), None

        return jax.lax.scan(one, (x, tx.init(x)), length=200)[0]

    x, state = run(START)
    assert value(x) < 0.1 * value(START)
    assert int(dho2_jax.metrics(state)["refreshes"]) >= 5
