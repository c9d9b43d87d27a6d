# SPDX-License-Identifier: Apache-2.0
"""`dho2 train` with curvature beside the training: staggered, in turns, overlapped."""

import jax
import numpy as np
import pytest
from test_app_mesh import DIGITS, SMALL

from dho2_jax.app.errors import UserError
from dho2_jax.app.plan import measure
from dho2_jax.app.run import experiment
from dho2_jax.app.run.stepper import Stepper

STAGGERED = "optimizer.refresh=staggered"
LONGER = ("steps=40", "optimizer.refresh_period=12", "optimizer.early_refreshes=(3,)")


pytestmark = pytest.mark.usefixtures("quick_compilation")


def build(*overrides):
    changes = [f"--config.{one}" for one in overrides]
    config = experiment.read_config(str(DIGITS), [*SMALL, *changes])
    return experiment.build("digits", config)


def train(*overrides):
    built = build(*overrides)
    programs = experiment.compile_for(built, built.dho2)
    run = experiment.run_one(
        built, built.dho2, programs, seed=0, directory=None, should_stop=lambda: False
    )
    return run.rows


def losses(rows):
    return [row["val_loss"] for row in rows if "val_loss" in row]


def test_staggered_on_eight_devices_is_staggered_on_one():
    rows = train(STAGGERED, *LONGER)
    one = train(STAGGERED, "mesh_shape=(1,)", *LONGER)
    np.testing.assert_allclose(losses(rows), losses(one), rtol=2e-3)
    last = rows[-1]
    # At once at steps 0 and 3; sweeps begin at 12 and at 24.
    assert (last["refreshes"], last["rejected"]) == (4, 0)
    assert last["recurrence_defect"] < 1e-4
    assert last["age"] == 40 - 24
    assert losses(rows)[-1] < 0.7 * losses(rows)[0]


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_groups_take_turns(curvature):
    rows = train(
        STAGGERED,
        "stagger_axis=data",
        "mesh_shape=(4,2)",
        "mesh_axes=data,fsdp",
        "param_sharding=fsdp",
        f"optimizer.curvature={curvature}",
        *LONGER,
    )
    last = rows[-1]
    assert (last["refreshes"], last["rejected"]) == (4, 0)
    assert losses(rows)[-1] < 0.7 * losses(rows)[0]


def test_devices_set_aside_refresh():
    common = ("mesh_shape=(4,)", "curvature_batch_size=16", *LONGER)
    rows = train("curvature_devices=2", "land_after=5", *common)
    # At once at steps 0 and 3; launched at 12, 24 and 36, landed at 17 and 29.
    assert (rows[-1]["refreshes"], rows[-1]["rejected"]) == (4, 0)
    assert rows[-1]["age"] == 40 - 24
    assert rows[-1]["drift"] > 0
    inline = train(*common)
    for row, other in zip(rows[1:4], inline[1:4], strict=True):  # up to step 9
        np.testing.assert_allclose(row["train_loss"], other["train_loss"], rtol=1e-3)
    assert losses(rows)[-1] < 0.7 * losses(rows)[0]


def test_a_run_taken_up_in_mid_sweep_measures_on_the_same_batch():
    """The part of a sweep is that of its first step, whenever the loop begins."""
    built = build(STAGGERED, "mesh_shape=(1,)", *LONGER)
    programs = experiment.compile_for(built, built.dho2)
    taken = []

    def step(params, state, batch, part):
        taken.append(part)
        return params, state, batch

    recorded = programs._replace(step=step, refresh=lambda state, params, batch: state)
    for begin in (12, 20):
        there = {"next_index": begin}
        advance = Stepper(built.task, built.dho2, recorded, 0, there)
        for i in range(begin, 23):
            advance(i, None, None)
    first = taken[0]
    for part in taken:
        for x, y in zip(jax.tree.leaves(part), jax.tree.leaves(first), strict=True):
            np.testing.assert_array_equal(x, y)


def test_plan_measures_what_takes_turns():
    """Also where the examples for curvature are fewer than the devices."""
    built = build(STAGGERED, "stagger_axis=data", "curvature_batch_size=0")
    found = measure.measure(built, jax.devices())
    # A product takes 2.5 gradients: of the 8 examples of a group at most 3.
    assert found["curvature_batch_size"] == 2
    assert found["product"]["flops"] > 0
    assert found["step"]["collectives"]["reduce-scatter"]["count"] >= 1
    assert found["refresh"]["total"] > 0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stagger_axis=data"], "must come with config.optimizer.refresh='staggered'"),
        (["curvature_devices=1", STAGGERED], "refresh='external'"),
        (["stagger_axis=dtaa", STAGGERED], "got 'dtaa'; did you mean `data`?"),
        (["stagger_axis=data", STAGGERED, "mesh_shape=(1,)"], "at least two devices"),
        (["curvature_devices=8"], "must be below the number of devices"),
        (["curvature_devices=-1"], "must not be negative"),
        (["curvature_devices=4", "land_after=6"], "must be below config.optimizer."),
        (
            [STAGGERED, "optimizer.refresh_period=5"],
            "`num_matvecs` must be <= refresh_period",
        ),
        (
            ["stagger_axis=data", STAGGERED, "curvature_batch_size=48"],
            "must divide config.batch_size=64",
        ),
    ],
)
def test_mistakes(overrides, expected):
    with pytest.raises(UserError) as error_info:
        build(*overrides)
    assert expected in str(error_info.value)
