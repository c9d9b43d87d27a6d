"""The hybrid step: the split, what it does to a quadratic, and its hard cases."""

import functools

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
    outlying,
    quadratic,
    refreshed,
    split,
    symmetric,
    train,
)

import dho2_jax


def one_layer():
    """A loss of one matrix, neither quadratic nor convex, as two halves."""
    rng = np.random.default_rng(9)
    inputs = jnp.asarray(rng.standard_normal((16, 5)), jnp.float32)
    targets = jnp.asarray(rng.standard_normal((16, 3)), jnp.float32)
    params = jnp.asarray(rng.standard_normal((5, 3)), jnp.float32)

    def outputs_fn(w):
        return jnp.tanh(inputs.astype(w.dtype) @ w).astype(jnp.float32)

    def loss_fn(outputs):
        return jnp.sum((outputs - targets) ** 2) / 16

    return outputs_fn, loss_fn, params


OUTPUTS_FN, LOSS_FN, SMALL_PARAMS = one_layer()


def small_loss(w):
    return LOSS_FN(OUTPUTS_FN(w))


def fixed(base, **kwargs):
    """Three lines of algebra and nothing else; refreshed by hand."""
    defaults = dict(base_rate="fixed", refresh="external", subspace_decay=0.0)
    return dho2_jax.dho2(base, **{**defaults, **kwargs})


# The split.


@pytest.mark.parametrize("momentum", ["ema", "heavy_ball", "nesterov"])
def test_the_split(momentum):
    """V update = -alpha u / (|lambda| + delta); the rest is s * SGD, off V."""
    n, alpha, beta, delta, rate, cap = 40, 0.7, 0.6, 0.5, 0.05, 1.5
    a, _ = symmetric(outlying(n), seed=1)
    tx = fixed(
        optax.sgd(rate),
        num_largest=4,
        num_smallest=3,
        num_matvecs=n,
        newton_learning_rate=alpha,
        subspace_decay=beta,
        subspace_momentum=momentum,
        damping=delta,
        max_base_scaling=cap,
    )
    params = split(np.ones(n))
    state = refreshed(tx, params, quadratic(a))
    space = dho2_jax.subspace(state)
    rows, values = flat_rows(space.eigenvectors), np.float64(space.eigenvalues)
    update = jit(tx.update)
    rng, u = np.random.default_rng(2), np.zeros(7)
    for _ in range(3):
        g = np.float64(np.float32(rng.standard_normal(n)))
        updates, state = update(split(g), state, params)
        c0 = rows @ g
        u = {
            "ema": beta * u + (1 - beta) * c0,
            "heavy_ball": beta * u + c0,
            "nesterov": beta**2 * u + (1 + beta) * c0,
        }[momentum]
        inside = rows @ flat(updates)
        expected = -alpha * u / (np.abs(values) + delta)
        np.testing.assert_allclose(inside, expected, atol=1e-6)
        rest = flat(updates) - rows.T @ inside
        complement = g - rows.T @ c0
        # lambda_max / lambda_min of the largest is 15 / 6, over the cap.
        np.testing.assert_allclose(rest, -rate * cap * complement, atol=1e-6)


def test_the_base_never_sees_the_subspace_nor_moves_in_it():
    n = 40
    a, _ = symmetric(outlying(n), seed=1)
    spy = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        # Sees the gradient, and answers with its sign, which is not orthogonal to V.
        lambda g, state, params=None: (jax.tree.map(lambda x: -jnp.sign(x), g), g),
    )
    tx = fixed(spy, num_largest=4, num_smallest=3, num_matvecs=n)
    params = split(np.ones(n))
    state = refreshed(tx, params, quadratic(a))
    rows = flat_rows(dho2_jax.subspace(state).eigenvectors)
    g = np.random.default_rng(3).standard_normal(n)
    # What V holds of the gradient is a thousand times what it holds of the rest.
    g += 1000 * rows.T @ np.ones(7)
    updates, state = jit(tx.update)(split(g), state, params)
    seen = flat(state.base_state)
    # Rounding: |g| is 2,600, and the rows are orthonormal to 1e-6.
    np.testing.assert_allclose(rows @ seen, 0, atol=2.6e-3)
    np.testing.assert_allclose(seen, g - rows.T @ rows @ g, atol=2.6e-3)
    values = np.float64(dho2_jax.subspace(state).eigenvalues)
    np.testing.assert_allclose(
        rows @ flat(updates), -(rows @ g) / np.abs(values), rtol=1e-5
    )


# A quadratic whose ill-conditioning lies in k directions.

SHARP = np.array([1e3, 2e3, 4e3, 8e3])
REST = np.linspace(0.5, 4.0, 36)
KAPPA = REST[-1] / REST[0]


@pytest.fixture(scope="module")
def ill_conditioned():
    a, q = symmetric(np.concatenate([REST, SHARP]), seed=4)
    return a, q, quadratic(a), jnp.asarray(q.T @ np.ones(40), jnp.float32)


def test_one_newton_step_removes_the_sharp_directions(ill_conditioned):
    """And SGD then converges at the condition number of the rest, 8 and not 16,000."""
    _, q, loss, params = ill_conditioned
    probe = fixed(optax.sgd(0.1), num_largest=4, num_matvecs=40)
    next_value = float(
        dho2_jax.subspace(refreshed(probe, params, loss)).next_eigenvalue
    )
    np.testing.assert_allclose(next_value, REST[-1], rtol=1e-4)

    # The best fixed rate for curvatures in [REST[0], next_value].
    rate = 2 / (next_value + REST[0])
    tx = fixed(
        optax.sgd(rate),
        num_largest=4,
        num_matvecs=40,
        max_base_scaling=1.0,
        refresh="periodic",
        refresh_period=100,
    )
    _, _, trajectory = train(tx, loss, params, 25)
    inside = np.abs(np.float64(trajectory) @ q.T)  # distances along eigenvectors
    assert np.max(inside[0, 36:]) < 1e-4  # from 1, in one step; float32
    assert np.max(inside[:, 36:]) < 1e-4  # and they stay there
    distance = np.linalg.norm(inside[:, :36], axis=1)
    measured = (distance[24] / distance[14]) ** 0.1
    np.testing.assert_allclose(measured, (KAPPA - 1) / (KAPPA + 1), rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "slowdown"),
    [
        (1e-4, 2),
        (1e-2, 2),
        (1.0, 4),
    ],
)
def test_curvature_set_rate_converges_at_the_condition_of_the_rest(
    ill_conditioned, rate, slowdown
):
    """Untuned, from a base rate far too low or too high by any measure.

    The yardstick is gradient descent at the best fixed rate for the rest, the time to
    find the rate included. A rate that starts too high comes down slowly, by design,
    and costs more. With the sharp directions left in, the slowdown would be 2,000.
    """
    _, q, loss, params = ill_conditioned
    tx = dho2_jax.dho2(
        optax.sgd(rate),
        num_largest=4,
        num_matvecs=40,
        refresh_period=200,
        subspace_decay=0.0,
    )
    steps = 120
    _, state, trajectory = train(tx, loss, params, steps)
    inside = np.float64(trajectory) @ q.T
    # The starting distance is 6, and nothing blows up on the way.
    assert np.max(np.linalg.norm(inside[:, :36], axis=1)) < 12
    measured = np.linalg.norm(inside[-1, :36] / 6) ** (1 / steps)
    assert measured < ((KAPPA - 1) / (KAPPA + 1)) ** (1 / slowdown)
    assert np.linalg.norm(inside[-1, 36:]) < 1e-4
    step = float(dho2_jax.metrics(state)["base_scaling"]) * rate
    assert 0.5 / REST[-1] < step < 4 / REST[-1]  # about the edge, 2 / lambda


# Coordinates that the loss does not use.


@pytest.mark.slow
@pytest.mark.parametrize("base_rate", ["fixed", "curvature"])
def test_unused_coordinates_never_move(base_rate):
    """Embedding rows of absent tokens and dead units, bit for bit, with Adam."""
    rng = np.random.default_rng(5)
    tokens = jnp.asarray(rng.integers(0, 6, (10, 32)))  # of a vocabulary of 11
    targets = jnp.asarray(rng.standard_normal((10, 32, 2)), jnp.float32)
    params = {
        "embedding": jnp.asarray(rng.standard_normal((11, 4)), jnp.float32),
        "in": jnp.asarray(rng.standard_normal((4, 8)), jnp.float32),
        "bias": jnp.where(jnp.arange(8) < 3, -100.0, 0.3),  # three dead units
        "out": jnp.asarray(rng.standard_normal((8, 2)), jnp.float32),
    }

    def loss(params, i):
        h = params["embedding"][tokens[i]] @ params["in"] + params["bias"]
        return jnp.mean((jax.nn.relu(h) @ params["out"] - targets[i]) ** 2)

    tx = dho2_jax.dho2(
        optax.adam(3e-3),
        num_largest=3,
        num_smallest=1,
        refresh_period=7,
        base_rate=base_rate,
        newton_learning_rate=0.1,
    )

    @jit
    def run(params, state):
        def step(carry, i):
            params, state = carry
            grads = jax.grad(loss)(params, i % 10)
            updates, state = tx.update(
                grads, state, params, value_fn=lambda p: loss(p, (i + 5) % 10)
            )
            return (optax.apply_updates(params, updates), state), updates

        return jax.lax.scan(step, (params, state), jnp.arange(50))

    (trained, state), updates = run(params, tx.init(params))
    assert dho2_jax.metrics(state)["refreshes"] == 8
    for name, where in [
        ("embedding", np.s_[6:, :]),
        ("in", np.s_[:, :3]),
        ("bias", np.s_[:3]),
        ("out", np.s_[:3, :]),
    ]:
        assert all(np.all(u[where] == 0) for u in np.asarray(updates[name])), name
        assert np.array_equal(trained[name][where], params[name][where]), name
        assert not np.array_equal(trained[name], params[name]), name


# Hessians of low rank, of one value, of none, and concave ones.


START, SLOPE = jnp.asarray(
    np.random.default_rng(6).standard_normal((2, 12)), jnp.float32
)
DEGENERATE = {
    "rank one": lambda p: 5 * jnp.vdot(SLOPE, p) ** 2,
    "isotropic": lambda p: 4 * jnp.vdot(p, p),
    "zero": lambda p: jnp.vdot(SLOPE, p),
    "concave": lambda p: -0.5 * jnp.vdot(p, jnp.arange(1.0, 13.0) * p),
}
FOUND = {  # of one smallest and two largest
    "rank one": [False, False, True],
    "isotropic": [False, False, True],
    "zero": [False, False, False],
    "concave": [True, True, True],
}
DEGENERATE_RATE = 1 / 8  # the inverse of the isotropic curvature


@pytest.fixture(scope="module", params=["fixed", "curvature"])
def degenerate_step(request):
    """One refresh and one step on a loss of `DEGENERATE`, with damping 0."""
    tx = dho2_jax.dho2(
        optax.sgd(DEGENERATE_RATE),
        num_largest=2,
        num_smallest=1,
        num_matvecs=12,
        refresh="external",
        subspace_decay=0.0,
        damping=0.0,
        base_rate=request.param,
    )

    @jit
    def step(which, params):
        def loss(p):
            return jax.lax.switch(which, list(DEGENERATE.values()), p)

        state = dho2_jax.refresh(tx.init(params), params, loss)
        grads = jax.grad(loss)(params)
        return (*tx.update(grads, state, params, value_fn=loss), grads)

    return request.param, step


@pytest.mark.parametrize("name", list(DEGENERATE))
def test_degenerate_hessians(degenerate_step, name):
    """Finite everywhere, also without damping, and `valid` says what was found."""
    base_rate, step = degenerate_step
    loss, params, valid = DEGENERATE[name], START, FOUND[name]
    updates, state, grads = step(list(DEGENERATE).index(name), params)
    metrics, space = dho2_jax.metrics(state), dho2_jax.subspace(state)
    chex.assert_tree_all_finite((updates, state))
    np.testing.assert_array_equal(space.valid, valid)
    assert metrics["num_valid"] == sum(valid)
    rows = np.float64(space.eigenvectors)
    assert np.all(rows[~np.array(valid)] == 0)
    after = params + updates
    own = -DEGENERATE_RATE * grads

    if name == "zero":
        # Nothing found: the refresh is rejected and the update is the base's own.
        assert (metrics["rejected"], metrics["refreshes"]) == (1, 0)
        assert np.asarray(updates).tobytes() == np.asarray(own).tobytes()
        return
    assert metrics["refreshes"] == 1
    if name == "concave":
        if base_rate == "curvature":
            # No direction of positive curvature: the base's own update.
            assert metrics["num_active"] == 0
            assert np.asarray(updates).tobytes() == np.asarray(own).tobytes()
        else:
            # FOSI: as long as a Newton step, and downhill where Newton goes uphill.
            values = np.float64(space.eigenvalues)
            np.testing.assert_allclose(
                rows @ np.float64(updates),
                -(rows @ np.float64(grads)) / np.abs(values),
                rtol=1e-4,
            )
        assert loss(after) < loss(params)
        return
    np.testing.assert_allclose(space.eigenvalues[-1], metrics["sharpness"])
    if base_rate == "fixed":
        # One exact Newton step, or Newton and gradient descent at rate 1 / curvature.
        assert loss(after) < 1e-9 * loss(params)
    else:
        # The Newton part is held to the base part's length, which is 0 for rank one.
        assert loss(after) <= loss(params)


def test_damping_zero_and_tiny_eigenvalues_stay_finite():
    """A kept pair may be small; it is never rounding, so its inverse is finite."""
    spectrum = np.concatenate([np.logspace(-12, -4, 16), [1e-2, 1.0, 30.0, 1e3]])
    a, _ = symmetric(spectrum, seed=7)
    tx = fixed(optax.sgd(1e-3), num_largest=8, num_smallest=2, num_matvecs=20)
    params = jnp.ones(20)
    state = refreshed(tx, params, quadratic(a))
    space = dho2_jax.subspace(state)
    kept = np.abs(np.float64(space.eigenvalues)[np.asarray(space.valid)])
    assert np.min(kept) > 1e3 * 1e-6
    updates, _ = jit(tx.update)(
        jnp.asarray(a @ np.ones(20), jnp.float32), state, params
    )
    chex.assert_tree_all_finite(updates)


# bfloat16.


@pytest.mark.slow
@pytest.mark.parametrize("base_rate", ["fixed", "curvature"])
def test_bfloat16_parameters(base_rate):
    loss, params = mlp((4, 6, 3), batch=20, seed=8)
    tx = dho2_jax.dho2(
        optax.adam(1e-2),
        num_largest=2,
        num_matvecs=10,
        refresh_period=2,
        base_rate=base_rate,
    )

    @jit
    def step(params, state):
        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params, value_fn=loss)
        return updates, optax.apply_updates(params, updates), state

    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    first, state = loss(half), tx.init(half)
    for i in range(5):
        updates, half, state = step(half, state)
        chex.assert_type(jax.tree.leaves((updates, half)), jnp.bfloat16)
        if i == 0:
            # bfloat16 keeps 2 to 3 digits of each product.
            values, _ = extreme(dense_hessian(loss, params), 2, 0)
            found = dho2_jax.subspace(state).eigenvalues
            np.testing.assert_allclose(found, values, rtol=0.03)
    for x in jax.tree.leaves(state.curvature.subspace):
        assert x.dtype in (jnp.float32, bool)
    assert state.curvature.momentum.dtype == jnp.float32
    assert dho2_jax.metrics(state)["rejected"] == 0
    assert loss(half) < first


def test_bfloat16_rounding_is_no_defect():
    params = SMALL_PARAMS.astype(jnp.bfloat16)
    state = refreshed(fixed(optax.sgd(0.1), num_largest=2), params, small_loss)
    assert dho2_jax.metrics(state)["rejected"] == 0


# Options.

RATES = {
    "newton_learning_rate": 0.1,
    "subspace_decay": 0.9,
    "damping": 0.0,
    "max_base_scaling": 3.0,
    "rate_schedule": 1.0,
}
NO_SLOPE = dict.fromkeys(RATES, 0.0)


@functools.cache
def program(**static):
    """Nine steps as a function of all rates, each linear in the step count."""
    kwargs = dict(num_largest=2, num_smallest=1, num_matvecs=6, refresh_period=4)
    kwargs |= static
    value_fn = (OUTPUTS_FN, LOSS_FN) if "ggn" in static.values() else small_loss

    @jit
    def run(params, rates, slopes):
        schedules = {
            name: lambda count, name=name: rates[name] + slopes[name] * count
            for name in RATES
        }
        tx = dho2_jax.dho2(optax.sgd(0.02, momentum=0.5), **kwargs, **schedules)

        def step(carry, _):
            params, state = carry
            grads = jax.grad(small_loss)(params)
            updates, state = tx.update(grads, state, params, value_fn=value_fn)
            return (optax.apply_updates(params, updates), state), None

        carry = (params, tx.init(params))
        params, state = jax.lax.scan(step, carry, None, length=9)[0]
        return params, dho2_jax.metrics(state)

    return run


def after(static, rates=(), slopes=()):
    """The parameters after nine steps, and the metrics."""
    run = program(**{"base_rate": "fixed", **static})
    params, metrics = run(SMALL_PARAMS, RATES | dict(rates), NO_SLOPE | dict(slopes))
    return flat(params), metrics


OPTIONS = [
    ("fixed", {"num_largest": 3}),
    ("fixed", {"num_smallest": 2}),
    ("fixed", {"num_matvecs": 4}),
    ("fixed", {"newton_learning_rate": 0.05}),
    ("fixed", {"newton_learning_rate": 0.0}),
    ("fixed", {"newton_learning_rate": "schedule"}),
    ("fixed", {"subspace_decay": 0.5}),
    ("fixed", {"subspace_decay": "schedule"}),
    ("fixed", {"subspace_momentum": "heavy_ball"}),
    ("fixed", {"subspace_momentum": "nesterov"}),
    ("fixed", {"damping": 0.5}),
    ("fixed", {"damping": "schedule"}),
    ("fixed", {"max_base_scaling": 1.0}),
    ("fixed", {"max_base_scaling": "schedule"}),
    ("fixed", {"rate_schedule": 0.5}),
    ("fixed", {"rate_schedule": "schedule"}),
    ("fixed", {"curvature": "ggn"}),
    ("fixed", {"negative_curvature": "base"}),
    ("fixed", {"seed": 1}),
    ("fixed", {"warmup_steps": 2}),
    ("fixed", {"refresh_period": 2}),
    ("fixed", {"base_rate": "curvature"}),
    ("curvature", {"newton_learning_rate": 0.0}),
    ("curvature", {"subspace_decay": 0.5}),
    ("curvature", {"damping": 0.5}),
    ("curvature", {"max_base_scaling": 0.5}),
    ("curvature", {"rate_schedule": 0.5}),
    ("curvature", {"negative_curvature": "abs"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "change"),
    OPTIONS,
    ids=[f"{mode}-{name}={x}" for mode, c in OPTIONS for name, x in c.items()],
)
def test_each_option_changes_the_result(mode, change):
    plain, _ = after({"base_rate": mode})
    name, value = next(iter(change.items()))
    if value == "schedule":  # falls linearly to about zero
        changed, metrics = after({"base_rate": mode}, {}, {name: -RATES[name] / 9})
        if name == "damping":
            changed, metrics = after({"base_rate": mode}, {}, {name: 0.1})
    elif name in RATES:
        changed, metrics = after({"base_rate": mode}, {name: value})
    else:
        changed, metrics = after({"base_rate": mode, **change})
    chex.assert_tree_all_finite(changed)
    assert metrics["rejected"] == 0
    # Far above the rounding of nine float32 steps on numbers near 1.
    assert np.max(np.abs(changed - plain)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reverse_over_reverse", "central_difference"])
def test_other_routes_to_the_hessian_agree(name):
    plain, _ = after({})
    changed, _ = after({"curvature": name})
    tolerance = 1e-4 if name == "reverse_over_reverse" else 5e-2
    assert np.max(np.abs(changed - plain)) < tolerance
    assert not np.array_equal(changed, plain)


def test_no_newton_step_leaves_the_subspace_alone():
    a, _ = symmetric(outlying(20), seed=1)
    tx = fixed(optax.sgd(0.1), num_largest=4, num_matvecs=20, newton_learning_rate=0.0)
    params = jnp.ones(20)
    state = refreshed(tx, params, quadratic(a))
    updates, _ = jit(tx.update)(params, state, params)
    rows = np.float64(dho2_jax.subspace(state).eigenvectors)
    np.testing.assert_allclose(rows @ np.float64(updates), 0, atol=1e-6)
    assert np.linalg.norm(updates) > 0.1


def test_a_base_rate_of_zero_leaves_the_newton_step():
    a, _ = symmetric(outlying(20), seed=1)
    tx = fixed(optax.sgd(0.0), num_largest=4, num_matvecs=20)
    params = jnp.ones(20)
    state = refreshed(tx, params, quadratic(a))
    updates, _ = jit(tx.update)(params, state, params)
    space = dho2_jax.subspace(state)
    rows, values = np.float64(space.eigenvectors), np.float64(space.eigenvalues)
    expected = -rows.T @ ((rows @ np.ones(20)) / values)
    np.testing.assert_allclose(updates, expected, atol=1e-6)
