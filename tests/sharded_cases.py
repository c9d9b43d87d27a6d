"""One problem with awkward leaves, and ways to lay it out, for the tests on meshes.

Its curvature is known in outline: a few sharp coordinates, some of no curvature at all,
a soft bulk, and features of a batch that couple all numbers of all leaves.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from cases import FAST
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_jax

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit

SHAPES = {
    "kernel": (3, 3, 64, 64),
    "scalar": (),
    "seven": (7,),
    "tall": (256, 10),
    "ten": (10,),
    "two": (2,),  # smaller than most meshes
    "vocabulary": (50257,),
    "wide": (7, 256),
    "tower": (256, 10),
}
"""Large are "tall" and "tower", stored as one array, and "wide"; the rest is packed."""

ALL = tuple(SHAPES)
FEW = ("kernel", "scalar", "tall", "wide", "tower")
UNUSED = {"tall": 2000, "vocabulary": 50000}
"""From these places on, a leaf's numbers have neither gradient nor curvature."""

OPTIONS = {
    "num_largest": 3,
    "num_smallest": 1,
    "num_matvecs": 12,
    "refresh_period": 10,
}


def parameters(names=ALL):
    rng = np.random.default_rng(0)
    drawn = {name: 0.3 * rng.standard_normal(SHAPES[name]) for name in SHAPES}
    return {name: jnp.asarray(drawn[name], jnp.float32) for name in names}


def batch():
    """Forty-eight examples: 1, 2, 4, 6 and 8 devices divide them."""
    inputs = np.random.default_rng(1).standard_normal((48, len(SHAPES)))
    targets = np.tanh(inputs.sum(1))
    return jnp.asarray(inputs, jnp.float32), jnp.asarray(targets, jnp.float32)


def _places(shape):
    """The place of each number in its leaf, float32."""
    place, stride = jnp.zeros(shape, jnp.float32), 1
    for dim in reversed(range(len(shape))):
        place += stride * jax.lax.broadcasted_iota(jnp.float32, shape, dim)
        stride *= shape[dim]
    return place


def _used(name, place):
    return (place < UNUSED.get(name, np.inf)).astype(jnp.float32)


def _stiffness(name):
    """Of each number: one is sharp, the rest is soft; the last of ten is negative."""
    place = _places(SHAPES[name])
    soft = (0.05 + 0.05 * jnp.sin(place) ** 2) * _used(name, place)
    stiffness = jnp.where(place == 0, 0.5 * 2.0 ** ALL.index(name), soft)
    return jnp.where(place == 9, -1.5, stiffness) if name == "ten" else stiffness


def outputs_fn(params, batch):
    inputs, targets = batch
    hidden = jnp.zeros(len(inputs))
    for name, x in params.items():
        place = _places(x.shape)
        feature = jnp.sum(x * jnp.cos(0.7 * place) * _used(name, place))
        hidden += inputs[:, ALL.index(name)] * feature / np.sqrt(x.size)
    return jnp.tanh(hidden) - targets, jax.tree.map(jnp.sin, params)


def loss_fn(outputs):
    bowls = (jnp.sum(_stiffness(name) * x**2) for name, x in outputs[1].items())
    return jnp.mean(outputs[0] ** 2) + 0.5 * sum(bowls)


def loss(params, batch):
    return loss_fn(outputs_fn(params, batch))


def gathered(params):
    """As fully sharded training under Explicit axes has it: whole before use."""
    return jax.tree.map(lambda x: jax.sharding.reshard(x, P()), params)


def plain_source(whole, batch):
    return {"value_fn": lambda params: loss(whole(params), batch)}


def ggn_source(whole, batch):
    return {"value_fn": (lambda params: outputs_fn(whole(params), batch), loss_fn)}


def matvec_source(whole, batch):
    def matvec_fn(params):
        slope = jax.grad(lambda p: loss(whole(p), batch))
        return lambda v: jax.jvp(slope, (params,), (v,))[1]

    return {"matvec_fn": matvec_fn}


class Problem(NamedTuple):
    """What is trained, and how, wherever it lies."""

    leaves: tuple[str, ...]
    base: Callable[[], Any]
    source: Callable | None  # what `update` is given; None: the loop calls `refresh`
    options: dict[str, Any]


def _adam():
    # With a large epsilon, so that rounding in a gradient near zero stays rounding.
    return optax.adam(1e-2, eps=1e-3)


PROBLEMS = {
    "adam": Problem(ALL, _adam, plain_source, {}),
    "few": Problem(FEW, _adam, plain_source, {}),
    "least": Problem(
        ("scalar", "tall"),
        _adam,
        plain_source,
        {"num_largest": 2, "num_smallest": 0, "num_matvecs": 6, "refresh_period": 3},
    ),
    "heavy_ball": Problem(
        FEW,
        lambda: optax.sgd(1e-2, momentum=0.9),
        ggn_source,
        {"curvature": "ggn", "base_rate": "fixed"},
    ),
    "linear": Problem(
        FEW,
        lambda: optax.sgd(1e-2, momentum=0.9),
        ggn_source,
        {"curvature": "ggn", "base_rate": "fixed", "linear_base": True},
    ),
    "own_products": Problem(
        ("kernel", "tall", "tower"), _adam, matvec_source, {"num_smallest": 0}
    ),
    "muon": Problem(
        ("scalar", "tall", "wide"),
        lambda: optax.contrib.muon(1e-2),
        None,
        {"refresh": "external"},
    ),
}


class Layout(NamedTuple):
    """A mesh and the parameters on it."""

    shape: tuple[int, ...]
    axes: tuple[str, ...] = ("d",)
    kind: AxisType = AUTO
    specs: Any = None  # of leaves that are not replicated, by name


def make_mesh(layout):
    devices = jax.devices()[: int(np.prod(layout.shape))]
    kinds = (layout.kind,) * len(layout.shape)
    return jax.make_mesh(layout.shape, layout.axes, kinds, devices=devices)


def specs_of(layout, names):
    """As JAX writes them for results: of full length in the types of Explicit axes."""
    own = {name: (layout.specs or {}).get(name, P()) for name in names}
    if layout.kind == AUTO:
        return own
    return {n: P(*s, *[None] * (len(SHAPES[n]) - len(s))) for n, s in own.items()}


def on_mesh(tree, mesh, specs):
    """`tree` on the mesh; `specs` is a tree of them, or one for all."""
    if isinstance(specs, P):
        specs = jax.tree.map(lambda _: specs, tree)
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs
    )


class Trainer:
    """The compiled programs of one problem on one layout, or on one device."""

    def __init__(self, name, layout=None):
        problem = PROBLEMS[name]
        self.source, self.layout, self.traces = problem.source, layout, 0
        self.whole = lambda params: params
        self.params, self.batch, self.mesh = parameters(problem.leaves), batch(), None
        where = {}
        if layout is not None:
            specs = specs_of(layout, problem.leaves)
            self.mesh = make_mesh(layout)
            self.params = on_mesh(self.params, self.mesh, specs)
            self.batch = on_mesh(self.batch, self.mesh, P(layout.axes))
            where = {"mesh": self.mesh}
            # Under Explicit axes dho2 can read them itself.
            if layout.kind == AUTO and layout.specs:
                where["param_specs"] = specs
            if layout.kind == EXPLICIT:
                self.whole = gathered
        self.tx = dho2_jax.dho2(problem.base(), **OPTIONS | problem.options | where)
        self.init = jax.jit(self.tx.init, compiler_options=FAST)
        self.step = jax.jit(self._step, compiler_options=FAST)
        self.refresh = jax.jit(self._refresh, compiler_options=FAST)

    def _step(self, params, state, batch):
        self.traces += 1
        value, grads = jax.value_and_grad(lambda p: loss(self.whole(p), batch))(params)
        source = self.source(self.whole, batch) if self.source else {}
        updates, state = self.tx.update(grads, state, params, **source)
        return optax.apply_updates(params, updates), state, value, updates

    def _refresh(self, params, state, batch):
        return dho2_jax.refresh(state, params, lambda p: loss(self.whole(p), batch))

    def run(self, steps, params=None, state=None):
        """Trains from the given state, or from the start."""
        if self.mesh is not None and self.layout.kind == EXPLICIT:
            with jax.set_mesh(self.mesh):
                return self._run(steps, params, state)
        return self._run(steps, params, state)

    def _run(self, steps, params, state):
        if state is None:
            params, state = self.params, self.init(self.params)
        losses, eigenvalues, first = [], [], []
        for i in range(steps):
            if self.source is None and i % 10 == 0:
                state = self.refresh(params, state, self.batch)
            params, state, value, updates = self.step(params, state, self.batch)
            losses.append(float(value))
            eigenvalues.append(np.asarray(state.curvature.subspace.eigenvalues))
            if i < 2:
                first.append(jax.tree.map(np.asarray, updates))
        return Run(np.array(losses), np.stack(eigenvalues), first, params, state)


class Run(NamedTuple):
    """What a run left behind."""

    losses: np.ndarray  # (steps,)
    eigenvalues: np.ndarray  # (steps, k + l)
    updates: list[dict[str, np.ndarray]]  # of the first two steps
    params: Any
    state: Any


@functools.cache
def dense(name, steps=50):
    """`(trainer, run)` on one device without a mesh, once for all tests."""
    trainer = Trainer(name)
    return trainer, trainer.run(steps)


def assert_same_run(run, expected):
    """Agreement to float32; where `run` is the shorter one, as far as it goes."""
    steps = len(run.losses)
    np.testing.assert_allclose(run.losses, expected.losses[:steps], rtol=2e-5)
    largest = np.max(np.abs(expected.eigenvalues))
    np.testing.assert_allclose(
        run.eigenvalues, expected.eigenvalues[:steps], atol=5e-6 * largest
    )
    for updates, others in zip(run.updates, expected.updates, strict=True):
        assert_close(updates, others, 1e-4)
    if steps == len(expected.losses):
        assert_close(run.params, expected.params, 1e-3)


def assert_close(tree, other, share):
    """Agreement of all numbers to a share of the largest."""
    largest = max(np.max(np.abs(x)) for x in jax.tree.leaves(other))
    chex.assert_trees_all_close(tree, other, rtol=0, atol=share * largest)


def assert_unused_untouched(params):
    """What has neither gradient nor curvature is where it was, bit for bit."""
    start = parameters()
    for name in UNUSED.keys() & params.keys():
        now, then = (np.ravel(x)[UNUSED[name] :] for x in (params[name], start[name]))
        assert len(now) > 200
        np.testing.assert_array_equal(now, then, err_msg=name)


def step_on(tx, names, check_vma=True):
    """One step on a device's share of the batch, the loss without collectives."""

    def step(params, state, batch):
        own = params
        if check_vma:  # else the derivative would be summed over the devices
            own = jax.tree.map(lambda x: jax.lax.pcast(x, names, to="varying"), params)
        value, grads = jax.value_and_grad(loss)(own, batch)
        value, grads = jax.lax.pmean((value, grads), names)
        updates, state = tx.update(
            grads, state, params, value_fn=lambda p: loss(p, batch)
        )
        return optax.apply_updates(params, updates), state, value

    return step


def shard_mapped(mesh, check_vma, function, in_specs, out_specs):
    """The caller's own `shard_map`, compiled."""
    local = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=check_vma,
    )
    return jax.jit(local, compiler_options=FAST)
