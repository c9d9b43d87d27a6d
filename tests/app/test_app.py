"""The commands end to end: files, numbers, pictures, mistakes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import hear_interrupts

from dho2_jax.app import cli
from dho2_jax.app.run import experiment, optimizers

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
SMALL = {
    "patch_autoencoder": ["--config.task.widths=(16,)", "--config.batch_size=64"],
    "digits_mlp": ["--config.task.widths=(16,)"],
    "char_lm": [
        "--config.task.width=16",
        "--config.task.num_layers=1",
        "--config.task.num_heads=2",
        "--config.task.length=16",
        "--config.task.max_bytes=400000",
        "--config.batch_size=16",
    ],
}
SHORT = [
    "--config.mesh_shape=(1,)",
    "--config.steps=20",
    "--config.log_every=5",
    "--config.eval_every=10",
    "--config.curvature_batch_size=16",
    "--config.optimizer.num_largest=3",
    "--config.optimizer.num_matvecs=6",
    "--config.optimizer.refresh_period=10",
]


pytestmark = pytest.mark.usefixtures("quick_compilation")


def run(*arguments):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([str(one) for one in arguments])
    return exit_info.value.code


def config_path(name):
    return CONFIGS / f"{name}.py"


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", SMALL)
def test_train_end_to_end(name, tmp_path, capsys):
    workdir = tmp_path / "out"
    status = run(
        "train", config_path(name), f"--config.workdir={workdir}", *SMALL[name], *SHORT
    )
    output = capsys.readouterr()
    assert status == 0, output.err
    assert "Adam: validation loss" in output.out
    assert "sharpness" in output.err and "refreshes" in output.err
    assert "WARNING" not in output.err and "Going on" not in output.err
    for optimizer in ("dho2", "base"):
        rows = read_rows(workdir / optimizer / "metrics.jsonl")
        assert [row["step"] for row in rows] == [0, 5, 10, 15, 20]
        assert [row["step"] for row in rows if "val_loss" in row] == [0, 10, 20]
        assert rows[-1]["val_loss"] < rows[0]["val_loss"]
        assert rows[-1]["train_loss"] < rows[1]["train_loss"]
        seconds = [row["seconds"] for row in rows]
        assert seconds[0] == 0 and seconds == sorted(seconds)
        assert list((workdir / optimizer).glob("events.out.tfevents.*"))
    rows = read_rows(workdir / "dho2" / "metrics.jsonl")
    assert rows[-1]["refreshes"] + rows[-1]["rejected"] == 2
    for metric in ("age", "sharpness", "next_eigenvalue", "base_scaling", "residual"):
        assert metric in rows[-1]
    spectra = [row["eigenvalues"] for row in rows if "eigenvalues" in row]
    assert spectra and all(one == sorted(one) for one in spectra)
    assert "refreshes" not in read_rows(workdir / "base" / "metrics.jsonl")[-1]
    check_picture(workdir / "plot.png")
    config = json.loads((workdir / "config.json").read_text())
    assert config["steps"] == 20 and config["optimizer"]["num_largest"] == 3
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["dho2"]["final_val_loss"] == rows[-1]["val_loss"]


def check_picture(path):
    from matplotlib.image import imread

    picture = imread(path)
    assert picture.shape[1] > 1500
    # More than axes on white: both methods' colours are there.
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        near = abs(picture[..., :3] * 255 - colour).sum(axis=-1) < 12
        assert near.sum() > 200


def test_compare_writes_a_table(tmp_path, capsys):
    workdir = tmp_path / "out"
    status = run(
        "compare",
        config_path("digits_mlp"),
        f"--config.workdir={workdir}",
        "--config.num_seeds=2",
        *SMALL["digits_mlp"],
        *SHORT,
    )
    output = capsys.readouterr()
    assert status == 0, output.err
    lines = output.out.splitlines()
    assert lines[0].startswith("optimizer") and "steps to target" in lines[0]
    assert any(line.startswith("DHO² (Adam)") for line in lines)
    assert max(map(len, lines[:4])) <= 100
    result = json.loads((workdir / "compare.json").read_text())
    assert set(result["optimizers"]) == {"base", "dho2"}
    for group in result["optimizers"].values():
        assert [one["seed"] for one in group["runs"]] == [0, 1]
        final = group["final_val_loss"]
        assert final["min"] <= final["median"] <= final["max"]
        assert final["min"] < final["max"]
    assert result["optimizers"]["base"]["reached_target"] >= 1
    check_picture(workdir / "plot.png")


def prepare(name, tmp_path, *extra):
    overrides = [f"--config.workdir={tmp_path / 'out'}", *SMALL[name], *SHORT, *extra]
    return experiment.prepare(str(config_path(name)), overrides)


def run_one(prepared, optimizer, programs, seed, directory):
    return experiment.run_one(
        prepared,
        optimizer,
        programs,
        seed=seed,
        directory=directory,
        should_stop=lambda: False,
    )


def without_clock(finished):
    return [{**row, "seconds": 0} for row in finished.rows]


def test_a_seed_fixes_the_run(tmp_path):
    prepared = prepare("digits_mlp", tmp_path)
    programs = experiment.compile_for(prepared, prepared.dho2)
    first, again, other = (
        run_one(prepared, prepared.dho2, programs, seed, tmp_path / str(number))
        for number, seed in enumerate((0, 0, 5))
    )
    assert without_clock(first) == without_clock(again)
    assert first.rows[0]["val_loss"] != other.rows[0]["val_loss"]
    assert first.rows[-1]["val_loss"] != other.rows[-1]["val_loss"]


def test_each_run_gets_its_own_directory(tmp_path):
    directories = [prepare("digits_mlp", tmp_path).directory for _ in range(3)]
    assert [one.name for one in directories] == ["out", "out-1", "out-2"]
    assert all((one / "config.json").is_file() for one in directories)


def test_overrides_reach_the_config(tmp_path):
    config = prepare(
        "digits_mlp",
        tmp_path,
        "--config.seed=5",
        "--config.optimizer.num_matvecs=None",
        "--config.optimizer.max_base_scaling=7",
        "--config.optimizer.negative_curvature=abs",
        "--config.task.widths=(5,6)",
        "--config.train_base=False",
    ).config
    assert config.seed == 5 and config.train_base is False
    assert config.optimizer.num_matvecs is None
    assert config.optimizer.max_base_scaling == 7.0
    assert config.optimizer.negative_curvature == "abs"
    assert config.task.widths == (5, 6)


def test_an_override_may_have_a_space_for_its_equals_sign():
    overrides, others = cli._split_overrides(
        ["train", "--config.a", "5", "file.py", "--config.b=x=y", "-h"]
    )
    assert overrides == ["--config.a=5", "--config.b=x=y"]
    assert others == ["train", "file.py", "-h"]


def test_another_task_may_be_named(tmp_path):
    shared = ["--config.task.name=patch_autoencoder"]
    prepared = prepare("digits_mlp", tmp_path, *shared)
    assert prepared.task.loss_label == "squared error per patch"
    assert prepared.config.task.patch_size == 16


@pytest.mark.parametrize("base", optimizers.BASES)
def test_every_base_and_schedule_differs(base, tmp_path):
    """The base alone: another base, rate or schedule gives another step."""
    params = {"w": jnp.ones((3, 2)), "b": jnp.full(2, 0.5)}

    def step(*extra):
        override = f"--config.optimizer.base={base}"
        config = prepare("digits_mlp", tmp_path, override, *extra).config
        transform = optimizers.build_base(config).transform
        state = transform.init(params)
        for _ in range(2):
            updates, state = transform.update(params, state, params)
        return np.concatenate([x.ravel() for x in jax.tree.leaves(updates)])

    reference = step("--config.base_schedule=constant")
    for extra in ("--config.base_schedule=cosine", "--config.base_learning_rate=1.0"):
        changed = step("--config.base_schedule=constant", extra)
        assert not np.allclose(reference, changed, rtol=1e-3)


@pytest.mark.parametrize("base_rate", ["fixed", "curvature"])
def test_the_schedule_of_dho2_acts(base_rate, tmp_path):
    params = {"w": jnp.ones(4)}

    def last_update(schedule):
        prepared = prepare(
            "digits_mlp",
            tmp_path,
            "--config.steps=3",
            f"--config.optimizer.base_rate={base_rate}",
            f"--config.optimizer.schedule={schedule}",
        )
        transform = prepared.dho2.transform
        state = transform.init(params)
        update = jax.jit(transform.update)
        for _ in range(3):
            updates, state = update(params, state, params)
        return float(jnp.abs(updates["w"]).max())

    assert last_update("cosine") < 0.5 * last_update("constant")


@pytest.mark.parametrize(
    "extra",
    [
        [
            "--config.optimizer.refresh=periodic",
            "--config.optimizer.base=muon",
            "--config.optimizer.base_rate=fixed",
        ],
        ["--config.optimizer.curvature=ggn", "--config.optimizer.base=heavy_ball"],
    ],
)
def test_modes(extra, tmp_path):
    prepared = prepare("digits_mlp", tmp_path, *extra)
    programs = experiment.compile_for(prepared, prepared.dho2)
    assert (programs.refresh is None) == ("periodic" in extra[0])
    rows = run_one(prepared, prepared.dho2, programs, 0, tmp_path / "run").rows
    assert rows[-1]["refreshes"] == 2
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]


def test_a_run_that_diverges_is_written_and_drawn(tmp_path):
    prepared = prepare(
        "patch_autoencoder",
        tmp_path,
        "--config.optimizer.base=sgd",
        "--config.base_learning_rate=1e9",
    )
    programs = experiment.compile_for(prepared, prepared.base)
    finished = run_one(prepared, prepared.base, programs, 0, tmp_path / "base")
    rows = read_rows(tmp_path / "base" / "metrics.jsonl")
    assert rows[-1]["val_loss"] is None and rows[-1]["step"] == 20
    assert experiment.draw(prepared, [finished]).stat().st_size > 10_000


def test_ctrl_c_keeps_what_was_written(tmp_path):
    workdir = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "dho2_jax.app.cli", "train"),
        str(config_path("digits_mlp")),
        *SMALL["digits_mlp"],
        *SHORT,
        "--config.steps=10000000",
        f"--config.workdir={workdir}",
    ]
    lines = workdir / "dho2" / "metrics.jsonl"
    hear_interrupts()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not (lines.exists() and lines.read_text().count("\n") > 5):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    rows = read_rows(lines)
    assert f"Stopped by Ctrl-C at step {rows[-1]['step']} of DHO²" in output
    assert "val_loss" in rows[-1]
    assert not (workdir / "base").exists()
    assert (workdir / "plot.png").stat().st_size > 10_000
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["dho2"]["interrupted"] is True
    assert list((workdir / "dho2").glob("events.out.tfevents.*"))
    assert "The same command goes on from there." in output
    checkpoints = [path.name for path in (workdir / "dho2" / "checkpoints").iterdir()]
    assert str(rows[-1]["step"]) in checkpoints


def test_help_and_missing_extras():
    for arguments, expected in (
        (["--help"], ["train", "compare", "spectrum", "--config.NAME=VALUE"]),
        (["spectrum", "--help"], ["CHECKPOINT", "--picture"]),
        (["train", "--help"], ["CONFIG", "metrics.jsonl", "plot.png"]),
    ):
        process = subprocess.run(
            [sys.executable, "-m", "dho2_jax.app.cli", *arguments],
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0
        assert all(one in process.stdout for one in expected)
    script = (
        "import sys; sys.modules['tqdm'] = None\n"
        "from dho2_jax.app import cli\n"
        f"cli.main(['train', {str(config_path('digits_mlp'))!r}])"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True
    )
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert "pip install 'dho2-jax[train]'" in process.stderr
