"""The overlapped refresh in two processes of four devices: the numbers of one of eight.

And splits for which processes would have to exchange numbers, refused by all of them.
"""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import free_port, surroundings

pytestmark = pytest.mark.slow

WORKER = pathlib.Path(__file__).parents[1] / "overlap_worker.py"
PATIENCE = 200  # for what takes seconds on an idle machine


def run(split, processes, tmp_path):
    """Returns what each process printed."""
    port, environment = free_port(), surroundings(8 // processes)
    started, files = [], []
    try:
        for index in range(processes):
            files.append(tmp_path / f"{split}{processes}{index}")
            command = [sys.executable, WORKER, port, processes, index, split]
            with open(files[-1], "w") as said:
                started.append(
                    subprocess.Popen(
                        list(map(str, command)),
                        stdout=said,
                        stderr=subprocess.STDOUT,
                        env=environment,
                    )
                )
        for process, file in zip(started, files, strict=True):
            assert process.wait(PATIENCE) == 0, file.read_text()
    finally:
        for process in started:
            process.kill()
            process.wait()
    found = [re.search(r"^\{.*\}$", file.read_text(), re.M) for file in files]
    return [json.loads(match[0]) for match in found if match]


@pytest.mark.parametrize("split", ["2+2", "3+1"])
def test_two_processes_do_what_one_does(split, tmp_path):
    (expected,) = run(split, 1, tmp_path)
    first, second = run(split, 2, tmp_path)
    assert first == second
    rows, others = first["rows"], expected["rows"]
    assert len(rows) == 2 * (2 + 4 + 3 + 1)
    np.testing.assert_allclose(rows, others, rtol=1e-4, atol=1e-6 * max(others))
    refreshes, age, drift, momentum = rows[-4:]
    assert refreshes == 2 and age == 2 and drift > 0 and momentum > 0


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (
            "uneven",
            r"`mesh` must have the same number of devices from every process .* "
            r"\{0: 2, 1: 1\} .*local_devices",
        ),
        (
            "crossed",
            r"`mesh` must give every process the part of each array .*, but "
            "process 0 holds another part .* first axis over the processes",
        ),
    ],
)
def test_numbers_do_not_cross_processes(split, expected, tmp_path):
    said = [row["refused"] for row in run(split, 2, tmp_path)]
    assert said[0] == said[1]
    assert re.search(expected, said[0]) and "\n" not in said[0]
