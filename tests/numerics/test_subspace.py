"""The algebra of the kept pairs, and which refreshes are used."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import flat, flat_rows, jit, quadratic, reflections, split, symmetric

import dho2_jax
from dho2_jax._numerics import linalg, subspaces

N = 32


def tree_rows(rows):
    """A float64 matrix `(r, N)` as rows of the pytree that `split` makes."""
    rows = jnp.asarray(rows, jnp.float32)
    return {"a": rows[:, : N // 2], "b": rows[:, N // 2 :].reshape(len(rows), -1, 2)}


def some_subspace(seed, valid=(True, True, True)):
    rows = reflections(N, seed)[: len(valid)] * np.array(valid)[:, None]
    return rows, subspaces.Subspace(
        eigenvalues=jnp.arange(1.0, len(valid) + 1),
        eigenvectors=tree_rows(rows),
        valid=jnp.array(valid),
        next_eigenvalue=jnp.zeros(()),
        residuals=jnp.zeros(len(valid)),
    )


def test_projection():
    rows, space = some_subspace(0)
    x = np.random.default_rng(1).standard_normal(N)
    on = jnp.ones(3, bool)
    coefs = subspaces.coefficients(space.eigenvectors, split(x), on)
    np.testing.assert_allclose(coefs, rows @ x, rtol=1e-5)
    left = subspaces.project_out(split(x), space.eigenvectors, on)
    np.testing.assert_allclose(flat(left), x - rows.T @ rows @ x, atol=1e-6)
    # A slot that is not active is left in.
    one = subspaces.project_out(
        split(x), space.eigenvectors, jnp.array([False, True, False])
    )
    np.testing.assert_allclose(flat(one), x - rows[1] * (rows[1] @ x), atol=1e-6)


@pytest.mark.parametrize("lost", [(), (1,), (0, 2)])
def test_momentum_moves_by_the_overlap(lost):
    valid = tuple(i not in lost for i in range(3))
    old_rows, old = some_subspace(0)
    new_rows, new = some_subspace(3, valid)
    u = np.array([1.0, -2.0, 0.5])
    change = subspaces.change_of_basis(old, new)
    moved = linalg.matmul(change, jnp.asarray(u, jnp.float32))
    expected = new_rows @ (old_rows.T @ u)
    assert np.max(np.abs(expected)) > 0.1
    np.testing.assert_allclose(moved, expected, atol=1e-6)


def test_momentum_moves_through_a_refresh():
    first, _ = symmetric(np.linspace(1, 9, N) ** 2, seed=1)
    second, _ = symmetric(np.linspace(1, 9, N) ** 2, seed=2)
    matrices = jnp.asarray(np.stack([first, second]), jnp.float32)
    tx = dho2_jax.dho2(
        optax.sgd(0.01), num_largest=4, num_matvecs=20, refresh="external"
    )

    @jit
    def refresh(state, params, i):
        return dho2_jax.refresh(state, params, lambda p: quadratic_of(matrices[i])(p))

    def quadratic_of(matrix):
        return lambda p: 0.5 * p @ (matrix @ p)

    params = jnp.ones(N)
    state = refresh(tx.init(params), params, 0)
    _, state = tx.update(params, state, params)
    old = dho2_jax.subspace(state).eigenvectors
    before = state.curvature.momentum
    assert np.linalg.norm(before) > 0.01
    state = refresh(state, params, 1)
    new = dho2_jax.subspace(state).eigenvectors
    change = np.float64(new) @ np.float64(old).T
    np.testing.assert_allclose(
        state.curvature.momentum, change @ np.float64(before), atol=1e-6
    )
    assert np.max(np.abs(state.curvature.momentum - before)) > 0.01


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("good", True),
        ("unconverged", True),
        ("nan row", False),
        ("nan value", False),
        ("infinite residual", False),
        ("skewed", False),
        ("too long", False),
        ("ghost", False),
        ("residual above scale", False),
        ("nothing found", False),
    ],
)
def test_what_is_acceptable(name, accepted):
    rows, space = some_subspace(0)
    if name == "unconverged":
        space = space._replace(residuals=jnp.array([0.0, 1.0, 2.9]))
    elif name == "nan row":
        space = space._replace(eigenvectors=tree_rows(rows * np.nan))
    elif name == "nan value":
        space = space._replace(eigenvalues=jnp.array([1.0, jnp.nan, 3.0]))
    elif name == "infinite residual":
        space = space._replace(residuals=jnp.array([0.0, jnp.inf, 0.0]))
    elif name == "skewed":
        skew = rows.copy()
        skew[0] = rows[0] * np.sqrt(1 - 0.01**2) + 0.01 * rows[1]
        space = space._replace(eigenvectors=tree_rows(skew))
    elif name == "too long":
        space = space._replace(eigenvectors=tree_rows(1.01 * rows))
    elif name == "ghost":  # a row in a slot that says it holds none
        space = space._replace(valid=jnp.array([True, True, False]))
    elif name == "residual above scale":
        space = space._replace(residuals=jnp.array([0.0, 0.0, 4.0]))
    elif name == "nothing found":
        space = some_subspace(0, (False, False, False))[1]
    assert bool(subspaces.is_acceptable(space, jnp.asarray(3.0))) is accepted


def test_newton_scale():
    values, active = jnp.array([-4.0, 0.001, 2.0, 8.0]), jnp.array([1, 1, 0, 1], bool)
    plain = subspaces.newton_scale(values, active, 0.0, 0.0)
    np.testing.assert_allclose(plain, [0.25, 1000.0, 0.0, 0.125], rtol=1e-6)
    damped = subspaces.newton_scale(values, active, 1.0, 0.0)
    np.testing.assert_allclose(damped, [0.2, 1 / 1.001, 0.0, 1 / 9], rtol=1e-6)
    floored = subspaces.newton_scale(values, active, 0.0, 0.01)
    np.testing.assert_allclose(floored, [0.25, 12.5, 0.0, 0.125], rtol=1e-6)
    none = subspaces.newton_scale(values, jnp.zeros(4, bool), 0.0, 0.0)
    np.testing.assert_array_equal(none, 0.0)


def test_spread_of_largest_and_sharpness():
    values = jnp.array([-5.0, 2.0, 4.0, 6.0])
    on = jnp.ones(4, bool)
    assert subspaces.spread_of_largest(values, on, 1) == 3.0
    assert subspaces.spread_of_largest(values, on.at[1].set(False), 1) == 1.5
    assert subspaces.spread_of_largest(values, ~on, 1) == 1.0
    assert subspaces.spread_of_largest(values, on, 4) == 1.0
    space = some_subspace(0)[1]
    assert subspaces.sharpness(space) == 3.0
    assert subspaces.sharpness(space._replace(valid=~on[:3])) == 0.0


def poisons(a):
    """An honest product, and those that go wrong each in a way of its own."""

    def honest(v):
        return jnp.matmul(a, v, precision=jax.lax.Precision.HIGHEST)

    def nan(v):
        return v * jnp.nan

    def one(v):
        return honest(v).at[3].set(jnp.nan)

    def infinite(v):
        return honest(v) * jnp.inf

    def overflowing(v):
        return honest(v) * 1e38

    def skew(v):  # not symmetric: no Hessian
        return honest(v) + 20.0 * jnp.roll(v, 1)

    return [honest, nan, one, infinite, overflowing, skew]


@pytest.mark.parametrize("base_rate", ["fixed", "curvature"])
def test_bad_products_leave_the_old_subspace(base_rate):
    a, _ = symmetric(np.linspace(1, 9, N) ** 2, seed=1)
    functions = poisons(jnp.asarray(a, jnp.float32))
    tx = dho2_jax.dho2(
        optax.sgd(0.01),
        num_largest=3,
        num_smallest=1,
        num_matvecs=12,
        refresh="external",
        base_rate=base_rate,
    )

    @jit
    def refresh(state, params, which):
        def matvec_fn(params):
            return lambda v: jax.lax.switch(which, functions, v)

        return dho2_jax.refresh(state, params, matvec_fn=matvec_fn)

    params = jnp.ones(N)
    state = refresh(tx.init(params), params, 0)
    _, state = tx.update(params, state, params)
    assert dho2_jax.metrics(state)["refreshes"] == 1
    good = state
    for i in range(1, len(functions)):
        state = refresh(state, params, i)
        metrics = dho2_jax.metrics(state)
        assert metrics["rejected"] == i, functions[i].__name__
        assert metrics["refreshes"] == 1
        kept = [(s.subspace, s.momentum) for s in (state.curvature, good.curvature)]
        for x, y in zip(*map(jax.tree.leaves, kept), strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
        if base_rate == "curvature":
            assert state.curvature.rate.scale == good.curvature.rate.scale
    state = refresh(state, params, 0)
    assert dho2_jax.metrics(state)["refreshes"] == 2
    # Twelve products of 32: the top value is near, not converged.
    np.testing.assert_allclose(
        dho2_jax.subspace(state).eigenvalues[-1], 81.0, rtol=1e-2
    )


def test_a_loss_that_is_nan_is_rejected():
    tx = dho2_jax.dho2(optax.sgd(0.01), num_largest=2, refresh_period=1)
    params = jnp.ones(8)
    state = tx.init(params)
    loss = quadratic(np.eye(8))
    _, state = jit(
        lambda s: tx.update(params, s, params, value_fn=lambda p: loss(p) * jnp.nan)
    )(state)
    metrics = dho2_jax.metrics(state)
    assert metrics["rejected"] == 1
    assert metrics["num_valid"] == 0
    assert np.isfinite(metrics["base_scaling"])


def test_rows_are_orthonormal_as_trees():
    rows, space = some_subspace(0)
    np.testing.assert_allclose(flat_rows(space.eigenvectors), rows, atol=1e-7)
