"""One tiny problem, and the tables of transformations, for the contract tests."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import dho2_jax

FAST = {"xla_backend_optimization_level": 0}  # compiles in two thirds of the time

SMALL = {
    "num_largest": 2,
    "num_matvecs": 4,
    "refresh_period": 2,
    "early_refreshes": (),
}
SMALL_FOSI = {"num_largest": 2, "refresh_period": 2, "warmup_steps": 0}

BASES = {
    "sgd": lambda: optax.sgd(0.02),
    "heavy_ball": lambda: optax.sgd(0.02, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.02, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.02),
    "adamw": lambda: optax.adamw(0.02),
    "muon": lambda: optax.contrib.muon(0.02),
}


def _on_base(make_base, **kwargs):
    return dho2_jax.dho2(make_base(), **SMALL | kwargs)


def _from_alias(name, **kwargs):
    return getattr(dho2_jax, name)(0.02, **SMALL | kwargs)


def _fosi(**kwargs):
    return dho2_jax.fosi(optax.adam(0.02), **SMALL_FOSI | kwargs)


FACTORIES = {name: functools.partial(_on_base, base) for name, base in BASES.items()}
"""Name to a function of `dho2`'s keywords, for bases and aliases alike."""

ALIASES = tuple(f"dho2_{name}" for name in BASES if hasattr(dho2_jax, f"dho2_{name}"))
FACTORIES |= {name: functools.partial(_from_alias, name) for name in ALIASES}
FACTORIES |= {"fosi": _fosi} if hasattr(dho2_jax, "fosi") else {}

COMPILED = ALIASES or tuple(BASES)
"""Those that are also compiled and run: one for each base."""


def parameters(dtype="float32"):
    """Twenty-three numbers in three arrays, one of them nested."""
    rng = np.random.default_rng(0)
    tree = {"w": (4, 3), "b": (3,), "head": {"w": (3, 2), "b": (2,)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(0.4 * rng.standard_normal(shape), dtype),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def loss(params):
    """A two-layer network on eight fixed examples; real, smooth, curved."""
    rng = np.random.default_rng(1)
    inputs = jnp.asarray(rng.standard_normal((8, 4)), jnp.float32)
    targets = jnp.asarray(rng.standard_normal((8, 2)), jnp.float32)
    hidden = jnp.tanh(inputs @ params["w"] + params["b"])
    outputs = hidden @ params["head"]["w"] + params["head"]["b"]
    return jnp.mean((outputs - targets) ** 2)


def assert_same_signature(tree, like):
    """What a second compilation hangs on: structure, shapes, dtypes and weak types."""
    chex.assert_trees_all_equal_shapes_and_dtypes(tree, like)
    chex.assert_trees_all_equal_comparator(
        lambda x, y: _is_weak(x) == _is_weak(y),
        lambda x, y: f"weakly typed: {_is_weak(x)} and {_is_weak(y)}",
        *(tree, like),
    )


def _is_weak(x):
    return bool(getattr(x, "weak_type", False))


def largest_change(tree, other):
    """The largest difference between two pytrees."""
    change = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), tree, other)
    return float(max(jax.tree.leaves(change)))


class Loop:
    """Jitted `step` and `renew` of one transformation, which count their traces."""

    def __init__(self, tx, **extra_args):
        self.tx, self.extra_args = tx, extra_args
        self.traces, self.renewals = 0, 0
        self.step = jax.jit(self._step, compiler_options=FAST)
        self.renew = jax.jit(self._renew, compiler_options=FAST)

    def _step(self, params, state):
        self.traces += 1
        grads = jax.grad(loss)(params)
        updates, state = self.tx.update(grads, state, params, **self.extra_args)
        return optax.apply_updates(params, updates), state

    def _renew(self, params, state):
        self.renewals += 1
        return dho2_jax.refresh(state, params, loss)

    def run(self, params, state, steps):
        """Returns the parameters and the state after `steps` updates."""
        for _ in range(steps):
            params, state = self.step(params, state)
        return params, state


def external(base=None, **kwargs):
    """`dho2` whose update needs no loss; on Adam unless told."""
    kwargs = SMALL | {"refresh": "external"} | kwargs
    return dho2_jax.dho2(optax.adam(0.02) if base is None else base, **kwargs)


def _injected(**kwargs):
    make = optax.inject_hyperparams(dho2_jax.dho2, static_args=dho2_jax.STATIC_ARGS)
    return make(optax.adam(0.02), **SMALL | {"refresh": "external"} | kwargs)


def _labels(params):
    labels = jax.tree.map(lambda _: "curved", params)
    return labels | {"head": jax.tree.map(lambda _: "plain", params["head"])}


def _mask(params):
    return jax.tree.map(lambda label: label == "curved", _labels(params))


WRAPPERS = {
    "bare": external,
    "chain": lambda **kw: optax.chain(
        optax.clip_by_global_norm(1.0), external(**kw), optax.scale(0.9)
    ),
    "multi_steps": lambda **kw: optax.MultiSteps(external(**kw), 2),
    "inject": _injected,
    "masked": lambda **kw: optax.masked(external(**kw), _mask),
    "prefix_masked": lambda **kw: optax.masked(
        external(**kw), {"w": True, "b": True, "head": False}
    ),
    "partition": lambda **kw: optax.partition(
        {"curved": external(**kw), "plain": optax.sgd(0.01)}, _labels
    ),
    "apply_if_finite": lambda **kw: optax.apply_if_finite(external(**kw), 3),
    "deep": lambda **kw: optax.chain(
        optax.apply_if_finite(optax.masked(_injected(**kw), _mask), 3),
        optax.add_decayed_weights(1e-4),
    ),
}
"""Name to a function that wraps an external DHO²; all take the whole parameters."""

EACH_WRAPPER = [
    name
    if name in ("bare", "chain", "inject", "masked")
    else pytest.param(name, marks=pytest.mark.slow)
    for name in WRAPPERS
]
"""Their names, for tests that compile each: the quick ones have four."""


@functools.cache
def wrapped(name):
    """The `Loop` of a wrapper, compiled once for all tests."""
    return Loop(WRAPPERS[name]())


@functools.cache
def trained(name):
    """`(loop, params, state)` after two updates, a refresh and one more update."""
    loop = wrapped(name)
    params, state = loop.run(parameters(), loop.tx.init(parameters()), 2)
    state = loop.renew(params, state)
    return loop, *loop.run(params, state, 1)
