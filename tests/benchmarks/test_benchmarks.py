"""The benchmarks: two ways to run a contender agree, and the report reads a race."""

import json
import math
import pathlib
import sys

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def importable():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("name", ["Adam", "DHO² on heavy ball"])
def test_a_fleet_and_a_race_train_alike(name):
    import contenders
    import fleet
    import race
    import workloads

    workload = workloads.build("digits", steps=24)
    contender = contenders.contenders(workload)[name]
    settings = [fleet.Setting(3, 1e-2), fleet.Setting(4, 3e-3, cosine=True)]
    found = fleet.sail(workload, contender, settings)
    programs = race.compile_for(workload, contender)
    for setting, losses in zip(settings, found.losses, strict=True):
        alone = race.run(
            workload,
            programs,
            seed=setting.seed,
            rate=setting.rate,
            cosine=setting.cosine,
        )
        assert alone.steps == found.steps.tolist()
        np.testing.assert_allclose(alone.losses, losses, rtol=2e-3)
        assert alone.losses[-1] < 0.9 * alone.losses[0]
        assert np.all(np.diff(alone.seconds) > 0)
        scale = 1.0 if name == "Adam" else max(alone.scales)
        assert len(alone.scales) == 24 and scale == max(alone.scales)
        half = math.sqrt(alone.losses[0] * alone.losses[-1])
        step, _ = race.reached(alone, half)
        assert 0 < step <= 24


def test_several_runs_count_with_the_median_time_of_each_stretch():
    import race

    first = race.Run([0, 10, 20], [0.0, 9.0, 10.0], [3.0, 2.0, 1.0], [1.0] * 20)
    others = [
        first._replace(seconds=[0.0, 2.0, 6.0]),
        first._replace(seconds=[0.0, 3.0, 5.0]),
        first._replace(steps=[0, 10], seconds=[0.0, 0.1], losses=[3.0, math.inf]),
    ]
    found = race.in_median_time([first, *others])
    # Stretches of 9, 2, 3 and of 1, 4, 2 seconds.
    assert found == first._replace(seconds=[0.0, 3.0, 5.0])
    assert race.in_median_time([first]) == first


def test_every_contender_can_be_built_and_tuned():
    import contenders
    import workloads

    for name in workloads.SMALL:
        for one in contenders.contenders(workloads.build(name)).values():
            assert len(one.rates) in (0, 5)
            if one.name != "Kron":  # of a package that only the benchmark needs
                assert hasattr(one.make(1e-3, 1.0), "update")


def test_a_larger_batch_is_a_workload_of_its_own():
    import race
    import time_to_target
    import workloads

    workload = workloads.build("autoencoder x4")
    assert workload.name == "autoencoder x4" == workloads.build("autoencoder", 4).name
    assert (workload.batch_size, workload.curvature_size) == (4096, 512)
    rows = [entry.label for entry in time_to_target.entries(workload)]
    assert "Adam, 0.001 constant" in rows and "DHO² on Adam, untuned" in rows
    assert not any(word in " ".join(rows) for word in ("α", "FOSI", "at its rate"))
    path = race.path_of(BENCHMARKS, workload.name)
    assert path == BENCHMARKS / "race-autoencoder-x4.json"


def test_a_race_may_be_of_some_contenders():
    import time_to_target
    import workloads

    def labels(name, *wanted):
        entries = time_to_target.entries(workloads.build(name), wanted)
        return [entry.label for entry in entries]

    some = ("DHO² on Adam", "Adam")
    tuned = ["Adam, 0.0001 constant", "DHO² on Adam, untuned"]
    assert labels("gpt2 x0.25", *some) == tuned
    repeats = "heavy ball, at its rate"
    assert repeats in labels("digits", "heavy ball", "DHO² on heavy ball")
    assert repeats not in labels("digits", "heavy ball", "Adam")
    with pytest.raises(SystemExit, match=r"must name some of heavy ball; .*'Adan'"):
        labels("digits", "Adan")


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet", 23_528_522), ("gpt2", 124_439_808)]
)
def test_workloads_for_accelerators_draw_what_their_networks_take(name, parameters):
    import contenders
    import jax
    import workloads

    workload = workloads.build(name, 1 / 16)
    batch = jax.jit(workload.batch)(np.uint32(0), np.int32(3))
    params = jax.eval_shape(workload.task.init, 0)
    assert sum(x.size for x in jax.tree.leaves(params)) == parameters
    for part in (batch, workload.part(batch), workload.task.dataset.validation):
        loss = jax.eval_shape(workload.task.loss_fn, params, part)
        assert loss.shape == ()
    first, *labels = jax.tree.leaves(jax.device_get(batch))
    assert first.shape[0] == workload.batch_size
    assert len(np.unique(first.reshape(len(first), -1), axis=0)) == len(first)
    if labels:
        assert 0 <= first.min() and first.max() <= 1 and first.std() > 0.1
        assert 0 <= labels[0].min() and labels[0].max() <= 9
    for one in contenders.contenders(workload).values():
        assert len(one.rates) in (0, 5)


def test_the_loss_for_curvature_is_the_training_loss():
    import jax
    import workloads

    from dho2_jax.app.tasks.registry import TASKS

    options = {"length": 8, "width": 8, "num_layers": 3, "num_heads": 2}
    options |= {"vocabulary_size": 128, "num_validation": 4, "remat": True}
    make = TASKS["gpt2"]
    task = make(1, **options, scan_layers=True)
    loss_fn = workloads.one_by_one(make, **options, scan_layers=True)
    params, batch = task.init(0), task.dataset.validation
    # Initial values make the layers nearly the same.
    params = jax.tree.map(
        lambda x: x + 0.3 * np.random.default_rng(x.size).normal(size=x.shape), params
    )
    for fn in (lambda f: f, jax.grad):
        ours, whole = fn(loss_fn)(params, batch), fn(task.loss_fn)(params, batch)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6),
            ours,
            whole,
        )


def test_a_fleet_in_parts_is_the_same():
    import contenders
    import fleet
    import workloads

    workload = workloads.build("digits", steps=4)
    contender = contenders.contenders(workload)["DHO² on Adam"]
    settings = [fleet.Setting(seed, 1e-3) for seed in (3, 4, 5)]
    whole = fleet.sail(workload, contender, settings)
    parts = fleet.sail(workload, contender, settings, at_once=1)
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-4)
    assert parts.settings == whole.settings and parts.cuts.shape == (3,)


def test_the_report_reads_medians_and_targets(tmp_path):
    import report

    def record(label, seed, losses, pace):
        return {
            "label": label,
            "contender": label.split(",")[0],
            "seed": seed,
            "compile_seconds": 1.0,
            "steps": [0, 10, 20],
            "seconds": [0.0, 10 * pace, 20 * pace],
            "losses": losses,
        }

    records = []
    for seed, end in enumerate((0.9, 1.0, 1.1)):
        records += [
            record("heavy ball, 0.1 constant", seed, [4.0, 2.0, end + 1], 0.1),
            record("Adam, 0.1 constant", seed, [4.0, 2.0, end], 0.1),
            record("Muon, 0.1 constant", seed, [4.0, 2.0, end], 0.2),
            record("Adam, at its rate", seed, [4.0, 0.5, 0.5], 0.1),
        ]
        for base in report.BASES:
            label = f"DHO² on {base}, untuned"
            records.append(record(label, seed, [4.0, end - 0.2, 0.5], 0.1))
    path = tmp_path / "race.json"
    path.write_text(json.dumps({"workload": "x", "records": records}))
    rows = report.load(path)
    targets = {base: report._tuned(rows, base).final() for base in report.BASES}
    assert targets == {"heavy ball": 2.0, "Adam": 1.0, "Muon": 1.0}
    adam = next(row for row in rows if row.label == "Adam, 0.1 constant")
    assert adam.to(1.0) == (20, 2.0, 2)  # two of three get there
    assert adam.to(0.1)[:2] == (math.inf, math.inf)
    text = report.ratios(rows, targets)
    assert "Adam's target, time (steps) of DHO² on it over Adam, 0.1 constant: " in text
    assert "untuned 0.50 (0.50)" in text
    assert "| Adam, 0.1 constant | 1 [0.9, 1.1] |" in report.table(rows, targets)
