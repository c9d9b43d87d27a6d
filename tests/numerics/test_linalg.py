"""Contractions over the basis against NumPy float64, and their precision."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import flat, flat_rows

import dho2_jax
from dho2_jax._numerics import lanczos, linalg

SHAPES = {"scalar": (), "vector": (5,), "matrix": (3, 4), "kernel": (2, 2, 3)}


def tree(seed, rows=(), dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal((*rows, *shape)), dtype)
        for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_contractions(dtype):
    x, y = tree(0, dtype=dtype), tree(1, dtype=dtype)
    a, b = tree(2, (4,)), tree(3, (6,))
    c = jnp.asarray(np.random.default_rng(4).standard_normal((2, 4)), jnp.float32)
    close = dict(rtol=1e-5, atol=1e-5)  # sums of 30 numbers in float32
    nx, ny, na, nb = flat(x), flat(y), flat_rows(a), flat_rows(b)
    np.testing.assert_allclose(linalg.inner(a, x), na @ nx, **close)
    np.testing.assert_allclose(linalg.vdot(x, y), nx @ ny, **close)
    np.testing.assert_allclose(linalg.norm(x), np.linalg.norm(nx), **close)
    np.testing.assert_allclose(flat(linalg.combine(c[0], a)), c[0] @ na, **close)
    np.testing.assert_allclose(flat_rows(linalg.rotate(c, a)), c @ na, **close)
    np.testing.assert_allclose(linalg.gram(a, b), na @ nb.T, **close)
    np.testing.assert_allclose(
        flat(linalg.add_scaled(x, -2.0, y)), nx - 2 * ny, **close
    )
    for value in (linalg.inner(a, x), linalg.vdot(x, y), linalg.add_scaled(x, 1.0, y)):
        assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(value))
    cast = linalg.cast_like(linalg.add_scaled(x, 1.0, y), x)
    assert all(v.dtype == dtype for v in jax.tree.leaves(cast))


@pytest.mark.parametrize("count", [4, 40])  # in one kernel of a GPU, and in several
def test_several_vectors_at_once_and_the_way_of_a_gpu(count):
    rows, x, y = tree(2, (count,)), tree(0), tree(1)
    expected = np.stack([flat_rows(rows) @ flat(v) for v in (x, y)])
    close = dict(rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(linalg.inner(rows, x, y), expected, **close)
    parts = jax.tree.map(linalg._sums_of_products, rows, x, y)
    np.testing.assert_allclose(sum(jax.tree.leaves(parts)), expected, **close)
    c = jnp.asarray(np.random.default_rng(4).standard_normal((2, count)), jnp.float32)
    both = jax.tree.map(lambda r: linalg._scaled_sums(c, r), rows)
    np.testing.assert_allclose(flat_rows(both), c @ flat_rows(rows), **close)
    one = jax.tree.map(lambda r: linalg._scaled_sums(c[0], r), rows)
    np.testing.assert_allclose(flat(one), c[0] @ flat_rows(rows), **close)


def test_a_gpu_reads_the_rows_once_for_all_inner_products():
    rows, x = {"w": jnp.ones((16, 8, 8))}, {"w": jnp.ones((8, 8))}

    def text(function, *args):
        lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
        return lowered.as_text()

    products = text(linalg.inner, rows, x, x)
    assert products.count("stablehlo.reduce(") == 1
    combinations = text(linalg.rotate, jnp.ones((2, 16)), rows)
    for found in (products, combinations):
        assert "dot_general" not in found
    together = text(lambda r: linalg.together((r, r)), rows)
    assert together.count("optimization_barrier") == 1


def precisions(function, *args):
    """The precision of each dot in the lowered text of `function`."""
    text = jax.jit(function).lower(*args).as_text()
    dots = re.findall(r"stablehlo\.dot_general.*", text)
    return [
        tuple(re.findall(r"HIGHEST|HIGH|DEFAULT", line)) or ("none",) for line in dots
    ]


HIGHEST = ("HIGHEST", "HIGHEST")


def test_each_contraction_asks_for_the_highest_precision():
    x, rows = tree(0), tree(1, (4,))
    for function, args in [
        (linalg.inner, (rows, x)),
        (functools.partial(linalg.vdot, inner=linalg.inner), (x, x)),
        (functools.partial(linalg.norm, inner=linalg.inner), (x,)),
        (linalg.combine, (jnp.ones(4), rows)),
        (linalg.rotate, (jnp.ones((2, 4)), rows)),
        (linalg.gram, (rows, rows)),
        (lanczos.step, (lanczos.start(x, 3), x)),
    ]:
        found = precisions(function, *args)
        assert found, function
        assert set(found) == {HIGHEST}, function


@pytest.mark.parametrize("base_rate", ["fixed", "curvature"])
def test_refresh_and_update_ask_for_the_highest_precision(base_rate):
    params = tree(0)
    tx = dho2_jax.dho2(
        optax.adam(1e-3),
        num_largest=2,
        num_smallest=1,
        refresh="external",
        base_rate=base_rate,
    )
    state = tx.init(params)

    def diagonal(params):  # a product without contractions of its own
        return lambda v: jax.tree.map(lambda p, t: p * p * t, params, v)

    def refresh(state, params):
        return dho2_jax.refresh(state, params, matvec_fn=diagonal)

    def update(grads, state, params):
        return tx.update(grads, state, params, matvec_fn=diagonal)

    for function, args in [
        (refresh, (state, params)),
        (update, (params, state, params)),
    ]:
        found = precisions(function, *args)
        assert len(found) >= 4  # the stored array is read four times
        assert set(found) == {HIGHEST}
