"""Staggered across a mesh axis: who computes what, and what comes of it."""

import contextlib
import functools

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FAST
from helpers import flat_rows, jit, up_to_sign
from jax.sharding import PartitionSpec as P
from sharded_cases import (
    EXPLICIT,
    Layout,
    assert_unused_untouched,
    batch,
    gathered,
    loss,
    make_mesh,
    on_mesh,
    parameters,
    specs_of,
)

import dho2_jax

LEAVES = ("scalar", "tall", "wide")
OPTIONS = {
    "num_largest": 2,
    "num_smallest": 1,
    "num_matvecs": 6,
    "refresh_period": 11,
}
STEPS = 22
TALL_AND_WIDE = {"tall": P("fsdp"), "wide": P(None, "fsdp")}
LAYOUTS = {
    "replicated": Layout((8,), ("data",)),
    "fsdp": Layout((4, 2), ("data", "fsdp"), specs=TALL_AND_WIDE),
    "explicit": Layout((4, 2), ("data", "fsdp"), EXPLICIT, TALL_AND_WIDE),
    "over_both": Layout(
        (2, 4),
        ("fsdp", "data"),
        specs={"tall": P(("fsdp", "data")), "wide": P(None, "data")},
    ),
    "six": Layout((3, 2), ("data", "fsdp")),  # nothing splits into three
    "over_itself": Layout((8,), ("data",), specs={"tall": P("data")}),
}


def curvature_batch(index):
    """Eight examples, others in each sweep."""
    return jax.tree.map(lambda x: jnp.roll(x, 8 * index, 0)[:8], batch())


class Staggered:
    """The compiled step of the problem on a layout."""

    def __init__(self, layout):
        mesh, specs = make_mesh(layout), specs_of(layout, LEAVES)
        self.mesh, self.traces = mesh, 0
        self.params = on_mesh(parameters(LEAVES), mesh, specs)
        self.batch = on_mesh(batch(), mesh, P(layout.axes))
        self.explicit = layout.kind == EXPLICIT
        whole = gathered if self.explicit else lambda params: params
        where = {"mesh": mesh}
        if layout.specs and not self.explicit:
            where["param_specs"] = specs
        options = OPTIONS | {"refresh": "staggered"} | where
        self.tx = dho2_jax.dho2(optax.adam(1e-2, eps=1e-3), **options)
        self.svag = dho2_jax.staggered_value_and_grad(
            lambda params, batch: loss(whole(params), batch),
            mesh=mesh,
            stagger_axis="data",
        )
        self.init = jax.jit(self.tx.init, compiler_options=FAST)
        self.step = jax.jit(self._step, compiler_options=FAST)
        rest = tuple(axis for axis in layout.axes if axis != "data")
        self.around = on_mesh(curvature_batch(0), mesh, P(rest) if rest else P())

    def within(self):
        return jax.set_mesh(self.mesh) if self.explicit else contextlib.nullcontext()

    def _step(self, params, state, batch, curvature_batch):
        self.traces += 1
        with jax.named_scope("svag"):
            value, grads, product = self.svag(params, batch, curvature_batch, state)
        updates, state = self.tx.update(grads, state, params, product=product)
        made = [jnp.any(x != 0) for x in product.vector.leaves]
        busy = jnp.any(jnp.stack(made))
        return optax.apply_updates(params, updates), state, value, grads, busy

    def run(self):
        """`(seen, state)`: values, gradients, parameters and `busy` of each step."""
        seen = []
        with self.within():
            params, state = self.params, self.init(self.params)
            for i in range(STEPS):
                index = dho2_jax.sweep_index(i, OPTIONS["refresh_period"])
                around = jax.tree.map(
                    lambda x, like: jax.device_put(x, like.sharding),
                    curvature_batch(index),
                    self.around,
                )
                before = params
                params, state, *found = self.step(params, state, self.batch, around)
                seen.append(jax.device_get((before, *found)))
        return seen, params, state


@functools.cache
def slopes_of_groups(groups):
    """A function: the loss and gradient of each group's part, on one device."""
    parts = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), batch())
    one = jax.value_and_grad(loss)
    return jit(lambda params: jax.vmap(one, (None, 0))(params, parts))


def assert_means(found, of_groups, used):
    """`found` is the mean over the groups that are used, and no other."""
    noticed = []
    for x, each in zip(jax.tree.leaves(found), jax.tree.leaves(of_groups), strict=True):
        each, size = np.asarray(each, np.float64), np.max(np.abs(each))
        mean = np.mean(each[used], axis=0)
        np.testing.assert_allclose(x, mean, rtol=0, atol=2e-6 * size)
        noticed.append(np.max(np.abs(np.mean(each, axis=0) - mean)) > 1e-5 * size)
    assert len(used) == len(each) or any(noticed)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_who_computes_what_and_what_comes_of_it(layout):
    """One test a layout, so that parallel processes do not compile a program twice."""
    program = Staggered(LAYOUTS[layout])
    seen, params, state = program.run()
    groups = program.mesh.shape["data"]
    left_out = []
    for i, (before, value, grads, busy) in enumerate(seen):
        if busy:
            left_out.append(i % groups)
        used = [r for r in range(groups) if not busy or r != i % groups]
        assert_means((value, grads), slopes_of_groups(groups)(before), used)
    assert set(left_out) == set(range(groups))  # each takes its turn
    rows = {*range(1, 8)} | {*range(12, 19)}
    busy = {i for i, one in enumerate(seen) if one[3]}
    assert rows - {13} <= busy  # or one step later, after a probe
    assert not busy & {0, 8} and len(busy) < STEPS - 3
    assert_unused_untouched(params)
    assert program.traces == program.step._cache_size() == 1

    metrics = dho2_jax.metrics(state)
    assert (int(metrics["refreshes"]), int(metrics["rejected"])) == (2, 0)
    assert int(metrics["age"]) == 11
    expected = refreshed([(seen[i][0], curvature_batch(i // 11)) for i in (0, 11)])
    assert_same_subspace(state, expected)


def refreshed(points):
    external = OPTIONS | {"refresh": "external"}
    state = dho2_jax.dho2(optax.sgd(0.1), **external).init(points[0][0])
    for point in points:
        state = _refresh()(state, *point)
    return state


@functools.cache
def _refresh():
    return jit(
        lambda state, params, batch: dho2_jax.refresh(
            state, params, lambda p: loss(p, batch)
        )
    )


def assert_same_subspace(state, expected, tolerance=(2e-6, 1e-3)):
    found, other = dho2_jax.subspace(state), dho2_jax.subspace(expected)
    values = np.asarray(other.eigenvalues)
    atol = tolerance[0] * np.max(np.abs(values))
    np.testing.assert_allclose(found.eigenvalues, values, rtol=0, atol=atol)
    rows = (flat_rows(x.eigenvectors) for x in (found, other))
    assert up_to_sign(*rows) < tolerance[1]


# --- losses of every kind ----------------------------------------------------------

FOUR, FOUR_BY_ONE = Layout((4,), ("data",)), Layout((4, 1), ("data", "one"))
SMALL = {
    "num_largest": 2,
    "num_matvecs": 4,
    "refresh_period": 30,
    "base_rate": "fixed",
}
INPUTS, TARGETS = np.random.default_rng(1).standard_normal((2, 16, 4)).astype("float32")
TARGETS = TARGETS[:, :2]


def outputs_fn(params, batch, *_):
    hidden = jnp.tanh(batch["x"] @ params["w"] + params["b"])
    outputs = hidden @ params["head"]["w"] + params["head"]["b"]
    return outputs.astype(jnp.float32)


def output_loss(outputs, batch, *_):
    return jnp.mean((outputs - batch["y"]) ** 2)


def network(params, batch, *_):
    return output_loss(outputs_fn(params, batch), batch)


def with_outputs(params, batch, *_):
    """Auxiliary outputs of every type; the integer is another in each group."""
    outputs = outputs_fn(params, batch)
    aux = {
        "hits": jnp.sum(batch["x"][:, 0] > 0),
        "flag": batch["x"][0, 0] > 0,
        "half": jnp.mean(outputs, 0).astype(jnp.bfloat16),
        "none": None,
    }
    return output_loss(outputs, batch), aux


def dropped(params, batch, key, options):
    """Dropout: another function of the parameters with every key."""
    kept = jax.random.bernoulli(key, 0.5, params["w"].shape[1:])
    hidden = jnp.tanh(batch["x"] @ params["w"] + params["b"]) * kept
    outputs = hidden @ params["head"]["w"] + params["head"]["b"]
    return output_loss(options["scale"] * outputs, batch)


def transposed(params, batch, *_):
    return network(params, {"x": batch["x"].T * batch["table"], "y": batch["y"]})


def parts_of(batch, groups, dims):
    """The batch of each group."""
    return [
        {
            name: x if dims[name] is None else np.split(x, groups, dims[name])[r]
            for name, x in batch.items()
        }
        for r in range(groups)
    ]


def loop(loss_fn, steps, whole, args=lambda i: (), dtype="float32", wrap=None, **kind):
    """Trains with svag on four groups: `(seen, params, state)` as above."""
    mesh = make_mesh(FOUR)
    curvature = kind.get("curvature", "hessian")
    options = SMALL | {"refresh": "staggered", "mesh": mesh, "curvature": curvature}
    tx = dho2_jax.dho2(optax.adam(0.02), **options)
    tx = wrap(tx) if wrap else tx
    svag = dho2_jax.staggered_value_and_grad(
        loss_fn, mesh=mesh, stagger_axis="data", **kind
    )

    @functools.partial(jax.jit, compiler_options=FAST)
    def step(params, state, batch, curvature_batch, args):
        value, grads, product = svag(params, batch, curvature_batch, state, *args)
        updates, state = tx.update(grads, state, params, product=product)
        return optax.apply_updates(params, updates), state, value, grads

    params = on_mesh(cases.parameters(dtype), mesh, P())
    state, seen = jax.jit(tx.init)(params), []
    for i in range(steps):
        before = params
        params, state, *found = step(params, state, whole, whole, args(i))
        seen.append(jax.device_get((before, *found)))
    assert step._cache_size() == 1
    return seen, params, state


BATCH = {"x": INPUTS, "y": TARGETS}
ROWS = {"x": 0, "y": 0}
SWEPT = range(1, 6)  # the steps that make a product: m + 1 of them


def assert_gradients(seen, loss_fn, parts, args=lambda i: (), has_aux=False):
    one = jit(jax.value_and_grad(loss_fn, has_aux=has_aux))
    for i in (0, 1, 3, 6):
        before, *found = seen[i]
        each = [jax.device_get(one(before, part, *args(i))) for part in parts]
        each = jax.tree.map(lambda *x: np.stack(x).astype(np.float32), *each)
        used = [r for r in range(4) if i not in SWEPT or r != i % 4]
        assert_means(found, each, used)


def assert_swept(state, params, batch, value_fn, tolerance=(2e-6, 1e-3), **options):
    """One sweep was accepted, and is a refresh at the first parameters."""
    counters = dho2_jax.metrics(state)
    assert (int(counters["refreshes"]), int(counters["rejected"])) == (1, 0)
    assert float(counters["recurrence_defect"]) < 100 * tolerance[0]
    external = SMALL | {"refresh": "external"} | options
    expected = dho2_jax.dho2(optax.sgd(0.1), **external).init(params)
    expected = jit(lambda s, p: dho2_jax.refresh(s, p, value_fn))(expected, params)
    assert_same_subspace(state, expected, tolerance)


@pytest.mark.slow
def test_auxiliary_outputs_are_means_too():
    seen, _, state = loop(with_outputs, 8, BATCH, has_aux=True)
    aux = seen[1][1][1]
    assert {x.dtype.name for x in (aux["hits"], aux["flag"])} == {"float32"}
    assert aux["half"].dtype.name == "bfloat16" and aux["none"] is None
    for one in seen:  # bfloat16 has its own rounding
        aux = one[1][1]
        chex.assert_shape(aux["half"], (2,))
    parts = parts_of(BATCH, 4, ROWS)

    def drop(found):
        (value, aux), grads = found
        return (value, {n: aux[n] for n in ("hits", "flag")}), grads

    short = [(before, *drop((value, grads))) for before, value, grads in seen]
    assert_gradients(
        short,
        lambda p, b: drop((with_outputs(p, b), None))[0],
        parts,
        has_aux=True,
    )
    assert_swept(state, seen[0][0], BATCH, lambda p: network(p, BATCH))


@pytest.mark.slow
def test_gauss_newton_takes_a_pair():
    pair = outputs_fn, output_loss
    seen, _, state = loop(pair, 8, BATCH, curvature="ggn")
    assert_gradients(seen, network, parts_of(BATCH, 4, ROWS))
    halves = (lambda p: outputs_fn(p, BATCH), lambda y: output_loss(y, BATCH))
    assert_swept(state, seen[0][0], BATCH, halves, curvature="ggn")


@pytest.mark.slow
@pytest.mark.parametrize("typed", [True, False])
def test_a_new_dropout_key_in_every_step(typed):
    make = jax.random.key if typed else jax.random.PRNGKey
    keys = jax.random.split(make(3), 8)

    def args(i):
        return keys[i], {"scale": jnp.float32(1.0)}

    seen, _, state = loop(dropped, 8, BATCH, args)
    assert_gradients(seen, dropped, parts_of(BATCH, 4, ROWS), args)
    counters = state.curvature.counters
    assert (int(counters.refreshes), int(counters.rejected)) == (1, 0)
    assert float(counters.recurrence_defect) < 1e-5


@pytest.mark.slow
def test_a_batch_along_another_dimension():
    rng = np.random.default_rng(2)
    table = rng.standard_normal(4).astype("float32")
    whole = {"x": INPUTS.T.copy(), "y": TARGETS, "table": table}
    spec = {"x": P(None, "data"), "y": P(("data",)), "table": P()}
    seen, _, state = loop(transposed, 8, whole, batch_spec=spec)
    parts = parts_of(whole, 4, {"x": 1, "y": 0, "table": None})
    assert_gradients(seen, transposed, parts)
    assert_swept(state, seen[0][0], whole, lambda p: transposed(p, whole))


def test_explicit_axes_and_a_batch_that_lies_nowhere_yet():
    """What `jax.make_mesh` and a batch from the host are, where nobody said more."""
    mesh = make_mesh(Layout((4,), ("data",), EXPLICIT))
    tx = dho2_jax.dho2(optax.sgd(0.1), refresh="staggered", mesh=mesh, **SMALL)
    svag = dho2_jax.staggered_value_and_grad(network, mesh=mesh, stagger_axis="data")
    params = cases.parameters()
    svag = jax.jit(svag, compiler_options=FAST)
    value, grads, _ = svag(params, BATCH, BATCH, tx.init(params))
    expected, slopes = jax.value_and_grad(network)(params, BATCH)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    chex.assert_trees_all_close(grads, slopes, rtol=1e-7, atol=1e-5)


@pytest.mark.slow
def test_parameters_in_bfloat16():
    seen, params, state = loop(network, 8, BATCH, dtype="bfloat16")
    half = cases.parameters("bfloat16")
    chex.assert_trees_all_equal_shapes_and_dtypes(seen[1][2], params, half)
    assert seen[1][1].dtype == jnp.float32
    assert_swept(state, seen[0][0], BATCH, lambda p: network(p, BATCH), (0.03, 0.2))


@pytest.mark.slow
def test_within_other_transformations():
    def wrap(tx):
        masked = optax.masked(tx, {"w": True, "b": True, "head": False})
        rest = {"w": False, "b": False, "head": True}
        frozen = optax.masked(optax.set_to_zero(), rest)
        return optax.chain(masked, frozen)

    seen, params, state = loop(network, 8, BATCH, wrap=wrap)
    assert_gradients(seen, network, parts_of(BATCH, 4, ROWS))
    assert cases.largest_change(params, seen[0][0]) > 0.01
    head = seen[0][0]["head"]
    own = {name: seen[0][0][name] for name in ("w", "b")}
    assert_swept(state, own, BATCH, lambda p: network({**p, "head": head}, BATCH))


@pytest.mark.slow
def test_a_product_of_another_step_is_ignored():
    mesh = make_mesh(FOUR)
    tx = dho2_jax.dho2(optax.adam(0.02), refresh="staggered", mesh=mesh, **SMALL)
    svag = dho2_jax.staggered_value_and_grad(network, mesh=mesh, stagger_axis="data")
    svag = jax.jit(svag, compiler_options=FAST)

    @functools.partial(jax.jit, compiler_options=FAST)
    def update(grads, state, params, product):
        updates, state = tx.update(grads, state, params, product=product)
        return optax.apply_updates(params, updates), state

    start = params = cases.parameters()
    state = jax.jit(tx.init)(params)
    index, products = [], []
    for i in range(12):
        _, grads, product = svag(params, BATCH, BATCH, state)
        products.append(product)
        # At steps 3 and 5 one comes late, at step 7 one is of the future.
        late = {3: products[2:3], 5: products[0:1]}.get(i)
        product = late[0] if late else product
        if i == 4:
            product = product._replace(count=product.count + 1)
        params, state = update(grads, state, params, product)
        index.append(int(state.curvature.sweep.lanczos.index))
    assert index == [-1, 0, 1, 1, 1, 1, 2, 3, 4, 5, 5, 5]
    chex.assert_tree_all_finite((params, state))
    assert_swept(state, start, BATCH, lambda p: network(p, BATCH))


# --- what is refused ---------------------------------------------------------------


def make(loss_fn=network, axis="data", mesh=None, **kwargs):
    mesh = make_mesh(FOUR_BY_ONE)
    kwargs = {"mesh": mesh, "stagger_axis": axis} | kwargs
    return dho2_jax.staggered_value_and_grad(loss_fn, **kwargs)


def call(batch_spec=None, **options):
    params = cases.parameters()
    state = dho2_jax.dho2(optax.sgd(0.1), **SMALL | options).init(params)
    svag = make(batch_spec=batch_spec)
    return jax.eval_shape(svag, params, BATCH, BATCH, state)


def call_with(batch_spec):
    return call(batch_spec, refresh="staggered", mesh=make_mesh(FOUR_BY_ONE))


def update(with_product=True, with_params=True, **kwargs):
    mesh = make_mesh(FOUR_BY_ONE)
    params = cases.parameters()
    options = SMALL | {"refresh": "staggered", "mesh": mesh}
    asked = dho2_jax.dho2(optax.sgd(0.1), **options).init(params)
    _, _, product = jax.eval_shape(make(), params, BATCH, BATCH, asked)
    extra = {"product": product} if with_product else {}
    if "refresh" in kwargs:
        options["refresh"] = kwargs.pop("refresh")
    tx = dho2_jax.dho2(optax.sgd(0.1), **options)
    state = tx.init(params)
    return jax.eval_shape(
        lambda extra: tx.update(
            params, state, params if with_params else None, **extra, **kwargs
        ),
        extra,
    )


OF_NETWORK = {"value_fn": lambda p: network(p, BATCH)}
REFUSED = {
    "no_mesh": (
        "`mesh` must be a jax.sharding.Mesh, got NoneType; pass that of dho2.",
        lambda: dho2_jax.staggered_value_and_grad(
            network, mesh=None, stagger_axis="data"
        ),
    ),
    "no_axis": (
        "`stagger_axis` must be an axis of `mesh` with at least 2 groups of devices, "
        "got 'model' on {'data': 4, 'one': 1}",
        lambda: make(axis="model"),
    ),
    "axis_of_one": (
        "`stagger_axis` must be an axis .* got 'one'",
        lambda: make(axis="one"),
    ),
    "curvature": ("`curvature` must be one of", lambda: make(curvature="fisher")),
    "pair": (
        "`loss_fn` must be a function of .* got function with curvature='ggn'; split",
        lambda: make(curvature="ggn"),
    ),
    "no_pair": (
        "`loss_fn` must be a function of .* got tuple with curvature='hessian'",
        lambda: make((outputs_fn, output_loss)),
    ),
    "no_function": ("`loss_fn` must be a function of", lambda: make(None)),
    "periodic_state": (
        "`state` must come from dho2.refresh='staggered', mesh=mesh. .* got "
        "refresh='periodic' and mesh=None",
        lambda: call(),
    ),
    "other_mesh": (
        "`state` must come from dho2.refresh='staggered', mesh=mesh.",
        lambda: call(refresh="staggered", mesh=jax.make_mesh((8,), ("data",))),
    ),
    "spec_is_no_spec": (
        "`batch_spec` must hold jax.sharding.PartitionSpecs, .* got data; leave it",
        lambda: call_with("data"),
    ),
    "spec_without_the_axis": (
        "`batch_spec` must .* of which some name `stagger_axis`='data', got .*'one'",
        lambda: call_with(P("one")),
    ),
    "no_state": (
        "`state` must hold exactly one DHO² state, got none",
        lambda: make()(cases.parameters(), BATCH, BATCH, ()),
    ),
    "external": (
        "`product` must be given to update with refresh='staggered' and in place of "
        "`value_fn`, got it with refresh='external'; drop one.",
        lambda: update(refresh="external"),
    ),
    "periodic": (
        "`product` must be given .* got it with refresh='periodic' and both; drop one.",
        lambda: update(refresh="periodic", **OF_NETWORK),
    ),
    "both": (
        "`product` must be given .* refresh='staggered' and both; drop one.",
        lambda: update(**OF_NETWORK),
    ),
    "neither": (
        "`value_fn` must be given to update with refresh='staggered', got None",
        lambda: update(with_product=False),
    ),
    "no_product": (
        "`product` must be what staggered_value_and_grad returned, got float",
        lambda: update(with_product=False, product=1.0),
    ),
    "no_params": (
        "`params` must be given to update together with `product`, got None",
        lambda: update(with_params=False),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    expected, wrong = REFUSED[name]
    with pytest.raises(ValueError, match=expected) as error:
        wrong()
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and len(text) < 400
