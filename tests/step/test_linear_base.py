"""`linear_base`: the same step, read from the basis half as often."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import flat, jit, mlp, refreshed

import dho2_jax

BASES = {
    "sgd": lambda: optax.sgd(0.02),
    "heavy_ball": lambda: optax.sgd(0.02, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.02, momentum=0.9, nesterov=True),
    "decayed": lambda: optax.chain(
        optax.trace(0.8), optax.add_decayed_weights(1e-3), optax.scale(-0.02)
    ),
}
loss, PARAMS = mlp((6, 8, 3))


def trained(base, linear, steps=30, **kwargs):
    """Parameters and state after steps with one subspace, from before the first."""
    tx = dho2_jax.dho2(
        base(), num_largest=4, refresh="external", linear_base=linear, **kwargs
    )
    params, state = PARAMS, refreshed(tx, PARAMS, loss)

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params, value_fn=loss)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.slow
@pytest.mark.parametrize("base_rate", ["fixed", "curvature"])
@pytest.mark.parametrize("name", list(BASES))
def test_the_same_steps_while_the_subspace_stays(name, base_rate):
    (x, ours), (y, other) = (
        trained(BASES[name], linear, base_rate=base_rate) for linear in (True, False)
    )
    moved = np.max(np.abs(flat(y) - flat(PARAMS)))
    np.testing.assert_allclose(flat(x), flat(y), atol=2e-4 * moved)
    a, b = dho2_jax.metrics(ours), dho2_jax.metrics(other)
    np.testing.assert_allclose(a["base_scaling"], b["base_scaling"], rtol=2e-3)
    np.testing.assert_allclose(a["momentum_norm"], b["momentum_norm"], rtol=2e-3)


def test_a_gpu_reads_what_the_base_was_given_once():
    """It would stack g and d within the reduction over V; a barrier keeps it apart."""

    def barriers(linear):
        tx = dho2_jax.dho2(
            optax.sgd(0.02, momentum=0.9), num_largest=4, linear_base=linear
        )
        update = jax.jit(lambda g, s, p: tx.update(g, s, p, value_fn=loss))
        traced = update.trace(PARAMS, tx.init(PARAMS), PARAMS)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        return text.count("optimization_barrier")

    assert barriers(True) == barriers(False) + 1


@pytest.mark.slow
def test_it_is_not_for_other_bases():
    """The sign of a projection is not the projection of a sign."""
    (x, _), (y, _) = (
        trained(lambda: optax.adam(1e-2), linear, 5) for linear in (True, False)
    )
    assert np.max(np.abs(flat(x) - flat(y))) > 1e-3


def test_memory_of_the_base_is_taken_off_the_subspace_of_now():
    """Against NumPy: d is what of the trace of whole gradients is off V, at each step.

    After a refresh the old gradients are taken off the new V, not off the old one.
    """
    rate, beta = 0.02, 0.9
    tx = dho2_jax.dho2(
        optax.sgd(rate, momentum=beta),
        num_largest=3,
        refresh="external",
        base_rate="fixed",
        max_base_scaling=1.0,
        newton_learning_rate=0.0,
        linear_base=True,
    )
    state, update = refreshed(tx, PARAMS, loss), jit(tx.update)
    rng, trace = np.random.default_rng(0), 0.0
    for i in range(6):
        if i == 3:
            there = jax.tree.map(lambda x: -x, PARAMS)
            state = refreshed(tx, there, loss, state)
        rows = jax.tree.leaves(dho2_jax.subspace(state).eigenvectors)
        rows = np.concatenate([np.float64(x).reshape(3, -1) for x in rows], axis=1)
        grads = jax.tree.map(
            lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), PARAMS
        )
        trace = beta * trace + flat(grads)
        updates, state = update(grads, state, PARAMS)
        expected = -rate * (trace - rows.T @ (rows @ trace))
        np.testing.assert_allclose(flat(updates), expected, atol=1e-6)


def passes(linear):
    """How many contractions over the basis the lowered update has."""
    params = {"w": jnp.zeros((256, 7))}  # one array of the basis
    tx = dho2_jax.dho2(
        optax.sgd(0.1), num_largest=3, refresh="external", linear_base=linear
    )
    lowered = jax.jit(tx.update).lower(params, tx.init(params), params)
    return len(re.findall(r"stablehlo.dot_general.*tensor<3x", lowered.as_text()))


def test_passes_over_the_basis():
    # Of the two inner products of a linear base a GPU makes one pass.
    assert passes(False) == 4
    assert passes(True) == 3


def test_aliases_know_their_base():
    for alias, linear in (
        (dho2_jax.dho2_sgd, True),
        (dho2_jax.dho2_heavy_ball, True),
        (dho2_jax.dho2_nesterov, True),
        (dho2_jax.dho2_adam, False),
    ):
        default = inspect.signature(alias).parameters["linear_base"].default
        assert default is linear


def test_linear_base_must_be_a_bool():
    with pytest.raises(ValueError, match="`linear_base` must be True or False"):
        dho2_jax.dho2(optax.sgd(0.1), linear_base="yes")
