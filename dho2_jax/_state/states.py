# SPDX-License-Identifier: Apache-2.0
"""The state of the transformation, and how to find it in a nest of Optax states."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from dho2_jax._numerics import lanczos, subspaces
from dho2_jax._state.config import Config
from dho2_jax._types import Array, PyTree
from dho2_jax._vectors import layouts, sharding, slices


class Counters(NamedTuple):
    """What happened to the refreshes so far."""

    refreshes: Array  # (), int32: accepted
    rejected: Array  # (), int32: computed and not used
    attempted_at: Array  # (), int32: `count` at the last one, -1 before it
    recurrence_defect: Array  # (), float32: of the last one, accepted or not


class Anchor(NamedTuple):
    """Where curvature was measured, and how far the parameters have gone since."""

    count: Array  # (), int32: `count` then
    norm: Array  # (), float32: |x| then
    path: Array  # (), float32: the lengths of all updates since, added up


class SweepState(NamedTuple):
    """A staggered refresh under way; `lanczos.index` says how far it is.

    Beyond what `LanczosState` says: m when the last product has been taken in, and
    m + 1 while no sweep is under way.
    """

    lanczos: lanczos.LanczosState  # its vectors are `Packed`
    anchor: Any  # `Packed`, float32: the parameters where the sweep began
    outside: Any  # `Outside`: those that take no part, there
    start: Anchor


class Probe(NamedTuple):
    """The curvature along the last step, if it was measured in this one."""

    is_due: Array  # (), bool
    bend: Array  # (), float32: |d . H d| / |d|^2


class CurvatureState(NamedTuple):
    """Everything but the base optimizer's own state."""

    config: Config  # static, no leaves
    count: Array  # (), int32: updates so far
    enabled: Array  # (), bool: off, every update is the base optimizer's
    subspace: subspaces.Subspace  # `eigenvectors` is a `Packed`
    momentum: Array  # u, (k + l,), float32
    base_scaling: Array  # s of the last update, (), float32
    counters: Counters
    anchor: Anchor  # of the subspace in use
    rate: Any  # the state of the rule that sets s, such as `rates.RateState`
    sweep: SweepState | None  # None unless refresh="staggered"


class DHO2State(NamedTuple):
    """State of `dho2`.

    Attributes:
      base_state: The base optimizer's own.
      curvature: Everything else. Read it by `subspace` and `metrics`.
    """

    base_state: optax.OptState
    curvature: CurvatureState


def init_curvature(
    config: Config, params: PyTree, outside: tuple[int, ...] = ()
) -> CurvatureState:
    """Returns the state before any refresh, for parameters of any (abstract) leaves.

    On a pytree without leaves, which is what `optax.tree_map_params` and empty groups
    of parameters pass, single empty arrays stand for the stored vectors: such a state
    is a prefix of the real one. `outside` are leaves that take no part.
    """
    layout = placed_layout(config, params, outside)

    def zeros(*rows: int) -> Any:
        if layout.shapes:
            return slices.new_zeros(layout, rows)
        return jnp.zeros((*rows, 0), jnp.float32)

    return CurvatureState(
        config=config,
        count=jnp.zeros((), jnp.int32),
        enabled=jnp.ones((), bool),
        subspace=subspaces.empty(zeros(config.size), config.size),
        momentum=jnp.zeros((config.size,), jnp.float32),
        base_scaling=jnp.ones((), jnp.float32),
        counters=Counters(
            refreshes=jnp.zeros((), jnp.int32),
            rejected=jnp.zeros((), jnp.int32),
            attempted_at=jnp.full((), -1, jnp.int32),
            recurrence_defect=jnp.zeros((), jnp.float32),
        ),
        anchor=_no_anchor(),
        rate=config.rule.start(zeros()),
        sweep=_no_sweep(min(config.num_matvecs, layout.size), zeros, layout, params)
        if config.refresh == "staggered"
        else None,
    )


def _no_anchor() -> Anchor:
    return Anchor(
        count=jnp.zeros((), jnp.int32),
        norm=jnp.zeros((), jnp.float32),
        path=jnp.zeros((), jnp.float32),
    )


def _no_sweep(
    m: int, zeros: Callable[..., Any], layout: layouts.Layout, params: PyTree
) -> SweepState:
    run = lanczos.LanczosState(
        basis=zeros(m),
        vector=zeros(),
        projected=jnp.zeros((m + 1, m), jnp.float32),
        betas=jnp.zeros((m,), jnp.float32),
        index=jnp.full((), m + 1, jnp.int32),
    )
    outside: Any = zeros()  # in place of it where there are no parameters
    if layout.shapes:
        leaves = jax.tree.leaves(params)
        nothing = tuple(jnp.zeros_like(leaves[i]) for i in layout.outside)
        outside = layouts.Outside(nothing, layout)
    return SweepState(run, zeros(), outside, _no_anchor())


def placed_layout(
    config: Config, params: PyTree, outside: tuple[int, ...]
) -> layouts.Layout:
    """Returns the layout of the parameters with the place of its slices.

    Raises:
      ValueError: If the parameters or `param_specs` do not fit the mesh.
    """
    layout = layouts.layout_of(params, outside)
    if not layout.shapes:
        return layout  # `param_specs` are those of the real parameters
    if config.mesh is not None:
        specs = sharding.read_specs(params, config.mesh, config.param_specs)
        return layouts.on_mesh(layout, config.mesh, specs)
    if config.axis_name:
        place = sharding.place_on_axes(
            config.axis_name, len(layout.shapes), len(layout.groups), layout.stored
        )
        everywhere = (P(),) * len(layout.outside)
        place = dataclasses.replace(place, outside_specs=everywhere)
    else:
        sharding.check_not_explicit(params)
        place = None
    return dataclasses.replace(layout, placement=place)


def is_active(state: CurvatureState) -> Array:
    """Returns which slots take part in a step: `(k + l,)`, bool."""
    return active_slots(state.config, state.subspace, state.enabled)


def active_slots(config: Config, subspace: subspaces.Subspace, enabled: Array) -> Array:
    """Returns which slots of a subspace would take part in a step."""
    active = subspace.valid & enabled
    if config.negative_curvature == "base":
        active &= subspace.eigenvalues > 0
    return active


def drift(state: CurvatureState) -> Array:
    """Returns the path since the subspace's anchor over |x| there; 0 without one."""
    _, norm, path = state.anchor
    return jnp.where(norm > 0, path / jnp.where(norm > 0, norm, 1.0), 0.0)


def layout_of_state(state: CurvatureState) -> layouts.Layout:
    """Returns the layout of the parameters the state was made for."""
    vectors = state.subspace.eigenvectors
    if not isinstance(vectors, layouts.Packed):
        raise ValueError(
            "`state` must come from parameters with at least one array, got one made "
            "from an empty pytree; call init on the parameters."
        )
    return vectors.layout


def located(state: PyTree, where: str | None = None) -> dict[str, DHO2State]:
    """Returns the DHO² states in any nest of Optax states, by what tells them apart.

    That are the keys on the way to them, as those of `optax.partition`, or else the
    whole path.

    Args:
      state: The nest.
      where: Of which states: the name, or any key or field on the way. None: of all.

    Raises:
      ValueError: If there is none.
    """
    paths = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_ours)
    found = [(path, node) for path, node in paths if is_ours(node)]
    keys = [[str(k.key) for k in path if hasattr(k, "key")] for path, _ in found]
    names = ["/".join(x) for x in keys]
    ways = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found]
    if len(set(names)) < len(names):
        names = ways
    chosen = {
        name: node
        for name, way, (_, node) in zip(names, ways, found, strict=True)
        if where is None or where == name or where in way.split("/") or where == way
    }
    if not chosen and where is not None and found:
        raise ValueError(
            f"`where` must lead to a DHO² state, got {where!r}; choose from {names}."
        )
    if not chosen:
        raise ValueError(
            "`state` must hold exactly one DHO² state, got none; pass the state of "
            "dho2(...), or of any wrapper around one, as the first argument."
        )
    return chosen


def find(state: PyTree, where: str | None = None) -> CurvatureState:
    """Returns the one curvature state in any nest of Optax states, unboxed."""
    return unboxed(find_boxed(state, where))


def find_boxed(state: PyTree, where: str | None = None) -> CurvatureState:
    """Returns the same with its leaves as they are; enough to read its config."""
    found = located(state, where)
    if len(found) != 1:
        raise ValueError(
            f"`state` must hold exactly one DHO² state, got {len(found)} of them; say "
            f"where=, one of {list(found)}."
        )
    (one,) = found.values()
    return one.curvature


def replace(
    state: PyTree,
    change: Callable[[CurvatureState], CurvatureState],
    where: str | None = None,
) -> PyTree:
    """Returns the nest with its curvature states changed, boxed as they were."""
    chosen = {id(node) for node in located(state, where).values()}

    def visit(node: Any) -> Any:
        if id(node) not in chosen:
            return node
        new = change(unboxed(node.curvature))
        boxes = jax.tree.structure(node.curvature)
        return node._replace(curvature=jax.tree.unflatten(boxes, jax.tree.leaves(new)))

    return jax.tree.map(visit, state, is_leaf=is_ours)


def set_enabled(
    state: PyTree, enabled: bool | Array, *, where: str | None = None
) -> PyTree:
    """Switches DHO² on or off in mid-run; the base optimizer's state is kept.

    Off, every update is exactly the base optimizer's, times `rate_schedule`. On again,
    the old subspace is used until the next refresh; call `refresh` if it is old.

    Args:
      state: Any nest of Optax states that holds DHO² states.
      enabled: A bool, or a traced boolean scalar.
      where: Which of several states, see `metrics`; None: all.

    Returns:
      The state with nothing else changed.

    Raises:
      ValueError: If `state` holds no DHO² state, or `enabled` is no bool.
    """
    is_array = isinstance(enabled, bool | np.bool_ | np.ndarray | jax.Array)
    is_bool = is_array and jnp.issubdtype(jnp.result_type(enabled), jnp.bool_)
    if not is_bool or jnp.shape(enabled) != ():
        raise ValueError(
            "`enabled` must be a bool or a boolean scalar array, got "
            f"{type(enabled).__name__} of shape {np.shape(enabled)}; pass True or "
            "False."
        )
    return replace(
        state,
        lambda s: s._replace(enabled=jnp.asarray(enabled, bool)),
        where,
    )


def is_ours(x: Any) -> bool:
    """Returns whether `x` is a DHO² state."""
    return isinstance(x, DHO2State)


def unboxed(state: CurvatureState) -> CurvatureState:
    """Replaces whatever boxes a leaf (as Flax NNX's variables do) by the leaf."""

    def is_box(x: Any) -> bool:
        kinds = tuple | Config | layouts.Packed | layouts.Outside
        return not (x is None or isinstance(x, kinds))

    return jax.tree.map(lambda x: jax.tree.leaves(x)[0], state, is_leaf=is_box)
