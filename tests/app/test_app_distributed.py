"""`dho2 train` in two processes: one curve, one writer, and an end for both."""

import json
import os
import pathlib
import re
import signal
import sys
import time

import jax
import numpy as np
import pytest
from helpers import start_processes
from jax.experimental import multihost_utils

from dho2_jax.app import cli
from dho2_jax.app.errors import UserError
from dho2_jax.app.run import distributed, experiment

DIGITS = pathlib.Path(__file__).parents[2] / "configs" / "digits_mlp.py"
SMALL = [
    "--config.task.widths=(16,)",
    "--config.log_every=3",
    "--config.eval_every=6",
    "--config.batch_size=64",
    "--config.curvature_batch_size=16",
    "--config.train_base=False",
    "--config.optimizer.num_largest=3",
    "--config.optimizer.num_matvecs=6",
    "--config.optimizer.refresh_period=6",
]
HEARTBEAT = 8
PATIENCE = 120  # for what takes seconds on an idle machine


def start(tmp_path, steps, *more):
    """Starts two processes of four devices each; what they say goes to files."""
    command = [
        *(sys.executable, "-m", "dho2_jax.app.cli", "train", DIGITS, *SMALL, *more),
        f"--config.steps={steps}",
        f"--config.workdir={tmp_path}/out",
        f"--heartbeat-seconds={HEARTBEAT}",
    ]
    return start_processes(command, tmp_path)


def read_rows(path):
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def test_two_processes_train_like_one(tmp_path, started):
    started += start(tmp_path, 12)
    config = experiment.read_config(str(DIGITS), [*SMALL, "--config.steps=12"])
    built = experiment.build("digits", config)
    programs = experiment.compile_for(built, built.dho2)
    expected = experiment.run_one(
        built, built.dho2, programs, seed=0, directory=None, should_stop=lambda: False
    ).rows
    for index, process in enumerate(started):
        process.wait(PATIENCE)
        assert process.returncode == 0, (tmp_path / f"said{index}").read_text()
    rows = read_rows(tmp_path / "out" / "dho2" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 3, 6, 9, 12]
    for row, other in zip(rows, expected, strict=True):
        for name in ("train_loss", "val_loss", "sharpness", "base_scaling"):
            if name in other:
                np.testing.assert_allclose(row[name], other[name], rtol=2e-4)
    assert rows[-1]["refreshes"] == expected[-1]["refreshes"] >= 2
    # Only the first wrote and printed.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "said0", "said1"]
    assert (tmp_path / "out" / "plot.png").exists()
    first, second = ((tmp_path / f"said{i}").read_text() for i in range(2))
    assert "for 8 devices" in first and "validation loss" in first
    assert "validation loss" not in second and "Compiling" not in second


def test_a_mistake_that_the_first_sees_ends_all(tmp_path, started):
    started += start(tmp_path, 12, "--config.resume=no/such")
    assert [process.wait(PATIENCE) for process in started] == [2, 2]
    for index in range(2):
        said = (tmp_path / f"said{index}").read_text()
        assert "dho2: error: `config.resume` must be" in said
        assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("victim", "number", "seconds"),
    [
        (1, signal.SIGKILL, HEARTBEAT),
        (0, signal.SIGINT, 1),  # JAX's coordinator goes, which is noticed at once
    ],
)
def test_when_one_ends_so_does_the_other(victim, number, seconds, tmp_path, started):
    started += start(tmp_path, 1_000_000)
    lines = tmp_path / "out" / "dho2" / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE
    while len(read_rows(lines)) < 2:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in started), [
            (tmp_path / f"said{i}").read_text() for i in range(2)
        ]
        time.sleep(0.2)
    other = 1 - victim
    started[victim].send_signal(number)
    status = started[victim].wait(PATIENCE)
    started[other].wait(seconds + 15)  # a busy machine
    said = [(tmp_path / f"said{i}").read_text() for i in range(2)]
    # By the runtime, or by a collective that fails earlier.
    assert started[other].returncode in (-signal.SIGABRT, 1), said[other]
    assert re.search("another (task|process) died", said[other])
    if number == signal.SIGINT:
        assert status == cli.INTERRUPTED
        assert "stopped by Ctrl-C" in said[victim] and "Traceback" not in said[victim]


# --- what the first decides ---------------------------------------------------------


def test_what_the_first_process_decides_or_refuses_holds_in_all(monkeypatch):
    assert distributed.from_first(lambda: {"a": (1, None)}) == {"a": [1, None]}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    sent = []

    def in_the_first(value):
        sent.append(np.array(value))
        return value

    def in_another(value):
        found = sent.pop(0)
        assert found.shape == value.shape and found.dtype == value.dtype
        return found

    def refuse():
        raise UserError("`config.resume` is wrong: ä.")

    def never():
        raise AssertionError("asked elsewhere")

    for decide, expected in ((refuse, "is wrong: ä"), (lambda: ["ä" * 9999], None)):
        for index, send, question in (
            (0, in_the_first, decide),
            (1, in_another, never),
        ):
            monkeypatch.setattr(jax, "process_index", lambda index=index: index)
            monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", send)
            if expected:
                with pytest.raises(UserError, match=expected):
                    distributed.from_first(question)
            else:
                assert distributed.from_first(question) == ["ä" * 9999]
        assert not sent


# --- who the others are --------------------------------------------------------------

FLAGS = {"coordinator": "host:1234", "num_processes": "2", "process_id": "1"}
VARIABLES = {
    "JAX_COORDINATOR_ADDRESS": "elsewhere:99",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}


def test_members():
    assert distributed.members({}, {}) is None
    assert distributed.members({}, {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert distributed.members(FLAGS, {}) == ("host:1234", 2, 1)
    assert distributed.members({}, VARIABLES) == ("elsewhere:99", 4, 3)
    assert distributed.members(FLAGS, VARIABLES) == ("host:1234", 2, 1)
    mixed = distributed.members({"process_id": "0"}, VARIABLES)
    assert mixed == ("elsewhere:99", 4, 0)
    unknown = (None, None, None)
    assert distributed.members({"distributed": True}, {}) == unknown
    assert distributed.members({}, {"SLURM_STEP_NUM_TASKS": "8"}) == unknown
    assert distributed.members({}, {"OMPI_COMM_WORLD_SIZE": "2"}) == unknown


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"process_id": None}, "--process-id (or JAX_PROCESS_ID); --process-id is mis"),
        ({"coordinator": None}, "--coordinator is missing"),
        ({"coordinator": "host"}, "`--coordinator` must be HOST:PORT"),
        ({"coordinator": ":12"}, "`--coordinator` must be HOST:PORT"),
        ({"num_processes": "0"}, "`--num-processes` must be an integer of at least 1"),
        ({"num_processes": "two"}, "`--num-processes` must be an integer of at least"),
        ({"process_id": "-1"}, "`--process-id` must be an integer of at least 0"),
        ({"process_id": "2"}, "`--process-id` must be below --num-processes=2, got 2"),
    ],
)
def test_members_mistakes(changes, expected):
    with pytest.raises(UserError) as error_info:
        distributed.members(FLAGS | changes, {})
    assert expected in str(error_info.value)


def test_join_mistakes():
    found = distributed.Members("localhost:1", 1, 0)
    with pytest.raises(UserError, match="heartbeat-seconds` must be at least 1, got 0"):
        distributed.join(found, 0)
    jax.devices()
    with pytest.raises(UserError, match="the processes cannot join"):
        distributed.join(found)
    distributed.join(None)


def test_a_process_of_its_own_exits_as_usual(capsys):
    assert distributed.is_first()
    distributed.leave(3)
    distributed.fail(RuntimeError("mine"))
    assert capsys.readouterr().err == ""


def test_a_failure_among_many_ends_the_process_at_once(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", ended.append)
    distributed.fail(jax.errors.JaxRuntimeError("a connection was closed"))
    said = capsys.readouterr().err
    assert "a connection was closed" in said and "another process died" in said
    distributed.fail(KeyError("mine"))
    said = capsys.readouterr().err
    assert "KeyError: 'mine'" in said and "another process" not in said
    assert ended == [1, 1]
