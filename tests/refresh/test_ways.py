"""A way to renew the subspace is one function in a registry: here is another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dho2_jax
from dho2_jax._refresh import at_once, products, ways
from dho2_jax._state.states import layout_of_state

CURVATURE = jnp.array([1.0, 2.0, 3.0, 5.0, 8.0, 40.0])


def value(x):
    return 0.5 * jnp.sum(CURVATURE * x**2)


def every_third(state, given):
    """Renews at every third step, whatever the schedule says."""
    layout = layout_of_state(state)
    part, made = products.products_at(
        state.config, layout, given.params, given.value_fn, given.matvec_fn
    )
    state = jax.lax.cond(
        state.count % 3 == 0,
        lambda state: at_once.refreshed(state, part, made),
        lambda state: state,
        state,
    )
    return ways.Ready(state, made, None)


def test_another_way_to_refresh(monkeypatch):
    monkeypatch.setitem(ways.WAYS, "every_third", every_third)
    tx = dho2_jax.dho2(optax.sgd(1e-2), num_largest=2, refresh="every_third")
    step = jax.jit(lambda g, s, x: tx.update(g, s, x, value_fn=value))
    x, counts = jnp.ones(6), []
    state = tx.init(x)
    for _ in range(10):
        updates, state = step(jax.grad(value)(x), state, x)
        x = x + updates
        counts.append(int(dho2_jax.metrics(state)["refreshes"]))
    assert counts == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    found = dho2_jax.subspace(state).eigenvalues
    np.testing.assert_allclose(found, [8.0, 40.0], rtol=1e-4)
