"""Optax's own contract, over every base and alias, and inside every wrapper."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from cases import (
    BASES,
    COMPILED,
    EACH_WRAPPER,
    FACTORIES,
    FAST,
    SMALL,
    WRAPPERS,
    Loop,
    assert_same_signature,
    external,
    largest_change,
    loss,
    parameters,
    trained,
    wrapped,
)

import dho2_jax

MODES = ("periodic", "external")
RATES = {
    "newton_learning_rate": 0.7,
    "subspace_decay": 0.6,
    "damping": 0.2,
    "max_base_scaling": 1.5,
    "rate_schedule": 0.5,
}


def renewed(params, state):
    """The state after a refresh, by one program: it does not look at the base."""
    bare = wrapped("bare")
    own = state._replace(base_state=bare.tx.init(params).base_state)
    return state._replace(curvature=bare.renew(params, own).curvature)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


# --- init, update and refresh agree ------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FACTORIES)
def test_init_update_and_refresh_agree_in_signature(name, dtype, mode):
    tx = FACTORIES[name](refresh=mode)
    params = parameters(dtype)
    state = tx.init(params)
    assert_same_signature(jax.eval_shape(tx.init, params), state)
    assert_same_signature(tx.init(abstract(params)), state)

    def update(grads, state):
        extra = {"value_fn": loss, "epoch": 3, "batch_stats": {"mean": jnp.ones(2)}}
        return tx.update(grads, state, params, **extra)

    updates, after = jax.eval_shape(update, params, state)
    assert_same_signature(updates, params)
    assert_same_signature(after, state)
    renew = jax.eval_shape(lambda s: dho2_jax.refresh(s, params, loss), state)
    assert_same_signature(renew, state)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, mode",
    [(name, "external") for name in COMPILED]
    + [(name, "periodic") for name in COMPILED if name.endswith(("_sgd", "_muon"))],
)
def test_one_compilation(name, mode):
    tx = FACTORIES[name](refresh=mode)
    loop = Loop(tx, value_fn=loss, unknown=3)
    params = parameters()
    state = tx.init(params)
    chex.assert_trees_all_equal(jax.jit(tx.init)(params), state)

    trained_params, trained_state = loop.run(params, state, 2)
    if mode == "external":
        trained_state = renewed(trained_params, trained_state)
    trained_params, trained_state = loop.run(trained_params, trained_state, 2)

    assert loop.traces == 1 and loop.step._cache_size() == 1
    assert wrapped("bare").renewals <= 1
    assert_same_signature(trained_state, state)
    assert_same_signature(trained_params, params)
    found = dho2_jax.metrics(trained_state)
    assert int(found["refreshes"]) == (2 if mode == "periodic" else 1)
    assert int(found["count"]) == 4 and int(found["num_valid"]) == 2
    assert float(loss(trained_params)) < float(loss(params))


def test_one_compilation_in_bfloat16():
    tx = FACTORIES["adam"](refresh="external")
    loop = Loop(tx, value_fn=loss)
    params = parameters("bfloat16")
    state = tx.init(params)
    after, new = loop.run(params, state, 4)
    assert loop.traces == 1 and loop.step._cache_size() == 1
    assert_same_signature(new, state)
    assert_same_signature(after, params)
    assert dho2_jax.subspace(new).eigenvectors["w"].dtype == jnp.float32
    assert float(loss(after)) < float(loss(params))


@pytest.mark.parametrize("name", COMPILED)
def test_eager_steps_keep_the_signature(name):
    tx = FACTORIES[name](refresh="external")
    params = parameters()
    state = tx.init(params)
    updates, after = tx.update(jax.grad(loss)(params), state, params)
    assert_same_signature(after, state)
    assert_same_signature(updates, params)


@pytest.mark.slow
def test_an_eager_refresh_keeps_the_signature():
    tx, params = external(), parameters()
    state = tx.init(params)
    after = dho2_jax.refresh(state, params, loss)
    assert int(dho2_jax.metrics(after)["refreshes"]) == 1
    assert_same_signature(after, state)
    assert_same_signature(dho2_jax.set_enabled(after, False), state)


@pytest.mark.parametrize(
    "params",
    [
        pytest.param({"a": 0.5, "b": jnp.ones(3)}, id="python_scalar"),
        pytest.param({"a": np.ones(()), "b": np.ones(3, np.float32)}, id="numpy"),
        pytest.param({"a": jnp.ones((0, 3)), "b": jnp.ones(3)}, id="no_elements"),
        pytest.param([jnp.ones(2), (jnp.ones(()), None)], id="nest_with_none"),
    ],
)
def test_unusual_leaves_keep_the_signature(params):
    tx = external(optax.sgd(0.1, momentum=0.9), num_matvecs=2)

    def square(p):
        return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(p))

    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    state = tx.init(params)
    update = jax.eval_shape(tx.update, params, state, params)
    assert_same_signature(update[1], state)
    assert_same_signature(update[0], params)
    renew = jax.eval_shape(lambda s: dho2_jax.refresh(s, params, square), state)
    assert_same_signature(renew, state)


@pytest.mark.parametrize(
    "base, grads_dtype",
    [
        pytest.param(optax.adam(0.1, mu_dtype="float32"), "bfloat16", id="moments"),
        pytest.param(optax.sgd(0.1), "float32", id="gradients"),
    ],
)
def test_a_wider_dtype_than_the_parameters_keeps_the_signature(base, grads_dtype):
    params = parameters("bfloat16")
    tx = external(base)
    state = tx.init(params)
    _, after = jax.eval_shape(tx.update, parameters(grads_dtype), state, params)
    assert_same_signature(after.curvature, state.curvature)


def test_weakly_typed_parameters_keep_the_signature():
    params = {"a": jnp.ones(3), "b": jax.jit(lambda: 0.5)()}
    assert params["b"].weak_type
    tx = external(optax.sgd(0.1), num_matvecs=2)
    state = tx.init(params)
    _, after = jax.eval_shape(tx.update, params, state, params)
    assert_same_signature(after, state)


# --- init --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FACTORIES)
def test_empty_pytree(name, mode):
    tx = FACTORIES[name](refresh=mode)
    for empty in ({}, ()):
        state = tx.init(empty)
        updates, after = tx.update(empty, state, empty)
        assert updates == empty
        assert_same_signature(after, state)
        assert int(dho2_jax.metrics(after)["count"]) == 1
        assert int(dho2_jax.metrics(after)["num_valid"]) == 0
    assert_same_signature(jax.eval_shape(tx.init, {}), tx.init({}))


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_init_is_abstract_too(name):
    tx, params = wrapped(name).tx, parameters()
    assert_same_signature(jax.eval_shape(tx.init, params), tx.init(params))


class WrappedInit(chex.TestCase):
    @chex.variants(with_jit=True, with_device=True, without_device=True, with_pmap=True)
    @parameterized.parameters(*WRAPPERS)
    def test_wrapped_init_is_one_everywhere(self, name):
        tx, params = wrapped(name).tx, parameters()
        found = self.variant(tx.init)(params)
        chex.assert_trees_all_equal(found, tx.init(params), strict=True)


# --- tree_map_params ---------------------------------------------------------------


@pytest.mark.parametrize("map_params", [optax.tree_map_params, optax.tree.map_params])
@pytest.mark.parametrize("name", BASES)
def test_tree_map_params_maps_the_base_alone(name, map_params):
    tx, params = FACTORIES[name](), parameters()
    state, base = tx.init(params), BASES[name]()
    ones = jax.tree.map(jnp.ones_like, params)
    rest = () if name == "muon" else (ones,)  # muon holds masks of its own

    def add(x, one=1.0):
        return x + one

    mapped = map_params(tx, add, state, *rest)
    expected = map_params(base, add, base.init(params), *rest)
    chex.assert_trees_all_equal(mapped.base_state, expected)
    chex.assert_trees_all_equal(mapped.curvature, state.curvature)


@pytest.mark.parametrize("name", FACTORIES)
def test_tree_map_params_makes_specs_for_the_whole_state(name):
    tx, params = FACTORIES[name](), parameters()
    state = tx.init(params)
    spec = jax.sharding.PartitionSpec
    sharded, whole = spec("x"), spec()
    specs = optax.tree_map_params(
        tx, lambda _: sharded, state, transform_non_params=lambda _: whole
    )
    spread = jax.tree.broadcast(specs, state, is_leaf=lambda x: isinstance(x, spec))
    chex.assert_trees_all_equal_structs(spread, state)
    assert set(jax.tree.leaves(spread.curvature)) == {whole}
    unchanged = optax.tree_map_params(
        tx, lambda x: x, state, transform_non_params=lambda x: x
    )
    chex.assert_trees_all_equal(unchanged, state)


@pytest.mark.parametrize("name", ["chain", "masked", "apply_if_finite"])
def test_tree_map_params_inside_wrappers(name):
    tx, params = wrapped(name).tx, parameters()
    state = tx.init(params)
    mapped = optax.tree_map_params(tx, lambda x: x + 1, state)
    chex.assert_trees_all_equal_structs(mapped, state)
    chex.assert_trees_all_equal(dho2_jax.metrics(mapped), dho2_jax.metrics(state))
    mu = optax.tree_utils.tree_get(mapped, "mu")
    assert all(float(jnp.min(x)) == 1 for x in jax.tree.leaves(mu))


# --- wrappers ----------------------------------------------------------------------


@pytest.mark.parametrize("name", EACH_WRAPPER)
@pytest.mark.slow
def test_wrapped_training_compiles_once(name):
    loop, params, state = trained(name)
    params, state = loop.run(params, state, 2)
    assert loop.traces == 1 and loop.renewals == 1
    assert_same_signature(state, loop.tx.init(parameters()))
    if "masked" not in name and name != "deep":  # a mask passes gradients through
        assert float(loss(params)) < float(loss(parameters()))


@pytest.mark.parametrize(
    "name", ["chain", "multi_steps", "inject", "apply_if_finite", "bare"]
)
def test_periodic_refresh_inside_wrappers_keeps_the_signature(name):
    tx, params = WRAPPERS[name](refresh="periodic"), parameters()
    state = tx.init(params)

    def update(grads, state):
        return tx.update(grads, state, params, value_fn=loss)

    updates, after = jax.eval_shape(update, params, state)
    assert_same_signature(updates, params)
    assert_same_signature(after, state)


def test_a_chain_of_one_is_the_bare_transformation():
    bare, params = external(refresh="periodic"), parameters()
    chained = optax.chain(optax.identity(), bare, optax.identity())

    def program(tx):
        def update(grads, state):
            return tx.update(grads, state, params, value_fn=loss)

        return str(jax.make_jaxpr(update)(params, tx.init(params)))

    assert program(chained) == program(bare)


@pytest.mark.slow
def test_multi_steps_is_the_mean_gradient():
    """Parameters rest between emissions, so both mini-gradients are the same."""
    bare, params, bare_state = wrapped("bare"), parameters(), None
    many = wrapped("multi_steps")
    bare_state = bare.renew(params, bare.tx.init(params))
    many_state = many.renew(params, many.tx.init(params))
    expected, bare_state = bare.run(params, bare_state, 3)
    found, many_state = many.run(params, many_state, 6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (found, dho2_jax.metrics(many_state)),
        (expected, dho2_jax.metrics(bare_state)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masked", "partition"])
def test_a_mask_is_dho2_on_the_rest(name):
    loop, whole = wrapped(name), parameters()
    head = whole["head"]
    rest = {k: v for k, v in whole.items() if k != "head"}

    def loss_of_rest(p):
        return loss(p | {"head": head})

    @jax.jit
    def step_of_rest(rest, kept):
        tx = external()
        state = dho2_jax.refresh(tx.init(rest), rest, loss_of_rest)
        return tx.update(kept, state, rest)[0]

    grads = jax.grad(loss)(whole)
    expected = step_of_rest(rest, {k: grads[k] for k in rest})

    wrapped_state = loop.tx.init(whole)
    if name == "masked":  # partition's refresh at `whole` also sees only its own
        assert len(jax.tree.leaves(dho2_jax.subspace(wrapped_state).eigenvectors)) == 2
    wrapped_state = loop.renew(whole, wrapped_state)
    found, _ = jax.jit(loop.tx.update)(grads, wrapped_state, whole)
    for key in rest:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-4, atol=1e-6)
    outside = 1.0 if name == "masked" else -0.01
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, outside * b, rtol=1e-6),
        found["head"],
        grads["head"],
    )


def test_apply_if_finite_skips_the_whole_step():
    loop, params, state = trained("apply_if_finite")
    grads = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    updates, after = jax.jit(loop.tx.update)(grads, state, params)
    assert largest_change(updates, jax.tree.map(jnp.zeros_like, updates)) == 0
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    assert int(after.total_notfinite) == 1
    chex.assert_tree_all_finite(loss(loop.run(params, after, 1)[0]))


# --- rates -------------------------------------------------------------------------


@pytest.mark.parametrize("base_rate", ["curvature", "fixed"])
@pytest.mark.parametrize("name", RATES)
def test_a_constant_schedule_is_the_number(name, base_rate):
    params = parameters()

    def program(rate):
        tx = external(base_rate=base_rate, **{name: rate})
        return str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))

    assert program(optax.constant_schedule(RATES[name])) == program(RATES[name])
    if (name, base_rate) != ("max_base_scaling", "curvature"):
        assert program(RATES[name]) != program(0.5 * RATES[name])


def test_schedules_are_read_at_the_step_count():
    cut = optax.piecewise_constant_schedule(1.0, {2: 0.0})
    loop = Loop(external(rate_schedule=cut))
    params = parameters()
    moved, state = loop.run(params, loop.tx.init(params), 2)
    rested, _ = loop.run(moved, state, 3)
    assert largest_change(params, moved) > 0
    assert largest_change(moved, rested) == 0


def test_injected_hyperparameters_act_without_recompiling():
    make = optax.inject_hyperparams(dho2_jax.dho2, static_args=dho2_jax.STATIC_ARGS)
    start = {
        "newton_learning_rate": 1.0,
        "subspace_decay": 0.9,
        "damping": 0.0,
        "max_base_scaling": 2.0,
        "rate_schedule": 1.0,
    }
    kwargs = SMALL | {"refresh": "external", "base_rate": "fixed"}
    loop = Loop(make(optax.adam(0.02), **kwargs, **start))
    params = parameters()
    state = loop.renew(params, loop.tx.init(params))
    assert set(state.hyperparams) == set(start)
    params, state = loop.run(params, state, 1)
    unchanged, _ = loop.step(params, state)
    for name, value in RATES.items():
        value = 1.0 if name == "max_base_scaling" else value
        hyperparams = state.hyperparams | {name: jnp.asarray(value, jnp.float32)}
        changed, _ = loop.step(params, state._replace(hyperparams=hyperparams))
        assert largest_change(changed, unchanged) > 1e-6, name
    assert loop.traces == 1


@pytest.mark.parametrize("name", [n for n in FACTORIES if n.startswith("dho2_")])
def test_aliases_inject_their_learning_rate(name):
    static = [arg for arg in dho2_jax.STATIC_ARGS if arg != "base_optimizer"]
    make = optax.inject_hyperparams(getattr(dho2_jax, name), static_args=static)
    tx, params = make(0.02, **SMALL, refresh="external"), parameters()
    state = tx.init(params)
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(0.02)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert_same_signature(after, state)
    assert_same_signature(updates, params)


# --- donation ----------------------------------------------------------------------


def assert_no_buffer_twice(tree):
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree) if x.size]
    assert len(set(pointers)) == len(pointers)


def test_the_state_can_be_donated():
    tx, params = external(), parameters()
    state = tx.init(params)
    assert_no_buffer_twice((params, state))

    def step(params, state):
        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params, value_fn=loss)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1), compiler_options=FAST)
    compiled = compiled.lower(params, state).compile()
    size = sum(x.nbytes for x in jax.tree.leaves((params, state)))
    shared = 4  # two leaves that are always equal (the scaling) share one buffer
    assert compiled.memory_analysis().alias_size_in_bytes >= size - shared

    old = state
    params, state = compiled(params, state)
    deleted = [x.is_deleted() for x in jax.tree.leaves(old)]
    assert sum(deleted) >= len(deleted) - 1
    state = dho2_jax.set_enabled(state, True)
    assert_no_buffer_twice(state)
    params, state = compiled(params, state)
    assert int(dho2_jax.metrics(state)["count"]) == 2


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_fresh_wrapped_state_holds_no_buffer_twice(name):
    params = parameters()
    assert_no_buffer_twice((params, wrapped(name).tx.init(params)))
