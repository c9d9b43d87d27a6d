# SPDX-License-Identifier: Apache-2.0
"""Groups of devices along one axis of a mesh: parts of a batch, and sums of vectors."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from dho2_jax._types import Array, PyTree
from dho2_jax._vectors import axes, layouts
from dho2_jax._vectors.layouts import Layout, Packed
from dho2_jax._vectors.sharding import as_spec, axes_of, constrain


def parts_of(batch: PyTree, batch_spec: PyTree, axis: str) -> PyTree:
    """Returns the places of `axis` in the batch's specs, a spec for each leaf."""
    if batch_spec is None:
        return jax.tree.map(lambda x: P(axis) if jnp.ndim(x) else P(), batch)

    def is_spec(x: Any) -> bool:
        return x is None or isinstance(x, P)

    given = jax.tree.leaves(batch_spec, is_leaf=is_spec)
    named = [
        a for x in given if isinstance(x, P) for entry in x for a in axes_of(entry)
    ]
    if not all(map(is_spec, given)) or axis not in named:
        raise ValueError(
            "`batch_spec` must hold jax.sharding.PartitionSpecs, of which some name "
            f"`stagger_axis`={axis!r}, got {batch_spec}; leave it None where that "
            "divides every first dimension."
        )

    def spread(spec: P | None, subtree: PyTree) -> PyTree:
        parts = [[a for a in axes_of(entry) if a == axis] for entry in spec or ()]
        return jax.tree.map(lambda _: as_spec(parts), subtree)

    return jax.tree.map(spread, batch_spec, batch, is_leaf=is_spec)


def split_along(batch: PyTree, specs: PyTree, mesh: Mesh) -> PyTree:
    """Returns the batch split by `specs`, where types say that it is not."""
    if AxisType.Explicit not in mesh.axis_types:
        return batch

    def split(x: Any, spec: P) -> Any:
        known = {a for entry in jax.typeof(x).sharding.spec for a in axes_of(entry)}
        wanted = {a for entry in spec for a in axes_of(entry)}
        return x if wanted <= known else constrain(x, mesh, spec)

    return jax.tree.map(split, batch, specs)


def whole_along(x: Any, mesh: Mesh, axis: str) -> Any:
    """Returns `x` without a split over `axis`; under Auto axes the compiler does it."""
    spec = jax.typeof(x).sharding.spec
    if not any(axis in axes_of(entry) for entry in spec):
        return x
    kept = [[a for a in axes_of(entry) if a != axis] for entry in spec]
    return constrain(x, mesh, as_spec(kept))


def sum_in_slices(layout: Layout, leaves: list[Array], axis: str) -> Packed:
    """Returns the sum over the groups of vectors like the parameters, in slices.

    Each leaf has the groups along `axis` in front. What is split over other axes
    already, as its parameter is, stays so.
    """
    place = layout.placement
    assert place is not None and place.mesh is not None
    kept = [_kept(layout, s, axis) for s in range(len(layout.stored))]
    in_specs = [P(axis)] * len(layout.shapes)
    for group, parts in zip(layout.groups, kept, strict=False):
        for i in group:
            in_specs[i] = as_spec([(axis,), *parts[1:]])

    def local(*leaves: Array) -> tuple[Array, ...]:
        stored = layouts.to_stored(layout, [x[0] for x in leaves])
        return tuple(map(reduce, place.slice_specs, kept, stored))

    def reduce(spec: P, kept: list[tuple[str, ...]], x: Array) -> Array:
        scattered = False
        for dim, entry in enumerate(spec):
            for name in axes_of(entry)[len(kept[dim]) :]:
                if name == axis:
                    x = lax.psum_scatter(x, name, scatter_dimension=dim, tiled=True)
                    scattered = True
                else:
                    x = axes.own_part(x, (name,), dim)
        return x if scattered else lax.psum(x, axis)

    pairs = zip(leaves, in_specs, strict=True)
    stored = jax.shard_map(
        local,
        mesh=place.mesh,
        in_specs=tuple(in_specs),
        out_specs=place.slice_specs,
        check_vma=False,
    )(*(constrain(x, place.mesh, spec) for x, spec in pairs))
    return Packed(stored, layout)


def _kept(layout: Layout, s: int, axis: str) -> list[tuple[str, ...]]:
    """Returns the axes that split each dimension of a stored array before `axis` does.

    Of these, the ones that split the parameter itself: a group of leaves has its first
    one's, the slab none.
    """
    place = layout.placement
    assert place is not None
    own: list[Any] = [()]
    if s < len(layout.groups):
        own += map(axes_of, place.param_specs[layout.groups[s][0]])
    split = itertools.zip_longest(map(axes_of, place.slice_specs[s]), own, fillvalue=())
    return [
        tuple(itertools.takewhile(lambda a, o=o: a != axis and a in o, names))
        for names, o in split
    ]
