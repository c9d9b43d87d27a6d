"""The staggered refresh: one product a step, all at the point where the sweep began.

The oracle is `dho2_jax.refresh` at that point, with as many refreshes before it; its
own oracles are dense (`test_refresh`, `test_subspace`).
"""

import functools

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FAST, assert_same_signature
from helpers import dense_hessian, extreme, flat_rows, jit, up_to_sign
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_cases import (
    EXPLICIT,
    OPTIONS,
    PROBLEMS,
    Layout,
    Problem,
    Trainer,
    assert_close,
    assert_same_run,
    assert_unused_untouched,
    batch,
    make_mesh,
    parameters,
    plain_source,
    shard_mapped,
    step_on,
)

import dho2_jax


def subspaces_differ(found, expected):
    """`(eigenvalues, rows)`: largest differences, relative to the largest."""
    ours, theirs = (np.asarray(x.eigenvalues) for x in (found, expected))
    values = np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))
    rows = (flat_rows(x.eigenvectors) for x in (found, expected))
    return values, up_to_sign(*rows)


def assert_same_subspace(state, expected, tolerance=(2e-6, 1e-3)):
    assert np.all(dho2_jax.subspace(expected).valid)
    differ = subspaces_differ(dho2_jax.subspace(state), dho2_jax.subspace(expected))
    assert differ[0] < tolerance[0] and differ[1] < tolerance[1], differ


# --- one device --------------------------------------------------------------------

SWEEP = {
    "num_largest": 2,
    "num_smallest": 1,
    "num_matvecs": 8,
    "refresh": "staggered",
    "refresh_period": 13,
}
INPUTS, TARGETS = np.random.default_rng(1).standard_normal((2, 16, 4))


def outputs_fn(params, inputs=INPUTS):
    inputs = jnp.asarray(inputs, jnp.float32)
    hidden = jnp.tanh(inputs @ params["w"] + params["b"])
    outputs = hidden @ params["head"]["w"] + params["head"]["b"]
    return outputs.astype(jnp.float32)


def output_loss(outputs):
    return jnp.mean((outputs - jnp.asarray(TARGETS[:, :2], jnp.float32)) ** 2)


def network(params, inputs=INPUTS):
    return output_loss(outputs_fn(params, inputs))


def products_of_network(params):
    """As a caller's own curvature products."""
    return lambda v: jax.jvp(jax.grad(network), (params,), (v,))[1]


def trajectory_of(tx, params, steps, **source):
    """`(params, state, trajectory)`; the trajectory has the start in front."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(network)(params), state, params, **source)
        return (optax.apply_updates(params, updates), state), params

    run = jit(lambda *carry: jax.lax.scan(step, carry, None, length=steps))
    (params, state), trajectory = run(params, tx.init(params))
    return params, state, trajectory


def refreshed_at(points, wrap=lambda tx: tx, source=None, **options):
    """The state after one refresh at each point."""
    options = SWEEP | options | {"refresh": "external"}
    tx = wrap(dho2_jax.dho2(optax.adam(0.05), **options))
    state = tx.init(points[0])
    source = source or {"value_fn": network}
    refresh = jit(lambda state, x: dho2_jax.refresh(state, x, **source))
    for point in points:
        state = refresh(state, point)
    return state


SOURCES = {
    "hessian": ({"value_fn": network}, {}),
    "ggn": ({"value_fn": (outputs_fn, output_loss)}, {"curvature": "ggn"}),
    "matvec_fn": ({"matvec_fn": products_of_network}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, dtype",
    [
        ("hessian", "float32"),
        ("hessian", "bfloat16"),
        ("ggn", "float32"),
        ("matvec_fn", "float32"),
    ],
)
def test_the_subspace_is_that_of_a_refresh_where_the_sweep_began(name, dtype):
    source, options = SOURCES[name]
    tx = dho2_jax.dho2(optax.adam(0.05), **SWEEP | options)
    params, state, trajectory = trajectory_of(tx, cases.parameters(dtype), 25, **source)
    assert int(state.curvature.anchor.count) == 13
    starts = [jax.tree.map(lambda x, i=i: x[i], trajectory) for i in (0, 13)]
    assert cases.largest_change(starts[1], params) > 0.05
    expected = refreshed_at(starts, source=source, **options)
    tolerance = (2e-6, 1e-3) if dtype == "float32" else (0.02, 0.1)
    assert_same_subspace(state, expected, tolerance)
    # At the first or the last point it would be another one.
    other = refreshed_at([starts[1], params], source=source, **options)
    differ = (dho2_jax.subspace(x) for x in (other, expected))
    assert subspaces_differ(*differ)[0] > (2e-3 if dtype == "float32" else 0.02)
    assert int(state.curvature.counters.rejected) == 0


def test_a_frozen_sweep_is_a_periodic_refresh_and_the_dense_one():
    params = cases.parameters()
    options = SWEEP | {"num_matvecs": 23, "refresh_period": 40}
    frozen = options | {"newton_learning_rate": 0.0}
    tx = dho2_jax.dho2(optax.sgd(0.0), **frozen)
    _, state, _ = trajectory_of(tx, params, 26, value_fn=network)
    tx = dho2_jax.dho2(optax.sgd(0.0), **frozen | {"refresh": "periodic"})
    _, periodic, _ = trajectory_of(tx, params, 1, value_fn=network)
    assert int(state.curvature.counters.refreshes) == 1
    assert int(state.curvature.anchor.count) == 0
    assert_same_subspace(state, periodic)
    values, rows = extreme(dense_hessian(network, params), 2, 1)
    found = dho2_jax.subspace(state)
    np.testing.assert_allclose(found.eigenvalues, values, atol=1e-5 * values[-1])
    assert up_to_sign(flat_rows(found.eigenvectors), rows) < 1e-3


def freeze_head(params):
    return {**params, "head": jax.lax.stop_gradient(cases.parameters()["head"])}


def _injected(base, **options):
    make = optax.inject_hyperparams(dho2_jax.dho2, static_args=dho2_jax.STATIC_ARGS)
    return make(base, **options)


@pytest.mark.slow
@pytest.mark.parametrize("nest", ["chain", "masked"])
def test_within_other_transformations(nest):
    if nest == "chain":
        inner = _injected(optax.adam(0.05), **SWEEP, rate_schedule=lambda _: 0.5)
        tx = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.apply_if_finite(inner, 3),
            optax.add_decayed_weights(-1e-3),
        )
        source, value_fn = {"value_fn": network}, network
    else:
        mask = {"w": True, "b": True, "head": False}
        tx = optax.chain(
            optax.masked(dho2_jax.dho2(optax.adam(0.05), **SWEEP), mask),
            optax.masked(optax.set_to_zero(), {"w": False, "b": False, "head": True}),
        )
        value_fn = lambda params: network(freeze_head(params))  # noqa: E731
        source = {"value_fn": value_fn}
    params, state, trajectory = trajectory_of(tx, cases.parameters(), 25, **source)
    starts = [jax.tree.map(lambda x, i=i: x[i], trajectory) for i in (0, 13)]
    assert cases.largest_change(starts[1], params) > 0.05
    wrap = (lambda tx: tx) if nest == "chain" else lambda tx: optax.masked(tx, mask)
    expected = refreshed_at(starts, wrap, {"value_fn": network})
    assert_same_subspace(state, expected)
    seen = dho2_jax.metrics(state)
    assert (int(seen["rejected"]), int(seen["age"])) == (0, 12)


# --- disturbances ------------------------------------------------------------------


class Disturbed:
    """A compiled step whose batch, and whether it gives NaN, may change in each."""

    def __init__(self, wrap=lambda tx: tx):
        options = SWEEP | {"num_matvecs": 6, "refresh_period": 12}
        self.tx = wrap(dho2_jax.dho2(optax.adam(0.02), **options))
        self.step = jit(self._step)

    def _step(self, params, state, inputs, poison_product, poison_gradient):
        grads = jax.grad(network)(params, inputs)
        grads = jax.tree.map(lambda g: g + poison_gradient, grads)
        updates, state = self.tx.update(
            grads,
            state,
            params,
            value_fn=lambda p: (1 + poison_product) * network(p, inputs),
        )
        return optax.apply_updates(params, updates), state

    def run(self, params, state, steps, which=0, product=0.0, gradient=0.0):
        inputs = np.roll(INPUTS, 4 * which, 0).astype(np.float32)
        for _ in range(steps):
            params, state = self.step(params, state, inputs, product, gradient)
        return params, state

    def start(self):
        params = cases.parameters()
        return params, self.tx.init(params)


@functools.cache
def disturbed():
    """The program, and a run of 15 steps: one sweep is over, one is under way."""
    program = Disturbed()
    params, state = program.run(*program.start(), 15)
    assert int(state.curvature.counters.refreshes) == 1
    assert 0 < int(state.curvature.sweep.lanczos.index) < 5
    return program, params, state


def assert_rejected_once(program, params, state, before):
    """The sweep of step 12 was, and the old subspace is in use; not so the next."""
    counters = state.curvature.counters
    assert (int(counters.refreshes), int(counters.rejected)) == (1, 1)
    chex.assert_trees_all_equal(state.curvature.subspace, before.curvature.subspace)
    assert int(dho2_jax.metrics(state)["age"]) == 23
    params, state = program.run(params, state, 12)
    counters = state.curvature.counters
    assert (int(counters.refreshes), int(counters.rejected)) == (2, 1)
    assert int(dho2_jax.metrics(state)["age"]) == 11
    assert float(counters.recurrence_defect) < 1e-5
    chex.assert_tree_all_finite((params, state))


def test_another_batch_in_mid_sweep_is_noticed():
    program, params, before = disturbed()
    params, state = program.run(params, before, 8, which=1)
    assert 0.01 < float(state.curvature.counters.recurrence_defect) < np.inf
    assert_rejected_once(program, params, state, before)


def test_a_product_that_is_not_finite_spoils_one_sweep():
    program, params, before = disturbed()
    params, state = program.run(params, before, 1, product=np.nan)
    params, state = program.run(params, state, 7)
    assert not float(state.curvature.counters.recurrence_defect) < 0.01
    assert_rejected_once(program, params, state, before)


@pytest.mark.slow
def test_a_step_that_apply_if_finite_drops_is_made_again():
    program = Disturbed(lambda tx: optax.apply_if_finite(tx, 5))
    calm = program.run(*program.start(), 9)
    params, state = program.run(*program.start(), 4)
    params, state = program.run(params, state, 2, product=np.nan, gradient=np.nan)
    assert int(state.total_notfinite) == 2
    params, state = program.run(params, state, 5)
    chex.assert_trees_all_equal(params, calm[0])
    chex.assert_trees_all_equal(state.inner_state, calm[1].inner_state)
    assert int(dho2_jax.metrics(state)["refreshes"]) == 1


def test_switched_off_a_sweep_waits():
    program, params, state = disturbed()
    anchor = state.curvature.sweep
    index = int(anchor.lanczos.index)
    expected = program.run(params, state, 7)[1].curvature
    # Elsewhere and with another batch: neither counts while it waits.
    state = dho2_jax.set_enabled(state, False)
    params, state = program.run(params, state, 2, which=2)
    assert int(state.curvature.sweep.lanczos.index) == index
    chex.assert_trees_all_equal(state.curvature.sweep.lanczos, anchor.lanczos)
    chex.assert_trees_all_equal(state.curvature.sweep.anchor, anchor.anchor)
    state = dho2_jax.set_enabled(state, True)
    params, state = program.run(params, state, 7)
    assert (state.curvature.counters.refreshes, expected.counters.refreshes) == (2, 2)
    assert int(state.curvature.anchor.count) == 12
    np.testing.assert_allclose(
        state.curvature.subspace.eigenvalues,
        expected.subspace.eigenvalues,
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.slow
def test_a_sweep_that_waited_too_long_is_given_up():
    program, params, before = disturbed()
    params, state = program.run(params, dho2_jax.set_enabled(before, False), 6)
    # On again at step 21; at 24 the next one is due.
    params, state = program.run(params, dho2_jax.set_enabled(state, True), 3)
    assert int(state.curvature.counters.rejected) == 0
    params, state = program.run(params, state, 1)
    assert int(state.curvature.counters.rejected) == 1
    assert int(state.curvature.sweep.start.count) == 24
    params, state = program.run(params, state, 10)
    counters = state.curvature.counters
    assert (int(counters.refreshes), int(counters.rejected)) == (2, 1)
    assert int(state.curvature.anchor.count) == 24


# --- many devices ------------------------------------------------------------------

PROBLEMS["staggered"] = Problem(
    ("scalar", "tall", "wide"),
    PROBLEMS["adam"].base,
    plain_source,
    {
        "refresh": "staggered",
        "num_largest": 2,
        "num_matvecs": 6,
        "refresh_period": 11,
    },
)
STEPS = 40
LAYOUTS = {
    "8": Layout((8,)),
    "fsdp": Layout((8,), specs={"tall": P("d"), "wide": P(None, "d")}),
    "explicit": Layout(
        (4, 2),
        ("data", "model"),
        EXPLICIT,
        {"tall": P("data", "model"), "wide": P(None, "model")},
    ),
    "4": Layout((4,)),
}


@functools.cache
def trainer(layout=None):
    return Trainer("staggered", LAYOUTS.get(layout))


@functools.cache
def trained(layout=None):
    return trainer(layout).run(STEPS)


@pytest.mark.slow
def test_three_sweeps_on_one_device():
    program = trainer()
    params, state, points = None, None, [program.params]
    for _ in range(2):
        params, state = program.run(11, params, state)[3:]
        points.append(params)
    state = trained().state
    external = PROBLEMS["staggered"].options | {"refresh": "external"}
    expected = dho2_jax.dho2(optax.adam(1.0), **OPTIONS | external).init(points[0])
    for point in points:
        expected = program.refresh(point, expected, program.batch)
    assert_same_subspace(state, expected)
    seen = dho2_jax.metrics(state)
    # The fourth has begun at step 33.
    assert (int(seen["refreshes"]), int(seen["rejected"])) == (3, 0)
    assert int(seen["age"]) == STEPS - 22
    assert 0 <= int(state.curvature.sweep.lanczos.index) < 6
    assert trained().losses[-1] < 0.1 * trained().losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["8", "fsdp", "explicit"])
def test_forty_steps_agree_with_one_device(layout):
    run = trained(layout)
    assert_same_run(run, trained())
    assert_unused_untouched(run.params)
    assert_unused_untouched(trained().params)
    assert_same_subspace(run.state, trained().state, (1e-5, 3e-3))
    assert trainer(layout).traces == trainer(layout).step._cache_size() == 1
    sweep = run.state.curvature.sweep
    for x in jax.tree.leaves((sweep.lanczos.basis, sweep.anchor, sweep.lanczos.vector)):
        assert x.addressable_shards[0].data.size == x.size // 8
    if layout != "8":
        assert_where_state_shardings_says(trainer(layout), run.state)


def assert_where_state_shardings_says(program, trained):
    where = dho2_jax.state_shardings(program.tx, program.params)
    states = [program.tx.init(program.params), trained]
    with jax.set_mesh(program.mesh):
        states.append(program.init(program.params))
    for state in states:
        assert_same_signature(state, states[0])
        for x, sharding in zip(
            jax.tree.leaves(state), jax.tree.leaves(where), strict=True
        ):
            assert x.sharding.is_equivalent_to(sharding, x.ndim)


@pytest.mark.slow
def test_the_state_can_be_donated():
    program = trainer("8")
    step = jax.jit(program._step, donate_argnums=(0, 1), compiler_options=FAST)
    params, state = jax.tree.map(
        jnp.copy, (program.params, program.init(program.params))
    )
    for _ in range(15):
        held = params, state
        params, state, *_ = step(params, state, program.batch)
        large = [x for x in jax.tree.leaves(held) if x.size > 128]
        assert len(large) > 9 and all(x.is_deleted() for x in large)
    expected = program.run(15)
    chex.assert_trees_all_equal(params, expected.params)
    chex.assert_trees_all_equal(state, expected.state)


def on_axis():
    problem = PROBLEMS["staggered"]
    return dho2_jax.dho2(problem.base(), axis_name="d", **OPTIONS | problem.options)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_trains_as_one_device(check_vma):
    tx, mesh = on_axis(), make_mesh(LAYOUTS["8"])
    params = jax.device_put(
        parameters(PROBLEMS["staggered"].leaves), NamedSharding(mesh, P())
    )
    specs = dho2_jax.state_specs(tx, params)

    mapped = functools.partial(shard_mapped, mesh, check_vma)
    state = mapped(tx.init, P(), specs)(params)
    step = mapped(
        step_on(tx, ("d",), check_vma), (P(), specs, P("d")), (P(), specs, P())
    )
    losses = []
    for _ in range(STEPS):
        params, state, value = step(params, state, batch())
        losses.append(float(value))
    assert step._cache_size() == 1
    np.testing.assert_allclose(losses, trained().losses, rtol=2e-5)
    assert_close(params, trained().params, 1e-3)
    assert_unused_untouched(params)
    assert_same_subspace(state, trained().state, (1e-5, 3e-3))


@pytest.mark.slow
def test_pmap_trains_as_one_device():
    tx, steps = on_axis(), 22
    start = parameters(PROBLEMS["staggered"].leaves)
    params = jax.tree.map(lambda x: jnp.stack([x] * 8), start)
    shares = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch())
    first = NamedSharding(make_mesh(LAYOUTS["8"]), P("d"))
    params, shares = jax.device_put((params, shares), first)
    init = jax.jit(jax.pmap(tx.init, axis_name="d"), compiler_options=FAST)
    step = jax.pmap(step_on(tx, ("d",), check_vma=False), axis_name="d")
    step = jax.jit(step, compiler_options=FAST)
    state, losses = init(params), []
    for _ in range(steps):
        params, state, value = step(params, state, shares)
        losses.append(np.asarray(value))
    np.testing.assert_array_equal(losses, np.array(losses)[:, :1].repeat(8, 1))
    np.testing.assert_allclose(
        np.array(losses)[:, 0], trained().losses[:steps], rtol=2e-5
    )
    assert int(state.curvature.counters.refreshes[0]) == 2
    assert int(state.curvature.counters.rejected[0]) == 0


# --- save and restore --------------------------------------------------------------


def abstract(program):
    """Parameters and state of a program, to restore into."""
    state = jax.eval_shape(program.tx.init, program.params)
    if program.mesh is None:
        where = jax.tree.map(lambda _: program.params["tall"].sharding, state)
    else:
        where = dho2_jax.state_shardings(program.tx, program.params)
    return program.params, jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where
    )


def saved(run, path):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, (run.params, run.state))


def restored(program, path):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, abstract(program))


@pytest.mark.slow
def test_a_run_cut_in_mid_sweep_goes_on_bit_for_bit(tmp_path):
    first, second = trainer(), Trainer("staggered")  # as after a restart
    met = set()
    for cut in (1, 4, 8, 10, 15, 18, 31):
        run = first.run(cut)
        met.add(int(run.state.curvature.sweep.lanczos.index))
        saved(run, tmp_path / str(cut))
        rest = second.run(STEPS - cut, *restored(second, tmp_path / str(cut)))
        chex.assert_trees_all_equal(rest.params, trained().params)
        chex.assert_trees_all_equal(rest.state, trained().state)
        np.testing.assert_array_equal(rest.losses, trained().losses[cut:])
    assert {-1, 6, 7} < met and len(met) > 4  # before, in, after and between sweeps


@pytest.mark.slow
@pytest.mark.parametrize("layout", [None, "4"])
def test_a_sweep_may_be_finished_on_another_number_of_devices(layout, tmp_path):
    run = trainer("8").run(15)
    assert 0 < int(run.state.curvature.sweep.lanczos.index) < 5
    saved(run, tmp_path / "state")
    program = trainer(layout)
    rest = program.run(10, *restored(program, tmp_path / "state"))
    seen = dho2_jax.metrics(rest.state)
    assert (int(seen["refreshes"]), int(seen["rejected"])) == (2, 0)
    assert float(seen["recurrence_defect"]) < 1e-5
    expected = trainer("8").run(10, run.params, run.state)
    assert_same_subspace(rest.state, expected.state)
    np.testing.assert_allclose(rest.losses, expected.losses, rtol=2e-5)
