"""The state carries its configuration: nests, NNX, save and restore, on and off."""

import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import (
    BASES,
    EACH_WRAPPER,
    SMALL,
    Loop,
    assert_same_signature,
    external,
    largest_change,
    loss,
    parameters,
    trained,
)

import dho2_jax

nnx = pytest.importorskip("flax.nnx")


# --- nests -------------------------------------------------------------------------


@pytest.mark.parametrize("name", EACH_WRAPPER)
def test_subspace_and_metrics_need_only_the_state(name):
    _, _, state = trained(name)
    found = dho2_jax.subspace(state)
    rows = [
        np.asarray(x).reshape(x.shape[0], -1)
        for x in jax.tree.leaves(found.eigenvectors)
    ]
    rows = np.concatenate(rows, axis=1)
    masked = name in ("masked", "prefix_masked", "partition", "deep")
    chex.assert_shape(rows, (2, 15 if masked else 23))
    np.testing.assert_allclose(rows @ rows.T, np.eye(2), atol=1e-5)
    assert bool(jnp.all(found.valid)) and bool(jnp.all(jnp.diff(found.eigenvalues) > 0))

    numbers = dho2_jax.metrics(state)
    chex.assert_shape(list(numbers.values()), ())
    assert int(numbers["refreshes"]) == 1 and int(numbers["enabled"]) == 1
    assert float(numbers["sharpness"]) == float(found.eigenvalues[-1])
    for key, value in jax.jit(dho2_jax.metrics)(state).items():
        np.testing.assert_allclose(value, numbers[key], rtol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", EACH_WRAPPER)
def test_set_enabled_changes_nothing_else(name):
    loop, params, state = trained(name)
    off = dho2_jax.set_enabled(state, False)
    assert_same_signature(off, state)
    assert int(dho2_jax.metrics(off)["enabled"]) == 0
    assert int(dho2_jax.metrics(off)["num_active"]) == 0
    assert int(dho2_jax.metrics(off)["num_valid"]) == 2
    chex.assert_trees_all_equal(dho2_jax.set_enabled(off, True), state)
    traced = jax.jit(dho2_jax.set_enabled)(state, jnp.asarray(False))
    chex.assert_trees_all_equal(traced, off)
    emits = 2 if name == "multi_steps" else 1
    on_params, _ = loop.run(params, state, emits)
    off_params, _ = loop.run(params, off, emits)
    assert largest_change(on_params, off_params) > 0
    assert loop.traces == 1


def test_refresh_of_a_masked_state_takes_the_whole_parameters():
    """What the mask leaves out, integers included, reaches the loss as it is."""
    params = parameters() | {"steps": jnp.arange(3)}

    def loss_with_steps(p):
        return loss(p) * jnp.sum(p["steps"]) / 3

    mask = jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jnp.floating), params)
    tx = optax.masked(external(), mask)
    state = tx.init(params)
    renewed = jax.eval_shape(
        lambda s: dho2_jax.refresh(s, params, loss_with_steps), state
    )
    assert_same_signature(renewed, state)


# --- save and restore --------------------------------------------------------------


def continued(loop, params, state):
    """Two more updates around a refresh."""
    params, state = loop.run(params, state, 1)
    state = loop.renew(params, state)
    return loop.run(params, state, 1)


@pytest.mark.parametrize("name", EACH_WRAPPER)
def test_leaves_in_an_npz_restore_into_a_target(name, tmp_path):
    loop, params, state = trained(name)
    np.savez(tmp_path / "state.npz", *jax.tree.leaves(state))

    target = jax.eval_shape(loop.tx.init, parameters())
    with np.load(tmp_path / "state.npz", allow_pickle=False) as file:
        leaves = [jnp.asarray(file[f"arr_{i}"]) for i in range(len(file.files))]
    restored = jax.tree.unflatten(jax.tree.structure(target), leaves)

    assert_same_signature(restored, state)
    chex.assert_trees_all_equal(dho2_jax.metrics(restored), dho2_jax.metrics(state))
    chex.assert_trees_all_equal(
        continued(loop, params, restored), continued(loop, params, state)
    )
    assert loop.traces == 1 and loop.renewals == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bare", "chain", "partition", "deep"])
def test_orbax_restores_into_an_abstract_target(name, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    loop, params, state = trained(name)
    target = jax.eval_shape(loop.tx.init, parameters())
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
    with ocp.CheckpointManager(tmp_path) as manager:
        restored = manager.restore(3, args=ocp.args.StandardRestore(target))

    assert_same_signature(restored, state)
    chex.assert_trees_all_equal(
        continued(loop, params, restored), continued(loop, params, state)
    )
    assert loop.traces == 1 and loop.renewals == 1


def test_a_target_made_by_other_arguments_says_so():
    """The configuration is not saved: it is the target's, and its shapes must fit."""
    _, _, state = trained("bare")
    other = external(num_largest=3).init(parameters())
    assert jax.tree.structure(other) != jax.tree.structure(state)
    assert len(jax.tree.leaves(other)) == len(jax.tree.leaves(state))


# --- Flax NNX ----------------------------------------------------------------------


class Network(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.inner = nnx.Linear(4, 3, rngs=rngs)
        self.outer = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.outer(jnp.tanh(self.inner(x)))


def network_loss(model):
    rng = np.random.default_rng(1)
    inputs = jnp.asarray(rng.standard_normal((8, 4)), jnp.float32)
    targets = jnp.asarray(rng.standard_normal((8, 2)), jnp.float32)
    return jnp.mean((model(inputs) - targets) ** 2)


def loss_of_state(model):
    """The loss as a function of the state that `wrt=nnx.Param` selects."""
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)
    return lambda params: network_loss(nnx.merge(graphdef, params, rest))


def boxes(opt_state):
    return [
        type(x)
        for x in jax.tree.leaves(
            opt_state, is_leaf=lambda x: isinstance(x, nnx.Variable)
        )
    ]


@pytest.mark.slow
def test_nnx_optimizer_refreshes_from_its_boxed_state():
    model, traces = Network(), []
    optimizer = nnx.Optimizer(model, external(), wrt=nnx.Param)
    before = optimizer.opt_state

    @nnx.jit
    def step(model, optimizer):
        traces.append(None)
        value, grads = nnx.value_and_grad(network_loss)(model)
        optimizer.update(model, grads)
        return value

    @nnx.jit
    def renew(model, optimizer):
        optimizer.opt_state = dho2_jax.refresh(
            optimizer.opt_state, nnx.state(model, nnx.Param), loss_of_state(model)
        )

    first = step(model, optimizer)
    step(model, optimizer)
    renew(model, optimizer)
    assert boxes(optimizer.opt_state) == boxes(before)
    chex.assert_trees_all_equal_structs(optimizer.opt_state, before)
    for _ in range(4):
        last = step(model, optimizer)

    numbers = dho2_jax.metrics(optimizer.opt_state)
    assert int(numbers["refreshes"]) == 1 and int(numbers["count"]) == 6
    assert int(numbers["num_active"]) == 2
    assert float(last) < float(first)
    assert len(traces) == 1
    eigenvectors = dho2_jax.subspace(optimizer.opt_state).eigenvectors
    kernel = jax.tree.leaves(eigenvectors["inner"]["kernel"])[0]
    chex.assert_shape(kernel, (2, 4, 3))

    optimizer.opt_state = dho2_jax.set_enabled(optimizer.opt_state, False)
    step(model, optimizer)
    assert len(traces) == 1
    assert int(dho2_jax.metrics(optimizer.opt_state)["num_active"]) == 0


@pytest.mark.slow
def test_nnx_optimizer_passes_value_fn():
    model, traces = Network(), []
    tx = optax.chain(external(refresh="periodic"), optax.identity())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        traces.append(None)
        value, grads = nnx.value_and_grad(network_loss)(model)
        optimizer.update(model, grads, value_fn=loss_of_state(model))
        return value

    values = [float(step(model, optimizer)) for _ in range(4)]
    assert values[-1] < values[0]
    assert len(traces) == 1
    assert int(dho2_jax.metrics(optimizer.opt_state)["refreshes"]) == 2


@pytest.mark.slow
def test_nnx_and_pure_states_train_alike():
    """The pure loop sees no boxes at all; leaves are matched in flattened order."""
    model = Network()
    tx = external(optax.sgd(0.02), base_rate="fixed")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def pure_loss(p):
        state = nnx.state(model, nnx.Param)
        return loss_of_state(model)(
            jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(p))
        )

    @jax.jit
    def pure_step(params):
        state = dho2_jax.refresh(tx.init(params), params, pure_loss)
        updates, _ = tx.update(jax.grad(pure_loss)(params), state, params)
        return optax.apply_updates(params, updates)

    expected = pure_step(params)

    optimizer.opt_state = jax.jit(
        lambda s, p: dho2_jax.refresh(s, p, loss_of_state(model))
    )(optimizer.opt_state, nnx.state(model, nnx.Param))
    assert int(dho2_jax.metrics(optimizer.opt_state)["refreshes"]) == 1
    nnx.jit(lambda o, m: o.update(m, nnx.grad(network_loss)(m)))(optimizer, model)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        expected,
    )


# --- on and off --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_off_is_the_base_bit_for_bit_and_on_again_goes_on(name):
    loop, base = Loop(external(BASES[name]())), Loop(BASES[name]())
    _, params, renewed = trained("bare")
    state = dho2_jax.DHO2State(base.tx.init(params), renewed.curvature)
    params, state = loop.run(params, state, 1)

    off = dho2_jax.set_enabled(state, False)
    alone, alone_state = base.run(params, off.base_state, 3)
    plain, off = loop.run(params, off, 3)
    chex.assert_trees_all_equal(plain, alone)
    chex.assert_trees_all_equal(off.base_state, alone_state)

    again = dho2_jax.set_enabled(off, True)
    resumed, again = loop.run(plain, again, 1)
    stayed, _ = loop.run(plain, off, 1)
    assert largest_change(resumed, stayed) > 0
    assert int(dho2_jax.metrics(again)["num_active"]) > 0
    assert loop.traces == 1


def test_off_from_the_start_never_refreshes():
    kwargs = SMALL | {"base_rate": "fixed"}
    tx = dho2_jax.dho2(BASES["adam"](), **kwargs)
    loop, base = Loop(tx, value_fn=loss), Loop(BASES["adam"]())
    params = parameters()
    state = dho2_jax.set_enabled(tx.init(params), False)
    plain, state = loop.run(params, state, 3)
    alone, _ = base.run(params, BASES["adam"]().init(params), 3)
    chex.assert_trees_all_equal(plain, alone)
    assert int(dho2_jax.metrics(state)["refreshes"]) == 0


@pytest.mark.slow
def test_the_state_is_float32_under_x64(tmp_path):
    """Users may enable x64; the branches of the refresh must still agree."""
    script = tmp_path / "x64.py"
    script.write_text(
        "import jax, jax.numpy as jnp, optax, dho2_jax\n"
        "jax.config.update('jax_enable_x64', True)\n"
        "loss = lambda x: jnp.sum(jnp.arange(1.0, 9.0) * x**2)\n"
        "tx = dho2_jax.dho2(optax.sgd(1e-2), num_largest=2, refresh_period=3)\n"
        "x = jnp.ones(8)\n"
        "state = tx.init(x)\n"
        "grad = jax.grad(loss)\n"
        "step = jax.jit(lambda x, s: tx.update(grad(x), s, x, value_fn=loss))\n"
        "for _ in range(5):\n"
        "    updates, new = step(x, state)\n"
        "    same = jax.tree.map(lambda a, b: a.dtype == b.dtype, state, new)\n"
        "    assert all(jax.tree.leaves(same)) and x.dtype == jnp.float64\n"
        "    x, state = x + updates, new\n"
        "assert loss(x) < 36\n"
    )
    subprocess.run([sys.executable, str(script)], check=True, timeout=120)
