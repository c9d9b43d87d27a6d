"""NNX models: their loss as a loss of parameters, and refreshes of their optimizer."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import dense_hessian, flat, jit

import dho2_jax

nnx = pytest.importorskip("flax.nnx")
helpers = pytest.importorskip("dho2_jax.nnx")

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Network(nnx.Module):
    """Batch normalisation, dropout, and one matrix that is used twice."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.second = self.first
        self.norm = nnx.BatchNorm(3, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        h = self.second(jnp.tanh(self.first(x)))
        return self.last(self.dropout(jnp.tanh(self.norm(h))))[:, 0]


def batch(size=24):
    x = jax.random.normal(jax.random.key(3), (size, 3)) * jnp.array([1.0, 2, 4])
    return x, jnp.sin(x.sum(-1))


def outputs_fn(model, data):
    return model(data[0])


def loss_of_outputs(outputs, data):
    return jnp.mean((outputs - data[1]) ** 2)


def loss_fn(model, data):
    return loss_of_outputs(outputs_fn(model, data), data)


def loss_and_outputs(model, data):
    outputs = outputs_fn(model, data)
    return loss_of_outputs(outputs, data), outputs


def as_trained(model):
    return model


def without_dropout(model):
    return nnx.view(model, deterministic=True)


def in_evaluation(model):
    return nnx.view(model, deterministic=True, use_running_average=True)


VIEWS = (as_trained, without_dropout, in_evaluation)


def pure(model, wrt=nnx.Param):
    return nnx.as_pure(nnx.state(model, wrt))


def make(refresh="external", wrt=nnx.Param, **kwargs):
    model = Network()
    kwargs = {"num_largest": 2, "num_matvecs": 4, "refresh": refresh} | kwargs
    tx = dho2_jax.dho2(optax.adam(1e-2), **kwargs)
    return model, nnx.Optimizer(model, tx, wrt=wrt)


@pytest.fixture(autouse=True)
def no_traces_yet():
    chex.clear_trace_counter()


def stepper(view=as_trained):
    @nnx.jit
    @chex.assert_max_traces(n=1)
    def step(model, optimizer, data):
        value, grads = nnx.value_and_grad(loss_fn)(model, data)
        fn = helpers.value_fn(loss_fn, view(model), data)
        optimizer.update(model, grads, value_fn=fn)
        return value

    return step


def others(model):
    """What of the model is no parameter: statistics, keys, counts."""
    state = nnx.state(model, nnx.Not(nnx.Param))
    return [
        np.asarray(jax.random.key_data(x))
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        else np.asarray(x)
        for x in jax.tree.leaves(nnx.as_pure(state))
    ]


# --- value_fn ----------------------------------------------------------------------


@pytest.mark.parametrize("view", VIEWS)
def test_it_is_the_loss_of_the_model_at_those_parameters(view):
    model, data = Network(), batch()
    elsewhere = jax.tree.map(lambda x: x + 0.1, pure(model))
    found = helpers.value_fn(loss_fn, view(model), data)(elsewhere)
    nnx.update(model, elsewhere)
    np.testing.assert_allclose(found, loss_fn(view(model), data), rtol=1e-6)


def test_it_is_one_function_and_leaves_the_model_alone():
    model, data = Network(), batch()
    before = others(model)
    fn = helpers.value_fn(loss_fn, model, data)
    params = pure(model)
    first = fn(params)
    assert float(fn(params)) == float(first)  # the same dropout mask
    hessian = dense_hessian(fn, params)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-5)
    chex.assert_trees_all_equal(others(model), before)
    loss_fn(model, data)  # moves the statistics and the dropout key
    assert any(np.any(a != b) for a, b in zip(others(model), before, strict=True))
    assert float(fn(params)) == float(first)
    assert float(helpers.value_fn(loss_fn, model, data)(params)) != float(first)


def test_views_see_other_curvature():
    data = batch()
    trained, still, evaluated = (
        dense_hessian(helpers.value_fn(loss_fn, view(model), data), pure(model))
        for view, model in ((view, Network()) for view in VIEWS)
    )
    assert np.max(np.abs(trained - still)) > 1e-2
    assert np.max(np.abs(evaluated - still)) > 1e-2


def test_it_takes_states_with_and_without_variables():
    model, data = Network(), batch()
    fn = helpers.value_fn(loss_fn, model, data)
    assert float(fn(nnx.state(model, nnx.Param))) == float(fn(pure(model)))


def test_auxiliary_outputs_are_dropped():
    model, data = Network(), batch()
    fn = helpers.value_fn(loss_and_outputs, model, data, has_aux=True)
    plain = helpers.value_fn(loss_fn, model, data)
    assert float(fn(pure(model))) == float(plain(pure(model)))


def test_a_pair_is_for_gauss_newton():
    model, data = Network(), batch()
    fns = helpers.value_fn((outputs_fn, loss_of_outputs), without_dropout(model), data)
    params = pure(model)
    v = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)
    found = jit(lambda p, v: dho2_jax.ggn_vp(*fns, p)(v))(params, v)
    rows = flat_jacobian(fns[0], params)
    expected = rows.T @ (rows @ flat(v)) * 2 / len(rows)
    np.testing.assert_allclose(flat(found), expected, rtol=1e-3, atol=1e-4)


def flat_jacobian(fn, params):
    leaves = jax.tree.leaves(jit(jax.jacobian(fn))(params))
    return np.concatenate([np.reshape(x, (x.shape[0], -1)) for x in leaves], 1)


def test_it_may_be_computed_in_parts():
    model, data = Network(), batch()
    still = in_evaluation(model)

    def of_part(params, part):
        return helpers.value_fn(loss_fn, still, part)(params)

    parts = dho2_jax.chunked_value_fn(of_part, data, num_chunks=3)
    whole = helpers.value_fn(loss_fn, still, data)
    found, expected = jit(lambda p: (jax.grad(parts)(p), jax.grad(whole)(p)))(
        pure(model)
    )
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-4, atol=1e-6)


# --- training ----------------------------------------------------------------------


@pytest.mark.slow
def test_periodic_refreshes_compile_once_and_move_no_statistics():
    (model, optimizer), data = make("periodic", refresh_period=3), batch()
    step = stepper()
    expected = Network()
    nnx.jit(loss_fn)(expected, data)  # one step's statistics and keys
    start = step(model, optimizer, data)
    chex.assert_trees_all_close(others(model), others(expected), rtol=1e-6, atol=1e-7)
    for _ in range(11):
        step(model, optimizer, data)
    seen = dho2_jax.metrics(optimizer.opt_state)
    assert (int(seen["refreshes"]), int(seen["rejected"])) == (4, 0)
    assert loss_fn(without_dropout(model), data) < start


@pytest.mark.slow
def test_refresh_in_place_compiles_once():
    (model, optimizer), data = make(), batch()
    step = stepper(without_dropout)

    @nnx.jit
    @chex.assert_max_traces(n=1)
    def renew(optimizer, model, data):
        helpers.refresh(
            optimizer, without_dropout(model), loss_and_outputs, data, has_aux=True
        )

    before = others(model)
    renew(optimizer, model, data)
    chex.assert_trees_all_equal(others(model), before)
    expected = np.linalg.eigvalsh(
        dense_hessian(
            helpers.value_fn(loss_fn, without_dropout(model), data), pure(model)
        )
    )
    found = dho2_jax.subspace(optimizer.opt_state).eigenvalues
    np.testing.assert_allclose(found[-1], expected[-1], rtol=0.05)
    for _ in range(3):
        step(model, optimizer, data)
    renew(optimizer, model, data)
    step(model, optimizer, data)
    seen = dho2_jax.metrics(optimizer.opt_state)
    assert (int(seen["refreshes"]), int(seen["count"])) == (2, 4)
    assert int(optimizer.step[...]) == 4


def test_refresh_of_a_part_of_the_parameters():
    """As for LoRA: `wrt` selects what is trained and what has curvature."""
    only_last = nnx.All(nnx.Param, nnx.PathContains("last"))
    (model, optimizer), data = make(wrt=only_last), batch()
    still, kernel = in_evaluation(model), np.asarray(model.first.kernel[...])
    nnx.jit(lambda o, m: helpers.refresh(o, m, loss_fn, data))(optimizer, still)
    vectors = dho2_jax.subspace(optimizer.opt_state).eigenvectors
    assert flat(vectors).size == 2 * 4
    dense = dense_hessian(
        helpers.value_fn(loss_fn, still, data, wrt=only_last), pure(model, only_last)
    )
    np.testing.assert_allclose(
        dho2_jax.subspace(optimizer.opt_state).eigenvalues,
        np.linalg.eigvalsh(dense)[-2:],
        rtol=1e-3,
    )
    np.testing.assert_array_equal(model.first.kernel[...], kernel)


@pytest.mark.slow
@pytest.mark.parametrize(
    "view, accepted", [(as_trained, False), (without_dropout, True)]
)
def test_a_sweep_needs_a_loss_without_new_dropout_masks(view, accepted):
    model, optimizer = make("staggered", refresh_period=10)
    step, data = stepper(view), batch()
    for _ in range(10):
        step(model, optimizer, data)
    seen = dho2_jax.metrics(optimizer.opt_state)
    assert (int(seen["refreshes"]), int(seen["rejected"])) == (accepted, not accepted)


# --- what is refused ---------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda m, o: helpers.value_fn(loss_fn, {"a": jnp.ones(3)}),
            "`model` must be a flax.nnx.Module .* got a dict without",
        ),
        (
            lambda m, o: helpers.value_fn(loss_fn, m, wrt=nnx.LoRAParam),
            "`model` must .*LoRAParam.*, got a Network without any",
        ),
        (
            lambda m, o: helpers.value_fn(m, loss_fn),
            "`loss_fn` must be a function .* got Network",
        ),
        (
            lambda m, o: helpers.value_fn((loss_fn, 3), m),
            "`loss_fn` must be a function .* got int",
        ),
        (
            lambda m, o: helpers.value_fn((loss_fn, loss_fn), m, has_aux=True),
            "`has_aux` must be False with a pair",
        ),
        (
            lambda m, o: helpers.refresh(m, o, loss_fn),
            "`optimizer` must be a flax.nnx.Optimizer, got Network",
        ),
        (
            lambda m, o: helpers.refresh(
                nnx.Optimizer(m, optax.sgd(0.1), wrt=nnx.Param), m, loss_fn, batch()
            ),
            "`state` must hold exactly one DHO² state, got none",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(*make())


@pytest.mark.parametrize("function", [helpers.value_fn, helpers.refresh])
def test_every_argument_is_documented(function):
    text = inspect.getdoc(function)
    assert "Raises:" in text
    for name in inspect.signature(function).parameters:
        assert f"\n  {name}: " in text or f"\n  *{name}: " in text
