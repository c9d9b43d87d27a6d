"""Curvature products against dense matrices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    dense_hessian,
    extreme,
    flat,
    flat_rows,
    jit,
    mlp,
    refreshed,
    up_to_sign,
)

import dho2_jax
from dho2_jax._numerics import operators

LOSS, PARAMS = mlp((4, 6, 3), batch=20, seed=1)


@pytest.fixture(scope="module")
def hessian():
    return dense_hessian(LOSS, PARAMS)


@pytest.fixture(scope="module")
def gauss_newton():
    """J^T H_l J in float64, from a dense Jacobian."""
    vector, unravel = jax.flatten_util.ravel_pytree(PARAMS)
    outputs = LOSS.outputs_fn(PARAMS)
    jacobian = jit(jax.jacobian(lambda x: LOSS.outputs_fn(unravel(x)).ravel()))
    j = np.asarray(jacobian(vector), np.float64)
    h = np.asarray(
        jax.hessian(lambda o: LOSS.loss_fn(o.reshape(outputs.shape)))(outputs.ravel()),
        np.float64,
    )
    return j.T @ h @ j


def direction(seed=2):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), PARAMS
    )


def error(product, expected):
    return np.linalg.norm(flat(product) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("linearized", 1e-5),
        ("recomputed", 1e-5),
        ("reverse_over_reverse", 1e-5),
        # Two gradients of float32: the cube root of the rounding, squared.
        ("central_difference", 2e-3),
    ],
)
def test_products_against_the_dense_hessian(hessian, name, tolerance):
    build = {
        "linearized": lambda p: dho2_jax.hvp(LOSS, p),
        "recomputed": lambda p: dho2_jax.hvp(LOSS, p, linearize=False),
        "reverse_over_reverse": lambda p: dho2_jax.hvp_reverse_over_reverse(LOSS, p),
        "central_difference": lambda p: dho2_jax.hvp_central_difference(LOSS, p),
    }[name]
    v = direction()
    product = jit(lambda p, v: build(p)(v))(PARAMS, v)
    assert error(product, hessian @ flat(v)) < tolerance
    chex.assert_trees_all_equal_structs(product, PARAMS)


@pytest.mark.parametrize("linearize", [True, False])
def test_ggn_product_against_dense(gauss_newton, hessian, linearize):
    v = direction()
    product = jit(
        lambda p, v: dho2_jax.ggn_vp(
            LOSS.outputs_fn, LOSS.loss_fn, p, linearize=linearize
        )(v)
    )(PARAMS, v)
    assert error(product, gauss_newton @ flat(v)) < 1e-5
    assert error(product, hessian @ flat(v)) > 0.1


@pytest.mark.parametrize("name", list(operators.OPERATORS))
def test_curvature_along_a_direction(hessian, gauss_newton, name):
    v = direction()
    matrix = gauss_newton if name == "ggn" else hessian
    value_fn = (LOSS.outputs_fn, LOSS.loss_fn) if name == "ggn" else LOSS
    found = jit(lambda p, v: operators.directional_curvature(name, value_fn, p, v))(
        PARAMS, v
    )
    expected = flat(v) @ matrix @ flat(v)
    tolerance = 1e-2 if name == "central_difference" else 1e-4
    np.testing.assert_allclose(found, expected, rtol=tolerance)


@pytest.mark.parametrize("name", list(operators.OPERATORS))
def test_bfloat16_parameters_give_float32_products(hessian, gauss_newton, name):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    value_fn = (LOSS.outputs_fn, LOSS.loss_fn) if name == "ggn" else LOSS
    v = direction()
    product = jit(lambda p, v: operators.curvature_matvec(name, value_fn, p)(v))(
        params, v
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(product, PARAMS)  # float32
    matrix = gauss_newton if name == "ggn" else hessian
    # bfloat16 has three digits less than float32, and a difference of gradients at a
    # step of its own size keeps little but the sign.
    tolerance = 0.5 if name == "central_difference" else 0.1
    assert error(product, matrix @ flat(v)) < tolerance


def pairs(curvature_name, value_fn=None, **kwargs):
    tx = dho2_jax.dho2(
        optax.sgd(0.1),
        num_largest=3,
        num_matvecs=25,
        refresh="external",
        curvature=curvature_name,
    )
    return dho2_jax.subspace(refreshed(tx, PARAMS, value_fn, **kwargs))


def test_ggn_through_a_refresh(gauss_newton):
    found = pairs("ggn", (LOSS.outputs_fn, LOSS.loss_fn))
    values, rows = extreme(gauss_newton, 3, 0)
    np.testing.assert_allclose(found.eigenvalues, values, rtol=1e-4)
    assert up_to_sign(flat_rows(found.eigenvectors)[-1:], rows[-1:]) < 1e-3


@pytest.mark.slow
def test_other_operators_through_a_refresh(hessian):
    values, _ = extreme(hessian, 3, 0)
    found = pairs("reverse_over_reverse", LOSS)
    np.testing.assert_allclose(found.eigenvalues, values, rtol=1e-4)
    found = pairs("central_difference", LOSS)
    np.testing.assert_allclose(found.eigenvalues, values, rtol=1e-2)


def test_own_product_gives_the_same_as_the_loss():
    ours = pairs("hessian", LOSS)
    own = pairs("hessian", matvec_fn=lambda p: dho2_jax.hvp(LOSS, p))
    np.testing.assert_allclose(own.eigenvalues, ours.eigenvalues, rtol=1e-5)
    np.testing.assert_allclose(
        flat_rows(own.eigenvectors), flat_rows(ours.eigenvectors), atol=1e-4
    )


WEIGHTS = jnp.asarray(np.random.default_rng(6).standard_normal((3, 6)), jnp.float32)
INPUTS = jnp.asarray(np.random.default_rng(5).standard_normal((6, 8)), jnp.float32)


def with_rule(kind):
    """A loss with a layer tanh(x) whose backward pass is written by hand.

    "blocked": the forward rule calls the layer itself, as is usual, which forward mode
    cannot follow. "loop": besides, the backward pass is a loop without a derivative in
    reverse. "callback": the backward pass leaves JAX, as a foreign kernel does.
    """

    @jax.custom_vjp
    def layer(x):
        return jnp.tanh(x)

    def forward(x):
        y = jnp.tanh(x) if kind == "callback" else layer(x)
        return y, x

    def backward(x, g):
        if kind == "loop":
            slope = jax.lax.while_loop(
                lambda c: c[0] < 1,
                lambda c: (c[0] + 1, 1 - jnp.tanh(c[1]) ** 2),
                (0, x),
            )[1]
        elif kind == "callback":
            out = jax.ShapeDtypeStruct(x.shape, x.dtype)
            slope = jax.pure_callback(lambda x: 1 - np.tanh(x) ** 2, out, x)
        else:
            slope = 1 - jnp.tanh(x) ** 2
        return (g * slope,)

    layer.defvjp(forward, backward)
    return lambda p: jnp.mean(layer(p @ INPUTS) ** 2)


def reference_with_rule():
    hessian = dense_hessian(lambda p: jnp.mean(jnp.tanh(p @ INPUTS) ** 2), WEIGHTS)
    return hessian @ np.arange(18.0)


RAMP = jnp.arange(18.0).reshape(3, 6)


def test_custom_vjp_loss_is_told_of_reverse_over_reverse_which_works():
    loss = with_rule("blocked")
    for linearize in (True, False):
        with pytest.raises(ValueError, match="use curvature='reverse_over_reverse'"):
            dho2_jax.hvp(loss, WEIGHTS, linearize=linearize)(RAMP)
    with pytest.raises(ValueError, match="use curvature='reverse_over_reverse'"):
        operators.directional_curvature("hessian", loss, WEIGHTS, RAMP)
    product = dho2_jax.hvp_reverse_over_reverse(loss, WEIGHTS)(RAMP)
    assert error(product, reference_with_rule()) < 1e-5


@pytest.mark.parametrize("kind", ["loop", "callback"])
def test_a_backward_without_derivative_is_told_of_central_difference(kind):
    """Whatever the error advises, followed to its end, gives a product that works."""
    loss = with_rule(kind)
    with pytest.raises(ValueError, match="'central_difference'"):
        dho2_jax.hvp(loss, WEIGHTS)(RAMP)
    with pytest.raises(ValueError, match="'central_difference'"):
        operators.directional_curvature("hessian", loss, WEIGHTS, RAMP)
    with pytest.raises(ValueError, match="use curvature='central_difference'"):
        dho2_jax.hvp_reverse_over_reverse(loss, WEIGHTS)(RAMP)
    product = dho2_jax.hvp_central_difference(loss, WEIGHTS)(RAMP)
    assert error(product, reference_with_rule()) < 2e-3


def test_a_custom_vjp_that_the_product_can_pass_needs_no_other_operator():
    """Forward over reverse passes many a rule; the rate's probe may ask no more."""

    @jax.custom_vjp
    def layer(x):
        return jnp.tanh(x)

    layer.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))

    def loss(p):
        return jnp.mean(layer(p @ INPUTS) ** 2)

    expected = reference_with_rule()
    assert error(dho2_jax.hvp(loss, WEIGHTS)(RAMP), expected) < 1e-5
    found = operators.directional_curvature("hessian", loss, WEIGHTS, RAMP)
    np.testing.assert_allclose(found, flat(RAMP) @ expected, rtol=1e-4)
