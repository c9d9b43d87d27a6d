"""`notebooks/pod/train_pod.py` in two processes: a curve that survives a kill."""

import pathlib
import re
import shutil
import subprocess
import sys
import time

from helpers import free_port, surroundings

POD = pathlib.Path(__file__).parents[2] / "notebooks" / "pod"
SMALL = "--width=32 --batch-size=32 --num-largest=2 --save-every=5 --log-every=1"
PATIENCE = 240  # for what takes twenty on an idle machine


def start(directory, run, steps):
    """Starts two processes of two devices each; what they say goes to files."""
    address = f"--coordinator=localhost:{free_port()}"
    processes = []
    for index in range(2):
        command = [
            *(sys.executable, str(POD / "train_pod.py"), *SMALL.split()),
            *(f"--workdir={directory}/checkpoints", f"--steps={steps}"),
            *(address, "--num-processes=2", f"--process-id={index}"),
        ]
        with open(directory / f"said{run}{index}", "w") as said:
            processes.append(
                subprocess.Popen(
                    command,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    env=surroundings(2),
                )
            )
    return processes


def losses(path):
    found = re.findall(r"^step (\d+): loss (\S+)$", path.read_text(), re.MULTILINE)
    return {int(step): loss for step, loss in found}


def saved_steps(directory):
    """The checkpoints that are whole."""
    if not directory.exists():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def test_killed_and_started_again_it_goes_on(tmp_path, started):
    checkpoints = tmp_path / "checkpoints"
    started += start(tmp_path, "first", 1_000_000)
    deadline = time.monotonic() + PATIENCE
    while len(saved_steps(checkpoints)) < 3:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in started), [
            path.read_text() for path in tmp_path.glob("said*")
        ]
        time.sleep(0.2)
    for process in started:
        process.kill()
        process.wait()
    before = losses(tmp_path / "saidfirst0")
    # The newest that the first run was seen to go beyond.
    whole = saved_steps(checkpoints)
    last = max(step for step in whole if step + 1 in before)
    assert last > 1
    for step in whole:
        if step > last:
            shutil.rmtree(checkpoints / str(step))

    started += start(tmp_path, "second", 1_000_000)
    deadline = time.monotonic() + PATIENCE
    while last + 1 not in losses(tmp_path / "saidsecond1"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    started[2].terminate()  # one of them: both save and end
    for process in started[2:]:
        process.wait(PATIENCE)
        assert process.returncode == 0, [
            path.read_text() for path in tmp_path.glob("saidsecond*")
        ]
    first, second = (losses(tmp_path / f"saidsecond{i}") for i in range(2))
    assert first == second and min(first) == last + 1
    assert first[last + 1] == before[last + 1]  # every digit
    assert saved_steps(checkpoints)[-1] == max(first)
    text = (tmp_path / "saidsecond1").read_text()
    assert "process 1 of 2 has 2 of 4 devices" in text


def test_the_commands_name_flags_that_exist():
    text = (POD / "README.md").read_text(encoding="utf-8")
    program = (POD / "train_pod.py").read_text(encoding="utf-8")
    assert len(program.splitlines()) < 150
    lines = text.replace("\\\n", " ").splitlines()
    commands = [line for line in lines if "train_pod.py --" in line]
    assert len(commands) >= 3
    for line in commands:
        for flag in re.findall(r" --([a-z-]+)", line.split("train_pod.py")[1]):
            assert f'"--{flag}"' in program or f'"{flag}"' in program, flag
