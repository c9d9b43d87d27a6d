# SPDX-License-Identifier: Apache-2.0
"""What a run must remember to go on as if it had never stopped, saved by Orbax.

Parameters and optimizer state are arrays, written while training goes on; how far the
run is, the data iterator's position included, is a small JSON beside them. All
processes take part.
"""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import orbax.checkpoint as ocp

from dho2_jax import check_restorable
from dho2_jax.app.errors import UserError
from dho2_jax.app.record import Progress
from dho2_jax.app.show import saved

STATE, PROGRESS = "state", "progress"  # the two parts of a checkpoint

Manager = Any  # an ocp.CheckpointManager


@contextlib.contextmanager
def open_manager(directory: pathlib.Path | None, keep: int) -> Iterator[Manager | None]:
    """Opens the checkpoints of one run; in all processes alike.

    Args:
      directory: Of the checkpoints, which all processes see; None: there are none.
      keep: How many to keep; older ones are deleted.

    Yields:
      What `save` and `restore` take. At the end it waits for what is being written.
    """
    if directory is None:
        yield None
        return
    options = ocp.CheckpointManagerOptions(max_to_keep=keep)
    with ocp.CheckpointManager(directory.absolute(), options=options) as manager:
        yield manager


def save(manager: Manager, params: Any, state: Any, progress: Progress) -> None:
    """Copies everything to the host, and has it written while the caller goes on.

    Args:
      manager: From `open_manager`.
      params: The parameters; may be donated afterwards.
      state: The optimizer's state; may be donated afterwards.
      progress: How far the run is.
    """
    manager.save(
        progress.step,
        args=ocp.args.Composite(
            **{
                STATE: ocp.args.StandardSave({"params": params, "opt_state": state}),
                PROGRESS: ocp.args.JsonSave(progress._asdict()),
            }
        ),
    )


def restore(
    manager: Manager, step: int, params: Any, state: Any
) -> tuple[Any, Any, Progress]:
    """Reads a checkpoint, whatever the number of devices it was saved on.

    Args:
      manager: From `open_manager`.
      step: One of `saved.steps_in`.
      params: Arrays or `ShapeDtypeStruct`s with the shardings to restore to.
      state: Likewise.

    Returns:
      Parameters, state and progress, as `save` was given them.

    Raises:
      UserError: If it cannot be read.
    """
    target = {"params": params, "opt_state": state}
    with _reading(pathlib.Path(manager.directory), step):
        found = manager.restore(
            step,
            args=ocp.args.Composite(
                **{
                    STATE: ocp.args.StandardRestore(target),
                    PROGRESS: ocp.args.JsonRestore(),
                }
            ),
        )
        progress = Progress(**found[PROGRESS])
        return found[STATE]["params"], found[STATE]["opt_state"], progress


def restore_last(
    manager: Manager, params: Any, state: Any
) -> tuple[Any, Any, Progress] | None:
    """Reads what was last saved, waiting for it to be written; None: nothing was.

    Args:
      manager: From `open_manager`.
      params: As for `restore`.
      state: Likewise.
    """
    manager.wait_until_finished()
    step = manager.latest_step()
    return None if step is None else restore(manager, step, params, state)


@contextlib.contextmanager
def _reading(directory: pathlib.Path, step: int) -> Iterator[None]:
    """Says in one sentence which checkpoint cannot be read, and what to do."""
    try:
        yield
    except saved.DAMAGED as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        before = [one for one in saved.steps_in(directory) if one < step]
        remedy = f"delete it to go on from step {before[-1]}, or " if before else ""
        raise UserError(
            f"the checkpoint {directory / str(step)} cannot be read ({reason}); "
            f"{remedy}begin anew with --config.resume=never."
        ) from error


def misfit(directory: pathlib.Path, step: int, params: Any, state: Any) -> str | None:
    """Says why a checkpoint cannot be restored into arrays of given shapes.

    Args:
      directory: Of the checkpoints of one run.
      step: One of `saved.steps_in`.
      params: Arrays, or anything with shapes.
      state: Likewise.

    Returns:
      One sentence without its full stop, or None if it can be restored.

    Raises:
      UserError: If it cannot be read.
    """
    with _reading(directory, step):
        tree = saved.read_tree(directory / str(step) / STATE)
        there = saved.shapes(tree)
    wanted = saved.shapes({"params": params, "opt_state": state})
    if there == wanted:
        return None
    if any("subspace" in names for names in wanted):
        try:
            check_restorable(tree, state)
        except ValueError as error:
            return str(error).rstrip(".")
    name = min(names for names, _ in there.items() ^ wanted.items())
    return f"{'.'.join(name)} was of shape {there.get(name)}, and is {wanted.get(name)}"
