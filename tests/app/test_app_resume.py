"""`dho2 train` stopped in any way and called again: the run that never stopped."""

import concurrent.futures
import errno
import json
import pathlib
import shutil
import sys
import time

import filelock
import jax
import numpy as np
import pytest
from helpers import start_processes

from dho2_jax.app import cli
from dho2_jax.app.errors import UserError
from dho2_jax.app.record import Progress
from dho2_jax.app.run import checkpoint, distributed, experiment, resume
from dho2_jax.app.show import saved, writers

DIGITS = pathlib.Path(__file__).parents[2] / "configs" / "digits_mlp.py"
SMALL = (
    "task.widths=(8,)",
    "steps=64",
    "log_every=1",
    "eval_every=10",
    "batch_size=64",
    "curvature_batch_size=16",
    "checkpoint_every=8",
    "mesh_shape=(1,)",
    "optimizer.num_largest=3",
    "optimizer.num_matvecs=6",
    "optimizer.refresh_period=12",
    "optimizer.early_refreshes=(3,)",
)
MODES = {
    # Rows of three losses each: a checkpoint falls between them.
    "external": ("log_every=3",),
    "periodic": ("optimizer.refresh=periodic", "train_base=False"),
    "staggered": ("optimizer.refresh=staggered", "train_base=False"),
    "overlapped": (
        *("mesh_shape=(2,)", "curvature_devices=1", "land_after=5"),
        "train_base=False",
    ),
}

pytestmark = pytest.mark.usefixtures("quick_compilation", "compiled_once")


@pytest.fixture(scope="module")
def compiled_once():
    """One compilation for all runs of the same programs."""
    made, compile_for = {}, experiment.compile_for

    def remembered(built, optimizer):
        fields = built.config.optimizer.items()
        key = optimizer.name, str(sorted(fields)), str(built.mesh)
        if key not in made:
            made[key] = compile_for(built, optimizer)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "compile_for", remembered)
        yield


def changes(directory, *overrides):
    return [f"--config.{x}" for x in (*SMALL, *overrides, f"workdir={directory}")]


def prepare(directory, *overrides):
    arguments = changes(directory, *overrides)
    return experiment.prepare(str(DIGITS), arguments, may_resume=True)


def never():
    return False


def after(count, how=None):
    """Ctrl-C after so many questions; with `how` it is raised, as a second one is."""
    asked = 0

    def should_stop():
        nonlocal asked
        asked += 1
        if how is not None and asked > count:
            raise how
        return asked > count

    return should_stop


def rows_of(directory, name="dho2"):
    rows = writers.read_rows(pathlib.Path(directory) / name / "metrics.jsonl")
    seconds = [row.pop("seconds") for row in rows]
    assert seconds == sorted(seconds)
    return rows


def assert_same_rows(rows, expected):
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    assert rows == expected


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(mode, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    experiment.train_both(prepare(whole, *MODES[mode], "checkpoint_every=0"), never)
    assert not list(whole.glob("*/checkpoints"))
    expected = rows_of(whole)

    # By Ctrl-C, which saves; in the overlapped mode a refresh is under way then.
    stopped = experiment.train_both(prepare(parts, *MODES[mode]), after(14))
    assert [run.interrupted for run in stopped] == [True]
    at = stopped[0].rows[-1]["step"]
    assert at == (18 if mode == "overlapped" else 13)
    steps = saved.steps_in(parts / "dho2" / "checkpoints")
    assert steps[-1] == at and "val_loss" in rows_of(parts)[-1]

    # Killed: all since the last checkpoint is done again.
    with pytest.raises(KeyboardInterrupt):
        experiment.train_both(
            prepare(parts, *MODES[mode]), after(28, KeyboardInterrupt())
        )
    assert f"Going on with DHO² (Adam) from step {at}" in capsys.readouterr().err
    runs = experiment.train_both(prepare(parts, *MODES[mode]), never)
    assert_same_rows(rows_of(parts), expected)
    assert not any(run.interrupted for run in runs)
    assert [{**row, "seconds": 0} for row in runs[0].rows] == [
        {**row, "seconds": 0} for row in expected
    ]
    assert rows_of(parts)[-1]["refreshes"] >= 5
    assert len(saved.steps_in(parts / "dho2" / "checkpoints")) == 2
    assert [path.name for path in tmp_path.iterdir() if path.name != "whole"] == [
        "parts"
    ]


def test_the_base_goes_on_too_and_what_is_finished_is_not_repeated(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    mode = MODES["external"]
    experiment.train_both(prepare(whole, *mode), never)
    # 66 questions of the first run, one between the two.
    stopped = experiment.train_both(prepare(parts, *mode), after(67 + 20))
    assert [run.interrupted for run in stopped] == [False, True]
    before = (parts / "dho2" / "metrics.jsonl").stat().st_mtime_ns
    prepared = prepare(parts, *mode)
    assert prepared.directory == parts
    runs = experiment.train_both(prepared, never)
    assert (parts / "dho2" / "metrics.jsonl").stat().st_mtime_ns == before
    for name in ("dho2", "base"):
        assert_same_rows(rows_of(parts, name), rows_of(whole, name))
    summary = json.loads((parts / "summary.json").read_text())
    assert [summary[name]["steps"] for name in ("dho2", "base")] == [64, 64]
    assert experiment.draw(prepared, runs).stat().st_size > 10_000

    # A longer one, killed early: what is known of the other stays.
    longer = prepare(parts, *mode, "steps=70", f"resume={parts}")
    assert experiment.train_both(longer, after(2))[0].interrupted
    summary = json.loads((parts / "summary.json").read_text())
    assert [summary[name]["steps"] for name in ("dho2", "base")] == [65, 64]


def test_which_directory_a_run_gets(tmp_path, capsys):
    short = ("steps=4", "train_base=False")
    out = tmp_path / "out"
    experiment.train_both(prepare(out, *short), after(2))
    capsys.readouterr()

    held = prepare(out, *short)
    assert held.directory == out and held.place.is_resumed
    # In use: another call of the same command gets a directory of its own.
    assert prepare(out, *short).directory == tmp_path / "out-1"
    with pytest.raises(UserError, match="not under way"):
        prepare(out, *short, f"resume={out}")
    resume.release(held.place)
    assert prepare(out, *short, "resume=never").directory == tmp_path / "out-2"

    # Where it computes and what it keeps may change; what it computes may not.
    free = ("mesh_shape=(2,)", "keep_checkpoints=5", "checkpoint_every=3")
    held = prepare(out, *short, *free)
    assert held.directory == out
    resume.release(held.place)
    capsys.readouterr()
    other = prepare(out, *short, "optimizer.num_largest=2")
    assert other.directory == tmp_path / "out-3" and not other.place.is_resumed
    said = capsys.readouterr().err
    assert "config.optimizer.num_largest=3, now 2" in said
    assert f"--config.resume={out} goes on with it" in said

    assert not experiment.train_both(prepare(out, *short), never)[0].interrupted
    assert prepare(out, *short).directory == tmp_path / "out-4"  # it was finished


def choose(directory, *overrides):
    config = experiment.read_config(str(DIGITS), changes(directory, *overrides))
    place = resume.choose(config, "name", ["dho2", "base"])
    resume.release(place)
    return place


def pretend_a_checkpoint(directory):
    item = directory / "dho2" / resume.CHECKPOINTS / "5" / checkpoint.STATE
    item.mkdir(parents=True)


def test_an_older_run_of_the_same_values_goes_on(tmp_path, capsys):
    out = tmp_path / "out"
    for seed, name in ((0, "out"), (1, "out-1")):
        place = choose(out, f"seed={seed}")
        assert place.directory == tmp_path / name and not place.is_resumed
        pretend_a_checkpoint(place.directory)
    capsys.readouterr()
    for seed, name in ((0, "out"), (1, "out-1"), (0, "out")):
        place = choose(out, f"seed={seed}")
        assert place.directory == tmp_path / name and place.is_resumed
        assert place.steps == {"dho2": [5], "base": []} and place.finished == {}
    assert capsys.readouterr().err == ""
    assert choose(out, "seed=2").directory == tmp_path / "out-2"
    said = capsys.readouterr().err
    assert "out-1 holds an unfinished run" in said and said.count("\n") == 1

    (out / "config.json").write_text('{"seed": 0, ')
    assert choose(out, "seed=0").directory == tmp_path / "out-3"
    with pytest.raises(UserError, match=r"that has checkpoints and config\.json"):
        choose(out, f"resume={out}")


def test_commands_started_at_once_get_a_directory_each(tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        made = [*pool.map(lambda _: resume._make(out), range(8))]
    paths = {path for path, _ in made}
    assert len(paths) == 8
    for _, lock in made:
        lock.release()

    # Another one that comes and goes between the look at it and the lock.
    lock_it = resume._lock

    def late(path):
        if path not in paths:
            writers.write_json(path / "config.json", {})
            paths.add(path)
        return lock_it(path)

    shutil.rmtree(min(paths))
    paths.remove(min(paths))
    monkeypatch.setattr(resume, "_lock", late)
    path, lock = resume._make(out)
    lock.release()
    assert not (path / "config.json").exists() and path != tmp_path / "out"


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    def fail(number):
        def acquire(self, **keywords):
            raise OSError(number, "no")

        monkeypatch.setattr(filelock.FileLock, "acquire", acquire)

    fail(errno.ENOLCK)
    path, lock = resume._make(str(tmp_path / "out"))
    lock.release()
    assert path == tmp_path / "out"
    fail(errno.EACCES)
    with pytest.raises(OSError):
        resume._make(str(tmp_path / "other"))


def test_what_not_all_processes_see_stays_as_it_is(saved_run, monkeypatch):
    files = [path for path in saved_run.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "everywhere", lambda here: False)
        with pytest.raises(UserError, match=r"all processes see.*resume=never"):
            prepare(saved_run, "steps=9", "train_base=False", f"resume={saved_run}")
    assert before == {path: path.read_bytes() for path in files}
    assert choose(saved_run, f"resume={saved_run}").is_resumed  # nobody holds it


@pytest.mark.parametrize("part", ["_METADATA", "d"])
def test_a_damaged_checkpoint(part, saved_run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(saved_run, out)
    checkpoints = out / "dho2" / "checkpoints"
    assert saved.steps_in(checkpoints) == [2, 3]
    damaged = checkpoints / "3" / "state" / part
    files = damaged.rglob("*") if damaged.is_dir() else [damaged]
    for path in files:
        path.write_bytes(path.read_bytes()[:10])
    common = ("steps=5", "train_base=False", f"resume={out}")
    with pytest.raises(UserError) as error_info:
        experiment.train_both(prepare(out, *common), never)
    message = str(error_info.value)
    assert f"the checkpoint {checkpoints / '3'} cannot be read (" in message
    assert message.endswith(
        "; delete it to go on from step 2, or begin anew with --config.resume=never."
    )
    assert "\n" not in message and "NoneType" not in message
    shutil.rmtree(checkpoints / "3")
    rows = experiment.train_both(prepare(out, *common), never)[0].rows
    assert [row["step"] for row in rows] == list(range(6))


def test_a_named_run_goes_on_with_other_values(tmp_path):
    out = tmp_path / "out"
    common = ("train_base=False", f"resume={out}")
    first = prepare(out, "steps=4", "train_base=False")
    first = experiment.train_both(first, never)[0].rows
    longer = prepare(out, "steps=9", *common)
    assert longer.directory == out
    assert json.loads((out / "config.json").read_text())["steps"] == 9
    rows = experiment.train_both(longer, never)[0].rows
    assert [row["step"] for row in rows] == list(range(10))
    assert rows[:4] == first[:4]


@pytest.mark.parametrize(
    ("override", "blame"),
    [
        ("optimizer.num_largest=5", "config.optimizer.num_largest=3, now 5"),
        ("optimizer.base=heavy_ball", "config.optimizer.base='adam', now 'heavy_ball'"),
        ("optimizer.base_rate=fixed", "base_rate='curvature', now 'fixed'"),
        ("task.widths=(7,)", "config.task.widths=[8], now [7]"),
    ],
)
def test_a_checkpoint_of_another_shape(override, blame, saved_run):
    with pytest.raises(UserError) as error_info:
        prepare(saved_run, "steps=9", f"resume={saved_run}", override)
    message = str(error_info.value)
    assert blame in message and "--config.resume=never" in message
    assert message.count(". ") == 0 and "\n" not in message


def test_another_shape_for_which_no_field_is_to_blame(saved_run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(saved_run, out)
    config = json.loads((out / "config.json").read_text())
    config["optimizer"]["num_largest"] = 5
    writers.write_json(out / "config.json", config)
    with pytest.raises(UserError) as error_info:
        prepare(out, "steps=9", f"resume={out}", "optimizer.num_largest=5")
    message = str(error_info.value)
    assert "no field of it differs, but the saved state does not fit" in message
    assert "`num_largest` + `num_smallest` was 3, and is 5" in message
    assert message.count(". ") == 0 and "\n" not in message


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "out"
    common = ("steps=3", "checkpoint_every=2", "train_base=False")
    experiment.train_both(prepare(out, *common), never)
    return out


def test_no_reader_sees_half_a_file(tmp_path):
    path = tmp_path / "config.json"
    writers.write_json(path, {"a": 1})
    with open(path) as reader:
        writers.write_json(path, {"a": 2})
        assert json.load(reader) == {"a": 1}
    assert writers.read_json(path) == {"a": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("damage", ['{"step": 1, ', "3", "\x00\x00"])
def test_rows_up_to_the_first_that_is_damaged(damage, tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert writers.read_rows(path) == []
    path.write_text(f'{{"step": 0}}\n{damage}\n{{"step": 2}}\n')
    assert writers.read_rows(path) == [{"step": 0}]


@pytest.mark.parametrize("wrong", ["no/such", "."])
def test_resume_names_no_run(wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"must be 'auto', 'never' or the directory"):
        prepare(tmp_path / "out", f"resume={wrong}")
    assert not list(tmp_path.iterdir())


def test_eight_devices_then_four_then_one_then_eight(tmp_path):
    common = ("train_base=False", "log_every=2", "steps=36")
    eight, out = "mesh_shape=(8,)", tmp_path / "out"
    experiment.train_both(prepare(tmp_path / "whole", *common, eight), never)
    expected = rows_of(tmp_path / "whole")
    meshes = [(eight, 10), ("mesh_shape=(4,)", 10), ("mesh_shape=(1,)", 10), (eight, 0)]
    for mesh, count in meshes:
        should_stop = after(count) if count else never
        runs = experiment.train_both(prepare(out, *common, mesh), should_stop)
        assert runs[0].rows[0]["step"] == 0
    rows = rows_of(out)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    assert rows[:5] == expected[:5]
    for row, other in zip(rows, expected, strict=True):
        assert row["refreshes"] == other["refreshes"]
        for name in ("train_loss", "val_loss", "sharpness", "base_scaling"):
            if name in other:
                np.testing.assert_allclose(row[name], other[name], rtol=5e-4)


def test_two_processes_go_on_until_one_is_told_to_end(tmp_path, started):
    """Saved by one process, continued and saved by two, continued by one."""
    out = tmp_path / "out"
    common = ("train_base=False", "log_every=2")
    one = (*common, "mesh_shape=(8,)")
    experiment.train_both(prepare(out, *one, "steps=6"), never)
    arguments = changes(out, *common, "mesh_shape=()", "steps=1000000", f"resume={out}")
    command = [sys.executable, "-m", "dho2_jax.app.cli", "train", DIGITS, *arguments]
    started += start_processes(command, tmp_path)

    def said(index=0):
        return (tmp_path / f"said{index}").read_text()

    deadline = time.monotonic() + 120
    while len(writers.read_rows(out / "dho2" / "metrics.jsonl")) < 12:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in started), (said(), said(1))
        time.sleep(0.2)
    started[1].terminate()
    assert [process.wait(60) for process in started] == [cli.TERMINATED] * 2, said()
    assert "Going on with DHO² (Adam) from step 6" in said()
    at = saved.steps_in(out / "dho2" / "checkpoints")[-1]
    assert f"Stopped by SIGTERM at step {at} of DHO²" in said()
    assert "Going on" not in said(1) and "Stopped" not in said(1)

    last = prepare(out, *one, f"steps={at + 6}", f"resume={out}")
    rows = experiment.train_both(last, never)[0].rows
    steps = {*range(0, at + 7, 2), at + 6}  # as without a break
    assert [row["step"] for row in rows_of(out)] == sorted(steps)
    whole = prepare(tmp_path / "whole", *one, "steps=20")
    expected = experiment.train_both(whole, never)[0].rows[:-1]
    assert expected[-1]["step"] == 18
    for row, other in zip(rows, expected, strict=False):
        assert row["step"] == other["step"]
        for name in ("train_loss", "sharpness"):
            if name in row:
                np.testing.assert_allclose(row[name], other[name], rtol=2e-4)


def test_the_command_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    asked = after(6)
    monkeypatch.setattr(
        "dho2_jax.app.run.train.interruptible",
        lambda: __import__("contextlib").nullcontext(asked),
    )
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["train", str(DIGITS), *changes(tmp_path / "out")])
    assert exit_info.value.code == cli.INTERRUPTED
    assert "The same command goes on from there" in capsys.readouterr().out


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    """What is written in the background is what it was when `save` returned."""
    with checkpoint.open_manager(tmp_path / "checkpoints", 1) as manager:
        x = jax.device_put(np.arange(2.0**20, dtype=np.float32))
        expected = np.array(x)
        double = jax.jit(lambda x: 2 * x, donate_argnums=0)
        checkpoint.save(manager, {"x": x}, {"y": x + 1}, Progress(step=3))
        for _ in range(3):
            x = double(x)
        manager.wait_until_finished()
        target = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        params, _, progress = checkpoint.restore(
            manager, 3, {"x": target}, {"y": target}
        )
    np.testing.assert_array_equal(params["x"], expected)
    assert progress.step == 3
