# SPDX-License-Identifier: Apache-2.0
"""Single arrays under named axes: a device's own part, the whole, the mean.

For code inside `jax.shard_map` or `jax.pmap`. Where `shard_map` checks which values
vary over which axes (its `check_vma`), these return what the check expects.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from dho2_jax._types import Array, PyTree

Names = tuple[str, ...]


class UnboundAxisError(ValueError):
    """There is no such axis here; holds its `names`."""

    def __init__(self, names: Names, cause: Exception):
        """Says what to do about it."""
        super().__init__(
            "`axis_name` must name axes of the shard_map or pmap around the call, got "
            f"{names} ({cause}); call init, update and refresh inside it, or use mesh=."
        )
        self.names = names


def size_of(names: Names) -> int:
    """Returns the number of devices along the axes.

    Raises:
      UnboundAxisError: If there is no such axis here.
    """
    try:
        return math.prod(lax.axis_size(name) for name in names)
    except NameError as error:
        raise UnboundAxisError(names, error) from error


def varying(tree: PyTree, names: Names) -> PyTree:
    """Returns `tree` marked as different on each device along the axes."""

    def mark(x: Array) -> Array:
        known = jax.typeof(x).manual_axis_type.varying
        new = tuple(name for name in names if name not in known)
        return lax.pcast(x, new, to="varying") if new else x

    return jax.tree.map(mark, tree)


def own_part(x: Array, names: Names, dim: int) -> Array:
    """Returns this device's part of `x`, which is split evenly along `dim`."""
    length = x.shape[dim] // size_of(names)
    start = lax.axis_index(names) * length
    return lax.dynamic_slice_in_dim(varying(x, names), start, length, axis=dim)


def join(x: Array, names: Names, dim: int) -> Array:
    """Returns the whole of which each device holds a part; equal on all devices."""
    return lax.all_gather(x, names, axis=dim, tiled=True, to="invarying")


def mean_part(x: Array, names: Names, dim: int) -> Array:
    """Returns this device's part of the mean of `x` over the devices."""
    total = lax.psum_scatter(
        varying(x, names), names, scatter_dimension=dim, tiled=True
    )
    return total / size_of(names)


def mean(x: Array, names: Names) -> Array:
    """Returns the mean of `x` over the devices."""
    return lax.psum(varying(x, names), names) / size_of(names)


def agreed(x: Array, names: Names) -> Array:
    """Returns `x`, which is equal on all devices, marked as such."""
    return lax.pmax(varying(x.astype(jnp.float32), names), names).astype(x.dtype)
