# SPDX-License-Identifier: Apache-2.0
"""How vectors are stored: large leaves stacked by shape, all others in one slab.

What a stored vector looks like depends on the shapes of the parameters alone, so that
one saved state can be moved between any numbers of devices. Leaves are matched by their
order and never by their tree, since wrappers change that between `init` and `update`
(Flax NNX boxes parameters in one and not in the other).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dho2_jax._types import Array, PyTree
from dho2_jax._vectors.sharding import (
    LANES,
    SPLITS,
    Placement,
    place_on_mesh,
    splits_evenly,
)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layout:
    """The static facts about the parameters, and where their slices lie."""

    treedef: Any  # of the parameters that `init` saw
    seen: tuple[tuple[int, ...], ...]  # their shapes
    placement: Placement | None = None  # None: wherever the caller's arrays are
    outside: tuple[int, ...] = ()  # those of them that `curvature_mask` leaves out

    @functools.cached_property
    def inside(self) -> tuple[int, ...]:
        """Which of the parameters take part in the curvature."""
        return tuple(i for i in range(len(self.seen)) if i not in set(self.outside))

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the parameters that take part."""
        return tuple(self.seen[i] for i in self.inside)

    @property
    def size(self) -> int:
        """n, the number of parameters that take part."""
        return sum(map(math.prod, self.shapes))

    @property
    def is_large(self) -> bool:
        """Whether such a model would be trained on hundreds of chips."""
        return self.size >= 2**20

    @functools.cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Leaves that any pod can split evenly, those of one shape together.

        A network has many layers and few shapes: programs compile much faster when all
        matrices of one shape are one array.
        """
        found: dict[tuple[int, ...], list[int]] = {}
        for i, shape in enumerate(self.shapes):
            if splits_evenly(shape, tiled=self.is_large):
                found.setdefault(shape, []).append(i)
        return tuple(map(tuple, found.values()))

    @functools.cached_property
    def small(self) -> tuple[int, ...]:
        """All other leaves, which are packed into the slab."""
        grouped = set(itertools.chain.from_iterable(self.groups))
        return tuple(i for i in range(len(self.shapes)) if i not in grouped)

    @functools.cached_property
    def stored(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the stored arrays: `(leaves, *shape)` for each group, and the slab.

        The slab is `(rows, 128)`; its rows are a multiple of a power of two that grows
        with the model, so that padding stays below 0.4 % of the model and the rows
        divide over as many devices as such a model would be trained on.
        """
        shapes = tuple((len(group), *self.shapes[group[0]]) for group in self.groups)
        if not self.small:
            return shapes
        step = 2 ** int(math.log2(max(self.size, 1) / 2**15 + 1e-9))
        step = max(step, SPLITS if self.is_large else 8)
        rows = -(-sum(math.prod(self.shapes[i]) for i in self.small) // LANES)
        return (*shapes, (max(1, -(-rows // step)) * step, LANES))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A vector, or rows of vectors, as a tuple of stored arrays with its layout."""

    leaves: tuple[Array, ...]
    layout: Layout = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flat:
    """A vector, or rows of vectors, as one array `(rows, 128)` on each device.

    For Lanczos, which holds many vectors and leaves none behind: no tile of a TPU is
    padded whatever the shapes of the parameters, and programs compile fast.
    """

    array: Array
    layout: Layout = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outside:
    """The parameters that `curvature_mask` leaves out, at some point of training."""

    leaves: tuple[Array, ...]
    layout: Layout = dataclasses.field(metadata={"static": True})


def with_layout(tree: PyTree, layout: Layout) -> PyTree:
    """Returns `tree` with another layout for everything that has one."""

    def has_one(x: Any) -> bool:
        return isinstance(x, Packed | Outside)

    def visit(x: Any) -> Any:
        return dataclasses.replace(x, layout=layout) if has_one(x) else x

    return jax.tree.map(visit, tree, is_leaf=has_one)


def layout_of(params: PyTree, outside: tuple[int, ...] = ()) -> Layout:
    """Returns the layout of a pytree of arrays or `ShapeDtypeStruct`s."""
    leaves, treedef = jax.tree.flatten(params)
    seen = tuple(tuple(jnp.shape(x)) for x in leaves)
    return Layout(treedef, seen, outside=outside)


def on_mesh(layout: Layout, mesh: Mesh, specs: Sequence[P]) -> Layout:
    """Returns the layout over all axes of a mesh.

    Args:
      layout: Of any place.
      mesh: The mesh.
      specs: Of all parameters that `init` saw.
    """
    within = [specs[i] for i in layout.inside]
    place = place_on_mesh(mesh, within, layout.groups, layout.stored)
    without = tuple(specs[i] for i in layout.outside)
    place = dataclasses.replace(place, outside_specs=without)
    return dataclasses.replace(layout, placement=place)


def zeros(layout: Layout, rows: tuple[int, ...] = ()) -> Packed:
    """Returns a vector of zeros, or `(rows,)` of them, float32."""
    return Packed(
        tuple(jnp.zeros((*rows, *shape), jnp.float32) for shape in layout.stored),
        layout,
    )


def stack(layout: Layout, leaves: list[Array]) -> list[Array]:
    """Returns the groups of leaves, each as one array."""
    return [jnp.stack([leaves[i] for i in group]) for group in layout.groups]


def to_stored(layout: Layout, leaves: list[Array]) -> list[Array]:
    """Returns the stored arrays of a vector that is given as leaves."""
    stored = stack(layout, leaves)
    if layout.small:
        stored.append(to_slab(layout, [leaves[i] for i in layout.small]))
    return stored


def unstack(layout: Layout, stacks: list[Array]) -> dict[int, Array]:
    """Returns the leaves in the groups' arrays, by their number.

    Rows may stand in front of each group: `(..., leaves, *shape)`.
    """
    leaves = {}
    for group, x in zip(layout.groups, stacks, strict=True):
        axis = x.ndim - len(layout.shapes[group[0]]) - 1
        for place, i in enumerate(group):
            leaves[i] = jax.lax.index_in_dim(x, place, axis, keepdims=False)
    return leaves


def to_slab(layout: Layout, small: list[Array]) -> Array:
    """Returns the slab `(rows, 128)` that holds the small leaves, float32."""
    flat = jnp.concatenate([x.astype(jnp.float32).reshape(-1) for x in small])
    rows, lanes = layout.stored[-1]
    return jnp.pad(flat, (0, rows * lanes - flat.size)).reshape(rows, lanes)


def from_slab(layout: Layout, slab: Array) -> dict[int, Array]:
    """Returns the small leaves in a slab `(..., rows, 128)`, by their number."""
    front = slab.shape[:-2]
    flat, start, small = slab.reshape(*front, -1), 0, {}
    for i in layout.small:
        shape = layout.shapes[i]
        piece = jax.lax.slice_in_dim(flat, start, start + math.prod(shape), axis=-1)
        small[i] = piece.reshape(*front, *shape)
        start += math.prod(shape)
    return small


def noise(layout: Layout, bits: Array) -> Packed:
    """Returns a vector of numbers in [-1, 1) that depend on `bits` and their places.

    `bits` is `(stored arrays,)`, uint32. A hash of each number's place, and not a draw
    of `jax.random`: it compiles to next to nothing, a device that needs a slice makes
    that slice, and the whole does not depend on the number of devices. As a start for
    Lanczos any vector in general position will do.
    """

    def leaf(shape: tuple[int, ...], seed: Array) -> Array:
        place, stride = jnp.zeros(shape, jnp.uint32), 1
        for dim in reversed(range(len(shape))):
            iota = jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
            place += jnp.uint32(stride % 2**32) * iota
            stride *= shape[dim]
        x = place * jnp.uint32(0x9E3779B1) + seed
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            x = (x ^ (x >> shift)) * jnp.uint32(factor)
        return x.astype(jnp.float32) * 2.0**-31 - 1

    leaves = tuple(leaf(s, bits[i]) for i, s in enumerate(layout.stored))
    return Packed(leaves, layout)


def _check_shapes(leaves: list, layout: Layout, name: str) -> None:
    """Raises unless the leaves are as many, and of the shapes, that `init` saw."""
    shapes, seen = tuple(tuple(jnp.shape(x)) for x in leaves), layout.seen
    if shapes == seen:
        return
    if len(shapes) != len(seen):
        raise ValueError(
            f"{name} must have the {len(seen)} arrays that init saw, got "
            f"{len(shapes)}; pass the same pytree everywhere."
        )
    i = next(i for i, (a, b) in enumerate(zip(shapes, seen, strict=True)) if a != b)
    raise ValueError(
        f"{name} must have the shapes that init saw, got {shapes[i]} for "
        f"{seen[i]} at leaf {i}; pass the same pytree everywhere."
    )


def has_holes(tree: PyTree) -> bool:
    """Returns whether `optax.masked` has left something out of `tree`."""
    return any(map(_is_hole, jax.tree.leaves(tree, is_leaf=_is_hole)))


def restrict(params: PyTree, layout: Layout, name: str = "`params`"):
    """Finds the leaves that take part in the curvature.

    Returns:
      `(part, merge)`: the list of these leaves, and a function from such a list to a
      pytree like `params`, with all others as they are.
    """
    return inside(*match(params, layout, name), layout)


def inside(
    leaves: list[Any], rebuild: Callable[[list[Any]], PyTree], layout: Layout
) -> tuple[list[Any], Callable[[list[Any]], PyTree]]:
    """Returns what `restrict` does, from what `match` does."""
    if not layout.outside:
        return leaves, rebuild

    def merge(part):
        whole = list(leaves)
        for i, x in zip(layout.inside, part, strict=True):
            whole[i] = x
        return rebuild(whole)

    return [leaves[i] for i in layout.inside], merge


def map_outside(change: Callable[[Any], Any], params: PyTree, layout: Layout) -> PyTree:
    """Returns `params` with `change` made to what `curvature_mask` leaves out."""
    if not layout.outside:
        return params
    leaves, rebuild = match(params, layout)
    for i in layout.outside:
        leaves[i] = change(leaves[i])
    return rebuild(leaves)


def with_holes(layout: Layout, part: list[Any]) -> PyTree:
    """Returns a pytree of the leaves that take part, `MaskedNode` for the others."""
    whole: list[Any] = [optax.MaskedNode()] * len(layout.seen)
    for i, x in zip(layout.inside, part, strict=True):
        whole[i] = x
    return jax.tree.unflatten(layout.treedef, whole)


def match(params: PyTree, layout: Layout, name: str = "`params`"):
    """Finds the leaves that `init` saw in `params`, which may hold others besides.

    Inside `optax.masked` and `optax.partition` the state is made from a tree in which
    `MaskedNode` stands for what is left out; `refresh` gets the whole tree.

    Returns:
      `(leaves, rebuild)`: the list of leaves that `init` saw, and a function from such
      a list to a pytree like `params`.
    """
    leaves, treedef = jax.tree.flatten(params)
    template = jax.tree.unflatten(layout.treedef, range(len(layout.seen)))
    if not has_holes(template) or len(leaves) == len(layout.seen):
        _check_shapes(leaves, layout, name)
        return leaves, lambda part: jax.tree.unflatten(treedef, part)

    slots, prefix = jax.tree.flatten(template, is_leaf=_is_hole)
    try:
        subtrees = prefix.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(
            f"{name} must have the structure that init saw, apart from what a mask "
            f"leaves out, got {treedef}; pass the whole parameter tree."
        ) from error
    part = [s for slot, s in zip(slots, subtrees, strict=True) if not _is_hole(slot)]
    _check_shapes(part, layout, name)

    def rebuild(new):
        new = iter(new)
        filled = [
            s if _is_hole(slot) else next(new)
            for slot, s in zip(slots, subtrees, strict=True)
        ]
        return jax.tree.unflatten(prefix, filled)

    return part, rebuild


def _is_hole(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
