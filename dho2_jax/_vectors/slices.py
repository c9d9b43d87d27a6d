# SPDX-License-Identifier: Apache-2.0
"""Vectors between the caller's arrays and slices of them.

The one place that knows the three ways in: no placement (one device, or wherever the
caller's arrays are), `mesh=` (the caller holds global arrays) and `axis_name=` (inside
the caller's own `shard_map` or `pmap`, where arrays are this device's).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dho2_jax._numerics import linalg
from dho2_jax._types import Array, PyTree, Rows
from dho2_jax._vectors import axes, layouts
from dho2_jax._vectors.layouts import Flat, Layout, Outside, Packed
from dho2_jax._vectors.sharding import (
    LANES,
    SUBLANES,
    Placement,
    axes_of,
    constrain,
    ways,
    with_rows,
)


def on_slices(layout: Layout, fn: Callable[..., Any], *args: Any) -> Any:
    """Runs `fn(inner, *args)` on the slices of every vector in `args`.

    The arithmetic on one device and on many is the same code: `inner` sums over the
    slices. All else in arguments and results is equal on all devices.
    """
    place = layout.placement
    if place is None:
        return fn(linalg.inner, *args)
    inner = functools.partial(_inner, layout)
    if place.mesh is None:
        return fn(inner, *args)
    # With a stand-in for the reduction, and no mesh in sight: the shapes of the
    # results as global arrays.
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        results = jax.eval_shape(functools.partial(fn, linalg.inner), *shapes)
    args = lay_out(layout, args)
    return jax.shard_map(
        functools.partial(fn, inner),
        mesh=place.mesh,
        in_specs=specs_of(args),
        out_specs=specs_of(results),
        # A `Flat` is split over all axes, also over those that do not divide a slice:
        # what comes out of it is equal there, which the check cannot know.
        check_vma=False,
    )(*args)


def specs_of(tree: PyTree) -> PyTree:
    """Returns `PartitionSpec`s: slices of vectors, all else replicated.

    What the curvature leaves out lies as the parameters do.
    """

    def visit(x: Any) -> Any:
        if isinstance(x, Flat):
            spec: Any = with_rows(P(_place(x.layout).axes), x.array.ndim - 2)
            return Flat(spec, x.layout)
        if isinstance(x, Outside):
            outside: Any = _place(x.layout).outside_specs
            return Outside(outside, x.layout)
        if not isinstance(x, Packed):
            return P()
        triples = zip(
            _place(x.layout).slice_specs, x.leaves, x.layout.stored, strict=True
        )
        specs: Any = (with_rows(spec, leaf.ndim - len(s)) for spec, leaf, s in triples)
        return Packed(tuple(specs), x.layout)

    kinds = Packed | Flat | Outside
    return jax.tree.map(visit, tree, is_leaf=lambda x: isinstance(x, kinds))


def lay_out(layout: Layout, tree: PyTree) -> PyTree:
    """Returns `tree` as `specs_of` says, if there is a mesh for it."""
    place = layout.placement
    if place is None or place.mesh is None:
        return tree
    mesh = place.mesh
    return jax.tree.map(lambda x, s: constrain(x, mesh, s), tree, specs_of(tree))


def new_zeros(layout: Layout, rows: tuple[int, ...] = ()) -> Packed:
    """Returns zeros in slices, `(rows,)` vectors of them, made where they belong."""
    place = layout.placement
    if place is None:
        return layouts.zeros(layout, rows)

    def make() -> Packed:
        leaves = tuple(jnp.zeros((*rows, *s), jnp.float32) for s in _local(layout))
        return Packed(axes.varying(leaves, place.axis_name), layout)

    if place.mesh is None:
        return make()
    specs = specs_of(jax.eval_shape(lambda: layouts.zeros(layout, rows)))
    return jax.shard_map(make, mesh=place.mesh, in_specs=(), out_specs=specs)()


def scatter(
    layout: Layout, leaves: list[Array], *, mean: bool = False, sliced: bool = False
) -> Packed:
    """Returns the slices of a vector that is given as the parameters' leaves.

    Args:
      layout: Of the vector.
      leaves: Like the parameters; with `axis_name=` equal on all devices.
      mean: With `axis_name=`: they differ, and their mean over the devices is wanted.
      sliced: The large leaves are slices already, as `gather(sliced=True)` leaves them.

    Returns:
      The vector; large leaves keep their dtypes, the slab is float32.
    """
    place = layout.placement
    if place is not None and place.mesh is not None:
        small = [leaves[i] for i in layout.small]
        specs = base_specs(layout)
        leaves = [
            constrain(x, place.mesh, s) for x, s in zip(leaves, specs, strict=True)
        ]
        stored = layouts.stack(layout, leaves)
        if small:
            stored.append(_slab_on_mesh(layout, place, small))
        return lay_out(layout, Packed(tuple(stored), layout))
    stored = layouts.to_stored(layout, leaves)
    if place is not None:
        first = len(layout.groups) if sliced else 0
        stored[first:] = [
            _cut(layout, i, stored[i], mean) for i in range(first, len(stored))
        ]
    return Packed(tuple(stored), layout)


def cut(vector: Packed) -> Packed:
    """Returns the slices of a vector in stored form, equal on all devices."""
    layout, place = vector.layout, vector.layout.placement
    if place is None or place.mesh is not None:
        return vector  # with a mesh: sliced where it is used
    leaves = (_cut(layout, i, x, False) for i, x in enumerate(vector.leaves))
    return Packed(tuple(leaves), layout)


def gather(vector: Packed, dtypes: list[Any], *, sliced: bool = False) -> list[Array]:
    """Returns a vector, or rows of vectors, as leaves like the parameters.

    Args:
      vector: In slices.
      dtypes: Of the leaves; large leaves are cast before they travel.
      sliced: Leave the large leaves in slices: with `mesh=` global arrays laid out so,
        with `axis_name=` this device's.

    Returns:
      The leaves; with `mesh=` in the parameters' partitioning, with `axis_name=` equal
      on all devices, both apart from what stays in slices.
    """
    layout, place = vector.layout, vector.layout.placement
    mesh = None if place is None else place.mesh
    last = len(layout.groups)
    stacks = [
        x.astype(jnp.result_type(*(dtypes[i] for i in group)))
        for group, x in zip(layout.groups, vector.leaves, strict=False)
    ]
    slab = vector.leaves[last:]
    if mesh is not None:
        slab = tuple(constrain(x, mesh, P()) for x in slab)
    elif place is not None:
        if not sliced:
            stacks = [_join(layout, i, x) for i, x in enumerate(stacks)]
        slab = tuple(_join(layout, last, x) for x in slab)
    found = layouts.unstack(layout, stacks)
    if slab:
        found |= layouts.from_slab(layout, slab[0])
    leaves = [found[i].astype(dtype) for i, dtype in enumerate(dtypes)]
    if mesh is None:
        return leaves
    specs = base_specs(layout) if sliced else _place(layout).param_specs
    return [
        constrain(x, mesh, with_rows(spec, x.ndim - len(shape)))
        for x, spec, shape in zip(leaves, specs, layout.shapes, strict=True)
    ]


def flatten(vector: Packed) -> Flat:
    """Returns a vector, or rows of them, as one array; within `on_slices`.

    Slices that several devices hold are scaled, so that inner products count them once.
    """
    layout, parts = vector.layout, []
    front = vector.leaves[0].ndim - len(layout.stored[0])
    rows = vector.leaves[0].shape[:front]
    for x, held in zip(vector.leaves, copies(layout), strict=True):
        x = jnp.moveaxis(x, front + _lane(x.shape[front:]), -1)
        parts.append((x.astype(jnp.float32) / math.sqrt(held)).reshape(*rows, -1))
    flat = jnp.concatenate(parts, axis=-1)
    padding = -flat.shape[-1] % (SUBLANES * LANES)
    flat = jnp.pad(flat, ((0, 0),) * front + ((0, padding),))
    return Flat(flat.reshape(*rows, -1, LANES), layout)


def unflatten(flat: Flat) -> Packed:
    """Undoes `flatten`; within `on_slices`."""
    layout, leaves, start = flat.layout, [], 0
    rows = flat.array.shape[:-2]
    numbers = flat.array.reshape(*rows, -1)
    for shape, held in zip(_local(layout), copies(layout), strict=True):
        size, lane = math.prod(shape), _lane(shape)
        moved = (*shape[:lane], *shape[lane + 1 :], shape[lane])
        piece = jax.lax.slice_in_dim(numbers, start, start + size, axis=-1)
        piece = math.sqrt(held) * piece.reshape(*rows, *moved)
        leaves.append(jnp.moveaxis(piece, -1, len(rows) + lane))
        start += size
    return Packed(tuple(leaves), layout)


def _lane(shape: tuple[int, ...]) -> int:
    """Returns the dimension that a TPU pads least as the last one."""
    return min(
        reversed(range(len(shape))), key=lambda d: -(-shape[d] // LANES) / shape[d]
    )


def base_specs(layout: Layout) -> tuple[P, ...]:
    """Returns where a base optimizer that works on slices sees each parameter."""
    place = _place(layout)
    specs = list(place.param_specs)
    for group, spec in zip(layout.groups, place.slice_specs, strict=False):
        for i in group:
            specs[i] = P(*spec[1:])
    return tuple(specs)


def _inner(layout: Layout, rows: Rows, *vectors: PyTree) -> Array:
    """Returns inner products over all slices; each number counts once."""
    place = _place(layout)
    if isinstance(vectors[0], Flat):
        return jax.lax.psum(linalg.inner(rows, *vectors), place.axes)
    leaves = zip(*map(jax.tree.leaves, (rows, *vectors)), strict=True)
    terms = [
        linalg.inner(*leaf) / held
        for leaf, held in zip(leaves, copies(layout), strict=True)
    ]
    # Where nothing could be split over some axis, all its devices hold the same.
    total = axes.varying(sum(terms[1:], terms[0]), place.axes)
    return jax.lax.psum(total, place.axes)


def _place(layout: Layout) -> Placement:
    """Returns where the slices lie, for code that runs only if they do."""
    assert layout.placement is not None
    return layout.placement


def copies(layout: Layout) -> list[int]:
    """Returns on how many devices each slice is held: 1 where the split is even."""
    place = layout.placement
    if place is None:
        return [1] * len(layout.stored)
    if place.mesh is not None:
        return [place.mesh.size // ways(s, place.mesh) for s in place.slice_specs]
    size = axes.size_of(place.axis_name)
    return [1 if _is_split(layout, i) else size for i in range(len(layout.stored))]


def _local(layout: Layout) -> list[tuple[int, ...]]:
    """Returns the shapes of this device's slices."""
    place = layout.placement
    if place is None:
        return list(layout.stored)
    if place.mesh is not None:
        return [
            NamedSharding(place.mesh, spec).shard_shape(shape)
            for spec, shape in zip(place.slice_specs, layout.stored, strict=True)
        ]
    size, shapes = axes.size_of(place.axis_name), []
    for i, shape in enumerate(layout.stored):
        local = list(shape)
        if _is_split(layout, i):
            local[_dim(layout, i)] //= size
        shapes.append(tuple(local))
    return shapes


def _slab_on_mesh(layout: Layout, place: Placement, small: list[Array]) -> Array:
    """Returns the slab in slices; each device packs what it needs of large leaves."""
    mesh, spec = place.mesh, place.slice_specs[-1]
    assert mesh is not None
    dims = [(d, axes_of(entry)) for d, entry in enumerate(spec) if entry]

    def pack(*small: Array) -> Array:
        slab = layouts.to_slab(layout, list(small))
        for dim, names in dims:
            slab = axes.own_part(slab, names, dim)
        return slab

    small = [constrain(x, mesh, P()) for x in small]
    return jax.shard_map(pack, mesh=mesh, in_specs=P(), out_specs=spec)(*small)


def _dim(layout: Layout, i: int) -> int:
    """Returns the dimension of stored array `i` that named axes split."""
    place = _place(layout)
    return len(place.slice_specs[i]) - 1  # the last entry: specs end without Nones


def _is_split(layout: Layout, i: int) -> bool:
    """Returns whether the devices along the named axes divide stored array `i`."""
    place = _place(layout)
    return layout.stored[i][_dim(layout, i)] % axes.size_of(place.axis_name) == 0


def _cut(layout: Layout, i: int, x: Array, mean: bool) -> Array:
    """Returns this device's slice of stored array `i`, under named axes."""
    place = _place(layout)
    names = place.axis_name
    if _is_split(layout, i):
        cut = axes.mean_part if mean else axes.own_part
        return cut(x, names, _dim(layout, i))
    return axes.varying(axes.mean(x, names) if mean else x, names)


def _join(layout: Layout, i: int, x: Array) -> Array:
    """Returns the whole of stored array `i`, with its rows, under named axes."""
    place = _place(layout)
    names = place.axis_name
    if x.shape[x.ndim - len(layout.stored[i]) :] == layout.stored[i]:
        return axes.agreed(x, names)
    rows = x.ndim - len(layout.stored[i])
    return axes.join(x, names, rows + _dim(layout, i))
