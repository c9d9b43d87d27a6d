"""`mesh=`: many devices do what one does, wherever parameters and curvature lie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_cases import (
    EXPLICIT,
    Layout,
    Trainer,
    assert_same_run,
    assert_unused_untouched,
    dense,
)

import dho2_jax

FSDP = {"kernel": P(None, None, "d"), "tall": P("d"), "wide": P(None, "d")}
MIXED = {  # "tall" and "tower" are stored as one and lie differently
    "kernel": P(None, None, "data", "model"),
    "tall": P("data", "model"),
    "wide": P(None, "model"),
}
CUBE = {
    "kernel": P(None, None, ("x", "z"), "y"),
    "tall": P(("y", "x")),
    "wide": P(None, "z"),
}

LAYOUTS = {
    "1": Layout((1,)),
    "2": Layout((2,)),
    "4": Layout((4,)),
    "8": Layout((8,)),
    "8_explicit": Layout((8,), kind=EXPLICIT),
    "6": Layout((3, 2), ("a", "b")),  # no leaf and no slab splits into three
    "fsdp": Layout((8,), specs=FSDP),
    "fsdp_explicit": Layout((8,), kind=EXPLICIT, specs=FSDP),
    "mixed": Layout((4, 2), ("data", "model"), specs=MIXED),
    "mixed_explicit": Layout((4, 2), ("data", "model"), EXPLICIT, MIXED),
    "cube": Layout((2, 2, 2), ("x", "y", "z"), specs=CUBE),
}


@functools.cache
def trainer(layout, problem="adam"):
    return Trainer(problem, LAYOUTS[layout])


@functools.cache
def trained(layout):
    """Fifty steps of the problem with all leaves."""
    return trainer(layout).run(50)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["1", "2", "4", "8"])
def test_fifty_steps_agree_with_one_device(layout):
    run = trained(layout)
    _, expected = dense("adam")
    assert int(expected.state.curvature.counters.refreshes) == 5
    assert_same_run(run, expected)
    assert_unused_untouched(run.params)
    assert_unused_untouched(expected.params)
    assert trainer(layout).step._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, problem",
    [
        ("8_explicit", "few"),
        ("6", "few"),
        ("fsdp", "few"),
        ("fsdp_explicit", "heavy_ball"),  # and Gauss-Newton, and the fixed rate
        ("mixed", "heavy_ball"),
        ("mixed_explicit", "own_products"),
        ("cube", "muon"),  # and the external refresh
        ("mixed", "linear"),
    ],
)
def test_every_layout_trains_as_one_device(layout, problem):
    program = Trainer(problem, LAYOUTS[layout])
    run = program.run(22)
    _, expected = dense(problem)
    assert int(run.state.curvature.counters.refreshes) == 3
    assert_same_run(run, expected)
    assert program.step._cache_size() == 1
    if problem == "few":
        assert_unused_untouched(run.params)
    basis = run.state.curvature.subspace.eigenvectors.leaves
    share = 2 if layout == "6" else 8
    for x in basis:
        assert x.addressable_shards[0].data.size == x.size // share


@pytest.mark.parametrize(
    "curvature",
    ["hessian", "ggn", "reverse_over_reverse", "central_difference"],
)
def test_every_product_is_traced_under_explicit_axes(curvature):
    """Where the compiler may not choose, each operation must say where it lies."""
    mesh = jax.make_mesh((8,), ("d",), (EXPLICIT,))
    w = jax.device_put(jnp.ones((16, 256)), NamedSharding(mesh, P("d", None)))
    tx = dho2_jax.dho2(optax.sgd(0.1), num_largest=2, curvature=curvature, mesh=mesh)

    def outputs_fn(w):
        return jnp.sum(jnp.sin(w) ** 2)

    def loss_fn(y):
        return 0.5 * y**2

    def step(w):
        state = tx.init(w)
        loss = lambda p: loss_fn(outputs_fn(p))  # noqa: E731
        source = (outputs_fn, loss_fn) if curvature == "ggn" else loss
        updates, state = tx.update(jax.grad(loss)(w), state, w, value_fn=source)
        return updates, dho2_jax.refresh(state, w, source)

    with jax.set_mesh(mesh):
        updates, _ = jax.eval_shape(step, w)
    assert updates.sharding.spec == P("d", None)


# --- save and restore --------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`(path, next losses)` of the run on eight devices after fifty steps."""
    ocp = pytest.importorskip("orbax.checkpoint")
    run = trained("8")
    path = tmp_path_factory.mktemp("run") / "state"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, (run.params, run.state))
    return path, trainer("8").run(12, run.params, run.state).losses


@pytest.mark.slow
@pytest.mark.parametrize("layout", [None, "1", "4", "8"])
def test_one_saved_state_continues_on_any_number_of_devices(layout, saved):
    ocp = pytest.importorskip("orbax.checkpoint")
    path, expected = saved
    program = trainer(layout) if layout else dense("adam")[0]
    params = program.params
    target = jax.eval_shape(program.tx.init, params)
    if layout:
        where = dho2_jax.state_shardings(program.tx, params)
    else:
        where = jax.tree.map(lambda _: params["tall"].sharding, target)
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), target, where
    )
    with ocp.StandardCheckpointer() as checkpointer:
        params, state = checkpointer.restore(path, (params, target))
    assert int(state.curvature.count) == 50
    run = program.run(12, params, state)
    np.testing.assert_allclose(run.losses, expected, rtol=2e-5)
    assert int(run.state.curvature.counters.refreshes) == 7
    assert program.traces == 1


def copies_of(x):
    """What the devices hold of each part of an array."""
    copies = {}
    for shard in x.addressable_shards:
        copies.setdefault(str(shard.index), []).append(np.asarray(shard.data))
    return list(copies.values())


@pytest.mark.slow
def test_replicas_are_bit_identical_after_a_hundred_steps():
    first = trained("8")
    run = trainer("8").run(50, first.params, first.state)
    assert int(run.state.curvature.count) == 100
    replicated = 0
    for x in jax.tree.leaves((run.params, run.state)):
        parts = copies_of(x)
        replicated += len(parts) == 1 and len(parts[0]) == 8
        for one, *others in parts:
            for other in others:
                np.testing.assert_array_equal(other, one)
    assert replicated > 30  # parameters, counters, eigenvalues, the rate


# --- work --------------------------------------------------------------------------


def test_work_of_a_product_falls_with_the_devices():
    """FLOPs on each device, with the curvature batch fixed."""
    params = {"v": jnp.ones((32, 64)), "w": jnp.ones((64, 8))}
    inputs = jnp.ones((1024, 32))

    def loss(params, inputs):
        return jnp.mean(jnp.tanh(inputs @ params["v"]) @ params["w"])

    def product(v, params, inputs):
        return dho2_jax.hvp(lambda p: loss(p, inputs), params)(v)

    def flops(size):
        mesh = Mesh(np.array(jax.devices()[:size]), ("d",))
        copies = jax.device_put(params, NamedSharding(mesh, P()))
        shares = jax.device_put(inputs, NamedSharding(mesh, P("d")))
        lowered = jax.jit(product).lower(copies, copies, shares)
        return lowered.compile().cost_analysis()["flops"]

    one = flops(1)
    assert one > 3 * 2 * 1024 * 32 * 64  # the first layer alone, three times
    for size in (2, 4, 8):
        np.testing.assert_allclose(flops(size), one / size, rtol=0.02)
