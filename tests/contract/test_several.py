"""Several DHO² states in one nest: functions answer for all, or for one of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dho2_jax

LABELS = {"first": "a", "second": "b", "third": "b"}
OPTIONS = {
    "a": {"num_largest": 1, "refresh_period": 4},
    "b": {"num_largest": 3, "refresh_period": 6, "seed": 1},
}


def make(name, refresh="periodic", base=None):
    base = optax.adam(1e-2) if base is None else base
    return dho2_jax.dho2(base, refresh=refresh, **OPTIONS[name])


def both(refresh="periodic"):
    return optax.partition({"a": make("a", refresh), "b": make("b", refresh)}, LABELS)


def parameters():
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = {"first": (3, 2), "second": (4,), "third": (2, 2)}
    return {
        name: jax.random.normal(key, size)
        for key, (name, size) in zip(keys, sizes.items(), strict=True)
    }


def loss(params):
    flat = jnp.concatenate([x.ravel() for x in params.values()])
    scales = jnp.linspace(1.0, 9.0, flat.size)
    return jnp.sum(scales * flat**2) + jnp.sum(jnp.tanh(flat)) ** 2


def group(params, name):
    return {leaf: x for leaf, x in params.items() if LABELS[leaf] == name}


@pytest.fixture(scope="module")
def state():
    tx, params = both("external"), parameters()
    return dho2_jax.refresh(tx.init(params), params, loss)


def test_metrics_are_told_apart_by_the_keys_on_the_way(state):
    found = dho2_jax.metrics(state)
    assert {key.split("/")[0] for key in found} == {"a", "b"}
    assert int(found["a/num_valid"]) == 1 and int(found["b/num_valid"]) == 3
    for name in "ab":
        one = dho2_jax.metrics(state, where=name)
        chex.assert_trees_all_equal(one, {key: found[f"{name}/{key}"] for key in one})


def test_subspaces_are_those_of_the_blocks(state):
    params = parameters()
    whole = dho2_jax.subspace(state)
    for name in "ab":
        own = group(params, name)
        flat, back = jax.flatten_util.ravel_pytree(own)
        hessian = jax.hessian(lambda x, back=back: loss(params | back(x)))(flat)
        largest = np.linalg.eigvalsh(hessian)[-OPTIONS[name]["num_largest"] :]
        np.testing.assert_allclose(whole[name].eigenvalues, largest, rtol=1e-4)
        one = dho2_jax.subspace(state, where=name)
        chex.assert_trees_all_equal(one, whole[name])


def test_one_of_them_can_be_renewed_or_switched_off(state):
    params = parameters()
    again = dho2_jax.refresh(state, params, loss, where="b")
    count = {k: int(v) for k, v in dho2_jax.metrics(again).items() if "refreshes" in k}
    assert count == {"a/refreshes": 1, "b/refreshes": 2}
    off = dho2_jax.metrics(dho2_jax.set_enabled(state, False, where="a"))
    assert int(off["a/enabled"]) == 0 and int(off["b/enabled"]) == 1
    off = dho2_jax.metrics(dho2_jax.set_enabled(state, False))
    assert int(off["a/enabled"]) == int(off["b/enabled"]) == 0


def test_whole_paths_tell_them_apart_where_keys_do_not():
    tx = optax.chain(make("a", "external"), make("b", "external"))
    found = dho2_jax.metrics(tx.init(parameters()))
    assert {key.rsplit("/", 1)[0] for key in found} == {"0", "1"}
    assert "sharpness" in dho2_jax.metrics(tx.init(parameters()), where="1")


@pytest.mark.parametrize("refresh", ["periodic", "staggered"])
@pytest.mark.slow
def test_a_step_in_a_partition_is_that_of_each_part_alone(refresh):
    """`whole_params`: inside, `update` sees its own part alone."""
    options = {} if refresh == "periodic" else {"refresh_period": 12}
    parts = {
        name: dho2_jax.dho2(
            optax.adam(1e-2), **OPTIONS[name] | options, refresh=refresh
        )
        for name in "ab"
    }
    tx, params = optax.partition(parts, LABELS), parameters()
    state, step = (
        tx.init(params),
        jax.jit(
            lambda grads, state, params: tx.update(
                grads, state, params, value_fn=loss, whole_params=params
            )
        ),
    )
    alone = {name: parts[name].init(group(params, name)) for name in "ab"}

    @jax.jit
    def one_by_one(grads, states, params):
        new, after = {}, {}
        for name in "ab":
            mine = group(params, name)
            updates, after[name] = parts[name].update(
                group(grads, name),
                states[name],
                mine,
                value_fn=lambda part: loss(params | part),
            )
            new |= updates
        return new, after

    for _ in range(30):
        grads = jax.grad(loss)(params)
        expected, alone = one_by_one(grads, alone, params)
        updates, state = step(grads, state, params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)
        params = optax.apply_updates(params, updates)
    assert int(dho2_jax.metrics(state, where="b")["refreshes"]) >= 1


def test_masked_takes_the_whole_parameters_too():
    tx = optax.masked(make("a"), {"first": True, "second": False, "third": False})
    params = parameters()
    updates, state = jax.jit(
        lambda state, params: tx.update(
            jax.grad(loss)(params), state, params, value_fn=loss, whole_params=params
        )
    )(tx.init(params), params)
    assert int(dho2_jax.metrics(state)["refreshes"]) == 1
    assert loss(optax.apply_updates(params, {**updates, "second": 0, "third": 0})) < (
        loss(params)
    )
