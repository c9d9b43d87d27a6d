# SPDX-License-Identifier: Apache-2.0
"""When a refresh runs: on the host and inside `update` alike."""

import jax
import jax.numpy as jnp
import optax
import pytest

import dho2_jax

CURVATURES = jnp.array([1.0, 2.0, 3.0, 10.0])


def loss(x):
    return 0.5 * jnp.sum(CURVATURES * x**2)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"refresh_period": 7}, [0, 7, 14]),
        ({"refresh_period": 7, "warmup_steps": 3}, [3, 10, 17]),
        (
            {"refresh_period": 10, "warmup_steps": 3, "early_refreshes": (2, 5)},
            [3, 5, 8, 13],
        ),
        ({"refresh_period": 10, "early_refreshes": (10, 12)}, [0, 10, 12]),
    ],
)
@pytest.mark.slow
def test_host_and_update_agree(schedule, expected):
    steps = 20
    on_host = [i for i in range(steps) if dho2_jax.should_refresh(i, **schedule)]
    assert on_host == expected

    tx = dho2_jax.dho2(optax.sgd(1e-3), num_largest=1, **schedule)

    @jax.jit
    def step(x, state):
        updates, state = tx.update(jax.grad(loss)(x), state, x, value_fn=loss)
        return optax.apply_updates(x, updates), state

    x, seen = jnp.ones(4), []
    state = tx.init(x)
    for i in range(steps):
        before = int(dho2_jax.metrics(state)["refreshes"])
        x, state = step(x, state)
        if int(dho2_jax.metrics(state)["refreshes"]) > before:
            seen.append(i)
    assert seen == expected
    assert int(dho2_jax.metrics(state)["age"]) == steps - expected[-1]


@pytest.mark.parametrize(
    "early",
    [5, (0,), (2.5,), ("a",), (True,)],
    ids=["int", "zero", "float", "str", "bool"],
)
def test_early_refreshes_are_steps(early):
    with pytest.raises(ValueError, match="early_refreshes"):
        dho2_jax.should_refresh(3, early_refreshes=early)
    with pytest.raises(ValueError, match="early_refreshes"):
        dho2_jax.dho2(optax.sgd(0.1), early_refreshes=early)
