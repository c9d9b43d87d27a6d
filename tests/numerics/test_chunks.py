"""A loss in parts: the same products, with the activations of one part at a time."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import flat, jit
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_jax

BATCH, WIDTH, LAYERS = 64, 8, 4
OPERATORS = {
    "hessian": dho2_jax.hvp,
    "reverse_over_reverse": dho2_jax.hvp_reverse_over_reverse,
    "central_difference": dho2_jax.hvp_central_difference,
}


def outputs_fn(params, batch):
    h = batch["x"]
    for weights in params["layers"]:
        h = jnp.tanh(h @ weights)
    return h @ params["out"]


def loss_of_outputs(outputs, batch):
    return jnp.mean((outputs - batch["y"]) ** 2)


def loss(params, batch):
    return loss_of_outputs(outputs_fn(params, batch), batch)


def problem(batch=BATCH, width=WIDTH):
    keys = jax.random.split(jax.random.key(0), LAYERS + 2)
    layers = [jax.random.normal(k, (width, width)) / width**0.5 for k in keys[2:]]
    params = {"layers": layers, "out": jax.random.normal(keys[0], (width,))}
    x = jax.random.normal(keys[1], (batch, width))
    return params, {"x": x, "y": jnp.sin(x.sum(-1))}


def random_like(params):
    return jax.tree.map(lambda x: jax.random.normal(jax.random.key(9), x.shape), params)


def assert_close(found, expected, tolerance):
    a, b = flat(found), flat(expected)
    assert np.max(np.abs(a - b)) <= tolerance * np.max(np.abs(b))


@pytest.mark.parametrize("curvature", [*OPERATORS, "ggn"])
def test_products_are_those_of_the_whole_batch(curvature):
    params, batch = problem()

    @jit
    def products(params, v):
        if curvature == "ggn":
            fns = (outputs_fn, loss_of_outputs)
            whole = [functools.partial(fn, batch=batch) for fn in fns]
            parts = dho2_jax.chunked_value_fn(fns, batch, num_chunks=4)
            return [dho2_jax.ggn_vp(*fns, params)(v) for fns in (whole, parts)]
        parts = dho2_jax.chunked_value_fn(loss, batch, num_chunks=4)
        each = (lambda p: loss(p, batch)), parts
        return [OPERATORS[curvature](fn, params)(v) for fn in each]

    whole, parts = products(params, random_like(params))
    assert_close(parts, whole, 2e-3 if curvature == "central_difference" else 1e-5)


@pytest.mark.slow
def test_a_refresh_and_its_probe_are_those_of_the_whole_batch():
    params, batch = problem()
    tx = dho2_jax.dho2(optax.sgd(1e-2), num_largest=2, num_matvecs=6)

    @functools.partial(
        jax.jit,
        static_argnums=0,
        compiler_options={"xla_backend_optimization_level": 0},
    )
    def step(num_chunks):
        fn = dho2_jax.chunked_value_fn(loss, batch, num_chunks=num_chunks)
        value, grads = jax.value_and_grad(fn)(params)
        updates, state = tx.update(grads, tx.init(params), params, value_fn=fn)
        return value, updates, dho2_jax.metrics(state)

    (value, updates, seen), (value4, updates4, seen4) = step(1), step(4)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value4, value, rtol=1e-5)
    assert int(seen4["refreshes"]) == 1
    assert_close(updates4, updates, 1e-3)
    for name in ("sharpness", "base_scaling"):
        np.testing.assert_allclose(seen4[name], seen[name], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_temporaries_fall_with_the_number_of_parts(curvature):
    """What one linearisation keeps for all products of a refresh, included."""
    params, batch = problem(batch=512, width=16)

    def several(num_chunks, params, batch, v):
        if curvature == "ggn":
            fns = (outputs_fn, loss_of_outputs)
            parts = dho2_jax.chunked_value_fn(fns, batch, num_chunks=num_chunks)
            matvec = dho2_jax.ggn_vp(*parts, params)
        else:
            parts = dho2_jax.chunked_value_fn(loss, batch, num_chunks=num_chunks)
            matvec = dho2_jax.hvp(parts, params)
        return jax.lax.fori_loop(0, 3, lambda _, v: matvec(v), v)

    def temporaries(num_chunks):
        compiled = (
            jax.jit(several, static_argnums=0)
            .lower(num_chunks, params, batch, random_like(params))
            .compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(16) < 0.2 * temporaries(1)  # the parts are copied, too


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_batch_stays_where_it_is(kind):
    params, batch = problem()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    placed = jax.device_put(batch, NamedSharding(mesh, P("data")))
    whole = jax.device_put(params, NamedSharding(mesh, P()))

    @jax.jit
    def product(params, batch, v):
        parts = dho2_jax.chunked_value_fn(loss, batch, num_chunks=4)
        return dho2_jax.hvp(parts, params)(v)

    v = random_like(params)
    expected = product(params, batch, v)
    v = jax.device_put(v, NamedSharding(mesh, P()))
    assert_close(product(whole, placed, v), expected, 1e-5)
    text = product.lower(whole, placed, v).compile().as_text()
    assert "all-reduce" in text
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)


@pytest.mark.slow
def test_inside_shard_map_each_device_takes_its_own_parts():
    params, batch = problem()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = dho2_jax.dho2(
        optax.sgd(1e-2), num_largest=2, refresh="external", axis_name="data"
    )
    specs = dho2_jax.state_specs(tx, params)

    def largest(num_chunks, batch):
        def local(params, batch):
            parts = dho2_jax.chunked_value_fn(loss, batch, num_chunks=num_chunks)
            return dho2_jax.refresh(tx.init(params), params, parts)

        where = {"mesh": mesh, "in_specs": (P(), P("data")), "out_specs": specs}
        state = jit(jax.shard_map(local, **where))(params, batch)
        return dho2_jax.subspace(state).eigenvalues

    np.testing.assert_allclose(largest(4, batch), largest(1, batch), rtol=1e-4)


def test_part_j_is_every_nth_example_from_the_jth_on():
    x = jnp.arange(6)
    seen = []

    def record(_, part):
        jax.debug.callback(lambda p: seen.append(p.tolist()), part, ordered=True)
        return jnp.mean(part * 1.0)

    value = dho2_jax.chunked_value_fn(record, x, num_chunks=3)(None)
    jax.effects_barrier()
    assert seen == [[0, 3], [1, 4], [2, 5]]
    assert float(value) == 2.5


@pytest.mark.parametrize(
    "loss_fn, batch, num_chunks, message",
    [
        (loss, jnp.ones((6, 2)), 4, r"`batch` must .* num_chunks=4.*\(6, 2\)"),
        (loss, (jnp.ones(4), jnp.ones(8)), 4, r"`batch` must .*\(4,\), \(8,\)"),
        (loss, jnp.ones(()), 1, r"`batch` must .*\(\)"),
        (loss, {}, 2, "`batch` must have at least one array"),
        (loss, jnp.ones(4), 0, "`num_chunks` must be >= 1, got 0"),
        (loss, jnp.ones(4), 2.0, "`num_chunks` must be a static integer"),
        (3, jnp.ones(4), 2, "`loss_fn` must be a function .* got int"),
        ((loss,), jnp.ones(4), 2, "`loss_fn` must be a function .* got tuple"),
    ],
)
def test_errors(loss_fn, batch, num_chunks, message):
    with pytest.raises(ValueError, match=message):
        dho2_jax.chunked_value_fn(loss_fn, batch, num_chunks=num_chunks)


def test_a_loss_that_is_not_a_scalar():
    for loss in (lambda p, b: (jnp.sum(p * b), {}), lambda p, b: p * b[0]):
        value_fn = dho2_jax.chunked_value_fn(loss, jnp.ones((8, 3)), num_chunks=2)
        with pytest.raises(ValueError, match="`loss_fn` must return one scalar"):
            value_fn(jnp.ones(3))
