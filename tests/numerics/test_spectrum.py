"""Ritz pairs against float64 eigh, alone and through a refresh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from helpers import (
    dense_hessian,
    extreme,
    flat_rows,
    mlp,
    outlying,
    quadratic,
    refreshed,
    split,
    symmetric,
    up_to_sign,
)

import dho2_jax
from dho2_jax._numerics import lanczos, ritz


def transformation(**kwargs):
    return dho2_jax.dho2(optax.sgd(0.1), refresh="external", **kwargs)


@pytest.mark.parametrize(("k", "small"), [(3, 0), (0, 2), (2, 3), (7, 2)])
def test_pairs_of_a_tridiagonal_matrix(k, small):
    rng = np.random.default_rng(0)
    m = 9
    alphas, betas = rng.standard_normal(m), rng.uniform(0.5, 1, m)
    t = np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)
    pairs = ritz.ritz_pairs(
        jnp.asarray(alphas, jnp.float32), jnp.asarray(betas, jnp.float32), k, small
    )
    values, rows = extreme(t, k, small)
    np.testing.assert_allclose(pairs.eigenvalues, values, rtol=1e-4, atol=1e-6)
    assert up_to_sign(np.float64(pairs.weights), rows) < 1e-4
    assert np.all(pairs.valid)
    np.testing.assert_allclose(
        pairs.residuals, np.abs(betas[-1] * rows[:, -1]), rtol=1e-3, atol=1e-6
    )
    if k + small < m:
        expected = np.linalg.eigvalsh(t)[m - k - 1]
        np.testing.assert_allclose(pairs.next_eigenvalue, expected, rtol=1e-4)
    else:
        assert pairs.next_eigenvalue == 0


def test_the_largest_are_served_first():
    # After a breakdown T is padded with zeros, which are no eigenvalues.
    alphas = jnp.array([5.0, -2.0, 1.0, 0.0, 0.0])
    pairs = ritz.ritz_pairs(alphas, jnp.zeros(5), 2, 2)
    np.testing.assert_array_equal(pairs.valid, [True, False, True, True])
    np.testing.assert_allclose(pairs.eigenvalues, [-2.0, 0.0, 1.0, 5.0])
    assert np.all(np.asarray(pairs.weights)[1] == 0)
    assert pairs.next_eigenvalue == 0

    none = ritz.ritz_pairs(jnp.zeros(5), jnp.zeros(5), 2, 2)
    assert not np.any(none.valid)
    assert np.all(np.asarray(none.eigenvalues) == 0)


# sizes, scale of the weights, m; 50, 500 and 2,000 parameters.
NETWORKS = {
    "small": ((7, 5, 3), 1.5, 45),
    "middle": ((13, 25, 7), 1.0, 110),
    "large": ((22, 50, 18), 1.0, 130),
}


@pytest.fixture(scope="module", params=list(NETWORKS))
def network(request):
    """A network's dense pairs, and what a refresh found."""
    sizes, scale, m = NETWORKS[request.param]
    loss, params = mlp(sizes, scale=scale)
    tx = transformation(num_largest=6, num_smallest=4, num_matvecs=m)
    state = refreshed(tx, params, loss)
    return dense_hessian(loss, params), dho2_jax.subspace(state), state


def outermost(matrix):
    """The ten extreme pairs, and which of them stand 1 % of the sharpness apart."""
    n = len(matrix)
    low, below = scipy.linalg.eigh(matrix, subset_by_index=[0, 4])
    high, above = scipy.linalg.eigh(matrix, subset_by_index=[n - 7, n - 1])
    far = 0.01 * max(abs(low[0]), abs(high[-1]))
    gaps_low = np.minimum(np.diff(low), np.diff(low, prepend=-np.inf)[:-1])
    gaps_high = np.minimum(np.diff(high), np.diff(high, append=np.inf)[1:])
    return (
        np.concatenate([low[:4], high[1:]]),
        np.concatenate([below.T[:4], above.T[1:]]),
        np.concatenate([gaps_low, gaps_high]) > far,
    )


@pytest.mark.slow
def test_network_pairs_against_dense(network):
    hessian, found, state = network
    values, rows, well = outermost(hessian)
    assert np.sum(well[:4]) >= 1, "no separated pair at the lower end"
    assert np.sum(well[4:]) >= 3, "too few separated pairs at the upper end"
    assert np.all(found.valid)
    error = np.abs(np.asarray(found.eigenvalues) / values - 1)[well]
    assert np.max(error) < 1e-4
    assert up_to_sign(flat_rows(found.eigenvectors)[well], rows[well]) < 1e-3
    metrics = dho2_jax.metrics(state)
    np.testing.assert_allclose(metrics["sharpness"], values[-1], rtol=1e-4)
    np.testing.assert_allclose(metrics["smallest_eigenvalue"], values[0], rtol=1e-4)
    assert metrics["recurrence_defect"] < 1e-4
    assert metrics["num_valid"] == 10


def test_network_rows_are_orthonormal(network):
    rows = flat_rows(network[1].eigenvectors)
    assert np.max(np.abs(rows @ rows.T - np.eye(10))) < 1e-5


@pytest.mark.parametrize("m", [8, 20])
def test_residual_bounds_bound(m):
    """With few products pairs have not converged, and the bounds say by how much."""
    n = 200
    a, _ = symmetric(outlying(n), seed=1)
    tx = transformation(num_largest=4, num_smallest=2, num_matvecs=m)
    found = dho2_jax.subspace(refreshed(tx, jnp.zeros(n), quadratic(a)))
    rows, values = flat_rows([found.eigenvectors]), np.float64(found.eigenvalues)
    actual = np.linalg.norm(rows @ a - values[:, None] * rows, axis=1)
    bounds = np.float64(found.residuals)
    rounding = 15 * 1e-5  # of products with an operator of norm 15
    assert np.all(actual <= bounds + rounding)
    # In exact arithmetic the bound is an equality, so it may not be slack either.
    np.testing.assert_allclose(actual, bounds, atol=rounding)
    if m == 8:
        assert np.max(bounds) > 0.1
        return
    # A k+1-th pair asked for is the value that was "next".
    more = transformation(num_largest=5, num_smallest=2, num_matvecs=m)
    more = dho2_jax.subspace(refreshed(more, jnp.zeros(n), quadratic(a)))
    np.testing.assert_allclose(found.next_eigenvalue, more.eigenvalues[2], rtol=1e-5)
    fifth = np.sort(outlying(n))[-5]
    assert 0.5 * fifth < found.next_eigenvalue <= fifth * (1 + 1e-5)


def test_all_products_give_all_pairs():
    n = 12
    values = np.concatenate([-np.arange(1.0, 6), np.arange(1.0, 8)])
    a, q = symmetric(values, seed=2)
    order = np.argsort(values)
    tx = transformation(num_largest=7, num_smallest=5, num_matvecs=40)
    state = refreshed(tx, split(np.zeros(n)), quadratic(a))
    found = dho2_jax.subspace(state)
    np.testing.assert_allclose(found.eigenvalues, values[order], rtol=1e-4)
    assert up_to_sign(flat_rows(found.eigenvectors), q[order]) < 1e-3
    assert found.next_eigenvalue == 0


def test_unfinished_recursion_has_pairs_of_what_was_measured():
    a, _ = symmetric(outlying(40), seed=3)
    a32 = jnp.asarray(a, jnp.float32)
    v0 = jnp.ones(40)
    state = jax.jit(lambda v: lanczos.run(lambda x: a32 @ x, v, 6))(v0)
    pairs = ritz.ritz_pairs(*lanczos.tridiagonal(state), 2, 0)
    rows = np.float64(pairs.weights) @ np.float64(state.basis)[:6]
    quotient = np.sum((rows @ a) * rows, axis=1)
    np.testing.assert_allclose(pairs.eigenvalues, quotient, rtol=1e-4)
