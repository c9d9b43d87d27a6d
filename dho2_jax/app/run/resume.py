# SPDX-License-Identifier: Apache-2.0
"""Which directory a run writes to, and whether it goes on with what is there.

The first process decides, and all others learn it.
"""

import errno
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import filelock
from tqdm import tqdm

from dho2_jax.app import fields
from dho2_jax.app.errors import UserError
from dho2_jax.app.fields import Config
from dho2_jax.app.record import Row
from dho2_jax.app.run import checkpoint, distributed
from dho2_jax.app.show import saved, writers

CONFIG, SUMMARY, LOCK = "config.json", "summary.json", ".lock"
CHECKPOINTS = "checkpoints"  # of one optimizer
# What a file system that has no locks says.
UNLOCKABLE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Place(NamedTuple):
    """Where a run lives, the same in all processes but for the lock."""

    directory: pathlib.Path
    is_resumed: bool
    is_shared: bool  # whether every process sees the directory
    finished: dict[str, Row]  # by optimizer: what came of it, if it is done
    steps: dict[str, list[int]]  # by optimizer: of its checkpoints, ascending
    lock: filelock.BaseFileLock | None = None  # the process's end releases it too


def choose(config: Config, name: str, optimizers: Sequence[str]) -> Place:
    """Finds the directory of a run; a new one gets its `config.json`.

    With config.resume="auto" the latest run of the same name that is not finished, has
    a checkpoint and was started with the same config goes on. Otherwise, and with
    "never", a new directory is made. Anything else is the directory of the run to go on
    with, also with other values, as far as they do not change the shape of its state.

    Args:
      config: A completed config.
      name: Of the run, where config.workdir is empty.
      optimizers: The names of those that the command trains, and would go on with; none
        if it does not continue runs at all.

    Returns:
      The place, locked against another run that would choose the same.

    Raises:
      UserError: If config.resume names no run that can go on, or not all processes see
        the directory of one that would.
    """
    directory, lock = None, None

    def decide() -> dict[str, Any]:
        nonlocal directory, lock
        found = None
        if optimizers and config.resume != "never":
            found = _find(config, name, optimizers)
        directory, lock = found or _make(config.workdir or f"runs/{name}")
        if found is None:
            writers.write_json(directory / CONFIG, config.to_dict())
        return {
            "directory": str(directory.absolute()),
            "is_resumed": found is not None,
            "finished": _finished(directory, optimizers, config.steps),
            "steps": _checkpoints(directory, optimizers),
        }

    said = distributed.from_first(decide)
    # In the first process as the user wrote it; the others may be in another directory.
    said["directory"] = directory or pathlib.Path(said["directory"])
    is_shared = distributed.everywhere((said["directory"] / CONFIG).is_file())
    place = Place(**said, is_shared=is_shared, lock=lock)
    if place.is_resumed and not place.is_shared:
        release(place)
        raise UserError(
            "a run goes on in a directory that all processes see, which "
            f"{place.directory} is not; move it to where they do, or begin anew with "
            "--config.resume=never."
        )
    return place


def release(place: Place | None) -> None:
    """Lets other calls go on with a run.

    Args:
      place: Of the run, or None.
    """
    if place is not None and place.lock is not None:
        place.lock.release()


def _find(
    config: Config, name: str, optimizers: Sequence[str]
) -> tuple[pathlib.Path, Any] | None:
    """Returns the run to go on with and its lock, or None."""
    if config.resume != "auto":
        path = pathlib.Path(config.resume)
        if not _can_go_on(path, optimizers):
            raise UserError(
                "`config.resume` must be 'auto', 'never' or the directory of a run of "
                f"`dho2 train` that has checkpoints and {CONFIG}, got "
                f"{config.resume!r}; look into runs/."
            )
        lock = _lock(path)
        if lock is None:
            raise UserError(
                f"`config.resume` must be a run that is not under way, got {path}, "
                "in which another process trains; wait for it or stop it."
            )
        return path, lock
    others = []
    names = _names(config.workdir or f"runs/{name}")
    for path in reversed([*itertools.takewhile(pathlib.Path.is_dir, names)]):
        is_finished = len(_finished(path, optimizers, config.steps)) == len(optimizers)
        if is_finished or not _can_go_on(path, optimizers):
            continue
        other = _changed(path, config)
        if other:
            others.append((path, other))
            continue
        lock = _lock(path)
        if lock is not None:
            return path, lock
    if others:
        path, other = others[0]
        tqdm.write(
            f"{path} holds an unfinished run with other values "
            f"({_listed(other)}); this one begins anew. --config.resume={path} "
            "goes on with it.",
            file=sys.stderr,
        )
    return None


def _make(wanted: str) -> tuple[pathlib.Path, Any]:
    """Creates and locks the first of the names whose directory holds nothing yet."""
    for path in _names(wanted):
        if path.exists() and not _is_free(path):
            continue
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
        if lock is None:
            continue
        if _is_free(path):  # still: another command may have come and gone
            return path, lock
        lock.release()
    raise AssertionError("there is always another name")


def _names(wanted: str) -> Iterator[pathlib.Path]:
    """Yields `wanted`, `wanted-1`, `wanted-2`, ..."""
    yield pathlib.Path(wanted)
    for index in itertools.count(1):
        yield pathlib.Path(f"{wanted}-{index}")


def _is_free(path: pathlib.Path) -> bool:
    return path.is_dir() and all(one.name == LOCK for one in path.iterdir())


def _lock(directory: pathlib.Path) -> filelock.BaseFileLock | None:
    """Returns a lock that marks the directory as in use, or None if it is."""
    lock = filelock.FileLock(directory / LOCK, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        return None
    except NotImplementedError:  # a file system without locks
        pass
    except OSError as error:
        if error.errno not in UNLOCKABLE:
            raise
    return lock


def _can_go_on(path: pathlib.Path, optimizers: Sequence[str]) -> bool:
    return writers.read_json(path / CONFIG) is not None and any(
        _checkpoints(path, optimizers).values()
    )


def _checkpoints(path: pathlib.Path, optimizers: Sequence[str]) -> dict[str, list[int]]:
    return {name: saved.steps_in(path / name / CHECKPOINTS) for name in optimizers}


def _finished(
    path: pathlib.Path, optimizers: Sequence[str], steps: int
) -> dict[str, Row]:
    """Returns what `summary.json` says of the optimizers that went to the end."""
    said = writers.read_json(path / SUMMARY) or {}
    return {
        name: said[name]
        for name in optimizers
        if name in said
        and not said[name]["interrupted"]
        and said[name]["steps"] >= steps
        and writers.read_rows(path / name / writers.METRICS)
    }


def note(directory: pathlib.Path, name: str, outcome: Row) -> None:
    """Adds what came of one optimizer to `summary.json`.

    Args:
      directory: Of the run.
      name: Of the optimizer.
      outcome: Plain data; replaces what was said of this optimizer before.
    """
    path = directory / SUMMARY
    writers.write_json(path, (writers.read_json(path) or {}) | {name: outcome})


def _changed(path: pathlib.Path, config: Config) -> dict[str, tuple[Any, Any]]:
    """Returns `(there, here)` of the fields in which a run's config differs."""
    here = json.loads(writers.to_json(config.to_dict()))
    return fields.changed(writers.read_json(path / CONFIG) or {}, here)


def _listed(fields: dict[str, tuple[Any, Any]]) -> str:
    """Says in words what differs."""
    said = [f"config.{k}={old!r}, now {new!r}" for k, (old, new) in fields.items()]
    return "; ".join(said[:3]) + ("; ..." if len(said) > 3 else "")


def check_fits(
    place: Place, name: str, config: Config, params: Any, state: Any
) -> None:
    """Checks that the checkpoints of a run can be restored.

    Args:
      place: Of the run.
      name: Of one of its optimizers.
      config: The config that the parameters and the state follow from.
      params: Anything with shapes.
      state: Likewise.

    Raises:
      UserError: If the latest checkpoint cannot be read or holds other arrays; says
        which fields are to blame.
    """
    if not place.steps[name]:
        return
    directory, step = place.directory / name / CHECKPOINTS, place.steps[name][-1]
    reason = checkpoint.misfit(directory, step, params, state)
    if reason is None:
        return
    groups = ("optimizer.", "task.")
    blame = _changed(place.directory, config)
    blame = {k: v for k, v in blame.items() if k.startswith(groups)}
    because = (
        f"it was saved with {_listed(blame)}; set that back, or"
        if blame
        else f"no field of it differs, but {reason};"
    )
    raise UserError(
        f"the checkpoint {directory / str(step)} does not fit this config: "
        f"{because} begin anew with --config.resume=never."
    )
