"""Lanczos against dense float64 eigenproblems."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from helpers import flat, flat_rows, outlying, reflections, split, symmetric, up_to_sign

from dho2_jax import lanczos_tridiag
from dho2_jax._numerics import lanczos, linalg

HIGHEST = jax.lax.Precision.HIGHEST


def times(matrix):
    matrix = jnp.asarray(matrix, jnp.float32)
    return lambda v: jnp.matmul(matrix, v, precision=HIGHEST)


def start_vector(n, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(n), jnp.float32)


def tridiagonalise(matvec, v0, m):
    return jax.jit(lambda v: lanczos_tridiag(matvec, v, m))(v0)


def small_matrix(result):
    alphas, betas = np.float64(result.alphas), np.float64(result.betas)
    return np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1)


def orthonormality(rows):
    """Largest entry of V V^T - I over the rows that are not zero."""
    present = np.any(rows != 0, axis=1)
    return np.max(np.abs(rows @ rows.T - np.diag(present.astype(float))))


@pytest.mark.parametrize(("n", "m"), [(50, 50), (500, 120), (2000, 120)])
def test_extreme_pairs_of_a_quadratic(n, m):
    spectrum = outlying(n)
    a, q = symmetric(spectrum, seed=n)
    result = tridiagonalise(times(a), start_vector(n), m)
    theta, weights = np.linalg.eigh(small_matrix(result))
    rows = weights.T @ flat_rows(result.basis)
    ends = np.r_[0:3, -4:0]
    assert np.max(np.abs(theta[ends] / spectrum[ends] - 1)) < 1e-4
    assert up_to_sign(rows[ends], q[ends]) < 1e-3


def test_residual_identity_on_a_pytree():
    n, m = 60, 25
    a, _ = symmetric(outlying(n), seed=2)
    a32 = jnp.asarray(a, jnp.float32)

    def matvec(v):
        x = jnp.concatenate([v["a"], v["b"].ravel()])
        y = jnp.matmul(a32, x, precision=HIGHEST)
        return {"a": y[: n // 2], "b": y[n // 2 :].reshape(v["b"].shape)}

    result = tridiagonalise(matvec, split(np.arange(1.0, n + 1)), m)
    v, t, r = flat_rows(result.basis), small_matrix(result), flat(result.residual)
    last = np.eye(m)[-1]
    defect = a @ v.T - v.T @ t - np.outer(r, last)
    # Rounding of single products, relative to the norm 15.
    assert np.max(np.abs(defect)) < 15 * 2e-6
    assert np.max(np.abs(v @ r)) < 1e-5 * np.linalg.norm(r)
    assert np.linalg.norm(r) > 0.1
    np.testing.assert_allclose(
        v[0], np.arange(1.0, n + 1) / np.linalg.norm(np.arange(1.0, n + 1)), rtol=1e-6
    )


@pytest.mark.parametrize("name", ["logarithmic", "hilbert"])
def test_orthonormal_after_100_steps_on_hilbert_like_spectra(name):
    if name == "hilbert":
        a = scipy.linalg.hilbert(200)
    else:
        a, _ = symmetric(np.logspace(-8, 0, 300), seed=3)
    result = tridiagonalise(times(a), start_vector(len(a)), 100)
    rows = flat_rows(result.basis)
    chex.assert_tree_all_finite(result)
    assert orthonormality(rows) < 1e-5
    top = np.linalg.eigvalsh(a)[-3:]
    np.testing.assert_allclose(
        np.linalg.eigvalsh(small_matrix(result))[-3:], top, rtol=1e-4
    )


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_sharp_spectra_and_products_that_are_not_symmetric(noise):
    """Rounding of the sharp directions comes back with each product, times 1e6."""
    n = 2000
    tail = np.random.default_rng(7).uniform(0, 1, n - 3)
    spectrum = np.r_[np.sort(tail), 1e3, 1e5, 1e6]
    a, _ = symmetric(spectrum, seed=8)
    product = times(a)

    def matvec(v):
        w = product(v)
        wild = jnp.sin(1e4 * v + jnp.arange(n))
        return w + noise * jnp.max(jnp.abs(w)) * wild

    result = tridiagonalise(matvec, start_vector(n), 28)
    rows = flat_rows(result.basis)
    assert orthonormality(rows) < (1e-3 if noise else 1e-5)
    found = np.linalg.eigvalsh(small_matrix(result))
    sharp = 1 if noise else 3
    np.testing.assert_allclose(found[-sharp:], spectrum[-sharp:], rtol=1e-3 + 3 * noise)
    if not noise:
        assert np.all(np.any(rows != 0, axis=1))
        assert 0.95 < found[-4] <= 1.0 + 1e-3


def test_repeated_eigenvalues():
    spectrum = np.repeat([-3.0, 1.0, 5.0, 10.0], [2, 30, 2, 3])
    a, _ = symmetric(spectrum, seed=4)
    result = tridiagonalise(times(a), start_vector(len(a)), 20)
    rows = flat_rows(result.basis)
    assert orthonormality(rows) < 1e-5
    size = int(np.sum(np.any(rows != 0, axis=1)))
    theta = np.linalg.eigvalsh(small_matrix(result)[:size, :size])
    # Each value is found, and no more often than it is there.
    for value, count in [(-3.0, 2), (5.0, 2), (10.0, 3)]:
        assert 1 <= np.sum(np.abs(theta - value) < 1e-3) <= count
    distance = np.min(np.abs(theta[:, None] - np.unique(spectrum)), axis=1)
    assert np.max(distance) < 1e-3


@pytest.mark.parametrize("m", [1, 12, 17])
def test_depths_one_all_and_more_than_all(m):
    n = 12
    spectrum = np.linspace(-2, 9, n)
    a, _ = symmetric(spectrum, seed=5)
    v0 = start_vector(n)
    result = tridiagonalise(times(a), v0, m)
    rows = flat_rows(result.basis)
    chex.assert_shape([result.alphas, result.betas, rows], [(m,), (m - 1,), (m, n)])
    assert np.all(rows[n:] == 0)
    assert np.all(np.asarray(result.alphas)[n:] == 0)
    assert np.all(np.asarray(result.betas)[n - 1 :] == 0)
    assert orthonormality(rows) < 1e-5
    if m == 1:
        v = np.float64(v0)
        quotient = v @ a @ v / (v @ v)
        np.testing.assert_allclose(result.alphas[0], quotient, rtol=1e-5)
    else:
        theta = np.linalg.eigvalsh(small_matrix(result)[:n, :n])
        np.testing.assert_allclose(theta, spectrum, rtol=1e-4, atol=1e-5)
        assert np.linalg.norm(flat(result.residual)) == 0


@pytest.mark.parametrize(("name", "rank"), [("rank", 3), ("identity", 1), ("zero", 0)])
def test_breakdown_ends_cleanly(name, rank):
    n, m = 40, 8
    u = jnp.asarray(reflections(n, 6)[:3], jnp.float32)
    values = jnp.array([4.0, -2.0, 7.0])
    matvec = {
        "rank": lambda v: linalg.combine(values * linalg.inner(u, v), u),
        "identity": lambda v: 3.0 * v,
        "zero": lambda v: 0.0 * v,
    }[name]
    # A start in the range has the rank as its Krylov dimension; zero keeps one row.
    v0 = matvec(start_vector(n)) if name == "rank" else start_vector(n)
    result = tridiagonalise(matvec, v0, m)
    chex.assert_tree_all_finite(result)
    rows = flat_rows(result.basis)
    found = max(rank, 1)
    assert orthonormality(rows) < 1e-5
    assert np.all(np.any(rows[:found] != 0, axis=1))
    assert np.all(rows[found:] == 0)
    assert np.all(np.asarray(result.alphas)[found:] == 0)
    assert np.all(np.asarray(result.betas)[found - 1 :] == 0)
    assert np.all(flat(result.residual) == 0)
    theta = np.linalg.eigvalsh(small_matrix(result)[:found, :found])
    expected = {"rank": [-2.0, 4.0, 7.0], "identity": [3.0], "zero": [0.0]}[name]
    np.testing.assert_allclose(theta, expected, atol=1e-5)


def test_zero_start_vector_gives_zeros():
    result = tridiagonalise(lambda v: 2.0 * v, jnp.zeros(6), 3)
    chex.assert_trees_all_equal(result, jax.tree.map(jnp.zeros_like, result))


def test_recurrence_defect_tells_a_fixed_operator_from_a_changing_one():
    n, m = 80, 20
    a, _ = symmetric(outlying(n), seed=7)
    b, _ = symmetric(outlying(n), seed=8)
    both = jnp.asarray(np.stack([a, 0.9 * a + 0.1 * b]), jnp.float32)

    @jax.jit
    def defect(change):
        def body(i, state):
            matrix = both[change * (i % 2)]
            product = jnp.matmul(matrix, state.vector)
            return lanczos.step(state, product)

        state = jax.lax.fori_loop(0, m, body, lanczos.start(start_vector(n), m))
        return lanczos.recurrence_defect(state)

    assert defect(0) < 1e-5
    assert defect(1) > 1e-2


def test_inner_product_is_the_one_given():
    """With x^T M y, M^-1 A is symmetric: the generalised problem A v = lambda M v."""
    n = 30
    a, _ = symmetric(outlying(n), seed=9)
    m, _ = symmetric(np.linspace(0.5, 3.0, n), seed=10)
    inverse_a, m32 = np.linalg.solve(m, a), jnp.asarray(m, jnp.float32)

    def inner(rows, x):
        return jnp.matmul(
            rows, jnp.matmul(m32, x, precision=HIGHEST), precision=HIGHEST
        )

    v0 = start_vector(n)
    result = jax.jit(lambda v: lanczos_tridiag(times(inverse_a), v, n, inner=inner))(v0)
    rows = flat_rows(result.basis)
    assert np.max(np.abs(rows @ m @ rows.T - np.eye(n))) < 1e-5
    theta = np.linalg.eigvalsh(small_matrix(result))
    np.testing.assert_allclose(
        theta, scipy.linalg.eigh(a, m, eigvals_only=True), rtol=1e-4, atol=1e-4
    )


def test_inner_product_with_a_norm_of_its_own():
    """Norms too are taken by `inner`, as they must be when vectors are sharded."""
    calls = []

    def inner(rows, x):
        calls.append(rows.shape[0])
        return 4.0 * linalg.inner(rows, x)

    result = lanczos_tridiag(lambda v: 2.0 * v, start_vector(5), 2, inner=inner)
    np.testing.assert_allclose(np.linalg.norm(result.basis[0]), 0.5, rtol=1e-6)
    assert {1, 2} <= set(calls)
