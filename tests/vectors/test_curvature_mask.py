"""`curvature_mask`: some parameters take part in the curvature, others do not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import up_to_sign
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_jax

nnx = pytest.importorskip("flax.nnx")

SETTINGS = {"num_largest": 3, "num_matvecs": 8, "refresh_period": 4}
MASK = {"embed": False, "net": {"w": True, "v": True}}


def make_params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "embed": jax.random.normal(keys[0], (256, 8)) / 8,
        "net": {
            "w": jax.random.normal(keys[1], (8, 256)) / 3,
            "v": jax.random.normal(keys[2], (256,)) / 16,
        },
    }


def make_batch(size=64):
    x = jax.random.normal(jax.random.key(3), (size, 256))
    return x, jnp.sin(x.sum(1) / 4)


def loss(params, batch):
    x, y = batch
    net = params["net"]
    return jnp.mean((jnp.tanh(x @ params["embed"] @ net["w"]) @ net["v"] - y) ** 2)


def stepper(tx):
    @jax.jit
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(
            grads, state, params, value_fn=lambda p: loss(p, batch)
        )
        return optax.apply_updates(params, updates), state, value

    return step


def refreshed(tx, params, batch):
    """The state after one refresh."""

    @jax.jit
    def refresh(state, params):
        return dho2_jax.refresh(state, params, lambda p: loss(p, batch))

    return refresh(tx.init(params), params)


def run(step, params, state, batch, steps=10):
    losses = []
    for _ in range(steps):
        params, state, value = step(params, state, batch)
        losses.append(float(value))
    return losses, params, state


@pytest.mark.slow
def test_eigenpairs_are_those_of_the_block_that_takes_part():
    params, batch = make_params(), make_batch()
    tx = dho2_jax.dho2(
        optax.adam(1e-2),
        num_largest=2,
        num_matvecs=40,
        refresh="external",
        curvature_mask=MASK,
    )
    state = refreshed(tx, params, batch)
    found = dho2_jax.subspace(state)
    flat, unravel = jax.flatten_util.ravel_pytree(params["net"])
    dense = jax.hessian(lambda x: loss(params | {"net": unravel(x)}, batch))(flat)
    values, vectors = np.linalg.eigh(np.asarray(dense, np.float64))
    np.testing.assert_allclose(found.eigenvalues, values[-2:], rtol=1e-5)
    rows = jax.vmap(lambda x: jax.flatten_util.ravel_pytree(x)[0])(
        found.eigenvectors["net"]
    )
    assert up_to_sign(np.asarray(rows), vectors[:, -2:].T) < 1e-3
    assert not jax.tree.leaves(found.eigenvectors["embed"])
    n = sum(x.size for x in jax.tree.leaves(params["net"]))
    stored = jax.tree.leaves(state.curvature.subspace.eigenvectors)
    assert sum(x.size for x in stored) < 2 * n + 2 * 8 * 128


@pytest.mark.slow
def test_each_part_is_trained_as_if_the_other_were_given():
    """The rest by its base, what takes part as by a dho2 that knows nothing else."""
    params, batch = make_params(), make_batch()
    tx = dho2_jax.dho2(optax.adam(1e-2), curvature_mask=MASK, **SETTINGS)
    alone, base = dho2_jax.dho2(optax.adam(1e-2), **SETTINGS), optax.adam(1e-2)

    @jax.jit
    def both(params, state, alone_state, base_state):
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(
            grads, state, params, value_fn=lambda p: loss(p, batch)
        )
        net, alone_state = alone.update(
            grads["net"],
            alone_state,
            params["net"],
            value_fn=lambda net: loss(params | {"net": net}, batch),
        )
        embed, base_state = base.update(grads["embed"], base_state, params["embed"])
        expected = {"embed": embed, "net": net}
        params = optax.apply_updates(params, updates)
        return params, state, alone_state, base_state, updates, expected

    state = tx.init(params)
    others = alone.init(params["net"]), base.init(params["embed"])
    for _ in range(10):
        params, state, *others, updates, expected = both(params, state, *others)
        chex.assert_trees_all_close(updates, expected, rtol=2e-4, atol=1e-7)
    assert int(dho2_jax.metrics(state)["refreshes"]) == 3


@pytest.mark.slow
def test_the_base_sees_all_parameters():
    """A base that freezes what takes no part, and one that clips by the global norm."""
    params, batch = make_params(), make_batch()
    base = optax.partition(
        {"train": optax.adam(1e-2), "freeze": optax.set_to_zero()},
        {"embed": "freeze", "net": "train"},
    )
    tx = dho2_jax.dho2(base, curvature_mask=MASK, **SETTINGS)
    losses, end, _ = run(stepper(tx), params, tx.init(params), batch)
    np.testing.assert_array_equal(end["embed"], params["embed"])
    assert losses[-1] < losses[0]

    tx = dho2_jax.dho2(
        optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0)),
        curvature_mask=MASK,
        rate_schedule=0.5,
        **(SETTINGS | {"refresh": "external"}),
    )
    grads = jax.grad(loss)(params, batch)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert abs(float(optax.tree.norm(updates)) - 0.5e-3) < 1e-6


def test_masks_of_several_forms():
    params = make_params()
    masks = (
        MASK,
        {"embed": np.bool_(False), "net": True},
        lambda p: jax.tree_util.tree_map_with_path(lambda k, _: k[0].key == "net", p),
    )
    states = [
        dho2_jax.dho2(optax.adam(1e-2), curvature_mask=mask, **SETTINGS).init(params)
        for mask in masks
    ]
    chex.assert_trees_all_equal_structs(states[0], states[1])
    chex.assert_trees_all_equal_structs(states[0], states[2])
    whole = dho2_jax.dho2(optax.adam(1e-2), **SETTINGS).init(params)
    everything = dho2_jax.dho2(optax.adam(1e-2), curvature_mask=True, **SETTINGS)
    chex.assert_trees_all_equal_structs(everything.init(params), whole)


def test_what_takes_no_part_may_be_of_any_dtype():
    params = make_params() | {"steps": jnp.arange(3)}
    with pytest.raises(ValueError, match="must be real floating-point arrays"):
        dho2_jax.dho2(optax.sgd(0.1), **SETTINGS).init(params)
    tx = dho2_jax.dho2(
        optax.masked(optax.sgd(0.1), MASK | {"embed": True, "steps": False}),
        curvature_mask=MASK | {"steps": False},
        **SETTINGS,
    )
    batch = make_batch()
    grads = jax.grad(loss)(make_params(), batch) | {"steps": jnp.zeros(3, int)}
    updates, _ = jax.jit(
        lambda g, s, p: tx.update(g, s, p, value_fn=lambda q: loss(q, batch))
    )(grads, tx.init(params), params)
    assert updates["steps"].dtype == jnp.int32
    assert not np.any(updates["steps"]) and np.any(updates["embed"])


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ({"embed": False}, "`curvature_mask` must be a prefix of the parameters' tree"),
        ({"embed": 1, "net": True}, "`curvature_mask` must hold bools, got int"),
        (False, "`curvature_mask` must be True somewhere"),
        (lambda p: jax.tree.map(jnp.any, p), "`curvature_mask` must hold bools, got "),
    ],
)
def test_mistakes(mask, expected):
    with pytest.raises(ValueError, match=expected):
        dho2_jax.dho2_adam(1e-3, curvature_mask=mask).init(make_params())


def test_fewer_parameters_take_part_than_pairs():
    tx = dho2_jax.dho2_adam(1e-3, num_largest=4, curvature_mask={"a": True, "b": False})
    with pytest.raises(ValueError, match="must be at most the number of parameters"):
        tx.init({"a": jnp.ones(3), "b": jnp.ones(100)})


@pytest.mark.slow
def test_inside_other_masks_and_injected():
    """`optax.masked` outside, `curvature_mask` within; and in `inject_hyperparams`."""
    params, batch = make_params() | {"frozen": jnp.ones(2)}, make_batch()
    inner = optax.inject_hyperparams(dho2_jax.dho2_adam, dho2_jax.STATIC_ARGS)(
        1e-2,
        curvature_mask=MASK | {"frozen": True},
        **(SETTINGS | {"refresh": "external"}),
    )
    tx = optax.masked(inner, jax.tree.map(lambda _: True, MASK) | {"frozen": False})
    state = refreshed(tx, params, batch)
    grads = jax.grad(loss)(make_params(), batch) | {"frozen": jnp.ones(2)}
    updates, state = jax.jit(tx.update)(grads, state, params)
    assert int(dho2_jax.metrics(state)["num_valid"]) == 3
    np.testing.assert_array_equal(updates["frozen"], 1.0)  # masked: passed through
    counted = optax.tree_map_params(tx, lambda x: x + 1, state)
    chex.assert_trees_all_equal_structs(counted, state)


@pytest.mark.slow
def test_nnx_boxes():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    tx = dho2_jax.dho2(
        optax.adam(1e-2),
        num_largest=2,
        refresh_period=2,
        curvature_mask=lambda p: nnx.map_state(lambda path, _: path[-1] == "kernel", p),
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (8, 4))

    def of(params):
        return jnp.mean((x @ params["kernel"] + params["bias"] - x[:, :3]) ** 2)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.mean((m(x) - x[:, :3]) ** 2))(model)
        optimizer.update(model, grads, value_fn=of)

    for _ in range(3):
        step(model, optimizer)
    assert int(dho2_jax.metrics(optimizer.opt_state)["refreshes"]) == 2


# --- on a mesh -----------------------------------------------------------------------


def assert_lies(tree, shardings):
    for x, where in zip(*map(jax.tree.leaves, (tree, shardings)), strict=True):
        assert x.sharding.is_equivalent_to(where, x.ndim)


SPECS = {"embed": P("data"), "net": {"w": P(None, "data"), "v": P()}}
WHOLE = {"embed": P(None, None), "net": {"w": P(None, None), "v": P(None)}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "specs"),
    [
        (AxisType.Auto, SPECS),
        (AxisType.Auto, jax.tree.map(lambda _: P(), SPECS)),
        # Split, this loss would have to name shardings; and P() alone is, to the cache
        # of jit, another than the P(None, None) that a step returns.
        (AxisType.Explicit, WHOLE),
    ],
)
def test_on_a_mesh_as_on_one_device(kind, specs):
    params, batch = make_params(), make_batch()
    tx = dho2_jax.dho2(optax.adam(1e-2), curvature_mask=MASK, **SETTINGS)
    expected, _, _ = run(stepper(tx), params, tx.init(params), batch)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))

    def put(tree, specs):
        return jax.device_put(
            tree, jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
        )

    tx = dho2_jax.dho2(
        optax.adam(1e-2),
        curvature_mask=MASK,
        mesh=mesh,
        param_specs=specs if kind == AxisType.Auto else None,
        **SETTINGS,
    )
    params = put(params, specs)
    state = tx.init(params)
    shardings = dho2_jax.state_shardings(tx, params)
    chex.assert_trees_all_equal_structs(shardings, state)
    again = jax.jit(tx.init, out_shardings=shardings)(params)
    for one in (state, again):
        assert_lies(one, shardings)
    moments = state.base_state[0].mu
    embed = moments["embed"].addressable_shards[0].data
    assert embed.size == 256 * 8 / 8
    assert moments["net"]["w"].addressable_shards[0].data.size == 8 * 256 / 8

    step = stepper(tx)
    losses, _, state = run(step, params, state, put(batch, (P("data"), P("data"))))
    np.testing.assert_allclose(losses, expected, rtol=2e-4)
    assert step._cache_size() == 1
    assert_lies(state, shardings)


@pytest.mark.slow
def test_overlapped():
    """On two devices that do not train, from what takes part alone."""
    params, batch = make_params(), make_batch()
    near, far = (
        jax.make_mesh(
            (len(devices),), (name,), axis_types=(AxisType.Auto,), devices=devices
        )
        for devices, name in ((jax.devices()[:2], "data"), (jax.devices()[2:4], "far"))
    )
    tx = dho2_jax.dho2(
        optax.adam(1e-2),
        num_largest=3,
        num_matvecs=8,
        refresh="external",
        curvature_mask=MASK,
        mesh=near,
    )
    params = jax.device_put(params, NamedSharding(near, P()))
    overlap = dho2_jax.overlapped_refresh(loss, mesh=far)
    state = tx.init(params)
    landed = overlap.land(state, overlap.launch(state, params, batch))
    there = refreshed(tx, params, batch)
    found, expected = map(dho2_jax.subspace, (landed, there))
    np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-4)
    assert found.valid.all() and not jax.tree.leaves(found.eigenvectors["embed"])


@pytest.mark.slow
def test_staggered_across_an_axis():
    params, batch = make_params(), make_batch()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, P())
    params = jax.device_put(params, everywhere)
    batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
    tx = dho2_jax.dho2(
        optax.adam(1e-2),
        curvature_mask=MASK,
        mesh=mesh,
        refresh="staggered",
        num_largest=3,
        num_matvecs=4,
        refresh_period=8,
    )
    svag = dho2_jax.staggered_value_and_grad(loss, mesh=mesh, stagger_axis="data")

    @jax.jit
    def step(params, state, batch):
        value, grads, product = svag(params, batch, batch, state)
        updates, state = tx.update(grads, state, params, product=product)
        return optax.apply_updates(params, updates), state, value

    losses, _, state = run(step, params, tx.init(params), batch, 16)
    assert_lies(state, dho2_jax.state_shardings(tx, params))
    # What takes no part is trained meanwhile: a sweep keeps it too as it was.
    seen = dho2_jax.metrics(state)
    assert int(seen["refreshes"]) == 2 and int(seen["rejected"]) == 0
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_a_sweep_is_of_one_function_while_the_rest_is_trained():
    params, batch = make_params(), make_batch()
    settings = {"num_largest": 3, "num_matvecs": 4, "curvature_mask": MASK}
    tx = dho2_jax.dho2(
        optax.adam(1e-2), refresh="staggered", refresh_period=20, **settings
    )
    _, _, state = run(stepper(tx), params, tx.init(params), batch, 8)
    external = dho2_jax.dho2(optax.adam(1e-2), refresh="external", **settings)
    expected = refreshed(external, params, batch)
    found, expected = map(dho2_jax.subspace, (state, expected))
    assert found.valid.all()
    np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-5)


@pytest.mark.slow
def test_inside_the_callers_own_shard_map():
    """With the base's state in slices too; the rest of it is whole on each device."""
    params, batch = make_params(), make_batch()
    tx = dho2_jax.dho2(optax.adam(1e-2), curvature_mask=MASK, **SETTINGS)
    expected, _, _ = run(stepper(tx), params, tx.init(params), batch, 6)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = dho2_jax.dho2(
        optax.adam(1e-2),
        curvature_mask=MASK,
        axis_name="data",
        shard_base_state=True,
        **SETTINGS,
    )
    specs = dho2_jax.state_specs(tx, params)
    assert specs.base_state[0].mu == {
        "embed": P(),
        "net": {"w": P(None, "data"), "v": P()},
    }

    def local(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        value, grads = jax.lax.pmean((value, grads), "data")
        updates, state = tx.update(
            grads, state, params, value_fn=lambda p: loss(p, batch)
        )
        return optax.apply_updates(params, updates), state, value

    mapped = {"mesh": mesh, "check_vma": False}
    init = jax.shard_map(tx.init, in_specs=P(), out_specs=specs, **mapped)
    step = jax.shard_map(
        local,
        in_specs=(P(), specs, P("data")),
        out_specs=(P(), specs, P()),
        **mapped,
    )
    losses, _, _ = run(jax.jit(step), params, jax.jit(init)(params), batch, 6)
    np.testing.assert_allclose(losses, expected, rtol=2e-4)
