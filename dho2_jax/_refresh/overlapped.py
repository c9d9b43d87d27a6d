# SPDX-License-Identifier: Apache-2.0
"""The overlapped refresh: other devices compute the curvature while these train.

What `launch` starts is one program on a mesh of its own; JAX dispatches it and returns,
and so do all copies to it and back. Nothing is read on the host. The result waits on
the training devices, in pieces, until `land` puts it together and to use: at a step
that the caller has fixed, since "when it is ready" is another step in each process.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dho2_jax._numerics import linalg, losses, subspaces
from dho2_jax._refresh import at_once
from dho2_jax._refresh.products import Products, products_at
from dho2_jax._state.config import Config
from dho2_jax._state.states import (
    Anchor,
    CurvatureState,
    active_slots,
    find,
    layout_of_state,
    replace,
)
from dho2_jax._types import Array, Params, PyTree
from dho2_jax._vectors import layouts, second_mesh, slices, transfer
from dho2_jax._vectors.layouts import Layout, Packed


class OverlappedRefresh(NamedTuple):
    """The two halves of a refresh on other devices."""

    launch: Callable[[PyTree, Params, PyTree], "Pending"]
    land: Callable[[PyTree, "Pending"], PyTree]


class Pending(NamedTuple):
    """A refresh under way; opaque. Its arrays are on the training devices."""

    pieces: tuple[transfer.Pieces, ...]  # of a `_Result`
    routes: tuple[transfer.Route, ...]  # static
    rounding: float  # static
    noted: "_Noted"


class _Noted(NamedTuple):
    """What the state says at launch, copied before a step can donate it."""

    question: "_Question"
    count: Array
    anchor: Anchor  # of the subspace that is in use then


class _Question(NamedTuple):
    """What the curvature mesh must know beside parameters and batch."""

    attempt: Array  # (), int32
    enabled: Array  # (), bool
    unprobed: Array  # (), bool: whether the rate wants a probe
    direction: Packed | None  # the rate's last, off the subspace in use


class _Result(NamedTuple):
    """What the curvature mesh answers."""

    found: at_once.Found
    norm: Array  # (), float32: |x|
    bend: Array  # (), float32: along the direction
    length: Array  # (), float32: its square; 0 where there was no probe


def overlapped_refresh(
    value_fn: Any, *, mesh: Mesh, param_specs: Any = None, batch_spec: Any = None
) -> OverlappedRefresh:
    r"""Makes a refresh that runs on devices of its own, while training goes on.

    `dho2` has refresh="external" and its own `mesh`; this one is disjoint from it. With
    `overlap = overlapped_refresh(...)`, the loop does, every T steps:

        pending = overlap.launch(state, params, batch)   # at step t
        ...                                              # n steps of training
        state = overlap.land(state, pending)             # at step t + n

    `launch(state, params, batch)` copies the parameters, the batch and a few numbers of
    the state to `mesh`, dispatches there what `refresh` would compute at these
    parameters, and the copy of the result back. It returns at once and keeps nothing
    that a later step may donate. `land(state, pending)` accepts or rejects the result
    as `refresh` does, takes the momentum along, and dates the subspace back to the
    launch: `metrics` shows an "age" of n. Its first argument is donated: use what it
    returns. A program that trains is dispatched before the result exists as long as it
    is dispatched before `land`; land too early, and the training devices wait.

    One refresh is in flight at a time, and they land in the order of their launch. With
    several processes every process calls both at the same steps; each must have the
    same number of devices in `mesh` as any other, and the same part of every array on
    both meshes. Give both a first axis over the processes, and all is well.

    Args:
      value_fn: `(params, batch) -> ()`, the mean loss on the curvature batch; for
        curvature="ggn" the pair `(outputs_fn(params, batch), loss_fn(outputs, batch))`.
        If it names a mesh, or its axes, they are those of the curvature mesh.
      mesh: The curvature mesh.
      param_specs: `PartitionSpec`s of the parameters on it, a tree or a prefix of one.
        None: replicated.
      batch_spec: Those of the batch, likewise. None: the first dimension over all axes
        of `mesh`, where these divide it. A batch that lies on the mesh already stays as
        it is.

    Returns:
      `OverlappedRefresh(launch, land)`, two functions.

    Raises:
      ValueError: Here if `mesh` is not a mesh or `value_fn` not a function; in `launch`
        if the meshes share devices, the state is not of refresh="external" with
        `mesh=`, specs do not fit, or a process would need what only others hold; in
        `land` if the state is not the one of the launch.

    Deviates from `refresh`: a probe of the curvature-set rate that `update` could not
    make is of the direction at launch, and is put to use with the subspace or not at
    all.
    """
    value_fn = losses.as_loss(value_fn)
    _check(value_fn, mesh)
    compute = jax.jit(functools.partial(_compute, value_fn), static_argnums=(0, 1, 2))

    def launch(state: PyTree, params: Params, batch: PyTree) -> Pending:
        ours = find(state)
        _check_disjoint(ours.config, mesh)
        near = layout_of_state(ours)
        part, _ = layouts.restrict(params, near)
        specs = P() if param_specs is None else param_specs
        given = second_mesh.laid_out(params, mesh, specs, "param_specs")
        far = second_mesh.layout_on(mesh, near, given)
        specs = batch_spec
        if specs is None:
            specs = jax.tree.map(lambda x: _evenly(x, mesh), batch)
        given = given, second_mesh.laid_out(batch, mesh, specs, "batch_spec")
        with jax.set_mesh(ours.config.mesh):
            noted = _note(ours)
        try:
            routes = _routes(ours, far)
            params, batch = transfer.move((params, batch), given)
            question = layouts.with_layout(noted.question, far)
            question = transfer.move(question, second_mesh.abstract(question, far))
        except transfer.NotLocalError as error:
            raise ValueError(
                "`mesh` must give every process the part of each array that it has on "
                f"the mesh of dho2, but {error}; give both meshes a first axis over "
                "the processes, and split parameters and batch alike."
            ) from error
        with jax.set_mesh(mesh):
            pieces = compute(ours.config, far, routes, question, params, batch)
        pieces = tuple(transfer.carry(routes, pieces))
        return Pending(pieces, routes, at_once.rounding(part), noted)

    return OverlappedRefresh(launch, land)


def land(state: PyTree, pending: Pending) -> PyTree:
    """Puts a launched refresh to use, or rejects it; donates the state."""
    ours = find(state)
    if not isinstance(pending, Pending) or ours.config.mesh is None:
        raise ValueError(
            "`pending` must be what launch returned for this state, got "
            f"{type(pending).__name__} and a state with mesh={ours.config.mesh}; call "
            "land(state, pending)."
        )
    shapes = jax.tree.leaves(second_mesh.abstract(_answer(ours), layout_of_state(ours)))
    places = [(x.shape, x.sharding) for x in shapes]
    if [(r.shape, r.target) for r in pending.routes] != places:
        raise ValueError(
            "`pending` must come from a launch with this state, got one for "
            f"{len(pending.routes)} arrays that lie otherwise; launch anew."
        )
    with jax.set_mesh(ours.config.mesh):
        landed = _land(
            pending.routes, pending.rounding, ours, pending.pieces, pending.noted
        )
    return replace(state, lambda _: landed)


@jax.jit
def _note(ours: CurvatureState) -> _Noted:
    layout, rule = layout_of_state(ours), ours.config.rule
    unprobed, direction = rule.is_unprobed(ours.rate), rule.direction(ours.rate)
    enabled, count, anchor = jax.tree.map(
        jnp.copy, (ours.enabled, ours.count, ours.anchor)
    )
    question = _Question(at_once.attempts(ours), enabled, unprobed, direction)
    return slices.lay_out(layout, _Noted(question, count, anchor))


def _compute(
    value_fn: Any,
    config: Config,
    layout: Layout,
    routes: tuple[transfer.Route, ...],
    question: _Question,
    params: Params,
    batch: PyTree,
) -> tuple[transfer.Pieces, ...]:
    """The program of the curvature mesh."""
    value_fn = losses.on_batch(value_fn, batch)
    part, products = products_at(config, layout, params, value_fn, None)
    found = at_once.compute_subspace(
        config, layout, products.matvec(), question.attempt
    )
    bend, length = _probed(config, layout, question, found.subspace, products)
    result = _Result(found, linalg.norm(part), bend, length)
    result = slices.lay_out(layout, result)
    return tuple(map(transfer.cut, routes, jax.tree.leaves(result)))


def _probed(
    config: Config,
    layout: Layout,
    question: _Question,
    found: subspaces.Subspace,
    products: Products,
) -> tuple[Array, Array]:
    """Returns what the rate asks for, if it does."""
    nothing = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
    if question.direction is None:
        return nothing
    active = active_slots(config, found, question.enabled)

    def measure(direction: Packed) -> tuple[Array, Array]:
        return products.bend(at_once.outside(layout, direction, found, active))

    return jax.lax.cond(
        question.unprobed, measure, lambda _: nothing, question.direction
    )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _land(
    routes: tuple[transfer.Route, ...],
    rounding: float,
    ours: CurvatureState,
    pieces: tuple[transfer.Pieces, ...],
    noted: _Noted,
) -> CurvatureState:
    leaves = map(transfer.join, routes, pieces)
    answer = jax.tree.unflatten(jax.tree.structure(_answer(ours)), leaves)
    # Another refresh since has begun to count anew.
    now, then = ours.anchor, noted.anchor
    path = now.path - jnp.where(now.count == then.count, then.path, 0.0)
    anchor = Anchor(noted.count, answer.norm, path)
    new = at_once.install(ours, answer.found, anchor, rounding)
    rule = new.config.rule
    accepted = new.counters.refreshes > ours.counters.refreshes
    due = accepted & noted.question.unprobed & rule.is_unprobed(new.rate)
    unlimited = jnp.full((), jnp.inf, jnp.float32)  # the next step caps
    probed = rule.later_probe(new.rate, answer.bend, answer.length, unlimited)
    rate = jax.tree.map(lambda a, b: jnp.where(due, a, b), probed, new.rate)
    new = new._replace(rate=rate)
    return slices.lay_out(layout_of_state(new), new)


# --- where everything lies -----------------------------------------------------------


def _evenly(x: Any, mesh: Mesh) -> P:
    """Returns the spec of an array of examples that none was given for."""
    split = jnp.ndim(x) > 0 and jnp.shape(x)[0] % mesh.size == 0
    return P(mesh.axis_names) if split else P()


def _answer(ours: CurvatureState) -> _Result:
    """Returns arrays of the shapes of a `_Result`, laid out like the state."""
    one = ours.anchor.norm
    return _Result(at_once.Found(ours.subspace, one, one), one, one, one)


def _routes(ours: CurvatureState, far: Layout) -> tuple[transfer.Route, ...]:
    """Returns the way back of each array of a `_Result`."""
    answer = _answer(ours)
    there = jax.tree.leaves(second_mesh.abstract(layouts.with_layout(answer, far), far))
    here = jax.tree.leaves(second_mesh.abstract(answer, layout_of_state(ours)))
    pairs = zip(there, here, strict=True)
    return tuple(transfer.route(a.shape, a.sharding, b.sharding) for a, b in pairs)


def _check(value_fn: Any, mesh: Any) -> None:
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"`mesh` must be a jax.sharding.Mesh, got {type(mesh).__name__}; make one "
            "with jax.make_mesh, of devices that do not train."
        )
    if not callable(value_fn):
        raise ValueError(
            "`value_fn` must be a function of (params, batch), or with "
            "curvature='ggn' the pair (outputs_fn, loss_fn), got "
            f"{type(value_fn).__name__}; pass the mean loss on the curvature batch."
        )


def _check_disjoint(config: Config, mesh: Mesh) -> None:
    """Raises unless the two meshes can share the work."""
    if config.mesh is None or config.refresh != "external":
        how = "axis_name=" if config.axis_name else f"mesh={config.mesh}"
        raise ValueError(
            "`state` must come from dho2(refresh='external', mesh=...), got "
            f"refresh='{config.refresh}' and {how}; make dho2 so."
        )
    shared = set(mesh.devices.flat) & set(config.mesh.devices.flat)
    if shared:
        raise ValueError(
            "`mesh` must share no device with the mesh of dho2, got "
            f"{min(shared, key=lambda d: d.id)} in both; split jax.devices() in two."
        )
    ours, theirs = (
        Counter(d.process_index for d in m.devices.flat) for m in (mesh, config.mesh)
    )
    if set(ours) != set(theirs) or len(set(ours.values())) > 1:
        raise ValueError(
            "`mesh` must have the same number of devices from every process that "
            f"trains, got {dict(sorted(ours.items()))} by process for "
            f"{dict(sorted(theirs.items()))} on the mesh of dho2; take as many of each "
            "process's jax.local_devices()."
        )
