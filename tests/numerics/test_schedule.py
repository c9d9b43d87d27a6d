"""When sweeps begin: what the host is told is what `update` does; and the drift."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import jit

import dho2_jax

SIZE = 6  # numbers in the problem, and the largest m


def bowl(x, curvature):
    """Has another Hessian everywhere, and with every batch."""
    return 0.5 * jnp.sum(curvature * x**2) + 0.1 * jnp.sum(jnp.cos(3 * x))


def batches(count):
    rng = np.random.default_rng(0)
    return jnp.asarray(np.arange(1, SIZE + 1) + rng.random((count, SIZE)), jnp.float32)


def follow(steps, which=None, source=bowl, **options):
    """A run of so many steps, as arrays over the steps.

    Batch `which[i]` is used in step i, the first one unless told. Parameters are those
    before each step and after the last.
    """
    options = {"num_largest": 2, "refresh": "staggered"} | options
    tx = dho2_jax.dho2(optax.adam(0.02), **options)
    which = np.zeros(steps, int) if which is None else np.asarray(which)

    def step(carry, batch):
        x, state = carry
        updates, state = tx.update(
            jax.grad(bowl)(x, batch), state, x, value_fn=lambda x: source(x, batch)
        )
        seen = {"x": x, "attempted": state.curvature.counters.attempted_at}
        seen |= dho2_jax.metrics(state)
        if state.curvature.sweep is not None:
            seen["index"] = state.curvature.sweep.lanczos.index
            seen["start"] = state.curvature.sweep.start.count
        return (x + updates, state), seen

    @jit
    def run(x, batches):
        return jax.lax.scan(step, (x, tx.init(x)), batches)

    (x, _), seen = run(jnp.ones(SIZE), batches(which.max() + 1)[which])
    seen = {name: np.asarray(value) for name, value in seen.items()}
    return seen | {"x": np.append(seen["x"], [x], 0)}


def begun(seen):
    """Steps in which a sweep began."""
    steps = np.arange(len(seen["index"]))
    return list(steps[(seen["index"] == -1) & (seen["start"] == steps)])


# --- which steps -------------------------------------------------------------------


def length_by_hand(m):
    """Steps from a start to the next possible one, in the worst phase of the probes."""

    def length(phase):
        step, left = 0, m + 1
        while left:
            step += 1
            left -= (step + phase) % 10 != 0
        return step + 2  # put to use; and then free

    return max(length(phase) for phase in range(10))


def starts_by_hand(horizon, period, early, m):
    """Steps since the warm-up at which sweeps begin, the regular ones first."""
    length = length_by_hand(m)
    taken = []
    for step in range(horizon + 2 * length + period):
        if step % period == 0 and all(step - other >= length for other in taken):
            taken.append(step)
    for step in sorted(early):
        if all(abs(step - other) >= length for other in taken):
            taken.append(step)
    return sorted(step for step in taken if step < horizon)


def test_sweep_index_counts_starts():
    rng = np.random.default_rng(0)
    horizon = 90
    for _ in range(200):
        m = int(rng.integers(1, 25))
        period = int(m + rng.integers(0, rng.choice([3, 40])))
        early = tuple(map(int, rng.integers(1, 70, rng.integers(0, 5))))
        warmup = int(rng.integers(0, 8))
        starts = starts_by_hand(horizon, period, early, m)
        expected = np.searchsorted(starts, np.arange(horizon), side="right") - 1
        got = [
            dho2_jax.sweep_index(warmup + step, period, warmup, early, m)
            for step in range(horizon)
        ]
        case = (m, period, early, warmup)
        np.testing.assert_array_equal(got, expected, err_msg=str(case))
        if not early and period >= length_by_hand(m):
            without = [dho2_jax.sweep_index(warmup + i, period, warmup) for i in (0, 9)]
            assert without == [got[0], got[9]], case
        for step in range(warmup):
            assert dho2_jax.sweep_index(step, period, warmup, early, m) == -1


PLANS = {
    "plain": {"refresh_period": 11, "num_matvecs": 5, "base_rate": "fixed"},
    "period_is_m": {"refresh_period": 5, "num_matvecs": 5, "base_rate": "fixed"},
    "no_pause": {"refresh_period": 9, "num_matvecs": 5, "warmup_steps": 4},
    "early": {
        "refresh_period": 40,
        "num_matvecs": 4,
        "warmup_steps": 3,
        "early_refreshes": (20, 8, 35, 12, 20),  # 8 fits, 12 and 35 do not
    },
}
STEPS = 80


def index_of(plan, step):
    names = "refresh_period", "warmup_steps", "early_refreshes", "num_matvecs"
    return dho2_jax.sweep_index(step, **{n: plan[n] for n in names if n in plan})


@functools.cache
def followed(name):
    """A run with a fresh batch for each sweep, as the documentation has it."""
    plan = PLANS[name]
    which = [index_of(plan, step) + 1 for step in range(STEPS)]
    return follow(STEPS, which, **plan)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_sweeps_begin_when_the_host_thinks_and_all_are_used(name):
    plan, seen = PLANS[name], followed(name)
    index = [-1] + [index_of(plan, step) for step in range(STEPS)]
    expected = list(np.flatnonzero(np.diff(index)))
    assert len(expected) > 3
    assert begun(seen) == expected
    assert seen["rejected"][-1] == 0
    length = length_by_hand(plan["num_matvecs"])
    finished = [start for start in expected if start + length <= STEPS]
    # The anchor in use is the start of the last one that is over.
    for start, after in zip(finished, [*finished[1:], STEPS], strict=True):
        assert seen["count"][start + length - 1] == start + length
        ages = seen["age"][start + length - 1 : after + length - 2]
        np.testing.assert_array_equal(ages, np.arange(len(ages)) + length)
    assert seen["refreshes"][finished[-1] + length - 1] == len(finished)


def test_a_sweep_must_fit_into_the_period():
    for refresh in ("staggered", "periodic"):
        options = {"num_largest": 2, "num_matvecs": 12, "refresh_period": 11}
        if refresh == "periodic":
            dho2_jax.dho2(optax.sgd(0.1), refresh=refresh, **options)
            continue
        expected = "`num_matvecs` must be <= refresh_period .* got 12 for 11; a step"
        with pytest.raises(ValueError, match=expected):
            dho2_jax.dho2(optax.sgd(0.1), refresh=refresh, **options)


def test_sweep_index_says_what_it_lacks():
    with pytest.raises(ValueError, match="`num_matvecs` must be given to sweep_index"):
        dho2_jax.sweep_index(3, 50, early_refreshes=(20,))
    with pytest.raises(ValueError, match="`num_matvecs` must be >= 1, got 0"):
        dho2_jax.sweep_index(3, 50, num_matvecs=0)
    with pytest.raises(ValueError, match="`step` must be a static integer"):
        dho2_jax.sweep_index(jnp.asarray(3))
    with pytest.raises(ValueError, match="`refresh_period` must be >= 1, got 0"):
        dho2_jax.sweep_index(3, 0)


# --- drift -------------------------------------------------------------------------


def drift_by_hand(x, anchor, count):
    """The path from step `anchor` to step `count` over the norm at its start."""
    x = x.astype(np.float64)
    moves = np.linalg.norm(np.diff(x[anchor : count + 1], axis=0), axis=1)
    return moves.sum() / np.linalg.norm(x[anchor])


@pytest.mark.parametrize("name", ["plain", "early"])
def test_drift_and_age(name):
    seen = followed(name)
    used = np.flatnonzero(seen["refreshes"])
    assert len(used) > 50
    for i in used:
        count, age = seen["count"][i], seen["age"][i]
        expected = drift_by_hand(seen["x"], count - age, count)
        np.testing.assert_allclose(seen["drift"][i], expected, rtol=1e-4)
    assert seen["drift"][used].max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("bound, early", [(0.15, (30,)), (1e-6, ()), (9.0, ())])
def test_a_drift_beyond_the_bound_begins_a_sweep(bound, early):
    m, period, warmup, steps = 4, 45, 6, 100
    seen = follow(
        steps,
        max_drift=bound,
        refresh_period=period,
        num_matvecs=m,
        warmup_steps=warmup,
        early_refreshes=early,
        base_rate="fixed",
    )
    x, length = seen["x"], length_by_hand(m)
    regular = [warmup + s for s in starts_by_hand(2 * steps, period, early, m)]
    starts, anchor, busy = [], None, -1
    for step in range(steps):
        if step == busy:  # the m + 1 products are in, and are put to use
            anchor = starts[-1]
        due = step in regular
        if not due and step >= busy and anchor is not None:
            upcoming = next(s for s in regular if s > step)
            far = drift_by_hand(x, anchor, step) > bound
            due = far and step + length <= upcoming
        if due:
            starts.append(step)
            busy = step + m + 2
    assert begun(seen) == starts
    between = [s for s in starts if s not in regular]
    assert bool(between) == (bound < 1)
    assert {s for s in regular if s < steps} <= set(starts)
    assert seen["rejected"][-1] == 0


def test_a_drift_beyond_the_bound_refreshes_at_once():
    m, period, warmup, steps, bound = 4, 45, 6, 60, 0.2
    seen = follow(
        steps,
        refresh="periodic",
        max_drift=bound,
        refresh_period=period,
        num_matvecs=m,
        warmup_steps=warmup,
        base_rate="fixed",
    )
    expected, last = [], None
    for step in range(steps):
        due = step >= warmup and (step - warmup) % period == 0
        if last is not None and step - last >= m:
            due |= drift_by_hand(seen["x"], last, step) > bound
        if due:
            expected.append(step)
            last = step
    assert len(expected) > 4
    assert sorted({*seen["attempted"]} - {-1}) == expected
    assert seen["rejected"][-1] == 0


def test_a_rejected_refresh_is_not_tried_again_at_each_step():
    """Where products are not finite but at the start, the first alone is accepted."""
    m, steps = 5, 40

    def source(x, batch):
        moved = jnp.any(jax.lax.stop_gradient(x) != 1)
        return jnp.where(moved, jnp.nan, 1.0) * bowl(x, batch)

    seen = follow(
        steps,
        refresh="periodic",
        max_drift=1e-3,
        refresh_period=1000,
        num_matvecs=m,
        base_rate="fixed",
        source=source,
    )
    assert seen["refreshes"][-1] == 1
    np.testing.assert_array_equal(
        np.flatnonzero(np.diff(seen["rejected"], prepend=0)), np.arange(m, steps, m)
    )


@pytest.mark.parametrize(
    "value, expected",
    [
        (0, "`max_drift` must be a static number > 0 or None, got 0"),
        (jnp.ones(()), "`max_drift` must be a static number > 0 or None"),
        (lambda count: 0.1, "`max_drift` must be a static number > 0 or None"),
        ("far", "`max_drift` must be a number"),
        (-0.1, "`max_drift` must be >= 0, got -0.1"),
    ],
)
def test_a_wrong_bound(value, expected):
    with pytest.raises(ValueError, match=expected):
        dho2_jax.dho2(optax.sgd(0.1), max_drift=value)


def test_a_bound_is_of_no_use_to_an_external_refresh():
    with pytest.raises(ValueError, match="must be None with refresh='external'"):
        dho2_jax.dho2(optax.sgd(0.1), max_drift=0.1, refresh="external")


# --- one schedule, however it is asked -----------------------------------------------

ALIASES = {
    "dho2": lambda **kwargs: dho2_jax.dho2(optax.sgd(1e-3), **kwargs),
    **{
        name: lambda name=name, **kwargs: getattr(dho2_jax, name)(1e-3, **kwargs)
        for name in ("dho2_sgd", "dho2_heavy_ball", "dho2_nesterov", "dho2_adam")
    },
    **{
        name: lambda name=name, **kwargs: getattr(dho2_jax, name)(1e-3, **kwargs)
        for name in ("dho2_adamw", "dho2_muon")
    },
    "fosi": lambda **kwargs: dho2_jax.fosi(optax.sgd(1e-3), **kwargs),
}
VALUES = jnp.linspace(1.0, 3.0, 30)


def value(x):
    return jnp.sum(VALUES * x**2)


def refreshed_at(tx, steps):
    """The steps in which `update` itself refreshes."""

    def one(carry, _):
        x, state = carry
        updates, state = tx.update(jax.grad(value)(x), state, x, value_fn=value)
        return (x + updates, state), dho2_jax.metrics(state)["refreshes"]

    x = jnp.ones(30)
    counts = jax.lax.scan(one, (x, tx.init(x)), length=steps)[1]
    return list(np.flatnonzero(np.diff(np.concatenate([[0], counts]))))


@pytest.mark.parametrize("name", ALIASES)
@pytest.mark.slow
def test_every_way_to_ask_gives_the_same_steps(name):
    steps = 130
    expected = [99] if name == "fosi" else [0, 20, 50, 100]
    tx = ALIASES[name]()
    state = optax.chain(tx, optax.identity()).init(jnp.ones(30))
    ways = {
        "update": refreshed_at(tx, steps),
        "transformation": [i for i in range(steps) if dho2_jax.should_refresh(i, tx)],
        "state": [i for i in range(steps) if dho2_jax.should_refresh(i, state)],
        "external": [
            i
            for i in range(steps)
            if dho2_jax.should_refresh(i, ALIASES[name](refresh="external"))
        ],
    }
    if name != "fosi":
        ways["nothing"] = [i for i in range(steps) if dho2_jax.should_refresh(i)]
    assert all(found == expected for found in ways.values()), ways


@pytest.mark.parametrize("name", [name for name in ALIASES if name != "fosi"])
@pytest.mark.slow
def test_sweeps_are_asked_of_the_state_alike(name):
    """With k = 24 a sweep takes 35 steps: the early one at 20 meets that of step 0."""
    tx = ALIASES[name](refresh="staggered")
    state = tx.init(jnp.ones(30))
    of_state = [dho2_jax.sweep_index(i, state) for i in range(230)]
    assert list(np.flatnonzero(np.diff([-1, *of_state]))) == [0, 50, 100, 200]
    assert of_state == [dho2_jax.sweep_index(i, tx) for i in range(230)]
    flat = [dho2_jax.sweep_index(i, num_matvecs=28) for i in range(230)]
    assert of_state == flat


def test_a_schedule_is_what_its_parts_are():
    schedule = dho2_jax.Schedule(refresh_period=7, warmup_steps=2, early_refreshes=(3,))
    whole = dho2_jax.dho2(optax.sgd(1e-3), num_largest=2, schedule=schedule)
    flat = dho2_jax.dho2(
        optax.sgd(1e-3),
        num_largest=2,
        refresh_period=7,
        warmup_steps=2,
        early_refreshes=(3,),
    )
    assert refreshed_at(whole, 25) == refreshed_at(flat, 25) == [2, 5, 9, 16, 23]
    with pytest.raises(ValueError, match=r"`schedule` must come without .*got both"):
        dho2_jax.dho2(optax.sgd(0.1), schedule=schedule, refresh_period=3)
    with pytest.raises(ValueError, match=r"`schedule` must be a dho2_jax.Schedule"):
        dho2_jax.dho2(optax.sgd(0.1), schedule=optax.constant_schedule(0.1))
    assert dho2_jax.Schedule().early_refreshes == (20, 50)
    assert dho2_jax.Schedule(99).early_refreshes == ()
