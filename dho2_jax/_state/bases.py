# SPDX-License-Identifier: Apache-2.0
"""The base optimizer, which sees the complement as if there were no slices.

Its own state may be kept in slices too (ZeRO-1): the complement is in slices already,
so that an elementwise optimizer then needs no communication at all, and only its result
is gathered.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dho2_jax._state.config import Config
from dho2_jax._types import PyTree
from dho2_jax._vectors import layouts, slices
from dho2_jax._vectors.layouts import Layout, Packed
from dho2_jax._vectors.sharding import constrain, slice_spec, splits_evenly


def init(
    base: optax.GradientTransformation, config: Config, layout: Layout, params: PyTree
) -> optax.OptState:
    """Returns the base optimizer's state, laid out as `update` keeps it."""
    state = base.init(_seen(config, layout, params))
    return _laid_out(base, config, layout, state)


def update(
    base: optax.GradientTransformationExtraArgs,
    config: Config,
    grads: PyTree,
    complement: Packed,
    state: optax.OptState,
    params: PyTree | None,
    extra_args: dict[str, Any],
) -> tuple[list[Any], Callable[[list[Any]], PyTree], Packed, optax.OptState]:
    """Runs the base optimizer on the complement.

    Args:
      base: The base optimizer.
      config: Of the transformation.
      grads: The whole gradient, for its tree and dtypes.
      complement: g2, in slices.
      state: The base optimizer's.
      params: As the caller gave them.
      extra_args: For the base optimizer.

    Returns:
      The dtypes of the base's updates d, a function that puts others in their place,
      d in slices, and the new state.
    """
    layout = complement.layout
    part, merge = layouts.restrict(grads, layout, "`updates`")
    sliced = config.shard_base_state
    seen = slices.gather(complement, [x.dtype for x in part], sliced=sliced)
    params = None if params is None else _seen(config, layout, params)

    def call(grads, state, params):
        return base.update(grads, state, params, **extra_args)

    mesh = config.mesh
    if mesh is not None and AxisType.Explicit in mesh.axis_types:
        call = _under_auto_axes(call, base, config, layout)
    updates, state = call(merge(seen), state, params)
    found, treedef = jax.tree.flatten(updates)
    if mesh is not None:
        place = layout.placement
        assert place is not None
        where = dict(zip(layout.outside, place.outside_specs, strict=True))
        if not sliced:
            # Or the compiler would split the base's own work as well: the matrix
            # products of Muon, for one, with a reduction for each.
            where |= dict(zip(layout.inside, place.param_specs, strict=True))
        for i, spec in where.items():
            found[i] = constrain(found[i], mesh, spec)
    rebuild = functools.partial(jax.tree.unflatten, treedef)
    steps, merge = layouts.inside(found, rebuild, layout)
    vector = slices.scatter(layout, steps, sliced=sliced)
    state = _laid_out(base, config, layout, state)
    return [x.dtype for x in steps], merge, vector, state


def marks(base: Any, state: PyTree, layout: Layout) -> PyTree:
    """Returns `state` with the number of the parameter that each leaf belongs to.

    It is -1 where a leaf has not the shape of a parameter, and throughout for a base
    whose `init` cannot be followed by `optax.tree_map_params`.
    """
    numbers = jax.tree.unflatten(layout.treedef, range(len(layout.seen)))

    def is_hole(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    def visit(leaf: Any, number: Any) -> Any:
        if is_hole(leaf):
            return leaf
        return number if tuple(jnp.shape(leaf)) == layout.seen[number] else -1

    try:
        return optax.tree_map_params(
            base,
            visit,
            state,
            numbers,
            transform_non_params=lambda _: -1,
            is_leaf=is_hole,
        )
    except Exception:  # any init may fail on the stand-ins that Optax gives it
        return jax.tree.map(lambda _: -1, state)


def specs(marks: PyTree, known: tuple[P, ...]) -> PyTree:
    """Returns the partition spec of each leaf: its parameter's, or replicated."""
    return jax.tree.map(lambda number: known[number] if number >= 0 else P(), marks)


def specs_seen(config: Config, layout: Layout) -> tuple[P, ...]:
    """Returns where the base optimizer sees each parameter that `init` saw."""
    place = layout.placement
    assert place is not None
    sliced = config.shard_base_state
    inside = slices.base_specs(layout) if sliced else place.param_specs
    known = dict(zip(layout.inside, inside, strict=True))
    for i, spec in zip(layout.outside, place.outside_specs, strict=True):
        shape = layout.seen[i]
        if sliced and place.mesh and splits_evenly(shape, tiled=layout.is_large):
            spec = slice_spec(shape, spec, tuple(place.mesh.shape.items()))
        known[i] = spec
    return tuple(known[i] for i in range(len(known)))


def _laid_out(base: Any, config: Config, layout: Layout, state: PyTree) -> PyTree:
    mesh = config.mesh
    if mesh is None:
        return state
    where = specs(marks(base, state, layout), specs_seen(config, layout))
    return jax.tree.map(lambda x, s: constrain(jnp.asarray(x), mesh, s), state, where)


def _under_auto_axes(call, base: Any, config: Config, layout: Layout):
    """Lets the compiler lay out what a base optimizer makes of Explicit shardings.

    An optimizer written for one device mixes its state, in slices, with parameters that
    are not, and multiplies matrices without a word on the result's sharding.
    """
    mesh = config.mesh
    assert mesh is not None
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in types if kind == AxisType.Explicit)

    def wrapped(grads, state, params):
        known = specs_seen(config, layout)
        where = (
            jax.tree.unflatten(jax.tree.structure(grads), known),
            specs(marks(base, state, layout), known),
        )
        where = jax.tree.map(lambda s: NamedSharding(mesh, s), where)
        auto: Any = jax.sharding.auto_axes(call, axes=explicit, out_sharding=where)
        return auto(grads, state, params)

    return wrapped


def _seen(config: Config, layout: Layout, params: PyTree) -> PyTree:
    """Returns the parameters as a base optimizer that works on slices sees them."""
    place = layout.placement
    if not (place and place.axis_name and config.shard_base_state):
        return params
    if len(jax.tree.leaves(params)) != len(layout.seen):
        return params
    part, merge = layouts.restrict(params, layout)
    packed = slices.scatter(layout, part)
    return merge(slices.gather(packed, [x.dtype for x in part], sliced=True))
