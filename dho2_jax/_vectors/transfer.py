# SPDX-License-Identifier: Apache-2.0
"""Moves of arrays between disjoint meshes for which no host ever waits.

`jax.device_put` copies shards from device to device where both sides cut the array in
the same way; elsewhere it goes through the memory of the host, and waits there for what
is still being computed. Here each side cuts its shards, or joins them, by a program of
its own, so that in between whole buffers travel; and each from a device of the process
that needs it, so that many processes need no other way to exchange them.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dho2_jax._types import Array, PyTree
from dho2_jax._vectors.sharding import Shape, with_rows

Origin = tuple[int, ...]
Pieces = tuple[Array, ...]


class NotLocalError(ValueError):
    """A process needs numbers that only others hold."""


@dataclasses.dataclass(frozen=True)
class Route:
    """How one array gets from one sharding to another; static."""

    shape: Shape
    source: NamedSharding
    target: NamedSharding

    @functools.cached_property
    def piece(self) -> Shape:
        """The shape of what travels: a part of one shard here and of one there."""
        ways = zip(
            _ways(self.source, self.shape), _ways(self.target, self.shape), strict=True
        )
        return tuple(
            n // math.lcm(*w) if n else 0 for n, w in zip(self.shape, ways, strict=True)
        )

    @functools.cached_property
    def plan(self) -> dict[Any, tuple[tuple[Any, int], ...]]:
        """Of each target device: from which device its pieces come, by number.

        Raises:
          NotLocalError: If one is on no device of the same process.
        """
        held: dict[tuple[int, Origin], list[tuple[Any, int]]] = {}
        for device, origins in self._origins(self.source).items():
            for number, origin in enumerate(origins):
                key = (device.process_index, origin)
                held.setdefault(key, []).append((device, number))
        plan = {}
        for i, (device, origins) in enumerate(self._origins(self.target).items()):
            found = [held.get((device.process_index, origin)) for origin in origins]
            if not all(found):
                raise NotLocalError(
                    f"process {device.process_index} holds another part of an array of "
                    f"shape {self.shape} by {self.source.spec} than by "
                    f"{self.target.spec}"
                )
            # Not all from the same of several devices that hold it.
            plan[device] = tuple(f[i % len(f)] for f in found if f)
        return plan

    def _origins(self, sharding: NamedSharding) -> dict[Any, list[Origin]]:
        """Returns where each device's pieces begin, in the order of `_boxes`."""
        boxes = _boxes(sharding.shard_shape(self.shape), self.piece)
        found = {}
        for device, index in sharding.devices_indices_map(self.shape).items():
            start = [s.indices(n)[0] for s, n in zip(index, self.shape, strict=True)]
            found[device] = [tuple(np.add(start, box).tolist()) for box in boxes]
        return found


@functools.lru_cache(4096)
def route(shape: Shape, source: NamedSharding, target: NamedSharding) -> Route:
    """Returns the route of an array, for all processes alike.

    Raises:
      NotLocalError: If a process would need numbers that only others hold.
    """
    found = Route(shape, source, target)
    _ = found.plan
    return found


def cut(route: Route, x: Array) -> Pieces:
    """Returns the pieces that travel; for a program on the source's mesh."""
    boxes = _boxes(route.source.shard_shape(route.shape), route.piece)
    if len(boxes) == 1:
        return (x,)

    def cut_shard(x: Array) -> Pieces:
        ends = (tuple(np.add(box, route.piece).tolist()) for box in boxes)
        pairs = zip(boxes, ends, strict=True)
        return tuple(jax.lax.slice(x, box, end) for box, end in pairs)

    spec = with_rows(route.source.spec, 0)
    return jax.shard_map(
        cut_shard,
        mesh=route.source.mesh,
        in_specs=spec,
        out_specs=(spec,) * len(boxes),
        check_vma=False,
    )(x)


def carry(routes: Sequence[Route], pieces: Sequence[Pieces]) -> list[Pieces]:
    """Returns the pieces on the target's devices; returns before they are there."""
    buffers, devices = [], []
    for way, arrays in zip(routes, pieces, strict=True):
        shards = [{s.device: s.data for s in x.addressable_shards} for x in arrays]
        for device, found in way.plan.items():
            if device.process_index == jax.process_index():
                buffers += [shards[number][source] for source, number in found]
                devices += [device] * len(found)
    placed = iter(jax.device_put(buffers, devices))
    return [_assembled(way, placed) for way in routes]


def join(route: Route, pieces: Pieces) -> Array:
    """Undoes `cut`; for a program on the target's mesh."""
    local = route.target.shard_shape(route.shape)
    if len(pieces) == 1:
        return pieces[0]

    def join_shards(*pieces: Array) -> Array:
        parts = list(pieces)
        for dim in reversed(range(len(local))):
            count = local[dim] // route.piece[dim]
            parts = [
                jnp.concatenate(parts[i : i + count], axis=dim)
                for i in range(0, len(parts), count)
            ]
        return parts[0]

    spec = with_rows(route.target.spec, 0)
    return jax.shard_map(
        join_shards,
        mesh=route.target.mesh,
        in_specs=(spec,) * len(pieces),
        out_specs=spec,
        check_vma=False,
    )(*pieces)


def move(tree: PyTree, like: PyTree) -> PyTree:
    """Returns copies of arrays on other devices; returns before they are there.

    What a process has in full, as a NumPy array or on devices of its own among those of
    many processes, it must have like all others.

    Args:
      tree: Arrays; those that lie on the devices of `like` stay as they are.
      like: The same, with the `sharding` wanted.

    Raises:
      NotLocalError: If a process would need numbers that only others hold.
    """
    arrays, treedef = jax.tree.flatten(tree)
    travelling = []
    for i, (x, wanted) in enumerate(zip(arrays, jax.tree.leaves(like), strict=True)):
        target = wanted.sharding
        if isinstance(x, jax.Array) and x.sharding.device_set == target.device_set:
            continue
        arrays[i] = x = _on_a_mesh(x)
        if x.is_fully_addressable and not target.is_fully_addressable:
            arrays[i] = _spread(x, target)
        else:
            travelling.append((i, route(x.shape, x.sharding, target)))
    pieces = [_cut(way, arrays[i]) for i, way in travelling]
    carried = carry([way for _, way in travelling], pieces)
    for (i, way), arrived in zip(travelling, carried, strict=True):
        arrays[i] = _join(way, arrived)
    return jax.tree.unflatten(treedef, arrays)


def _on_a_mesh(x: Any) -> Array:
    """Returns an array with a `NamedSharding`, that of one device if it had none."""
    if not isinstance(x, jax.Array):
        x = jnp.asarray(x)
    if isinstance(x.sharding, NamedSharding):
        return x
    if len(x.sharding.device_set) > 1:
        raise ValueError(
            "arrays must have a jax.sharding.NamedSharding, got "
            f"{type(x.sharding).__name__} for one of shape {x.shape}; place it by "
            "jax.device_put."
        )
    mesh = Mesh(np.array(list(x.sharding.device_set)), ("one",))
    return jax.make_array_from_single_device_arrays(
        x.shape, NamedSharding(mesh, P()), [x.addressable_shards[0].data]
    )


def _spread(x: Array, target: NamedSharding) -> Array:
    """Returns what every process has in full as one array over all of them."""
    indices = target.addressable_devices_indices_map(x.shape)
    parts = jax.device_put([x[index] for index in indices.values()], list(indices))
    return jax.make_array_from_single_device_arrays(x.shape, target, parts)


def _cut(route: Route, x: Array) -> Pieces:
    """Cuts, by a program of its own where there is something to cut."""
    if route.source.shard_shape(route.shape) == route.piece:
        return (x,)
    with jax.set_mesh(_mesh(route.source)):
        return _cut_program(route, x)


def _join(route: Route, pieces: Pieces) -> Array:
    if len(pieces) == 1:
        return pieces[0]
    with jax.set_mesh(_mesh(route.target)):
        return _join_program(route, pieces)


def _mesh(sharding: NamedSharding) -> Mesh:
    assert isinstance(sharding.mesh, Mesh)
    return sharding.mesh


_cut_program = jax.jit(cut, static_argnums=0)
_join_program = jax.jit(join, static_argnums=0)


def _assembled(way: Route, placed: Any) -> Pieces:
    """Returns global arrays of the pieces of all of this process's devices."""
    local = way.target.shard_shape(way.shape)
    number = len(_boxes(local, way.piece))
    mine = [d for d in way.plan if d.process_index == jax.process_index()]
    parts = [[next(placed) for _ in range(number)] for _ in mine]
    ways = _ways(way.target, way.shape)
    shape = tuple(w * n for w, n in zip(ways, way.piece, strict=True))
    return tuple(
        jax.make_array_from_single_device_arrays(shape, way.target, list(part))
        for part in zip(*parts, strict=True)
    )


def _ways(sharding: NamedSharding, shape: Shape) -> list[int]:
    """Returns in how many parts each dimension is split."""
    local = sharding.shard_shape(shape)
    return [n // k if k else 1 for n, k in zip(shape, local, strict=True)]


def _boxes(local: Shape, piece: Shape) -> list[Origin]:
    """Returns where the pieces of a shard begin, the last dimension fastest."""
    ranges = (range(0, n, k) if n else (0,) for n, k in zip(local, piece, strict=True))
    return list(itertools.product(*ranges))
