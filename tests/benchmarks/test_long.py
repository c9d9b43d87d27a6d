# SPDX-License-Identifier: Apache-2.0
"""Long runs destroy nothing: a short version of `benchmarks/long.py`."""

import pathlib
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def long():
    sys.path.insert(0, str(BENCHMARKS))
    import long

    yield long
    sys.path.remove(str(BENCHMARKS))


def run(long, problem, base, rate, seeds, steps, mode="periodic", period=100, k=8):
    make = long._hybrid(base, mode, period, k)
    one = long.runner(problem, make, steps, mode, period)
    return [one(seed, rate) for seed in seeds]


@pytest.mark.parametrize("base, rate", [("Adam", 1e-3), ("heavy ball", 1e-2)])
def test_past_zero_training_loss(long, base, rate):
    """It exploded there, to a validation loss of 629 and 82150; alone 0.08 to 0.12."""
    for found in run(long, long.digits(), base, rate, range(2), 2000):
        assert found.final < 0.3
        assert found.best < 1e-5  # of a training batch


@pytest.mark.parametrize(
    "base, rate, seeds, period",
    [
        ("Adam", 1e-3, (3, 5), 20),  # rose by a factor of 1e11, to 87 for ever
        ("heavy ball", 1e-4, (0, 1, 2), 100),  # stayed at 87, s = 1e-12
        ("heavy ball 0.99", 1e-4, (1, 4), 100),
    ],
)
def test_a_badly_conditioned_equation(long, base, rate, seeds, period):
    for found in run(
        long, long.poisson(), base, rate, seeds, 2000, period=period, k=24
    ):
        assert found.final < 1e-2 * found.start
        assert found.final < 10 * found.best
        assert found.rise < 30


@pytest.mark.parametrize("base", ["heavy ball 0.99", "Adam"])
def test_random_starts(long, base):
    rates = 10.0 ** np.linspace(-5, 1, 7)
    one = long.runner(
        long.noisy(), long._hybrid(base, "periodic", 50, 4), 600, "periodic", 50
    )
    found = [one(seed, rate) for seed, rate in enumerate(rates)]
    assert all(x.final < x.start for x in found)
    finals = [x.final for x in found]
    assert max(finals) < 2 * np.median(finals)


def test_faults(long):
    one = long.runner(
        long.noisy(),
        long._hybrid("Adam", "periodic", 50, 4),
        360,
        "periodic",
        50,
        faults=True,
    )
    calm = one(0, 1e-2, -1, 0).final
    for i, fault in enumerate(long.FAULTS):
        if i not in long._NOT_FINITE:
            assert one(0, 1e-2, i, 150).final < 3 * calm, fault


def test_a_row_says_the_worst(long):
    runs = [
        long.Run(final, 1.0, 0.1, 2.0, (1, 2, 3, 4, 5)) for final in (0.1, 0.2, 3.0)
    ]
    row = long._summary(runs)
    assert (row["median"], row["worst"]) == (0.2, 3.0)
    assert (row["above start"], row["above 2 medians"]) == (1, 1)
    assert row["end / best"] == pytest.approx(30.0)
    assert "worst 3" in long.table({"one": row})
