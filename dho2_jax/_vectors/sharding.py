# SPDX-License-Identifier: Apache-2.0
"""Where slices lie: which mesh axes split which dimension of a stored array.

Knows shapes, meshes and partition specs, and nothing of what is stored.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dho2_jax._types import Array, PyTree

Shape = tuple[int, ...]

SPLITS = 256
"""Ways that every large leaf can be split: as many chips as a pod slice has."""

SUBLANES, LANES = 8, 128
"""The last two dimensions of an array on a TPU are padded to multiples of these."""

_MOSTLY_PADDING = 4


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the slices of one layout lie; static."""

    mesh: Mesh | None  # with `mesh=`, else None
    axis_name: tuple[str, ...]  # with `axis_name=`, else empty
    param_specs: tuple[P, ...]  # of each parameter that takes part
    slice_specs: tuple[P, ...]  # of each stored array, without its rows
    outside_specs: tuple[P, ...] = ()  # of each that `curvature_mask` leaves out

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of all axes that slices are spread over."""
        return self.axis_name if self.mesh is None else self.mesh.axis_names


def place_on_mesh(
    mesh: Mesh,
    param_specs: Sequence[P],
    groups: Sequence[Sequence[int]],
    stored: Sequence[Shape],
) -> Placement:
    """Returns the placement over all axes of a mesh.

    Args:
      mesh: The mesh.
      param_specs: Of each parameter.
      groups: The parameters in each of the first stored arrays.
      stored: Shapes of the stored arrays; one more than `groups` if there is a slab.

    Returns:
      Slices that refine the parameters' own partitioning: in a group of which not all
      have the same, that of the first.
    """
    sizes = tuple(mesh.shape.items())
    specs = []
    for i, shape in enumerate(stored):
        if i < len(groups):
            own = param_specs[groups[i][0]]
            specs.append(with_rows(slice_spec(shape[1:], own, sizes), 1))
        else:
            specs.append(slice_spec(shape, P(), sizes))
    return Placement(mesh, (), tuple(param_specs), tuple(specs))


def place_on_axes(
    axis_name: tuple[str, ...],
    num_params: int,
    num_groups: int,
    stored: Sequence[Shape],
) -> Placement:
    """Returns the placement over named axes, a function of the shapes alone.

    How many devices there are is known only inside the caller's `shard_map`.
    """
    one = ((axis_name, SPLITS),)
    grouped = stored[:num_groups]
    specs = [with_rows(slice_spec(shape[1:], P(), one), 1) for shape in grouped]
    specs += [P(axis_name)] * (len(stored) - num_groups)
    return Placement(None, axis_name, (P(),) * num_params, tuple(specs))


@functools.cache
def slice_spec(shape: Shape, spec: P, sizes: tuple[tuple[Any, int], ...]) -> P:
    """Returns `spec` refined over the axes that it leaves unused.

    Of the ways to give these axes to dimensions that they divide, the one that splits
    over most devices; of those, the one with the fewest numbers after a TPU has padded
    two of the dimensions to its tiles.

    Args:
      shape: Of the array, without its rows.
      spec: The array's own partitioning.
      sizes: Axes in the mesh's order, with their sizes.
    """
    size = dict(sizes)
    own = [axes_of(entry) for entry in spec] + [()] * (len(shape) - len(spec))
    used = {axis for axes in own for axis in axes}
    free = [axis for axis in size if axis not in used and size[axis] > 1]
    best, best_cost = own, None
    for choice in itertools.product((*range(len(shape)), None), repeat=len(free)):
        parts = list(own)
        for axis, dim in zip(free, choice, strict=True):
            if dim is not None:
                parts[dim] = (*parts[dim], axis)
        ways = [math.prod(size[a] for a in axes) for axes in parts]
        if any(n % w for n, w in zip(shape, ways, strict=True)):
            continue
        local = [n // w for n, w in zip(shape, ways, strict=True)]
        cost = (-math.prod(ways), _tiled(local))
        if best_cost is None or cost < best_cost:
            best, best_cost = parts, cost
    return as_spec(best)


@functools.cache
def splits_evenly(shape: Shape, tiled: bool) -> bool:
    """Returns whether as many chips as a pod slice has can split an array evenly.

    One of its two or more dimensions must be divisible by 256; and, if `tiled`, what a
    chip then holds must not be mostly padding: of (16, 16, 3, 768), a patch embedding,
    each of 256 chips would hold (16, 16, 3, 3), which a TPU pads to eight times that.
    """
    if len(shape) < 2 or not math.prod(shape):
        return False
    for dim, size in enumerate(shape):
        if size % SPLITS == 0:
            local = [*shape[:dim], size // SPLITS, *shape[dim + 1 :]]
            wasteful = _tiled(local) >= _MOSTLY_PADDING * SUBLANES * math.prod(local)
            if not (tiled and wasteful):
                return True
    return False


def as_spec(parts: Sequence[Sequence[Any]]) -> P:
    """Returns a spec from the axes of each dimension, without trailing Nones."""
    entries = []
    for axes in parts:
        flat = tuple(itertools.chain.from_iterable(map(axes_of, axes)))
        entries.append(None if not flat else flat[0] if len(flat) == 1 else flat)
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def axes_of(entry: Any) -> tuple[Any, ...]:
    """Returns the axes in one entry of a spec."""
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple | list) else (entry,)


def _tiled(local: Sequence[int]) -> int:
    """Numbers that 8 rows of this shape take, two dimensions padded to a tile.

    Any two: the compiler chooses the order of the dimensions in memory.
    """
    dims = (SUBLANES, *local)
    whole = math.prod(dims)
    return min(
        whole
        // max(1, dims[i] * dims[j])
        * _up(dims[i], SUBLANES)
        * _up(dims[j], LANES)
        for i, j in itertools.permutations(range(len(dims)), 2)
    )


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def with_rows(spec: P, rows: int) -> P:
    """Returns the spec of an array that has `rows` more dimensions in front."""
    return as_spec([()] * rows + [axes_of(entry) for entry in spec])


def ways(spec: P, mesh: Mesh) -> int:
    """Returns over how many devices of the mesh a spec splits."""
    return math.prod(mesh.shape[a] for entry in spec for a in axes_of(entry))


def constrain(x: Array, mesh: Mesh, spec: P) -> Array:
    """Returns `x` laid out by `spec`, whatever the types of the mesh's axes.

    Explicit axes are moved by `reshard` and Auto axes by a constraint; each refuses
    the other.
    """
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))

    def only(kind: AxisType) -> NamedSharding:
        parts = [[a for a in axes_of(e) if types[a] == kind] for e in spec]
        return NamedSharding(mesh, as_spec(parts))

    if AxisType.Explicit in mesh.axis_types:
        x = jax.sharding.reshard(x, only(AxisType.Explicit))
    if AxisType.Auto in mesh.axis_types:
        x = jax.lax.with_sharding_constraint(x, only(AxisType.Auto))
    return x


def read_specs(
    params: PyTree,
    mesh: Mesh,
    param_specs: tuple[Any, tuple[Any, ...]] | None,
    name: str = "param_specs",
) -> tuple[P, ...]:
    """Returns the partitioning of each parameter.

    From `param_specs` (the flattened tree, or prefix of one, of `PartitionSpec`s or
    None) when it is given; else from Explicit axis types, or from the sharding of
    concrete arrays and `ShapeDtypeStruct`s; else replicated. `name` is the argument's
    in what is raised.

    Raises:
      ValueError: If a spec does not fit its parameter or the mesh, or a parameter lies
        on another mesh.
    """
    paths = jax.tree_util.tree_leaves_with_path(params)
    if param_specs is None:
        found = [_spec_of(x, mesh, path) for path, x in paths]
    else:
        found = _broadcast(jax.tree.unflatten(*param_specs), params, name)
    for (path, x), spec in zip(paths, found, strict=True):
        _check_spec(spec, tuple(x.shape), mesh, jax.tree_util.keystr(path), name)
    return tuple(as_spec([axes_of(entry) for entry in spec]) for spec in found)


def is_spec(x: Any) -> bool:
    """Returns whether `x` says how one array is split."""
    return x is None or isinstance(x, P | NamedSharding)


def _broadcast(specs: PyTree, params: PyTree, name: str) -> list[P]:
    def spread(spec: Any, subtree: PyTree) -> list:
        if isinstance(spec, NamedSharding):
            spec = spec.spec
        return [P() if spec is None else spec for _ in jax.tree.leaves(subtree)]

    for spec in jax.tree.leaves(specs, is_leaf=is_spec):
        if not is_spec(spec):
            raise ValueError(
                f"`{name}` must hold jax.sharding.PartitionSpecs, got "
                f"{type(spec).__name__}; use P() for a replicated parameter."
            )
    try:
        lists = jax.tree.map(spread, specs, params, is_leaf=is_spec)
    except ValueError as error:
        theirs = jax.tree.structure(specs, is_leaf=is_spec)
        raise ValueError(
            f"`{name}` must be a prefix of the parameters' tree, got {theirs} for "
            f"{jax.tree.structure(params)}; give one spec for each parameter or "
            "subtree."
        ) from error
    return jax.tree.leaves(lists, is_leaf=is_spec)


def _spec_of(x: Any, mesh: Mesh, path: Any) -> P:
    # A tracer has no `sharding`, and under Auto axes its type tells nothing.
    sharding = getattr(x, "sharding", None)
    if sharding is None:
        sharding = getattr(jax.typeof(x), "sharding", None)
    if not isinstance(sharding, NamedSharding) or not sharding.mesh.axis_names:
        return P()
    theirs = sharding.mesh
    if isinstance(theirs, Mesh):
        same = theirs == mesh
    else:
        same = dict(theirs.shape) == dict(mesh.shape)
        same &= theirs.axis_types == mesh.axis_types
    if not same:
        raise ValueError(
            f"the parameters must lie on `mesh`, {mesh}, got {theirs} at "
            f"'{jax.tree_util.keystr(path)}'; place them on the mesh of dho2."
        )
    return sharding.spec


def check_not_explicit(params: PyTree) -> None:
    """Raises for parameters that are split over Explicit axes, which need a mesh."""
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        found = jax.typeof(x).sharding
        if found.mesh.axis_names and any(axes_of(entry) for entry in found.spec):
            raise ValueError(
                "`mesh` must be given for parameters that are split over Explicit axes,"
                f" got {found.spec} at '{jax.tree_util.keystr(path)}'; pass mesh=."
            )


def _check_spec(spec: P, shape: Shape, mesh: Mesh, path: str, name: str) -> None:
    where = f"at '{path}' of shape {shape}"
    axes = [a for entry in spec for a in axes_of(entry)]
    for axis in axes:
        if axis not in mesh.shape:
            raise ValueError(
                f"`{name}` must name axes of the mesh, {tuple(mesh.axis_names)}, "
                f"got '{axis}' {where}; correct the spec or the mesh."
            )
    split = [math.prod(mesh.shape[a] for a in axes_of(entry)) for entry in spec]
    fits = len(spec) <= len(shape) and len(set(axes)) == len(axes)
    if not fits or any(n % w for n, w in zip(shape, split, strict=False)):
        raise ValueError(
            f"`{name}` must divide each dimension evenly, got {spec} {where} on a "
            f"mesh {dict(mesh.shape)}; use P() where nothing fits."
        )


def frozen_specs(specs: Any) -> tuple[Any, tuple[Any, ...]]:
    """Returns a tree of partition specs as hashable parts."""
    leaves, treedef = jax.tree.flatten(specs, is_leaf=is_spec)
    return treedef, tuple(leaves)
