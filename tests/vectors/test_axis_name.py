"""`axis_name=`: the same numbers inside the caller's own `shard_map` or `pmap`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import up_to_sign
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_cases import (
    FAST,
    FEW,
    OPTIONS,
    PROBLEMS,
    assert_close,
    assert_unused_untouched,
    batch,
    dense,
    parameters,
    shard_mapped,
    step_on,
)

import dho2_jax

STEPS = 12


def transformation(axis_name, **kwargs):
    return dho2_jax.dho2(
        PROBLEMS["few"].base(), axis_name=axis_name, **OPTIONS | kwargs
    )


def make_mesh(shape, names):
    return Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), names)


def rows_of(subspace):
    leaves = jax.tree.leaves(subspace.eigenvectors)
    return np.concatenate(
        [np.asarray(x, np.float64).reshape(len(x), -1) for x in leaves], axis=1
    )


@pytest.fixture(scope="module")
def expected():
    """One device on the whole batch."""
    return dense("few")[0].run(STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, names, check_vma, shard_base_state",
    [
        ((8,), ("d",), True, False),
        ((8,), ("d",), False, True),
        ((4, 2), ("a", "b"), True, True),
    ],
)
def test_shard_map_trains_as_one_device(
    shape, names, check_vma, shard_base_state, expected
):
    mesh = make_mesh(shape, names)
    tx = transformation(
        names[0] if len(names) == 1 else names, shard_base_state=shard_base_state
    )
    params = jax.device_put(parameters(FEW), NamedSharding(mesh, P()))
    shares = jax.device_put(batch(), NamedSharding(mesh, P(names)))
    specs = dho2_jax.state_specs(tx, params)

    mapped = functools.partial(shard_mapped, mesh, check_vma)
    state = mapped(tx.init, P(), specs)(params)
    where = dho2_jax.state_shardings(tx, params, mesh)
    for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)

    step = mapped(
        step_on(tx, names, check_vma), (P(), specs, P(names)), (P(), specs, P())
    )
    lowered = step.lower(params, state, shares).as_text()
    assert "stablehlo.reduce_scatter" in lowered
    losses = []
    for _ in range(STEPS):
        params, state, value = step(params, state, shares)
        losses.append(float(value))
    assert step._cache_size() == 1

    np.testing.assert_allclose(losses, expected.losses, rtol=2e-5)
    assert_close(params, expected.params, 1e-4)
    assert_unused_untouched(params)
    found, other = dho2_jax.subspace(state), dho2_jax.subspace(expected.state)
    np.testing.assert_allclose(found.eigenvalues, other.eigenvalues, atol=3e-4)
    assert up_to_sign(rows_of(found), rows_of(other)) < 1e-3
    for x in state.curvature.subspace.eigenvectors.leaves:
        assert x.addressable_shards[0].data.size == x.size // 8
    moment = state.base_state[0].mu["tall"].addressable_shards[0].data
    assert moment.size == 2560 // (8 if shard_base_state else 1)


@pytest.mark.slow
def test_pmap_trains_as_one_device():
    _, expected = dense("least", 6)
    tx = transformation("d", **PROBLEMS["least"].options)
    start = parameters(PROBLEMS["least"].leaves)
    first = NamedSharding(make_mesh((8,), ("d",)), P("d"))
    params = jax.tree.map(lambda x: jnp.stack([x] * 8), start)
    shares = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch())
    params, shares = jax.device_put((params, shares), first)
    init = jax.pmap(tx.init, axis_name="d")
    step = jax.pmap(step_on(tx, ("d",), check_vma=False), axis_name="d")
    step = jax.jit(step, compiler_options=FAST)
    state = jax.jit(init, compiler_options=FAST)(params)
    losses = []
    for _ in range(6):
        params, state, value = step(params, state, shares)
        losses.append(np.asarray(value))
    np.testing.assert_array_equal(losses, np.array(losses)[:, :1].repeat(8, 1))
    np.testing.assert_allclose(np.array(losses)[:, 0], expected.losses, rtol=2e-5)
    first = jax.tree.map(lambda x: x[0], params)
    copies = jax.tree.map(lambda x: np.stack([x] * 8), first)
    chex.assert_trees_all_equal(params, copies)
    assert_close(first, expected.params, 1e-4)
    assert int(state.curvature.counters.refreshes[0]) == 2


@pytest.mark.slow
def test_init_and_a_scan_of_updates_inside_one_shard_map(expected):
    """What varies over the axis after `update` is what varied before it."""
    tx = transformation("d")
    step = step_on(tx, ("d",))

    def run(params, batch):
        def body(carry, _):
            params, state, value = step(*carry, batch)
            return (params, state), value

        carry = params, tx.init(params)
        (params, state), losses = jax.lax.scan(body, carry, None, length=STEPS)
        return params, losses, dho2_jax.metrics(state), dho2_jax.subspace(state)

    mapped = jax.shard_map(
        run, mesh=make_mesh((8,), ("d",)), in_specs=(P(), P("d")), out_specs=P()
    )
    run = jax.jit(mapped, compiler_options=FAST)
    params, losses, metrics, subspace = run(parameters(FEW), batch())
    np.testing.assert_allclose(losses, expected.losses, rtol=2e-5)
    assert_close(params, expected.params, 1e-4)
    assert int(metrics["refreshes"]) == 2
    rows = rows_of(dho2_jax.subspace(expected.state))
    assert up_to_sign(rows_of(subspace), rows) < 1e-3
