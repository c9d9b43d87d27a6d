"""`state_shardings` and `state_specs` say where `init` and `update` put each array."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FAST
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_jax

EXPLICIT = AxisType.Explicit
SMALL = {"num_largest": 2, "num_matvecs": 4, "refresh": "external"}

SPECS = {"b": P(), "v": P("y"), "w": P("y", "x")}
REPLICATED = {"b": P(), "v": P(), "w": P()}


def parameters():
    rng = np.random.default_rng(0)
    shapes = {"b": (7,), "v": (256, 3), "w": (16, 256)}
    return {
        name: jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for name, shape in shapes.items()
    }


def make_mesh(kind=AxisType.Auto, size=8):
    devices = jax.devices()[:size]
    return jax.make_mesh((size // 2, 2), ("x", "y"), (kind, kind), devices=devices)


def place(tree, mesh, specs):
    return jax.tree.map(
        lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs
    )


def loss(params):
    """Elementwise, so that it goes through any types of axes."""
    return sum(jnp.sum(jnp.cosh(x)) for x in jax.tree.leaves(params))


def setting(name):
    """`(tx, params, mesh)`; in the last of the names `tx` has no mesh of its own."""
    mesh = make_mesh(EXPLICIT if name.startswith("explicit") else AxisType.Auto)
    specs, where = REPLICATED if "replicated" in name else SPECS, {"mesh": mesh}
    if name == "param_specs":
        where |= {"param_specs": specs}
    if name == "base_not_sliced":
        where |= {"param_specs": specs, "shard_base_state": False}
    if name == "no_mesh":
        where = {}
    if name.startswith("explicit"):  # of full length, as in the types of results
        shapes = jax.eval_shape(parameters)
        specs = jax.tree.map(
            lambda x, s: P(*s, *[None] * (x.ndim - len(s))), shapes, specs
        )
    tx = dho2_jax.dho2(optax.adam(1e-2), **SMALL, **where)
    return tx, place(parameters(), mesh, specs), mesh


def context(mesh):
    explicit = EXPLICIT in mesh.axis_types
    return jax.set_mesh(mesh) if explicit else contextlib.nullcontext()


def assert_lies(state, shardings):
    """Each array where it was announced to be."""
    chex.assert_trees_all_equal_structs(state, shardings)
    paths = jax.tree_util.tree_leaves_with_path(state)
    for (path, x), sharding in zip(paths, jax.tree.leaves(shardings), strict=True):
        where = jax.tree_util.keystr(path)
        assert isinstance(x.sharding, NamedSharding), where
        assert x.sharding.mesh == sharding.mesh, where
        assert x.sharding.is_equivalent_to(sharding, x.ndim), (where, x.sharding)
        assert x.committed, where


def assert_same_specs(specs, shardings):
    """Apart from trailing Nones, which Explicit axes have and Auto axes have not."""
    chex.assert_trees_all_equal_structs(specs, shardings)
    pairs = zip(jax.tree.leaves(specs), jax.tree.leaves(shardings), strict=True)
    for spec, sharding in pairs:
        assert sharding.is_equivalent_to(NamedSharding(sharding.mesh, spec), 5)


def programs(tx, wheres=(None, None)):
    """`(step, refresh)`, jitted, without a loss in the step; `wheres` they put it."""

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    def refresh(params, state):
        return dho2_jax.refresh(state, params, loss)

    return (
        jax.jit(step, out_shardings=wheres, compiler_options=FAST),
        jax.jit(refresh, out_shardings=wheres[1], compiler_options=FAST),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "replicated",
        "param_specs",
        "base_not_sliced",
        "explicit_replicated",
        "explicit",
    ],
)
def test_every_init_agrees_and_no_step_compiles_twice(name):
    tx, params, mesh = setting(name)
    step, refresh = programs(tx)
    with context(mesh):
        shardings = dho2_jax.state_shardings(tx, params)
        specs = dho2_jax.state_specs(tx, params)
        assert_same_specs(specs, shardings)
        inits = {
            "eager": tx.init,
            "placed": jax.jit(tx.init, out_shardings=shardings),
            "jitted": jax.jit(tx.init),
        }
        for init in inits.values():
            state = init(params)
            assert_lies(state, shardings)
            if name in ("base_not_sliced", "explicit_replicated"):
                continue  # the programs take their time to compile
            new, state = step(params, state)
            assert_lies(state, shardings)
            state = refresh(new, state)
            assert_lies(state, shardings)
            new, state = step(new, state)
            step(new, state)
            assert_lies(new, jax.tree.map(lambda x: x.sharding, params))
        assert step._cache_size() <= 1 and refresh._cache_size() <= 1
    basis = shardings.curvature.subspace.eigenvectors.leaves
    assert np.prod(basis[1].shard_shape((2, 1, 16, 256))) == 2 * 16 * 256 // 8
    mu = shardings.base_state[0].mu["v"]
    own = params["v"].sharding.shard_shape((256, 3))
    assert mu.shard_shape((256, 3)) == (own if name == "base_not_sliced" else (32, 3))


def test_an_eager_init_reads_the_parameters_and_a_jitted_one_cannot():
    """Under Auto axes nothing inside jit sees where a parameter lies."""
    mesh = make_mesh()
    params = place(parameters(), mesh, SPECS)
    tx = dho2_jax.dho2(optax.adam(1e-2), mesh=mesh, **SMALL)
    shardings = dho2_jax.state_shardings(tx, params)
    state = tx.init(params)
    assert_lies(state, shardings)
    rows = state.curvature.subspace.eigenvectors.leaves[1]
    assert rows.sharding.spec == P(None, None, "y", "x")
    blind = jax.jit(tx.init)(params).curvature.subspace.eigenvectors.leaves[1]
    assert blind.addressable_shards[0].data.size == blind.size // 8


def test_without_a_mesh_of_its_own_the_state_follows_the_parameters():
    tx, params, mesh = setting("no_mesh")
    shardings = dho2_jax.state_shardings(tx, params)
    assert shardings == dho2_jax.state_shardings(tx, params, mesh)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    assert_lies(state, shardings)
    v, w, slab = (x.spec for x in shardings.curvature.subspace.eigenvectors.leaves)
    assert (v, w, slab) == (P(None, None, "y"), P(None, None, "y", "x"), P())
    assert shardings.base_state[0].mu["w"].spec == P("y", "x")


def test_abstract_parameters_serve_as_well():
    for name in ("replicated", "param_specs", "explicit", "no_mesh"):
        tx, params, mesh = setting(name)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            params,
        )
        with context(mesh):
            expected = dho2_jax.state_shardings(tx, params)
            assert dho2_jax.state_shardings(tx, abstract) == expected
            assert_same_specs(dho2_jax.state_specs(tx, abstract), expected)


def test_parameters_that_are_nowhere_yet_take_the_mesh_from_the_argument():
    for where in ({}, {"mesh": make_mesh()}, {"axis_name": ("x", "y")}):
        tx = dho2_jax.dho2(optax.adam(1e-2), **SMALL, **where)
        shapes = jax.eval_shape(parameters)
        shardings = dho2_jax.state_shardings(tx, shapes, make_mesh())
        slices = [s.spec for s in shardings.curvature.subspace.eigenvectors.leaves]
        both = ("x", "y")
        tall, wide = P(None, None, both), P(None, None, None, both)
        # Without an own mesh nothing is split further than the parameters are.
        split = [tall, tall, P(None, both)] if "mesh" in where else None
        split = [tall, wide, P(None, both)] if "axis_name" in where else split
        assert slices == (split or [P(), P(), P()])
        assert shardings.base_state[0].count.spec == P()


def test_state_specs_of_named_axes_need_no_mesh():
    for sharded in (True, False):
        tx = dho2_jax.dho2(
            optax.adam(1e-2), axis_name="d", shard_base_state=sharded, **SMALL
        )
        specs = dho2_jax.state_specs(tx, parameters())
        slices = list(specs.curvature.subspace.eigenvectors.leaves)
        tall, wide = P(None, "d"), P(None, None, "d")
        assert slices == [P(None, *tall), P(None, *wide), P(None, "d")]
        assert specs.curvature.rate.direction.leaves == (tall, wide, P("d"))
        own = {"b": P(), "v": P("d"), "w": P(None, "d")}
        own = own if sharded else dict.fromkeys(own, P())
        assert specs.base_state[0].nu == own
        assert specs.curvature.count == P()


# --- nests -------------------------------------------------------------------------


def _mask(params):
    return {"b": True, "v": False, "w": True}


NESTS = {
    "chain": lambda make: optax.chain(
        optax.clip_by_global_norm(1.0), make(), optax.scale(0.5)
    ),
    "multi_steps": lambda make: optax.MultiSteps(make(), 2),
    "masked": lambda make: optax.masked(make(), _mask),
    "inject": lambda make: make(
        optax.inject_hyperparams(dho2_jax.dho2, static_args=dho2_jax.STATIC_ARGS)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, specs",
    [
        ("chain", True),
        ("multi_steps", True),
        ("masked", False),
        ("masked", True),
        ("inject", True),
    ],
)
def test_shardings_of_nests(name, specs):
    mesh = make_mesh()
    own = SPECS if specs else REPLICATED
    where = {"mesh": mesh, "param_specs": own if specs else None}

    def make(factory=dho2_jax.dho2):
        return factory(optax.adam(1e-2), **SMALL, **where)

    tx = NESTS[name](make)
    params = place(parameters(), mesh, own)
    shardings = dho2_jax.state_shardings(tx, params)
    chex.assert_trees_all_equal_structs(shardings, jax.eval_shape(tx.init, params))
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    assert_lies(state, shardings)
    wheres = (None, None)
    if name == "multi_steps":
        assert shardings.acc_grads["w"].is_equivalent_to(params["w"].sharding, 2)

    if name == "multi_steps":
        # Its own accumulators are the compiler's to place, unless they are pinned.
        wheres = (jax.tree.map(lambda x: x.sharding, params), shardings)
    step, refresh = programs(tx, wheres)
    state = refresh(params, state)
    assert_lies(state, shardings)
    new = params
    for _ in range(3):
        new, state = step(new, state)
    assert_lies(state, shardings)
    assert step._cache_size() == 1
    assert float(jnp.max(jnp.abs(new["w"] - params["w"]))) > 0


# --- wrong calls -------------------------------------------------------------------


def dho2(**kwargs):
    return dho2_jax.dho2(optax.sgd(0.1), **SMALL | kwargs)


def unbound():
    tx = dho2(axis_name="data")
    return tx.init(parameters())


def elsewhere():
    params = place(parameters(), make_mesh(size=4), REPLICATED)
    return dho2(mesh=make_mesh()).init(params)


def inside_another():
    mesh = make_mesh(EXPLICIT)
    other = Mesh(np.array(jax.devices()), ("d",), axis_types=(EXPLICIT,))
    with jax.set_mesh(other):
        return jax.jit(dho2(mesh=mesh).init)(place(parameters(), other, REPLICATED))


def explicit_without():
    _, params, mesh = setting("explicit")
    with jax.set_mesh(mesh):
        return dho2().init(params)


def specs(tree):
    return lambda: dho2(mesh=make_mesh(), param_specs=tree).init(parameters())


def shardings(mesh=None, of=None):
    tx = dho2() if of is None else dho2(mesh=of)
    return dho2_jax.state_shardings(tx, parameters(), mesh)


WRONG = {
    "no_mesh": (lambda: dho2(mesh=8), "`mesh` must be a jax.sharding.Mesh, got 8"),
    "devices": (
        lambda: dho2(mesh=jax.devices()),
        r"`mesh` must be a jax.sharding.Mesh, got \[CpuDevice",
    ),
    "both": (
        lambda: dho2(mesh=make_mesh(), axis_name="d"),
        "`axis_name` must be None with `mesh`, got 'd'",
    ),
    "specs_alone": (
        lambda: dho2(param_specs=P("x")),
        "`param_specs` must come with `mesh`",
    ),
    "specs_with_axis": (
        lambda: dho2(param_specs=P(), axis_name="d"),
        "`param_specs` must come with `mesh`",
    ),
    "explicit_without": (
        explicit_without,
        r"`mesh` must be given for parameters that are split over Explicit axes, got",
    ),
    "axis_name_type": (lambda: dho2(axis_name=3), "`axis_name` must be the name"),
    "no_axis_name": (lambda: dho2(axis_name=()), r"`axis_name` must be the name.*\(\)"),
    "shard_base_state": (
        lambda: dho2(shard_base_state="yes"),
        "`shard_base_state` must be True, False or None, got 'yes'",
    ),
    "unknown_axis": (
        specs({"b": None, "v": P("model"), "w": P()}),
        r"`param_specs` must name axes of the mesh, \('x', 'y'\), got 'model' at "
        r"'\['v'\]' of shape \(256, 3\)",
    ),
    "does_not_divide": (
        specs({"b": None, "v": P(None, "y"), "w": P()}),
        r"`param_specs` must divide each dimension evenly, got .*'y'.*\(256, 3\)",
    ),
    "too_long": (
        specs({"b": P(None, "x"), "v": P(), "w": P()}),
        r"`param_specs` must divide .*at '\['b'\]' of shape \(7,\)",
    ),
    "axis_twice": (
        specs({"b": P(), "v": P("x"), "w": P("x", "x")}),
        r"`param_specs`",
    ),
    "no_prefix": (
        specs({"b": P(), "v": P()}),
        "`param_specs` must be a prefix of the parameters' tree",
    ),
    "no_spec": (specs({"b": P(), "v": P(), "w": "x"}), "`param_specs` must hold"),
    "other_mesh": (elsewhere, "the parameters must lie on `mesh`, .*'x': 4"),
    "other_type": (inside_another, "the parameters must lie on `mesh`, .*at"),
    "unbound": (unbound, r"`axis_name` must name axes .*\('data',\)"),
    "no_mesh_at_all": (shardings, "`mesh` must be given when neither dho2"),
    "not_that_of_dho2": (
        functools.partial(shardings, make_mesh(size=4), make_mesh()),
        "`mesh` must be that of dho2, .*leave it out",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_say_so_in_one_sentence(name):
    call, pattern = WRONG[name]
    with pytest.raises(ValueError, match=pattern) as caught:
        call()
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and ";" in message
    assert len(message) < 400


@pytest.mark.parametrize("spec", [P(), None])
def test_a_prefix_of_specs_serves_all_below(spec):
    tx = dho2(mesh=make_mesh(), param_specs=spec)
    shardings = dho2_jax.state_shardings(tx, parameters())
    mesh = make_mesh()
    plain = dho2_jax.state_shardings(dho2(mesh=mesh), parameters())
    assert jax.tree.leaves(shardings) == jax.tree.leaves(plain)
