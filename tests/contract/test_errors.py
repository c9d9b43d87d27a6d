"""Wrong calls: one clear sentence each, at the earliest possible moment."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import external, parameters

import dho2_jax

VECTOR = {"a": jnp.arange(1.0, 5.0), "b": jnp.ones(2)}


def square(params):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


@jax.custom_vjp
def activation(x):
    return 2 * x


# Its forward rule calls the function itself, where forward mode has no rule to use.
activation.defvjp(lambda x: (activation(x), None), lambda _, g: (2 * g,))


def hard(params):
    """A loss whose gradient forward mode cannot differentiate: its Hessian is 2."""
    return sum(jnp.sum(activation(x) ** 2) for x in jax.tree.leaves(params)) / 4


def make(base=None, **kwargs):
    kwargs = {"num_largest": 2, "num_matvecs": 4} | kwargs
    return dho2_jax.dho2(optax.sgd(0.1) if base is None else base, **kwargs)


def init(params, **kwargs):
    return make(**kwargs).init(params)


def update(grads=VECTOR, params=VECTOR, of=VECTOR, tx=None, **extra):
    tx = make() if tx is None else tx
    state = tx.init(of)
    return jax.eval_shape(lambda s: tx.update(grads, s, params, **extra), state)


def refresh(value_fn=square, params=VECTOR, of=VECTOR, tx=None, **kwargs):
    tx = make(refresh="external") if tx is None else tx
    state = tx.init(of)
    return jax.eval_shape(
        lambda s: dho2_jax.refresh(s, params, value_fn, **kwargs), state
    )


def injected(**kwargs):
    wrapped = optax.inject_hyperparams(dho2_jax.dho2)
    return wrapped(optax.sgd(0.1), num_largest=2, **kwargs).init(VECTOR)


def two(params=VECTOR):
    return optax.chain(make(), make()).init(params)


def masked_periodic():
    tx = optax.masked(make(), {"a": True, "b": False})
    return update(tx=tx, value_fn=lambda p: jnp.sum(p["a"] ** 2) * jnp.sum(p["b"]))


complex_vector = {"a": jnp.ones(4, jnp.complex64)}
integer_vector = {"a": jnp.ones(2), "b": {"count": jnp.arange(4)}}

# (what the sentence must hold, the call): a `name`, then the value or the remedy.
CONSTRUCTION = {
    "num_largest_negative": ("`num_largest` >= 0 -1", lambda: make(num_largest=-1)),
    "num_largest_float": ("`num_largest` integer 2.0", lambda: make(num_largest=2.0)),
    "num_largest_bool": ("`num_largest` integer True", lambda: make(num_largest=True)),
    "num_largest_array": (
        "`num_largest` integer STATIC_ARGS",
        lambda: make(num_largest=jnp.asarray(2)),
    ),
    "num_smallest_negative": ("`num_smallest` >= 0 -2", lambda: make(num_smallest=-2)),
    "no_pairs": ("`num_largest` `num_smallest` >= 1", lambda: make(num_largest=0)),
    "too_few_products": (
        "`num_matvecs` num_smallest 3 None",
        lambda: make(num_largest=3, num_smallest=2, num_matvecs=3),
    ),
    "num_matvecs_string": ("`num_matvecs` '8'", lambda: make(num_matvecs="8")),
    "refresh_typo": (
        "`refresh` 'perodic' nearest 'periodic'",
        lambda: make(refresh="perodic"),
    ),
    "refresh_none": ("`refresh` None 'external'", lambda: make(refresh=None)),
    "refresh_period_zero": ("`refresh_period` >= 1 0", lambda: make(refresh_period=0)),
    "warmup_negative": ("`warmup_steps` >= 0 -1", lambda: make(warmup_steps=-1)),
    "alpha_negative": (
        "`newton_learning_rate` >= 0 -0.1",
        lambda: make(newton_learning_rate=-0.1),
    ),
    "alpha_nan": (
        "`newton_learning_rate` nan",
        lambda: make(newton_learning_rate=float("nan")),
    ),
    "alpha_string": (
        "`newton_learning_rate` '1' str",
        lambda: make(newton_learning_rate="1"),
    ),
    "alpha_vector": (
        "`newton_learning_rate` scalar",
        lambda: make(newton_learning_rate=np.ones(3)),
    ),
    "alpha_none": (
        "`newton_learning_rate` None",
        lambda: make(newton_learning_rate=None),
    ),
    "decay_one": ("`subspace_decay` [0, 1) 1.0", lambda: make(subspace_decay=1.0)),
    "decay_bool": ("`subspace_decay` True", lambda: make(subspace_decay=True)),
    "damping_negative": ("`damping` >= 0 -1.0", lambda: make(damping=-1.0)),
    "cap_negative": (
        "`max_base_scaling` >= 0 -3",
        lambda: make(max_base_scaling=-3),
    ),
    "schedule_negative": ("`rate_schedule` -1.0", lambda: make(rate_schedule=-1.0)),
    "momentum_typo": (
        "`subspace_momentum` 'heavyball' 'heavy_ball'",
        lambda: make(subspace_momentum="heavyball"),
    ),
    "base_rate_typo": (
        "`base_rate` 'curvatur' 'curvature'",
        lambda: make(base_rate="curvatur"),
    ),
    "base_rate_number": ("`base_rate` 0.1", lambda: make(base_rate=0.1)),
    "curvature_typo": (
        "`curvature` 'hesian' 'hessian'",
        lambda: make(curvature="hesian"),
    ),
    "negative_unknown": (
        "`negative_curvature` 'ignore' 'base'",
        lambda: make(negative_curvature="ignore"),
    ),
    "seed_negative": ("`seed` >= 0 -1", lambda: make(seed=-1)),
    "seed_key": ("`seed` integer", lambda: make(seed=jax.random.key(0))),
    "base_is_a_number": ("`base_optimizer` float optax", lambda: make(base=0.1)),
    "base_is_a_factory": (
        "`base_optimizer` optax.adam(1e-3)",
        lambda: make(base=optax.adam),
    ),
    "traced_integers": ("`num_largest` STATIC_ARGS", lambda: injected()),
    "should_refresh_array": (
        "`step` integer",
        lambda: dho2_jax.should_refresh(jnp.asarray(3)),
    ),
    "should_refresh_period": (
        "`refresh_period` >= 1 0",
        lambda: dho2_jax.should_refresh(3, 0),
    ),
}

INIT = {
    "complex_params": ("`params` complex64 'a'", lambda: init(complex_vector)),
    "integer_params": (
        "`params` int32 'count' optax.masked",
        lambda: init(integer_vector),
    ),
    "string_params": ("`params` 'name'", lambda: init({"name": "x"})),
    "more_pairs_than_numbers": (
        "`num_largest` 7 6",
        lambda: init(VECTOR, num_largest=7, num_matvecs=8),
    ),
}

UPDATE = {
    "no_value_fn": ("`value_fn` None refresh='external'", lambda: update()),
    "no_params": (
        "`params` None tx.update(",
        lambda: update(params=None, value_fn=square),
    ),
    "both_functions": (
        "`value_fn` `matvec_fn` both",
        lambda: update(value_fn=square, matvec_fn=lambda p: lambda v: v),
    ),
    "vector_loss": (
        "`value_fn` scalar (4,) mean",
        lambda: update(value_fn=lambda p: p["a"] ** 2),
    ),
    "complex_loss": (
        "`value_fn` real complex64",
        lambda: update(value_fn=lambda p: jnp.sum(p["a"]) * 1j),
    ),
    "integer_loss": (
        "`value_fn` real int32",
        lambda: update(value_fn=lambda p: jnp.sum(p["a"]).astype(jnp.int32)),
    ),
    "loss_of_two": (
        "`value_fn` parameters alone batch lambda",
        lambda: update(value_fn=lambda p, batch: square(p)),
    ),
    "loss_with_aux": (
        "`value_fn` one scalar aux [0]",
        lambda: update(value_fn=lambda p: (square(p), {"logits": p["a"]})),
    ),
    "loss_value": ("`value_fn` float lambda", lambda: update(value_fn=0.5)),
    "loss_returns_none": ("`value_fn` scalar", lambda: update(value_fn=lambda p: None)),
    "missing_gradient": (
        "`updates` 2 1",
        lambda: update(grads={"a": VECTOR["a"]}, value_fn=square),
    ),
    "gradient_of_another_shape": (
        "`updates` (3,) (4,)",
        lambda: update(grads=VECTOR | {"a": jnp.ones(3)}, value_fn=square),
    ),
    "complex_gradient": (
        "`updates` complex64",
        lambda: update(
            grads=VECTOR | {"a": jnp.ones(4, jnp.complex64)}, value_fn=square
        ),
    ),
    "params_of_another_shape": (
        "`params` (3,) (4,)",
        lambda: update(params=VECTOR | {"a": jnp.ones(3)}, value_fn=square),
    ),
    "ggn_without_a_pair": (
        "`value_fn` (outputs_fn, loss_fn) 'ggn'",
        lambda: update(tx=make(curvature="ggn"), value_fn=square),
    ),
    "pair_without_ggn": (
        "`value_fn` tuple lambda",
        lambda: update(value_fn=(lambda p: p["a"], jnp.sum)),
    ),
    "matvec_itself": (
        "`matvec_fn` lambda params: matvec",
        lambda: update(matvec_fn=lambda v: v),
    ),
    "matvec_number": ("`matvec_fn` float", lambda: update(matvec_fn=2.0)),
    "matvec_of_another_shape": (
        "`matvec_fn` shape",
        lambda: update(matvec_fn=lambda p: lambda v: {"a": v["a"][:2], "b": v["b"]}),
    ),
    "custom_vjp": (
        "`value_fn` custom_vjp 'reverse_over_reverse' 'central_difference'",
        lambda: update(value_fn=hard),
    ),
    "masked_with_the_whole_loss": (
        "`value_fn` refresh='external' dho2_jax.refresh",
        masked_periodic,
    ),
    "empty_state": (
        "`state` empty init",
        lambda: update(of={}, value_fn=square),
    ),
}

REFRESH = {
    "no_function": ("`value_fn` None refresh", lambda: refresh(None)),
    "both_functions": (
        "`value_fn` `matvec_fn` both",
        lambda: refresh(matvec_fn=lambda p: lambda v: v),
    ),
    "vector_loss": ("`value_fn` (4,)", lambda: refresh(lambda p: p["a"])),
    "empty_params": ("`params` empty", lambda: refresh(params={})),
    "state_of_empty_params": ("`state` empty init", lambda: refresh(of={})),
    "missing_leaf": ("`params` 2 1", lambda: refresh(params={"a": VECTOR["a"]})),
    "another_shape": (
        "`params` (5,) (4,)",
        lambda: refresh(params=VECTOR | {"a": jnp.ones(5)}),
    ),
    "part_of_a_masked_tree": (
        "`params` whole",
        lambda: refresh(
            params={"c": VECTOR["b"], "d": VECTOR["b"], "e": VECTOR["a"]},
            tx=optax.masked(make(), {"a": True, "b": False}),
        ),
    ),
    "no_state": (
        "`state` none dho2(",
        lambda: dho2_jax.refresh(optax.adam(0.1).init(VECTOR), VECTOR, square),
    ),
    "state_and_params_swapped": (
        "`state` none dho2(",
        lambda: dho2_jax.refresh(VECTOR, make().init(VECTOR), square),
    ),
    "no_such_state": (
        "`where` 'third' '0' '1'",
        lambda: dho2_jax.refresh(two(), VECTOR, square, where="third"),
    ),
    "which_schedule": (
        "`state` 2 where= '0' '1'",
        lambda: dho2_jax.should_refresh(3, two()),
    ),
    "schedule_of_nothing": (
        "`of` transformation state Schedule",
        lambda: dho2_jax.should_refresh(3, optax.sgd(0.1)),
    ),
    "schedule_twice": (
        "`of` warmup_steps",
        lambda: dho2_jax.should_refresh(3, dho2_jax.Schedule(), warmup_steps=2),
    ),
    "metrics_without_state": ("`state` none", lambda: dho2_jax.metrics(())),
    "subspace_of_none": (
        "`where` 'third' '0' '1'",
        lambda: dho2_jax.subspace(two(), where="third"),
    ),
    "set_enabled_without_state": (
        "`state` none",
        lambda: dho2_jax.set_enabled(optax.EmptyState(), False),
    ),
    "set_enabled_vector": (
        "`enabled` (2,) False",
        lambda: dho2_jax.set_enabled(make().init(VECTOR), jnp.ones(2, bool)),
    ),
    "set_enabled_string": (
        "`enabled` str True",
        lambda: dho2_jax.set_enabled(make().init(VECTOR), "off"),
    ),
    "custom_vjp": (
        "`value_fn` 'reverse_over_reverse'",
        lambda: refresh(hard),
    ),
}

PRODUCTS = {
    "hvp_empty": ("`params` empty", lambda: dho2_jax.hvp(square, {})),
    "hvp_integers": (
        "`params` int32 'count'",
        lambda: dho2_jax.hvp(square, integer_vector),
    ),
    "hvp_aux": (
        "`value_fn` scalar aux",
        lambda: dho2_jax.hvp(lambda p: (square(p), p), VECTOR),
    ),
    "hvp_custom_vjp": (
        "`value_fn` custom_vjp 'reverse_over_reverse'",
        lambda: dho2_jax.hvp(hard, VECTOR)(VECTOR),
    ),
    "hvp_vector": (
        "`params` structure",
        lambda: dho2_jax.hvp(square, VECTOR)({"a": jnp.ones(3), "b": jnp.ones(2)}),
    ),
    "hvp_call_value": ("`value_fn` function", lambda: dho2_jax.hvp(3.0, VECTOR)),
    "ggn_vector_loss": (
        "`value_fn` scalar (4,)",
        lambda: dho2_jax.ggn_vp(lambda p: p["a"], lambda y: y, VECTOR),
    ),
    "lanczos_no_steps": (
        "`num_matvecs` >= 1 0",
        lambda: dho2_jax.lanczos_tridiag(lambda v: v, VECTOR, 0),
    ),
    "lanczos_float_steps": (
        "`num_matvecs` integer 2.5",
        lambda: dho2_jax.lanczos_tridiag(lambda v: v, VECTOR, 2.5),
    ),
    "lanczos_empty": (
        "`v0` empty",
        lambda: dho2_jax.lanczos_tridiag(lambda v: v, {}, 2),
    ),
    "lanczos_integers": (
        "`v0` int32",
        lambda: dho2_jax.lanczos_tridiag(lambda v: v, {"a": jnp.arange(3)}, 2),
    ),
    "lanczos_shapes": (
        "`matvec` shapes",
        lambda: dho2_jax.lanczos_tridiag(lambda v: {"a": v["a"]}, VECTOR, 2),
    ),
}

CALLS = {
    f"{when}-{name}": case
    for when, cases in {
        "construction": CONSTRUCTION,
        "init": INIT,
        "update": UPDATE,
        "refresh": REFRESH,
        "products": PRODUCTS,
    }.items()
    for name, case in cases.items()
}


def assert_one_sentence(error, words):
    text = str(error)
    # JAX appends a note about its traceback to what passes through a transformation.
    text = text.split("\n--------------------")[0]
    assert re.search(r"`\w+`", text)
    assert "\n" not in text and text.endswith(".") and len(text) < 400
    assert "; " in text, "a remedy comes after the rule and the value"
    for word in words:
        assert word in text


def split_words(expected):
    """Words of the sentence; what stands in brackets stays together."""
    return re.findall(r"\[0, 1\)|\(outputs_fn, loss_fn\)|\S+", expected)


@pytest.mark.parametrize("case", CALLS)
def test_a_wrong_call_gives_one_clear_sentence(case):
    expected, call = CALLS[case]
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert_one_sentence(caught.value, split_words(expected))


@pytest.mark.slow
@pytest.mark.parametrize("curvature", ["reverse_over_reverse", "central_difference"])
def test_what_the_custom_vjp_sentence_names_works(curvature):
    tx = make(refresh="external", curvature=curvature)
    state = jax.jit(lambda s: dho2_jax.refresh(s, VECTOR, hard))(tx.init(VECTOR))
    sharpness = float(dho2_jax.metrics(state)["sharpness"])
    assert sharpness == pytest.approx(2.0, rel=1e-2)


def test_legal_edges_raise_nothing():
    make(newton_learning_rate=0, subspace_decay=0.0, damping=0, rate_schedule=0)
    make(base=optax.sgd(0.0), max_base_scaling=float("inf"))
    make(num_largest=np.int64(2), num_matvecs=2, newton_learning_rate=np.float32(0.5))
    make(num_largest=0, num_smallest=1, newton_learning_rate=jnp.asarray(0.5))
    make(num_largest=6, num_matvecs=9).init(VECTOR)
    assert external().init(parameters()) is not None
