# SPDX-License-Identifier: Apache-2.0
"""Many processes, one program: joins them, and ends them together.

Every process runs the same command. A process learns of the others by flags, by the
environment or from a scheduler, and joins through `jax.distributed.initialize`. The
first writes files and prints; the others compute.
"""

import argparse
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from dho2_jax.app.errors import UserError

HEARTBEAT_SECONDS = 30
START_SECONDS = 300  # schedulers start hosts minutes apart
SHUTDOWN_SECONDS = 120  # the others wait while the first draws the picture

ENVIRONMENT = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
# How many processes a launcher started: JAX finds the rest of these by itself.
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")

HELP = f"""\
many processes: run the same command in each of them, with

  --coordinator HOST:PORT --num-processes N --process-id I

where HOST is the machine of process 0, PORT is free there, and I counts from 0; or with
{", ".join(ENVIRONMENT.values())} in the environment;
or by `srun` or `mpirun`, which are noticed; or with --distributed, by which JAX asks
its surroundings (Cloud TPU, GKE, Slurm, Open MPI). Every process needs the same config
and the same data. Process 0 writes the files and prints.

If a process dies or hangs, the others end with an error: within seconds if it was
process 0, otherwise after at most --heartbeat-seconds ({HEARTBEAT_SECONDS}). Either a
collective fails in them (exit status 1), or JAX's runtime aborts them (SIGABRT, 134),
saying "another task died". The same happens if one does not come up within
{START_SECONDS} seconds, and {SHUTDOWN_SECONDS} after one stops at a mistake that the
others do not make. Ctrl-C ends a process at once, and so the others. SIGTERM to one,
as Slurm and Kubernetes send before they take a machine away, saves a checkpoint and
ends all of them after the same step.
"""

OPTIONS = (
    "--coordinator",
    "--num-processes",
    "--process-id",
    "--distributed",
    "--heartbeat-seconds",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this file to a command.

    Args:
      parser: The command's.
    """
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    parser.add_argument("--num-processes", metavar="N", help="how many there are")
    parser.add_argument("--process-id", metavar="I", help="which this one is, from 0")
    parser.add_argument(
        "--distributed", action="store_true", help="let JAX find the other processes"
    )
    parser.add_argument(
        "--heartbeat-seconds",
        metavar="S",
        type=int,
        default=HEARTBEAT_SECONDS,
        help=f"silence that means death, default {HEARTBEAT_SECONDS}",
    )


class Members(NamedTuple):
    """What a process was told about the others; None where JAX finds it out."""

    coordinator: str | None
    num_processes: int | None
    process_id: int | None


def members(
    flags: Mapping[str, str | int | bool | None], environment: Mapping[str, str]
) -> Members | None:
    """Finds out whether there are other processes.

    Args:
      flags: `coordinator`, `num_processes`, `process_id` and `distributed`, as far as
        they were given; a flag wins over the environment.
      environment: The process's environment variables.

    Returns:
      What was said, or None for a single process on its own.

    Raises:
      UserError: If only some of it was said, or it makes no sense.
    """
    said = {
        name: flags.get(name)
        if flags.get(name) is not None
        else environment.get(variable) or None
        for name, variable in ENVIRONMENT.items()
    }
    missing = [name for name, value in said.items() if value is None]
    if flags.get("distributed"):
        pass
    elif len(missing) == len(said):
        counts = (environment.get(one, "") for one in LAUNCHERS)
        if not any(count.isdigit() and int(count) > 1 for count in counts):
            return None
    elif missing:
        raise UserError(
            "a run of many processes needs all of "
            + ", ".join(f"{_flag(k)} (or {v})" for k, v in ENVIRONMENT.items())
            + f"; {_flag(missing[0])} is missing."
        )
    coordinator = said["coordinator"]
    if coordinator is not None:
        host, _, port = str(coordinator).rpartition(":")
        if not host or not port.isdigit():
            raise UserError(
                f"`--coordinator` must be HOST:PORT, such as 10.0.0.1:1234, "
                f"got {coordinator!r}."
            )
    number, index = _integer(said, "num_processes", 1), _integer(said, "process_id", 0)
    if number is not None and index is not None and index >= number:
        raise UserError(
            f"`--process-id` must be below --num-processes={number}, got {index}; "
            "count the processes from 0."
        )
    return Members(coordinator, number, index)  # pyright: ignore[reportArgumentType]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _integer(said: Mapping[str, object], name: str, least: int) -> int | None:
    value = said[name]
    if value is None:
        return None
    text = str(value)
    if not text.isdigit() or int(text) < least:
        raise UserError(
            f"`{_flag(name)}` must be an integer of at least {least}, got {text!r}."
        )
    return int(text)


def join(found: Members | None, heartbeat_seconds: int = HEARTBEAT_SECONDS) -> None:
    """Joins the other processes; must come before anything that uses a device.

    Args:
      found: From `members`; with None nothing happens.
      heartbeat_seconds: How long a process may be silent before it counts as dead.

    Raises:
      UserError: If JAX cannot find out who the others are, or was started before.
    """
    if found is None:
        return
    if heartbeat_seconds < 1:
        raise UserError(
            f"`--heartbeat-seconds` must be at least 1, got {heartbeat_seconds}."
        )
    if found.coordinator:
        print(
            f"dho2: process {found.process_id} of {found.num_processes} joins at "
            f"{found.coordinator} (within {START_SECONDS} s) ...",
            file=sys.stderr,
        )
    try:
        jax.distributed.initialize(
            found.coordinator,
            found.num_processes,
            found.process_id,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the processes cannot join ({reason}); give --coordinator, "
            "--num-processes and --process-id."
        ) from error


def is_first() -> bool:
    """Returns whether this process writes files and prints."""
    return jax.process_index() == 0


def _is_one_of_many() -> bool:
    # In this order: to count the processes starts the devices.
    return jax.distributed.is_initialized() and jax.process_count() > 1


def from_first(decide: Callable[[], Any]) -> Any:
    """Has the first process decide for all.

    Args:
      decide: Returns plain data; called in the first process only.

    Returns:
      What it returned, as JSON keeps it, in every process.

    Raises:
      UserError: In every process, if `decide` raised one.
    """
    text = ""
    if is_first():
        try:
            text = json.dumps({"decided": decide()})
        except UserError as error:
            text = json.dumps({"error": str(error)})
    said = json.loads(text if jax.process_count() == 1 else _broadcast(text))
    if "error" in said:
        raise UserError(said["error"])
    return said["decided"]


def _broadcast(text: str) -> str:
    """Returns the text that the first process has, in all of them."""
    size = multihost_utils.broadcast_one_to_all(np.int32(len(text.encode())))
    buffer = np.zeros(int(size), np.uint8)
    if is_first():
        buffer[:] = np.frombuffer(text.encode(), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer))).decode()


def everywhere(here: bool) -> bool:
    """Returns whether something holds in every process.

    Args:
      here: Whether it does in this one.
    """
    if jax.process_count() == 1:
        return here
    return bool(np.all(multihost_utils.process_allgather(np.array(here))))


def until_preempted() -> Callable[[], bool]:
    """Makes the question whether to stop because a machine will be taken away.

    JAX hears SIGTERM, in whichever process, and has them agree on a later call.

    Returns:
      What all processes must call equally often, as once a step; true from the same
      call on in all of them.
    """
    calls, is_told = 0, False

    def ask() -> bool:
        nonlocal calls, is_told
        calls += 1
        # True at one call only.
        is_told = is_told or multihost_utils.reached_preemption_sync_point(calls)
        return is_told

    return ask


def leave(status: int) -> None:
    """Ends one of many processes at once; on its own, a process exits as usual.

    The usual exit waits for all processes, which is right when all are done and a hang
    when this one failed and the others compute.

    Args:
      status: The exit status.
    """
    if not _is_one_of_many():
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def fail(error: Exception) -> None:
    """Ends one of many processes after an unexpected error; on its own, does nothing.

    Args:
      error: What nobody caught.
    """
    if not _is_one_of_many():
        return
    traceback.print_exception(error)
    if isinstance(error, jax.errors.JaxRuntimeError):
        print(
            f"dho2: error: process {jax.process_index()} cannot go on, probably "
            "because another process died; see what the others say.",
            file=sys.stderr,
        )
    leave(1)
