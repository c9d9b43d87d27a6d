# SPDX-License-Identifier: Apache-2.0
"""What Orbax saved in a directory, by whomever: which trees, and of what shapes.

Orbax itself is asked what is complete and what is a tree.
"""

import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import orbax.checkpoint as ocp
from absl import logging

# What Orbax raises of files that are cut off, missing or not its own.
DAMAGED = (ValueError, OSError, LookupError, TypeError, AttributeError)


def steps_in(directory: pathlib.Path) -> list[int]:
    """Returns the steps at which complete checkpoints lie in `directory`, ascending.

    Args:
      directory: Of a `CheckpointManager`; need not exist.
    """
    found = ocp.path.step.standard_name_format().find_all(directory)
    return sorted(one.step for one in found)


def is_tree(directory: pathlib.Path) -> bool:
    """Returns whether a directory is that of one whole saved tree."""
    path: Any = directory  # Orbax names a path class of its own; any will do
    return (
        directory.is_dir()
        and ocp.path.step.is_path_finalized(path)
        and ocp.path.format_utils.is_pytree_checkpoint(path)
    )


def trees_in(directory: pathlib.Path, depth: int) -> Iterator[pathlib.Path]:
    """Yields the directories of saved trees, those being written left out.

    Args:
      directory: Where to look, itself included.
      depth: How many levels further down.
    """
    if is_tree(directory):
        yield directory
    elif depth and ocp.path.step.is_path_finalized(directory):
        for one in sorted(directory.iterdir()):
            if one.is_dir():
                yield from trees_in(one, depth - 1)


def read_tree(path: pathlib.Path) -> Any:
    """Returns a saved tree with descriptions in place of its arrays.

    Args:
      path: A directory for which `is_tree` holds.

    Raises:
      ValueError: If it or an array is damaged; Orbax raises others too, see `DAMAGED`.
    """
    with ocp.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.metadata(path.absolute()).item_metadata
    if found is None:
        raise ValueError("an array in it, or its description, is damaged")
    return found.tree


def shapes(tree: Any) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Returns the shape of each array of a pytree by its names on the way there."""
    flat = ocp.tree.to_flat_dict(tree)
    return {name: tuple(x.shape) for name, x in flat.items() if hasattr(x, "shape")}


def quieten_orbax() -> None:
    """Leaves Orbax's errors alone: it warns of files that need not be there.

    And where one array cannot be read, it does not wait for the reads of the others.
    """
    logging.set_verbosity(logging.ERROR)
    show = sys.unraisablehook

    def show_others(found: Any) -> None:
        if str(found.exc_value) != "Event loop is closed":
            show(found)

    sys.unraisablehook = show_others
