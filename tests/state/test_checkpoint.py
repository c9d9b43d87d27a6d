"""Checkpoints of a loop of one's own, by Orbax's CheckpointManager and Grain."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_jax
import dho2_jax.nnx
from dho2_jax import check_restorable

grain = pytest.importorskip("grain")
ocp = pytest.importorskip("orbax.checkpoint")

STEPS, CUT, BATCH = 60, 10, 16
READING = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.slow]


def batches():
    """Endless, shuffled, and each example with noise of its own."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((48, 8)).astype(np.float32)
    examples = grain.MapDataset.source(inputs).seed(1).shuffle().repeat()

    def noisy(x, rng):
        return x + 0.1 * rng.standard_normal(8, np.float32)

    return examples.random_map(noisy).batch(BATCH).to_iter_dataset(READING)


def loss_fn(params, batch):
    hidden = jnp.tanh(batch @ params["w"] + params["b"])
    return jnp.mean((hidden @ params["v"] - jnp.sin(batch.sum(-1))) ** 2)


class Loop(NamedTuple):
    """A training loop as a user writes it, on some devices."""

    mesh: jax.sharding.Mesh
    tx: optax.GradientTransformationExtraArgs
    step: object

    def target(self):
        """What to restore into: shapes, with the places of this loop's devices."""
        whole = NamedSharding(self.mesh, P())
        shapes = jax.eval_shape(parameters)
        params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes
        )
        return {
            "params": params,
            "opt_state": dho2_jax.abstract_state(self.tx, params),
        }

    def start(self):
        params = jax.device_put(parameters(), NamedSharding(self.mesh, P()))
        return {"params": params, "opt_state": self.tx.init(params)}

    def place(self, batch):
        return jax.device_put(batch, NamedSharding(self.mesh, P("data")))


def parameters():
    w = jnp.sin(jnp.arange(64.0)).reshape(8, 8)
    return {"w": w, "b": jnp.zeros(8), "v": jnp.full(8, 0.3, jnp.float32)}


@functools.cache
def loop(devices):
    """Compiled once for each number of devices."""
    mesh = jax.make_mesh(
        (devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )
    tx = dho2_jax.dho2(
        optax.adam(1e-2), num_largest=3, num_matvecs=6, refresh_period=7, mesh=mesh
    )

    def step(train, batch):
        value_fn = functools.partial(loss_fn, batch=batch)
        loss, grads = jax.value_and_grad(value_fn)(train["params"])
        updates, state = tx.update(
            grads, train["opt_state"], train["params"], value_fn=value_fn
        )
        params = optax.apply_updates(train["params"], updates)
        return {"params": params, "opt_state": state}, loss

    return Loop(mesh, tx, jax.jit(step, donate_argnums=0))


def run(loop, count, train=None, data=None, manager=None):
    """Trains; saves in the background on the way; returns losses and where it is."""
    train = loop.start() if train is None else train
    data = iter(batches()) if data is None else data
    losses = []
    for i in range(count):
        if manager is not None and i == CUT:
            manager.save(
                i,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(train),
                    data=grain.checkpoint.CheckpointSave(data),
                ),
            )
        train, loss = loop.step(train, loop.place(next(data)))
        losses.append(float(loss))
    return losses, train, data


def restored(loop, path, step=CUT):
    data = iter(batches())
    with ocp.CheckpointManager(path) as manager:
        found = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(loop.target()),
                data=grain.checkpoint.CheckpointRestore(data),
            ),
        )
    return found["state"], data


def save(path, step, train, data):
    with ocp.CheckpointManager(path) as manager:
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(train),
                data=grain.checkpoint.CheckpointSave(data),
            ),
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`(path, losses)` of a run on each number of devices that saves and goes on."""

    @functools.cache
    def of(devices):
        path = tmp_path_factory.mktemp(f"run{devices}")
        with ocp.CheckpointManager(path) as manager:
            losses, train, _ = run(loop(devices), STEPS, manager=manager)
        return path, losses, int(dho2_jax.metrics(train["opt_state"])["refreshes"])

    return of


def test_the_next_fifty_losses_are_bit_identical_on_one_device(whole):
    path, losses, refreshes = whole(1)
    rest, train, _ = run(loop(1), STEPS - CUT, *restored(loop(1), path))
    assert rest == losses[CUT:] and len(rest) == 50
    assert int(dho2_jax.metrics(train["opt_state"])["refreshes"]) == refreshes == 9
    assert losses[-1] < 0.7 * losses[0]
    assert loop(1).step._cache_size() == 1  # restored arrays are as the others were


def test_from_eight_devices_to_four_to_one_and_back(whole, tmp_path):
    path, losses, _ = whole(8)
    here, step, found = path, CUT, []
    for devices in (4, 1, 8):
        train, data = restored(loop(devices), here, step)
        vectors = train["opt_state"].curvature.subspace.eigenvectors.leaves
        assert {x.sharding.mesh.size for x in vectors} == {devices}
        for x in vectors:
            assert x.addressable_shards[0].data.size * devices == x.size
        part, train, data = run(loop(devices), 15, train, data)
        found, step, here = found + part, step + 15, tmp_path / str(devices)
        save(here, step, train, data)
    np.testing.assert_allclose(found, losses[CUT : CUT + 45], rtol=1e-3)
    # And on the number it came from, as if nothing had happened.
    rest, _, _ = run(loop(8), 20, *restored(loop(8), path))
    assert rest == losses[CUT : CUT + 20]


# --- what does not fit ---------------------------------------------------------------


def transformation(**changes):
    arguments = {"num_largest": 3, "num_matvecs": 6, "refresh": "external", **changes}
    return dho2_jax.dho2(optax.adam(1e-2), **arguments)


def state_of(params=None, **changes):
    params = parameters() if params is None else params
    return jax.eval_shape(transformation(**changes).init, params)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The path of a saved state of three pairs, in a nest."""
    path = tmp_path_factory.mktemp("saved")
    params = parameters()
    state = optax.chain(optax.clip(1.0), transformation()).init(params)
    save(path, 0, {"params": params, "opt_state": state}, iter(batches()))
    return path


def metadata(path, step=0):
    handlers = {"state": ocp.StandardCheckpointHandler()}
    with ocp.CheckpointManager(path, item_handlers=handlers) as manager:
        return manager.item_metadata(step)["state"]


OTHERS = [
    ({"num_largest": 4}, "`num_largest` + `num_smallest` was 3, and is 4"),
    ({"num_largest": 2}, "`num_largest` + `num_smallest` was 3, and is 2"),
    ({"num_smallest": 1}, "`num_largest` + `num_smallest` was 3, and is 4"),
    ({"base_rate": "fixed"}, "`base_rate` was 'curvature', and is 'fixed'"),
    ({"refresh": "staggered"}, "`refresh` was 'periodic' or 'external', and is 'stag"),
    ({"params": {"w": jnp.ones((1024, 3))}}, "the shape of array 0 of them was"),
]


@pytest.mark.parametrize(("changes", "expected"), OTHERS)
def test_a_state_of_another_shape_says_what_is_wrong(changes, expected, saved):
    with pytest.raises(ValueError) as error_info:
        check_restorable(metadata(saved), state_of(**changes))
    message = str(error_info.value)
    assert expected in message and message.endswith("or begin with a new state.")
    assert "\n" not in message


def test_another_number_of_products_in_a_sweep():
    arguments = {"refresh": "staggered", "refresh_period": 30}
    before = state_of(**arguments)
    check_restorable(before, before)
    with pytest.raises(ValueError, match="`num_matvecs` was 6, and is 7"):
        check_restorable(before, state_of(num_matvecs=7, **arguments))


def test_what_fits_is_let_through(saved):
    """In any nest, as metadata or untyped numbers, boxed by NNX or not."""
    check_restorable(metadata(saved), state_of(refresh="periodic", num_matvecs=5))
    chained = jax.eval_shape(
        optax.chain(optax.clip(1.0), transformation()).init, parameters()
    )
    check_restorable(metadata(saved), chained)
    with ocp.StandardCheckpointer() as checkpointer:
        untyped = checkpointer.restore(saved / "0" / "state")
    check_restorable(untyped, state_of())
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, transformation(), wrt=nnx.Param)
    boxed = nnx.to_pure_dict(nnx.state(optimizer))
    check_restorable(boxed, optimizer.opt_state)
    with pytest.raises(ValueError, match="was 3, and is 5"):
        check_restorable(boxed, state_of(nnx.state(model), num_largest=5))


def test_a_checkpoint_without_a_state(saved):
    with pytest.raises(ValueError, match="exactly one DHO² state, got 0"):
        check_restorable(metadata(saved)["params"], state_of())
    with pytest.raises(ValueError, match="exactly one DHO² state, got 2"):
        check_restorable([metadata(saved), metadata(saved)], state_of())


def test_the_new_interface_of_orbax(tmp_path):
    """Version 1, in which nothing has to be told what it reads."""
    from orbax.checkpoint import v1

    first = loop(1)
    _, train, _ = run(first, 3)
    v1.save(tmp_path / "state", train)
    check_restorable(v1.metadata(tmp_path / "state").metadata, train["opt_state"])
    again = v1.load(tmp_path / "state", first.target())
    chex.assert_trees_all_equal(again, train)
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(train), strict=True):
        assert x.sharding == y.sharding


class Deep(nnx.Module):
    """Arrays of so many shapes that they are stored in more than ten."""

    def __init__(self, rngs):
        sizes = [2, *range(3, 16)]
        self.layers = nnx.List(
            nnx.Linear(256, n, rngs=rngs, use_bias=False) for n in sizes
        )
        self.norm = nnx.BatchNorm(256, rngs=rngs)

    def __call__(self, x):
        x = self.norm(x)
        return sum(jnp.tanh(layer(x)).sum(-1) for layer in self.layers)


def test_nnx_goes_on_as_if_it_had_never_stopped(tmp_path):
    """Model with its statistics, and optimizer, as one `nnx.state`."""

    def start():
        model = Deep(nnx.Rngs(0))
        tx = dho2_jax.dho2(optax.adam(1e-3), num_largest=2, refresh_period=3)
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss_fn(model, batch):
        return jnp.mean((model(batch) - 1) ** 2)

    @nnx.jit
    def step(model, optimizer, batch):
        value, grads = nnx.value_and_grad(loss_fn)(model, batch)
        value_fn = dho2_jax.nnx.value_fn(loss_fn, model, batch)
        optimizer.update(model, grads, value_fn=value_fn)
        return value

    def train(model, optimizer, steps):
        keys = (jax.random.fold_in(jax.random.key(1), i) for i in steps)
        return [
            float(step(model, optimizer, jax.random.normal(key, (16, 256))))
            for key in keys
        ]

    model, optimizer = start()
    train(model, optimizer, range(4))
    handlers = {"run": ocp.StandardCheckpointHandler()}
    with ocp.CheckpointManager(tmp_path, item_handlers=handlers) as manager:
        saved = ocp.args.StandardSave(nnx.state((model, optimizer)))
        manager.save(4, args=ocp.args.Composite(run=saved))
        expected = train(model, optimizer, range(4, 10))
        manager.wait_until_finished()
        model, optimizer = start()
        metadata = manager.item_metadata(4)["run"]
        check_restorable(metadata, optimizer.opt_state)
        stored = dho2_jax.subspace(optimizer.opt_state).eigenvectors
        assert len(jax.tree.leaves(stored)) > 11
        with pytest.raises(ValueError, match="was 2, and is 3"):
            tx = dho2_jax.dho2(optax.adam(1e-3), num_largest=3)
            check_restorable(
                metadata, nnx.Optimizer(model, tx, wrt=nnx.Param).opt_state
            )
        target = ocp.args.StandardRestore(nnx.state((model, optimizer)))
        found = manager.restore(4, args=ocp.args.Composite(run=target))["run"]
    nnx.update((model, optimizer), found)
    assert train(model, optimizer, range(4, 10)) == expected
