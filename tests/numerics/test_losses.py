"""A loss in two parts is a loss: every operator takes it, and so does `update`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dho2_jax
from dho2_jax._numerics import losses

X = jax.random.normal(jax.random.key(0), (20, 4))
Y = jnp.sin(X.sum(-1))
START = jnp.linspace(-0.5, 0.7, 4)
SPLIT = dho2_jax.SplitLoss(
    lambda w: jnp.tanh(X @ w), lambda out: jnp.mean((out - Y) ** 2)
)


def dense(curvature):
    if curvature != "ggn":
        return jax.hessian(SPLIT)(START)
    jacobian = jax.jacobian(SPLIT.outputs_fn)(START)
    return 2 / 20 * jacobian.T @ jacobian


@pytest.mark.parametrize(
    "curvature", ["hessian", "ggn", "reverse_over_reverse", "central_difference"]
)
def test_every_operator_takes_it(curvature):
    matvec = dho2_jax.curvature_matvec(curvature, SPLIT, START)
    found = jax.vmap(jax.jit(matvec))(jnp.eye(4))
    np.testing.assert_allclose(found, dense(curvature), atol=2e-3)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_update_takes_it(curvature):
    options = {"num_largest": 2, "curvature": curvature, "refresh_period": 5}
    tx = dho2_jax.dho2(optax.sgd(1e-2), **options)
    step = jax.jit(lambda g, s, x: tx.update(g, s, x, value_fn=SPLIT))
    _, state = step(jax.grad(SPLIT)(START), tx.init(START), START)
    largest = np.linalg.eigvalsh(dense(curvature))[-2:]
    np.testing.assert_allclose(dho2_jax.subspace(state).eigenvalues, largest, rtol=1e-3)


def test_both_forms_are_bound_and_restricted_alike():
    split = losses.as_loss((lambda w, x: x @ w, lambda out, x: jnp.sum(out**2 * x[0])))
    assert isinstance(split, dho2_jax.SplitLoss)
    assert losses.as_loss(split) is split and losses.as_loss(3) == 3
    whole = lambda w, x: jnp.sum((x @ w) ** 2 * x[0])  # noqa: E731
    half = START[:2]
    for form in (split, whole):
        bound = losses.on_batch(
            losses.of_part(form, lambda part: jnp.concatenate([part, part])), X[:4]
        )
        expected = whole(jnp.concatenate([half, half]), X[:4])
        chex.assert_trees_all_close(bound(half), expected, rtol=1e-6)
    with_aux = dho2_jax.SplitLoss(split.outputs_fn, lambda out, x: (out.sum(), x))
    assert losses.without_aux(with_aux)(START, X).shape == ()
    outputs_fn, loss_fn = split
    assert (outputs_fn, loss_fn) == (split[0], split[1])
