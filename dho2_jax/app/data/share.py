# SPDX-License-Identifier: Apache-2.0
"""Which part of every batch a process makes, and a global batch of all parts."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dho2_jax.app.errors import UserError


class Share(NamedTuple):
    """One of equal parts of a batch, which follow each other in order of the index."""

    index: int
    count: int

    def rows(self, batch_size: int) -> slice:
        """Returns where this part lies in a batch, whose size `count` divides."""
        size = batch_size // self.count
        return slice(self.index * size, (self.index + 1) * size)


def of_this_process() -> Share:
    """Returns this process's part of every batch."""
    return Share(jax.process_index(), jax.process_count())


def check_processes(devices: Sequence[Any]) -> None:
    """Checks that equal parts of a batch suit the devices of each process.

    Args:
      devices: Those that train, of all processes.

    Raises:
      UserError: If some process has more of them than another.
    """
    counts: dict[int, int] = {}
    for device in devices:
        counts[device.process_index] = counts.get(device.process_index, 0) + 1
    if len(set(counts.values())) > 1:
        raise UserError(
            "`config.mesh_shape` must use equally many devices of each process, which "
            "makes an equal part of every batch, got "
            f"{[counts[one] for one in sorted(counts)]}; use hosts that are alike."
        )


def join(part: Any, mesh: Mesh | None) -> Any:
    """Makes a global batch of the parts that the processes hold.

    Each process transfers its own part to its own devices. Where these do not follow
    each other in the mesh, the batch has the same examples in another order.

    Args:
      part: A pytree of NumPy arrays that share their leading dimension: this process's
        part, as large as any other's.
      mesh: The mesh, or None for one device.

    Returns:
      The batch as global arrays, its examples over all axes of the mesh, or over the
      first ones if all do not divide it; without a mesh, unchanged.
    """
    if mesh is None:
        return part
    processes = len({device.process_index for device in mesh.devices.flat})
    examples = processes * len(jax.tree.leaves(part)[0])
    axes = mesh.axis_names
    while examples % math.prod(mesh.shape[name] for name in axes):
        axes = axes[:-1]
    sharding = NamedSharding(mesh, PartitionSpec(axes) if axes else PartitionSpec())
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(
            sharding, x, (examples, *x.shape[1:])
        ),
        part,
    )
