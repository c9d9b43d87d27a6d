# SPDX-License-Identifier: Apache-2.0
"""The base rate set by curvature, against a NumPy re-statement and on real losses."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dho2_jax
from dho2_jax._numerics import rates


class PlainRule:
    """The rule in float64 and plain Python, from its equations."""

    def __init__(self):
        self.s, self.taken, self.steps, self.probed = 1.0, 1.0, 0, 0
        self.slopes, self.lengths = [], []
        self.mean = self.deviation = 0.0
        self.descent = self.bend = self.weight = self.before_cut = 0.0
        self.cuts = 0
        self.before, self.starts = 0.0, []

    def observe(self, slope, ahead, length):
        settled = self.steps > 10
        limit = self.mean + 8 * self.deviation
        explained = max(ahead, 0) + self.taken * self.bend * length
        steep = self.bend > 0 and not slope <= explained
        rising = not slope <= self.before
        rising &= bool(np.isfinite(slope) or np.isfinite(self.before))
        uphill = not slope + ahead <= 0  # higher up at the end than down at the start
        self.before = slope
        kept = np.clip(slope, 2 * self.mean - limit, limit) if settled else slope
        kept = kept if np.isfinite(kept) else self.mean
        start = min(ahead, limit) if settled else ahead
        stands_out = (settled and not slope <= limit) or (self.steps < 40 and steep)
        if stands_out and rising and uphill:
            self.before_cut = max(self.before_cut, self.s)
            self.s *= 0.5
            self.slopes, self.starts, self.lengths = [], [], []
            self.descent = self.bend = self.weight = 0.0
            self.cuts += 1
        else:
            self.slopes.append(kept)
            self.starts.append(start)
            self.lengths.append(length)
        if self.steps <= 1:
            self.mean, self.deviation = kept, abs(kept)
            return
        memory = min(0.9, 1 - 1 / self.steps)
        self.mean = memory * self.mean + (1 - memory) * kept
        self.deviation = memory * self.deviation + (1 - memory) * abs(kept - self.mean)

    def adjust(self, bend, length, largest):
        if self.slopes:
            taken = self.taken
            a = taken * bend - sum(self.slopes) / sum(self.lengths)
            a = min(a, -sum(self.starts) / sum(self.lengths))
            growing = length > self.weight
            past = min(0.8 * self.weight, 4 * length)
            self.weight = past + length
            self.descent = (past * self.descent + length * a) / self.weight
            self.bend = (past * self.bend + length * bend) / self.weight
            best = self.descent / self.bend
            aim = best
            if self.steps >= 40:
                aim = 1.5 * best
                if self.cuts:
                    aim = max(best, min(aim, self.before_cut / 2))
            elapsed = self.steps - self.probed
            if aim > self.s:
                early = self.steps < 40
                uncut = early and not self.cuts
                fast = (
                    uncut
                    or (early and self.s < best / 4)
                    or self.s < 0.5 * self.before_cut
                    or self.s < aim / 16
                )
                growth = 2.0 if fast else min(2.0, 1.25 ** (elapsed / 10))
                leap = min(best / 4, 4 * self.s)
                leap = leap if uncut else 0.0
                self.s = min(aim, max(growth * self.s, leap))
            elif aim < taken:
                slow = np.sqrt(1 - elapsed / (self.steps + elapsed))
                least = 0.5 if growing or taken >= 3 * best else slow
                self.s *= max(aim / taken, least)
        self.s = min(max(self.s, 1e-12), largest)
        self.slopes, self.starts, self.lengths = [], [], []
        self.probed = self.steps


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rule_equals_its_plain_statement(seed):
    rng = np.random.default_rng(seed)
    plain, rate = PlainRule(), rates.start(jnp.zeros(()))
    observe, adjust = jax.jit(rates.observe), jax.jit(rates.adjust)
    for step in range(1, 160):
        plain.steps = step
        rate = rate._replace(steps=jnp.int32(step))
        # Slopes scatter around -1 and now and then stand far out, or are not finite;
        # lengths wander over several orders of magnitude.
        slope, length = rng.normal(-1.0, 0.5), rng.lognormal(0, 2.0)
        ahead = rng.normal(-2.0, 1.5)
        if rng.random() < 0.06:
            slope = rng.choice([1e3, np.inf, np.nan, -1e3])
        if rng.random() < 0.03:
            ahead = rng.choice([1e3, -1e3])
        schedule = 0.5 * (1 + np.cos(np.pi * step / 200))
        plain.taken = schedule * plain.s
        plain.observe(slope, ahead, length)
        rate = rate._replace(
            taken=jnp.float32(schedule) * rate.scale,
            length=jnp.float32(length),
            ahead=jnp.float32(ahead),
        )
        rate = observe(rate, jnp.float32(slope))
        due = step % (2 if step < 40 else 10) == 0
        assert bool(rates.is_due(rate)) == due
        if due:
            readings = rng.lognormal(np.log(2.0), 1.0), rng.lognormal(0, 2.0)
            plain.adjust(*readings, 30.0)
            rate = adjust(rate, *map(jnp.float32, (*readings, 30.0)))
        np.testing.assert_allclose(rate.scale, plain.s, rtol=2e-3)
    assert int(rate.cuts) == plain.cuts > 0


def test_probes_thin_out_in_long_runs():
    def period(step):
        return 2 if step < 40 else 10 if step < 2000 else 20 if step < 5000 else 50

    steps = np.arange(6000)
    rate = rates.start(jnp.zeros(()))._replace(steps=jnp.asarray(steps, jnp.int32))
    periods = np.array([period(step) for step in steps])
    np.testing.assert_array_equal(rates.is_due(rate), steps % periods == 0)
    # Beside the products of a sweep only as often as later.
    rarely = np.maximum(periods, 10)
    np.testing.assert_array_equal(rates.is_due(rate, often=False), steps % rarely == 0)
    for count, unprobed in ((2 * rarely - 1, False), (2 * rarely, True)):
        counted = rate._replace(slope_count=jnp.asarray(count, jnp.float32))
        assert np.all(rates.is_unprobed(counted) == unprobed)


def quadratic(eigenvalues, seed=0):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))
    a = jnp.asarray(q @ np.diag(eigenvalues) @ q.T, jnp.float32)
    return lambda x: 0.5 * x @ jnp.matmul(a, x, precision="highest")


def train(tx, loss, x, steps, refresh_every=None):
    state = tx.init(x)

    @jax.jit
    def step(x, state):
        value, grads = jax.value_and_grad(loss)(x)
        updates, state = tx.update(grads, state, x, value_fn=loss)
        return optax.apply_updates(x, updates), state, value

    values = []
    for _ in range(steps):
        x, state, value = step(x, state)
        values.append(float(value))
    return x, state, np.array(values)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1e-6, 1e-3, 1.0, 100.0])
def test_any_initial_rate_ends_near_the_best(rate):
    # The rest, after eight sharp directions are gone, has eigenvalues in [0.1, 1].
    eigenvalues = np.concatenate([np.linspace(0.1, 1, 32), np.logspace(2, 4, 8)])
    loss = quadratic(eigenvalues)
    tx = dho2_jax.dho2(
        optax.sgd(rate), num_largest=8, num_matvecs=24, base_rate="curvature"
    )
    _, state, values = train(tx, loss, jnp.ones(40), 150)
    chex.assert_tree_all_finite(values)
    assert values.max() <= 1.01 * values[0]
    assert values[-1] < 1e-3 * values[0]
    applied = rate * float(dho2_jax.metrics(state)["base_scaling"])
    assert 0.5 < applied < 20  # steepest descent's rates lie between 1 and 1/0.1


def mlp_problem(seed=0):
    keys = jax.random.split(jax.random.PRNGKey(seed), 4)
    params = {
        "a": jax.random.normal(keys[0], (10, 20)) / 3,
        "b": jax.random.normal(keys[1], (20, 5)) / 4,
    }
    x = 2 * jax.random.normal(keys[2], (128, 10)) + 1.0
    y = jax.random.normal(keys[3], (128, 5))

    def loss(p):
        return jnp.mean(jnp.sum((jnp.tanh(x @ p["a"]) @ p["b"] - y) ** 2, -1))

    return loss, params


BASES = {
    "sgd": optax.sgd,
    "heavy_ball": lambda r: optax.sgd(r, momentum=0.9),
    "adam": optax.adam,
    "muon": optax.contrib.muon,
}


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_four_decades_of_initial_rates_do_not_diverge(base):
    loss, params = mlp_problem()
    start = float(loss(params))
    finals = []
    for rate in (1e-5, 1e-3, 1e-1, 1.0):
        tx = dho2_jax.dho2(
            BASES[base](rate), num_largest=8, refresh_period=50, base_rate="curvature"
        )
        _, _, values = train(tx, loss, params, 150)
        chex.assert_tree_all_finite(values)
        finals.append(values[-1])
        # It was 40 times as much when s still doubled after a cut.
        assert values[20:].max() < 3 * values[20]
    assert max(finals) < 0.85 * start
    if base != "muon":  # unit steps settle where their own rate lets them
        assert max(finals) < 1.5 * min(finals)  # the search for the rate included


@pytest.mark.slow
def test_the_rule_rests_without_a_subspace():
    loss, params = mlp_problem()
    base = optax.adam(1e-2)
    tx = dho2_jax.dho2(base, refresh="external", base_rate="curvature")
    state, base_state = tx.init(params), base.init(params)
    for _ in range(3):
        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params, value_fn=loss)
        expected, base_state = base.update(grads, base_state, params)
        chex.assert_trees_all_equal(updates, expected)
        params = optax.apply_updates(params, updates)
    assert int(state.curvature.rate.steps) == 0


@pytest.mark.slow
def test_external_refresh_probes_when_update_cannot():
    loss, params = mlp_problem()
    tx = dho2_jax.dho2(
        optax.sgd(1e-4), num_largest=4, refresh="external", base_rate="curvature"
    )
    state = tx.init(params)
    refresh = jax.jit(lambda s, p: dho2_jax.refresh(s, p, loss))
    update = jax.jit(lambda s, p: tx.update(jax.grad(loss)(p), s, p))
    scales = []
    for step in range(121):
        if dho2_jax.should_refresh(step, 30):
            state = refresh(state, params)
        updates, state = update(state, params)
        params = optax.apply_updates(params, updates)
        scales.append(float(dho2_jax.metrics(state)["base_scaling"]))
    assert scales[0] == scales[29] == 1.0  # no probe before the second refresh
    assert scales[30] > 2.0  # a leap towards what the probe found
    assert scales[120] != scales[90] != scales[60]


@pytest.mark.slow
def test_the_cap_holds_and_may_be_a_schedule():
    loss, params = mlp_problem()

    def run(cap):
        tx = dho2_jax.dho2(
            optax.sgd(1e-5), num_largest=4, base_rate="curvature", max_base_scaling=cap
        )
        state = train(tx, loss, params, 60)[1]
        return float(dho2_jax.metrics(state)["base_scaling"])

    assert run(5.0) == 5.0
    assert run(lambda count: jnp.where(count < 30, 5.0, 7.0)) == 7.0
    assert run(None) > 7.0


@pytest.mark.slow
def test_a_schedule_multiplies_the_rule():
    loss, params = mlp_problem()
    steps = 200

    def run(schedule):
        tx = dho2_jax.dho2(
            optax.sgd(1e-2),
            num_largest=4,
            base_rate="curvature",
            rate_schedule=schedule,
        )
        state = train(tx, loss, params, steps)[1]
        return float(dho2_jax.metrics(state)["base_scaling"])

    cosine = optax.schedules.cosine_decay_schedule(1.0, steps)
    # The decay is neither compensated (that would be a factor of 16,000 by the end) nor
    # fed back. Undisturbed s grows by 1.25 in ten steps, 36-fold after the first forty;
    # at a constant rate the guard holds it at the edge, some times lower.
    assert 0.3 < run(cosine) / run(1.0) < 200


def test_a_spike_is_cut_and_forgotten():
    rate = rates.start(jnp.zeros(()))
    for step in range(1, 30):
        rate = rate._replace(steps=jnp.int32(step), length=jnp.float32(1.0))
        rate = rates.observe(rate, jnp.float32(-1.0 - 0.1 * (step % 3)))
    cut = rates.observe(rate, jnp.float32(50.0))
    assert float(cut.scale) == 0.5 * float(rate.scale)
    assert int(cut.cuts) == 1
    again = rates.observe(cut, jnp.float32(jnp.nan))
    assert float(again.scale) == 0.25 * float(rate.scale)
    assert np.isfinite(float(again.slope_mean))
    calm = rates.observe(again, jnp.float32(-1.0))
    assert float(calm.scale) == float(again.scale)
    # A second one that is not finite says nothing that the first has not.
    assert float(rates.observe(again, jnp.float32(jnp.nan)).scale) == float(again.scale)


def observed(ahead, slope, slopes=30):
    """s after steady slopes, then one that stands out, of a step that began `ahead`."""
    rate = rates.start(jnp.zeros(()))
    for step in range(1, slopes):
        rate = rate._replace(steps=jnp.int32(step), length=jnp.float32(1.0))
        rate = rates.observe(rate, jnp.float32(-1.0 - 0.1 * (step % 3)))
    rate = rate._replace(ahead=jnp.float32(ahead))
    return rates.observe(rate, jnp.float32(slope))


@pytest.mark.parametrize("slopes", [30, 60])  # before and after the early steps
def test_only_a_step_that_raised_the_loss_is_cut(slopes):
    """It went down as steeply as it came up: another length would be no better."""
    assert float(observed(ahead=-60.0, slope=50.0, slopes=slopes).scale) == 1.0
    assert float(observed(ahead=-40.0, slope=50.0, slopes=slopes).scale) == 0.5


def test_a_slope_that_no_longer_rises_is_not_cut_again():
    """Else momentum that points uphill for a while takes s to nothing."""
    rate = observed(ahead=0.0, slope=50.0)
    for slope in (40.0, 30.0, 30.0):
        rate = rates.observe(rate, jnp.float32(slope))
    assert float(rate.scale) == 0.5
    assert float(rates.observe(rate, jnp.float32(80.0)).scale) == 0.25


def test_a_direction_of_no_length_tells_nothing():
    rate = observed(ahead=0.0, slope=-1.0)._replace(length=jnp.float32(0.0))
    after = rates.observe(rate, jnp.float32(1e6))
    chex.assert_trees_all_equal(after, rate)


def test_momentum_that_points_uphill_early_is_not_cut():
    """The slope was there before the step: a shorter one would not have less."""
    rate = rates.start(jnp.zeros(()))._replace(
        steps=jnp.int32(5), length=jnp.float32(1.0), bend=jnp.float32(1.0)
    )
    rate = rate._replace(taken=jnp.float32(1.0), ahead=jnp.float32(3.0))
    assert float(rates.observe(rate, jnp.float32(3.9)).scale) == 1.0
    assert float(rates.observe(rate, jnp.float32(4.1)).scale) == 0.5


def quadratic_16(x):
    return 0.5 * jnp.sum(jnp.linspace(1, 50, 16) * x**2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "base", [optax.sgd(1e-3), optax.adam(1e-3)], ids=["sgd", "adam"]
)
def test_steps_that_go_nowhere_teach_nothing(base):
    """A base that accumulates answers zero on most steps."""
    tx = dho2_jax.dho2(
        optax.MultiSteps(base, 3).gradient_transformation(), num_largest=2
    )
    _, state, values = train(tx, quadratic_16, jnp.ones(16), 300)
    assert values.max() <= 1.01 * values[0] and values[-1] < 0.1 * values[0]
    assert np.isfinite(float(dho2_jax.metrics(state)["base_scaling"]))


@pytest.mark.slow
def test_a_base_that_stands_still_leaves_the_newton_step():
    tx = dho2_jax.dho2(optax.sgd(0.0), num_largest=2, num_matvecs=16)
    x, _, _ = train(tx, quadratic_16, jnp.ones(16), 200)
    np.testing.assert_allclose(x[:14], 1.0, atol=1e-4)
    np.testing.assert_allclose(x[14:], 0.0, atol=1e-3)


@pytest.mark.slow
def test_one_bad_gradient_is_forgotten():
    tx = dho2_jax.dho2(optax.sgd(1e-2), num_largest=2, refresh="external")
    x = jnp.ones(16)
    state = dho2_jax.refresh(tx.init(x), x, quadratic_16)
    step = jax.jit(lambda x, s, bad: tx.update(jax.grad(quadratic_16)(x) * bad, s, x))
    for i in range(200):
        updates, state = step(x, state, jnp.nan if i == 7 else 1.0)
        x = x + jnp.where(jnp.isfinite(updates), updates, 0.0)
    assert float(quadratic_16(x)) < 0.05 * float(quadratic_16(jnp.ones(16)))


@pytest.mark.slow
def test_float16_probes_do_not_underflow():
    def bend(dtype):
        tx = dho2_jax.dho2(
            optax.adam(1e-4, eps=1e-4), num_largest=2, refresh="external"
        )
        x = jnp.linspace(0.1, 1, 16).astype(dtype)
        state = dho2_jax.refresh(tx.init(x), x, quadratic_16)
        for _ in range(3):
            grads = jax.grad(quadratic_16)(x)
            updates, state = tx.update(grads, state, x, value_fn=quadratic_16)
            x = optax.apply_updates(x, updates)
        return float(state.curvature.rate.bend)

    np.testing.assert_allclose(bend(jnp.float16), bend(jnp.float32), rtol=0.05)
