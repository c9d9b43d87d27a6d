"""The overlapped refresh: other devices find the subspace while these train."""

import contextlib
import functools
import logging
import time
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FAST
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_cases import AUTO, EXPLICIT, FEW, OPTIONS, batch, loss, on_mesh, parameters

import dho2_jax
from dho2_jax._vectors import transfer

EXTERNAL: dict[str, Any] = OPTIONS | {"refresh": "external"}


def mesh_of(shape, first, axes=("d",), kind=AUTO):
    """A mesh of `first` and the devices after it."""
    devices = jax.devices()[first : first + int(np.prod(shape))]
    return jax.make_mesh(shape, axes, (kind,) * len(shape), devices=devices)


def make_tx(**where: Any):
    return dho2_jax.dho2(optax.adam(1e-2, eps=1e-3), **EXTERNAL | where)


class Loop:
    """A training loop whose steps donate, and its overlapped refresh."""

    def __init__(self, near, far, names=FEW, value_fn=loss, **options):
        self.near, self.far = near, far
        self.tx = make_tx(mesh=near, **options)
        self.params = on_mesh(parameters(names), near, P())
        self.batch = on_mesh(batch(), near, P())
        self.state = jax.jit(self.tx.init, compiler_options=FAST)(self.params)
        self.step = jax.jit(self._step, donate_argnums=(0, 1), compiler_options=FAST)
        split = None if 48 % far.size == 0 else P()
        self.overlap = dho2_jax.overlapped_refresh(value_fn, mesh=far, batch_spec=split)

    def _step(self, params, state, batch):
        grads = jax.grad(loss)(params, batch)
        updates, state = self.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def train(self, steps):
        for _ in range(steps):
            self.params, self.state = self.step(self.params, self.state, self.batch)
            # Virtual CPU devices share few threads, which collectives hold.
            jax.block_until_ready((self.params, self.state))

    def launch(self):
        pending = self.overlap.launch(self.state, self.params, batch())
        jax.block_until_ready(pending.noted)
        return pending

    def land(self, pending):
        self.state = jax.block_until_ready(self.overlap.land(self.state, pending))


@functools.cache
def on_one_device():
    """`(init, refresh)` without a mesh, for all tests."""
    tx = make_tx()

    def renew(state, params):
        return dho2_jax.refresh(state, params, lambda p: loss(p, batch()))

    return tx.init, jax.jit(renew, compiler_options=FAST)


@functools.cache
def dense():
    """The state on one device after a refresh at the start."""
    init, renew = on_one_device()
    return renew(init(parameters(FEW)), parameters(FEW))


def assert_same_subspace(state, expected):
    """Agreement to float32, rows up to their signs."""
    found, other = dho2_jax.subspace(state), dho2_jax.subspace(expected)
    largest = float(dho2_jax.metrics(expected)["sharpness"])
    assert largest > 1 and np.all(found.valid == other.valid)
    for a, b in ((found.eigenvalues, other.eigenvalues),):
        np.testing.assert_allclose(a, b, atol=5e-6 * largest)
    rows, others = (flat_rows(s.eigenvectors) for s in (found, other))
    signs = np.sign(np.sum(rows * others, 1, keepdims=True))
    np.testing.assert_allclose(signs * rows, others, atol=2e-5)


def flat_rows(tree):
    leaves = (np.asarray(x) for x in jax.tree.leaves(tree))
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], 1)


def facts(tree):
    return jax.tree.structure(tree), [
        (x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(tree)
    ]


# --- landed at once ------------------------------------------------------------------

FSDP = {
    "kernel": P(None, None, "d"),
    "scalar": P(),
    "tall": P("d"),
    "tower": P("d"),
    "wide": P(None, "d"),
}
CURVED = {
    "kernel": P(None, None, "u"),
    "scalar": P(),
    "tall": P("u"),
    "tower": P(),
    "wide": P(),
}
SPLITS = {
    "6+2": ((3, 2), ("a", "b"), (2,), AUTO, None, None),
    "4+4": ((4,), ("d",), (4,), AUTO, None, None),
    "7+1": ((7,), ("d",), (1,), AUTO, None, None),
    "fsdp 4+4": ((4,), ("d",), (4,), AUTO, FSDP, CURVED),
    "fsdp 4+2": ((4,), ("d",), (2,), AUTO, FSDP, CURVED),
    "fsdp 4+2, whole there": ((4,), ("d",), (2,), AUTO, FSDP, None),
    "explicit 4+4": ((4,), ("d",), (4,), EXPLICIT, None, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_landed_at_once_it_is_a_refresh(split):
    shape, axes, other, kind, specs, far_specs = SPLITS[split]
    near = mesh_of(shape, 0, axes, kind)
    far = mesh_of(other, near.size, ("u",), kind)
    where = {"param_specs": specs} if specs else {}
    params = on_mesh(parameters(FEW), near, specs or P())
    tx = make_tx(mesh=near, **where)
    with jax.set_mesh(near) if kind == EXPLICIT else contextlib.nullcontext():
        state = jax.jit(tx.init, compiler_options=FAST)(params)
        overlap = dho2_jax.overlapped_refresh(loss, mesh=far, param_specs=far_specs)
        before = facts(state)
        pending = overlap.launch(state, params, batch())
        # Slices on the way: never more on a training device than will lie there.
        rows = state.curvature.subspace.eigenvectors.leaves
        travel = [p for p in pending.pieces if p[0].ndim > 2]
        for x, pieces in zip(rows, travel, strict=True):
            held = sum(p.addressable_shards[0].data.size for p in pieces)
            assert held == x.addressable_shards[0].data.size
        state = overlap.land(state, pending)
    assert facts(state) == before
    assert_same_subspace(state, dense())
    found, expected = (dho2_jax.metrics(s) for s in (state, dense()))
    for name in ("refreshes", "rejected", "age", "drift", "num_valid"):
        assert found[name] == expected[name]
    anchor, other = state.curvature.anchor, dense().curvature.anchor
    np.testing.assert_allclose(anchor.norm, other.norm, rtol=1e-6)


@pytest.mark.slow
def test_gauss_newton_inside_other_transformations():
    """And the batch on its mesh already, and a mask."""

    def outputs_fn(params, batch):
        return jnp.tanh(batch @ params["w"]) * params["b"]

    def loss_fn(outputs, batch):
        return jnp.mean((outputs - jnp.sum(batch, 1, keepdims=True)) ** 2)

    rng = np.random.default_rng(0)
    near, far = mesh_of((4,), 0), mesh_of((2,), 4)
    params = {
        "b": jnp.ones(3),
        "w": jnp.asarray(rng.normal(size=(256, 3)), jnp.float32),
    }
    data = jnp.asarray(rng.normal(size=(8, 256)), jnp.float32) / 16
    params = on_mesh(params, near, P())
    tx = optax.chain(
        optax.clip(1.0),
        optax.masked(
            dho2_jax.dho2(
                optax.sgd(0.1),
                num_largest=2,
                num_matvecs=6,
                refresh="external",
                curvature="ggn",
                mesh=near,
            ),
            {"b": False, "w": True},
        ),
    )
    state = tx.init(params)
    pair = (lambda p: outputs_fn(p, data), lambda y: loss_fn(y, data))
    expected = dho2_jax.refresh(state, params, pair)
    overlap = dho2_jax.overlapped_refresh((outputs_fn, loss_fn), mesh=far)
    there = jax.device_put(data, NamedSharding(far, P(None, "d")))
    state = overlap.land(state, overlap.launch(state, params, there))
    found, other = dho2_jax.subspace(state), dho2_jax.subspace(expected)
    np.testing.assert_allclose(found.eigenvalues, other.eigenvalues, rtol=1e-5)
    assert np.all(found.eigenvalues > 1e-3)
    rows, others = (flat_rows(s.eigenvectors) for s in (found, other))
    signs = np.sign(np.sum(rows * others, 1, keepdims=True))
    np.testing.assert_allclose(signs * rows, others, atol=1e-5)


# --- while training goes on ----------------------------------------------------------


@contextlib.contextmanager
def compilations():
    """Collects what JAX compiles, by name."""
    names = []

    class Listener(logging.Handler):
        def emit(self, record):
            if record.getMessage().startswith("Compiling"):
                names.append(record.getMessage())

    logger, listener = logging.getLogger("jax"), Listener()
    logger.addHandler(listener)
    try:
        with jax.log_compiles():
            yield names
    finally:
        logger.removeHandler(listener)


@pytest.mark.slow
def test_it_is_of_the_parameters_at_launch():
    loop = Loop(mesh_of((6,), 0), mesh_of((2,), 6))
    loop.land(loop.launch())
    loop.train(3)
    params = jax.tree.map(np.asarray, loop.params)
    at_launch = jax.tree.map(np.asarray, dho2_jax.metrics(loop.state))
    path = float(loop.state.curvature.anchor.path)
    pending = loop.launch()
    loop.train(4)
    ours = loop.state.curvature
    old, momentum = dho2_jax.subspace(loop.state), np.asarray(ours.momentum)
    old, path = flat_rows(old.eigenvectors), float(ours.anchor.path) - path
    loop.land(pending)

    _, renew = on_one_device()
    expected = renew(dense(), params)
    assert_same_subspace(loop.state, expected)
    # And not of those of the first refresh, nor of those at the landing.
    first = dho2_jax.subspace(dense()).eigenvalues
    now = dho2_jax.subspace(renew(dense(), jax.tree.map(np.asarray, loop.params)))
    found = dho2_jax.subspace(loop.state)
    for other in (first, now.eigenvalues):
        assert np.max(np.abs(found.eigenvalues - other)) > 1e-3
    new = flat_rows(found.eigenvectors)
    assert np.linalg.norm(momentum) > 0.01
    np.testing.assert_allclose(
        loop.state.curvature.momentum, new @ old.T @ momentum, rtol=1e-4, atol=1e-5
    )
    seen = dho2_jax.metrics(loop.state)
    assert seen["count"] == 7 and at_launch["age"] == 3
    assert seen["age"] == 4 and seen["refreshes"] == 2
    norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(params)))
    assert path > 0
    np.testing.assert_allclose(seen["drift"], path / norm, rtol=1e-5)


@pytest.mark.slow
def test_a_second_round_compiles_nothing_and_bad_curvature_is_rejected():
    loop = Loop(mesh_of((6,), 0), mesh_of((2,), 6))
    for _ in range(2):
        pending = loop.launch()
        loop.train(2)
        loop.land(pending)
    with compilations() as names:
        loop.train(1)
        pending = loop.launch()
        loop.train(2)
        loop.land(pending)
        loop.train(1)
    assert not names
    assert loop.step._cache_size() == 1
    assert dho2_jax.metrics(loop.state)["refreshes"] == 3

    kept = jax.tree.map(np.array, dho2_jax.subspace(loop.state))
    anchor = int(loop.state.curvature.anchor.count)
    bad = (batch()[0], jnp.full_like(batch()[1], jnp.nan))
    loop.land(loop.overlap.launch(loop.state, loop.params, bad))
    seen = dho2_jax.metrics(loop.state)
    assert seen["refreshes"] == 3 and seen["rejected"] == 1
    assert loop.state.curvature.anchor.count == anchor
    chex.assert_trees_all_equal(dho2_jax.subspace(loop.state), kept)
    loop.train(1)
    loop.land(loop.launch())
    assert dho2_jax.metrics(loop.state)["refreshes"] == 4


@pytest.mark.slow
def test_training_steps_run_while_the_curvature_program_waits():
    """Its batch is still being computed, on its own device, when they are done."""
    near, far = mesh_of((4,), 0), mesh_of((1,), 7)
    loop = Loop(near, far, ("scalar", "tall"))
    loop.land(loop.launch())  # compiles
    loop.train(1)

    @functools.partial(jax.jit, compiler_options=FAST)
    def slowly(x, turns):
        turn = lambda _, y: jnp.sin(y) + x  # noqa: E731
        return x + 0 * jax.lax.fori_loop(0, turns, turn, x)

    inputs, targets = on_mesh(batch(), far, P())
    begin = time.perf_counter()
    jax.block_until_ready(slowly(inputs, 10_000))
    turns = int(10_000 * 5 / (time.perf_counter() - begin))  # five seconds
    data = slowly(inputs, turns), targets
    pending = loop.overlap.launch(loop.state, loop.params, data)
    loop.train(3)
    ready = [x.is_ready() for x in jax.tree.leaves(pending.pieces)]
    assert not data[0].is_ready() and not any(ready)
    loop.land(pending)
    seen = dho2_jax.metrics(loop.state)
    assert seen["refreshes"] == 2 and seen["age"] == 3


@pytest.mark.slow
def test_it_probes_the_rate_when_update_could_not():
    """As `refresh` does: after twenty slopes without a probe."""
    loop = Loop(mesh_of((4,), 0), mesh_of((2,), 4))
    loop.land(loop.launch())
    loop.train(5)
    rates = []
    for steps in (0, 20):
        loop.train(steps)
        copy = jax.tree.map(jnp.copy, loop.state)
        renew = jax.jit(dho2_jax.refresh, static_argnums=2, compiler_options=FAST)
        expected = renew(copy, loop.params, lambda p: loss(p, batch()))
        expected = jax.tree.map(np.array, expected)
        loop.land(loop.launch())
        found, other = (s.curvature.rate for s in (loop.state, expected))
        for name in ("scale", "length", "descent", "bend", "weight", "probed"):
            a, b = getattr(found, name), getattr(other, name)
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7, err_msg=name)
        rates.append(jax.tree.map(np.array, found))
    assert rates[0].probed == 0 and rates[1].probed == rates[1].steps > 20
    assert rates[1].bend > 0 and rates[1].scale != rates[0].scale


# --- between meshes ------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6,), (3, 2), (4,), (7,)])
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_moves(shape, kind):
    near = mesh_of(shape, 0, ("x", "y")[: len(shape)], kind)
    far = mesh_of((8 - near.size,), near.size, ("u",), kind)
    x = np.arange(24 * 14 * 2, dtype=np.float32).reshape(24, 14, 2)
    specs = [P(), P("x"), P(None, near.axis_names), P(*near.axis_names)]
    for spec in specs:
        here = NamedSharding(near, spec)
        for other in (P(), P("u"), P(None, "u")):
            there = NamedSharding(far, other)
            try:
                here.shard_shape(x.shape)
                there.shard_shape(x.shape)
            except ValueError:
                continue
            like = [
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
                for s in (here, there)
            ]
            first = jax.device_put(x, here)
            moved = transfer.move(first, like[1])
            assert moved.sharding.is_equivalent_to(there, 3)
            np.testing.assert_array_equal(moved, x)
            back = transfer.move(moved, like[0])
            assert back.sharding.is_equivalent_to(here, 3)
            np.testing.assert_array_equal(back, x)


# --- mistakes ------------------------------------------------------------------------


def refused(match, **changes):
    near, far = mesh_of((4,), 0), mesh_of((2,), 4)
    options = {"mesh": near, "refresh": "external"} | changes.pop("dho2", {})
    overlap = {"mesh": far, "value_fn": loss} | changes
    tx = dho2_jax.dho2(optax.sgd(0.1), num_largest=2, **options)
    params = on_mesh(parameters(("scalar", "tall")), near, P())
    with pytest.raises(ValueError, match=match) as error_info:
        value_fn = overlap.pop("value_fn")
        made = dho2_jax.overlapped_refresh(value_fn, **overlap)
        made.launch(tx.init(params), params, batch())
    assert "\n" not in str(error_info.value)


def test_mistakes():
    refused("`mesh` must be a jax.sharding.Mesh, got list", mesh=[1])
    refused("`value_fn` must be a function of .params, batch.", value_fn=3)
    refused("`mesh` must share no device .* got cpu:3", mesh=mesh_of((2,), 3))
    refused("got refresh='periodic'", dho2={"refresh": "periodic"})
    refused("and mesh=None; make dho2 so", dho2={"mesh": None})
    refused("`param_specs` must name axes of the mesh", param_specs=P("model"))
    refused("`batch_spec` must name axes of the mesh", batch_spec=P("model"))
    refused("`batch_spec` must divide each dimension", batch_spec=P(None, "d"))


@pytest.mark.slow
def test_what_lands_must_have_been_launched_with_this_state():
    loop = Loop(mesh_of((2,), 0), mesh_of((1,), 7), ("scalar", "tall"))
    other = Loop(mesh_of((2,), 2), mesh_of((1,), 7), ("scalar", "tall"))
    with pytest.raises(
        ValueError, match="`pending` must be what launch returned for this state, got"
    ):
        loop.land(None)
    with pytest.raises(ValueError, match="`pending` must come from a launch with this"):
        loop.land(other.launch())
