# SPDX-License-Identifier: Apache-2.0
"""Which directory a run writes to, and whether it goes on with what is there.

The first process decides, and all others learn it. Imports `checkpoint`, `config`,
`writers` and `errors`.
"""

import contextlib
import io
import json
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from dho2_jax.app import checkpoint, distributed, writers
from dho2_jax.app.config import Config
from dho2_jax.app.errors import UserError

CHECKPOINTS = "checkpoints"  # beside an optimizer's metrics.jsonl
RUNS = ("dho2", "base")

# Fields that may change in a run: where it computes and what it keeps.
FREE = (
    *("workdir", "resume", "num_seeds", "checkpoint_every", "keep_checkpoints"),
    *("mesh_shape", "mesh_axes", "param_sharding"),
)


class Place(NamedTuple):
    """Where a run lives, the same in all processes."""

    directory: pathlib.Path
    is_resumed: bool
    is_shared: bool  # whether every process sees the directory
    lock: Any = None  # an open file; its closing, or the process's end, is the release


def choose(config: Config, name: str, may_resume: bool) -> Place:
    """Finds the directory of a run; a new one gets its `config.json`.

    With config.resume="auto" the latest run of the same name that is not finished, has
    a checkpoint and was started with the same config goes on. Otherwise, and with
    "never", a new directory is made. Anything else is the directory of the run to go on
    with, also with other values, as far as they do not change the shape of its state.

    Args:
      config: A completed config.
      name: Of the run, where config.workdir is empty.
      may_resume: Whether this command continues runs at all.

    Returns:
      The place, locked against another run that would choose the same.

    Raises:
      UserError: If config.resume names no run that can go on.
    """
    found, lock = None, None
    if distributed.is_first():
        found, lock = _decide(config, name, may_resume)
        if found is None:
            directory = writers.free_directory(config.workdir or f"runs/{name}")
            writers.write_json(directory / "config.json", config.to_dict())
        else:
            directory = found
        lock = lock or _lock(directory)
        said = json.dumps([str(directory.absolute()), found is not None])
    else:
        said = ""
    path, is_resumed = json.loads(_from_first(said))
    if distributed.is_first():
        path = directory  # as the user wrote it
    path = pathlib.Path(path)
    is_shared = _everywhere((path / "config.json").is_file())
    return Place(path, is_resumed, is_shared, lock)


def release(place: Place | None) -> None:
    """Lets other calls go on with a run.

    Args:
      place: Of the run, or None.
    """
    if place is not None and place.lock is not None:
        place.lock.close()


def _decide(
    config: Config, name: str, may_resume: bool
) -> tuple[pathlib.Path | None, Any]:
    """Returns the run to go on with and its lock, or None twice."""
    if not may_resume or config.resume == "never":
        return None, None
    if config.resume != "auto":
        path = pathlib.Path(config.resume)
        if not _has_checkpoint(path):
            raise UserError(
                "`config.resume` must be 'auto', 'never' or the directory of a run of "
                f"`dho2 train` that has checkpoints, got {config.resume!r}; look into "
                "runs/."
            )
        lock = _lock(path)
        if lock is None:
            raise UserError(
                f"`config.resume` must be a run that is not under way, got {path}, "
                "in which another process trains; wait for it or stop it."
            )
        return path, lock
    for path in reversed(_existing(config.workdir or f"runs/{name}")):
        if not _has_checkpoint(path) or _is_finished(path, config):
            continue
        other = changed(path, config)
        if other:
            tqdm.write(
                f"{path} holds an unfinished run with other values ({_list(other)}); "
                f"this one begins anew. --config.resume={path} goes on with it.",
                file=sys.stderr,
            )
            return None, None
        lock = _lock(path)
        if lock is not None:
            return path, lock
    return None, None


def _existing(wanted: str) -> list[pathlib.Path]:
    """Returns `wanted`, `wanted-1`, ... as far as they exist."""
    found, path = [], pathlib.Path(wanted)
    while path.is_dir():
        found.append(path)
        path = pathlib.Path(f"{wanted}-{len(found)}")
    return found


def _has_checkpoint(path: pathlib.Path) -> bool:
    return (path / "config.json").is_file() and any(
        checkpoint.steps_in(path / name / CHECKPOINTS) for name in RUNS
    )


def _is_finished(path: pathlib.Path, config: Config) -> bool:
    names = RUNS if config.train_base else RUNS[:1]
    return all(finished(path, name, config.steps) for name in names)


def finished(path: pathlib.Path, name: str, steps: int) -> dict[str, Any] | None:
    """Returns what `summary.json` says of one optimizer's run, if it went to the end.

    Args:
      path: The directory of the run.
      name: "dho2" or "base".
      steps: Its number of updates.
    """
    with contextlib.suppress(OSError, json.JSONDecodeError):
        said = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        found = said.get(name)
        if found and not found["interrupted"] and found["steps"] >= steps:
            return found
    return None


def changed(path: pathlib.Path, config: Config) -> dict[str, tuple[Any, Any]]:
    """Returns the fields in which a run's config differs from another one.

    Args:
      path: The directory of the run.
      config: A completed config.

    Returns:
      `(there, here)` by name; fields that may change freely are left out.
    """
    text = (path / "config.json").read_text(encoding="utf-8")
    plain = json.loads(json.dumps(writers.finite(config.to_dict())))
    there, here = dict(_leaves(json.loads(text))), dict(_leaves(plain))
    return {
        name: (there.get(name), here.get(name))
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name) and name not in FREE
    }


def check_fits(
    place: Place, name: str, config: Config, params: Any, state: Any
) -> None:
    """Checks that the checkpoints of a run can be restored.

    Args:
      place: Of the run.
      name: "dho2" or "base".
      config: The config that the parameters and the state follow from.
      params: Anything with shapes.
      state: Likewise.

    Raises:
      UserError: If a checkpoint holds other arrays; says which fields are to blame.
    """
    directory = place.directory / name / CHECKPOINTS
    steps = checkpoint.steps_in(directory)
    if not steps or not checkpoint.differences(directory, steps[-1], params, state):
        return
    groups = ("optimizer.", "task.")
    blame = changed(place.directory, config)
    blame = {k: v for k, v in blame.items() if k.startswith(groups)}
    because = (
        f"it was saved with {_list(blame)}; set that back"
        if blame
        else "it was saved by another version of dho2-jax; use that one"
    )
    raise UserError(
        f"the checkpoint {directory / str(steps[-1])} does not fit this config: "
        f"{because}, or begin anew with --config.resume=never."
    )


def _list(fields: dict[str, tuple[Any, Any]]) -> str:
    """Says in words what differs."""
    said = [
        f"config.{k}={there!r}, now {here!r}" for k, (there, here) in fields.items()
    ]
    return "; ".join(said[:3]) + ("; ..." if len(said) > 3 else "")


def _leaves(tree: Any, prefix: str = ""):
    """Yields each field's full name with its value."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _lock(directory: pathlib.Path) -> Any:
    """Returns an open file that marks the directory as in use, or None if it is."""
    try:
        import fcntl
    except ImportError:  # Windows: two runs at a time are the user's business
        return io.StringIO()
    file = open(directory / "config.json", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # a file system without locks
        return file
    return file


def _from_first(text: str) -> str:
    """Returns the text that the first process has, in all of them."""
    if jax.process_count() == 1:
        return text
    buffer = np.zeros(8192, np.uint8)
    code = text.encode()[: len(buffer)]
    buffer[: len(code)] = np.frombuffer(code, np.uint8)
    buffer = multihost_utils.broadcast_one_to_all(buffer)
    return bytes(np.asarray(buffer)).rstrip(b"\0").decode()


def _everywhere(here: bool) -> bool:
    """Returns whether something holds in every process."""
    if jax.process_count() == 1:
        return here
    return bool(np.all(multihost_utils.process_allgather(np.array(here))))
