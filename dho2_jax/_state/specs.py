# SPDX-License-Identifier: Apache-2.0
"""Where every array of a state lies: for `out_shardings`, `shard_map` and restores."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dho2_jax._state import bases
from dho2_jax._state.states import DHO2State, find, is_ours, layout_of_state
from dho2_jax._types import Params, PyTree
from dho2_jax._vectors import axes, layouts, sharding, slices


def state_shardings(
    tx: optax.GradientTransformation, params: Params, mesh: Mesh | None = None
) -> PyTree:
    """Returns the sharding of every array in `tx.init(params)`.

    For `jax.jit(tx.init, out_shardings=...)`, and as the target of a restore. With
    `dho2(mesh=...)` the eigenvectors are in slices over all of its axes; what the base
    and any wrapper keep for each parameter lies as the parameter does, the base's own
    in slices too if `shard_base_state`; all else is replicated.

    Args:
      tx: `dho2(...)`, or any nest of Optax transformations around one.
      params: The parameters, or `jax.ShapeDtypeStruct`s like them. Without
        `param_specs` their partitioning is read from their `sharding`.
      mesh: Needed if neither `tx` has one nor the parameters are on one: with
        `axis_name=`, the mesh of the caller's `shard_map`.

    Returns:
      A pytree of `NamedSharding` like the state.

    Raises:
      ValueError: If there is no mesh, it is another one than that of `tx`, or the
        parameters do not fit it.
    """
    return _shardings(tx, params, _abstract_state(tx, params), mesh)


def _shardings(tx: Any, params: Params, state: PyTree, mesh: Mesh | None) -> PyTree:
    """Returns `state_shardings`, from the shapes of the state."""
    config = find(state).config
    if mesh is not None and config.mesh is not None and mesh != config.mesh:
        raise ValueError(
            f"`mesh` must be that of dho2, {config.mesh}, got {mesh}; leave it out."
        )
    mesh = config.mesh or mesh or _mesh_of(params)
    specs = _specs(tx, params, state, mesh)
    explicit = AxisType.Explicit in mesh.axis_types

    def sharding_of(spec: P, x: Any) -> NamedSharding:
        # As jit returns them: to its cache, P() and P(None) are two.
        full = P(*spec, *(None,) * (len(x.shape) - len(spec)))
        return NamedSharding(mesh, full if explicit else spec)

    leaves = zip(jax.tree.leaves(specs), jax.tree.leaves(state), strict=True)
    return jax.tree.unflatten(
        jax.tree.structure(specs), [sharding_of(spec, x) for spec, x in leaves]
    )


def abstract_state(
    tx: optax.GradientTransformation, params: Params, mesh: Mesh | None = None
) -> PyTree:
    """Returns the shapes of `tx.init(params)`, each with its sharding: restore targets.

    Nothing is computed. For example with Orbax, for the number of devices that there
    are now: `ocp.args.StandardRestore(dho2_jax.abstract_state(tx, params))`.

    Args:
      tx: As for `state_shardings`.
      params: As for `state_shardings`.
      mesh: As for `state_shardings`. Where there is none, the arrays get no sharding:
        they are restored to where they would be made.

    Returns:
      A pytree of `jax.ShapeDtypeStruct` like the state.

    Raises:
      ValueError: As `state_shardings`, but for a missing mesh.
    """
    state = _abstract_state(tx, params)
    if not (mesh or find(state).config.mesh or _find_mesh(params)):
        return state
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        state,
        _shardings(tx, params, state, mesh),
    )


def state_specs(tx: optax.GradientTransformation, params: Params) -> PyTree:
    """Returns `state_shardings` as `PartitionSpec`s.

    With `dho2(axis_name=...)` these are the `in_specs` and `out_specs` of the state in
    the caller's own `jax.shard_map`; no mesh is needed.

    Args:
      tx: `dho2(...)`, or any nest of Optax transformations around one.
      params: The parameters, or `jax.ShapeDtypeStruct`s like them.

    Returns:
      A pytree of `PartitionSpec` like the state.

    Raises:
      ValueError: As `state_shardings`.
    """
    state = _abstract_state(tx, params)
    config = find(state).config
    mesh = None if config.axis_name else config.mesh or _mesh_of(params)
    return _specs(tx, params, state, mesh)


def _specs(tx: Any, params: Params, state: PyTree, mesh: Mesh | None) -> PyTree:
    """Returns the spec of each array of the state, in the state's own structure."""
    if not jax.tree.leaves(params):
        return jax.tree.map(lambda _: P(), state)
    ours, everything = find(state), layouts.layout_of(params)
    config, layout = ours.config, layout_of_state(ours)
    seen = _numbers(everything, layout)
    if mesh is None:
        known = (P(),) * len(everything.shapes)
    else:
        known = sharding.read_specs(params, mesh, config.param_specs)
        placed = layouts.on_mesh(layout, mesh, [known[i] for i in seen])
        place = placed.placement
        assert place is not None
        if config.mesh is None and not config.axis_name:
            # Nothing splits them further: large leaves follow their parameters.
            follow = [
                sharding.with_rows(place.param_specs[group[0]], 1)
                for group in layout.groups
            ]
            follow += [P()] * (len(layout.stored) - len(follow))
            place = dataclasses.replace(place, slice_specs=tuple(follow))
        if not config.axis_name:
            layout = dataclasses.replace(layout, placement=place)
    by_base = dict(enumerate(known))
    by_base |= dict(zip(seen, bases.specs_seen(config, layout), strict=True))
    marks = bases.marks(tx, state, everything)

    def visit(node: Any, marked: Any) -> Any:
        if not is_ours(node):
            return bases.specs(marked, known)
        curvature = slices.specs_of(layouts.with_layout(node.curvature, layout))
        if config.mesh is None:
            curvature = layouts.with_layout(curvature, layout_of_state(node.curvature))
        base_state = bases.specs(marked.base_state, tuple(by_base.values()))
        return DHO2State(base_state, curvature)

    return jax.tree.map(visit, state, marks, is_leaf=is_ours)


def _abstract_state(tx: Any, params: Params) -> PyTree:
    """Returns the state's shapes; with `axis_name=` as arrays over all devices."""
    try:
        return jax.eval_shape(tx.init, params)
    except axes.UnboundAxisError as error:
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params
        )
        # On one device a slice is the whole.
        mesh = AbstractMesh((1,) * len(error.names), error.names)
        init = jax.shard_map(
            tx.init, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
        )
        return jax.eval_shape(init, shapes)


def _numbers(everything: layouts.Layout, layout: layouts.Layout) -> list[int]:
    """Returns which of all parameters those are that `init` saw."""
    stand_ins = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in everything.shapes
    ]
    number = {id(x): i for i, x in enumerate(stand_ins)}
    found, _ = layouts.match(jax.tree.unflatten(everything.treedef, stand_ins), layout)
    return [number[id(x)] for x in found]


def _find_mesh(params: Params) -> Mesh | None:
    """Returns the mesh that the parameters are on, if they are on one."""
    for x in jax.tree.leaves(params):
        found = getattr(x, "sharding", None)
        if isinstance(found, NamedSharding) and isinstance(found.mesh, Mesh):
            return found.mesh
    return None


def _mesh_of(params: Params) -> Mesh:
    """Returns the mesh that the parameters are on."""
    found = _find_mesh(params)
    if found is not None:
        return found
    raise ValueError(
        "`mesh` must be given when neither dho2 has one nor the parameters are on one, "
        "got None; pass mesh=."
    )
