# SPDX-License-Identifier: Apache-2.0
"""`dho2 train`: a run whose loss leaves goes back to a checkpoint, and says so."""

import json

import jax
import numpy as np
import pytest
from test_app_mesh import DIGITS, SMALL

from dho2_jax.app.record import outcome
from dho2_jax.app.run import experiment

pytestmark = pytest.mark.usefixtures("quick_compilation")


def train(tmp_path, monkeypatch, is_lost, *overrides):
    """A run in which the `is_lost` evaluations, by their number, give 1e5."""
    changes = [f"--config.{one}" for one in (f"workdir={tmp_path / 'run'}", *overrides)]
    built = experiment.prepare(
        str(DIGITS),
        [*SMALL, "--config.mesh_shape=(1,)", "--config.train_base=False", *changes],
        may_resume=True,
    )
    real, count = experiment.compile_for, iter(range(1000))

    def compile_for(built, optimizer):
        programs = real(built, optimizer)

        def evaluate(params):
            value = float(programs.evaluate(params))
            return 1e5 if is_lost(next(count)) else value

        return programs._replace(evaluate=evaluate)

    monkeypatch.setattr(experiment, "compile_for", compile_for)
    (run,) = experiment.train_both(built, lambda: False)
    return run, built


EVERY = ("steps=20", "eval_every=5", "log_every=5", "checkpoint_every=10")


def steps_of(run):
    return [(row["step"], row.get("returned_to")) for row in run.rows]


def test_a_run_goes_back_to_its_last_checkpoint(tmp_path, monkeypatch, capsys):
    # Evaluated at 0, 5, 10 and 15; then from 10 on once more.
    run, built = train(tmp_path, monkeypatch, lambda i: i == 3, *EVERY)
    assert steps_of(run) == [
        *((0, None), (5, None), (10, None), (15, 10)),
        *((15, None), (20, None)),
    ]
    assert outcome(run)["returns"] == 1 and not run.interrupted
    assert outcome(run)["final_val_loss"] < run.rows[0]["val_loss"]
    said = " ".join(capsys.readouterr().err.split())
    assert "the validation loss has left, 1e+05 at step 15" in said
    assert "going back to step 10" in said
    rows = (built.directory / "dho2" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[3])["returned_to"] == 10


def test_nothing_that_is_lost_is_saved(tmp_path, monkeypatch):
    # At step 10, where the first checkpoint is due: to the beginning, and on.
    run, _ = train(tmp_path, monkeypatch, lambda i: i == 2, *EVERY)
    assert steps_of(run)[2:4] == [(10, 0), (5, None)]
    assert np.isfinite(run.rows[-1]["val_loss"])


def test_a_run_that_leaves_again_and_again_ends_where_it_was_well(
    tmp_path, monkeypatch
):
    run, _ = train(tmp_path, monkeypatch, lambda i: i in (3, 4, 5, 6), *EVERY)
    assert outcome(run)["returns"] == 4
    assert run.rows[-1]["step"] == 10
    assert run.rows[-1]["val_loss"] == run.rows[2]["val_loss"]


@pytest.mark.parametrize("off", ["lost_factor=0", "checkpoint_every=0"])
def test_going_back_can_be_switched_off(tmp_path, monkeypatch, off):
    run, _ = train(tmp_path, monkeypatch, lambda i: i == 3, *EVERY, off)
    assert [row["step"] for row in run.rows] == [0, 5, 10, 15, 20]
    assert outcome(run)["returns"] == 0
    assert jax.tree.reduce(max, [row["val_loss"] for row in run.rows]) == 1e5
