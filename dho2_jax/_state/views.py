# SPDX-License-Identifier: Apache-2.0
"""Read-only views of the state, found in any nest of Optax states."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from dho2_jax._numerics import subspaces
from dho2_jax._state.states import (
    CurvatureState,
    drift,
    is_active,
    located,
    unboxed,
)
from dho2_jax._types import Array, PyTree
from dho2_jax._vectors import layouts
from dho2_jax._vectors.slices import copies, gather

_COUNTS = ("rate_cuts", "bounds", "trials", "refusals")


def subspace(state: PyTree, *, where: str | None = None) -> Any:
    """Returns the eigenpairs in use, the eigenvectors as the parameters' own tree.

    For looking at, not for the training step.

    Args:
      state: Any nest of Optax states that holds DHO² states.
      where: Which of several states, see `metrics`.

    Returns:
      `Subspace(eigenvalues, eigenvectors, valid, next_eigenvalue, residuals)`; leaves
      of `eigenvectors` are `(k + l, *param.shape)`, float32. Of several states, a dict
      of such by name.

    Raises:
      ValueError: If `state` holds no DHO² state, or `where` leads to none.
    """
    found = located(state, where)
    all_of = {name: _subspace(unboxed(x.curvature)) for name, x in found.items()}
    return next(iter(all_of.values())) if len(all_of) == 1 else all_of


def _subspace(state: CurvatureState) -> subspaces.Subspace:
    config, ours = state.config, state.subspace
    vectors = ours.eigenvectors
    if isinstance(vectors, layouts.Packed):
        whole = ((config.size, *shape) for shape in vectors.layout.stored)
        if config.axis_name and [x.shape for x in vectors.leaves] == list(whole):
            # Outside the caller's shard_map, which has put the slices together.
            layout = dataclasses.replace(vectors.layout, placement=None)
            vectors = layouts.Packed(vectors.leaves, layout)
        leaves = gather(vectors, [jnp.float32] * len(vectors.layout.shapes))
        vectors = layouts.with_holes(vectors.layout, leaves)
    return ours._replace(eigenvectors=vectors)


def metrics(state: PyTree, *, where: str | None = None) -> dict[str, Array]:
    """Returns flat scalars for a logger.

    Args:
      state: Any nest of Optax states that holds DHO² states.
      where: Which of several states: the keys on the way to it, joined by "/", as "a"
        in `optax.partition({"a": dho2(...), ...}, ...)`; where these do not tell them
        apart, the whole path. Any part of the path that leads to one alone serves.

    Returns:
      A dict of `()` arrays; of several states, with "name/" before each key.

      - "count": updates so far.
      - "enabled": 1 while DHO² is on.
      - "refreshes", "rejected": refreshes used, and computed (or, a sweep that the next
        one overtook, half computed) but not used.
      - "age": updates since the parameters were where the subspace in use belongs.
      - "drift": how far they have gone since, the lengths of all updates added up, in
        units of their own norm there.
      - "num_valid", "num_active": pairs found; of these, those that a step uses.
      - "sharpness": the largest eigenvalue found, 0 before any.
      - "smallest_eigenvalue": the smallest found, 0 before any.
      - "next_eigenvalue": the largest Ritz value not kept, what the base still feels.
      - "residual": the largest bound on |H v - lambda v|, relative to the sharpness.
      - "recurrence_defect": how far V H V^T of the last refresh was from symmetric
        tridiagonal; rounding if the curvature function did not change meanwhile.
      - "base_scaling": s, the factor on the base's update, without `rate_schedule`.
      - "rate_cuts": how often the guard halved it.
      - "bounds": steps that were shortened to what earlier ones proved safe.
      - "trials", "refusals": steps tried on the loss before they were taken; of these,
        those that it refused, since it would have risen by a quarter.
      - "momentum_norm": |u|.
      - "replication": how often the devices of `mesh` hold a number of V among them; 1
        where the devices divide everything evenly.

    Raises:
      ValueError: If `state` holds no DHO² state, or `where` leads to none.
    """
    found = located(state, where)
    all_of = {name: _metrics(unboxed(x.curvature)) for name, x in found.items()}
    if len(all_of) == 1:
        return next(iter(all_of.values()))
    return {f"{a}/{b}": x for a, one in all_of.items() for b, x in one.items()}


def _metrics(ours: CurvatureState) -> dict[str, Array]:
    space, counters, active = ours.subspace, ours.counters, is_active(ours)
    valid = space.valid
    scale = jnp.max(jnp.where(valid, jnp.abs(space.eigenvalues), 0.0))
    lowest = jnp.min(jnp.where(valid, space.eigenvalues, jnp.inf))
    counts = dict.fromkeys(_COUNTS, jnp.zeros((), jnp.int32))
    if ours.config.rule.measures:
        reach = ours.rate.reach
        found = ours.rate.cuts, reach.bounds, reach.trials, reach.refusals
        counts = dict(zip(_COUNTS, found, strict=True))
    return {
        "count": ours.count,
        "enabled": ours.enabled.astype(jnp.int32),
        "refreshes": counters.refreshes,
        "rejected": counters.rejected,
        "age": ours.count - ours.anchor.count,
        "drift": drift(ours),
        "num_valid": jnp.sum(valid.astype(jnp.int32)),
        "num_active": jnp.sum(active.astype(jnp.int32)),
        "sharpness": subspaces.sharpness(space),
        "smallest_eigenvalue": jnp.where(jnp.any(valid), lowest, 0.0),
        "next_eigenvalue": space.next_eigenvalue,
        "residual": jnp.max(space.residuals) / jnp.where(scale > 0, scale, 1.0),
        "recurrence_defect": counters.recurrence_defect,
        "base_scaling": ours.base_scaling,
        **counts,
        "momentum_norm": jnp.sqrt(jnp.sum(ours.momentum**2)),
        "replication": jnp.asarray(_replication(space.eigenvectors), jnp.float32),
    }


def _replication(vectors: Any) -> float:
    place = vectors.layout.placement if isinstance(vectors, layouts.Packed) else None
    if place is None or place.mesh is None:
        return 1.0
    numbers = [math.prod(shape) for shape in vectors.layout.stored]
    held = zip(numbers, copies(vectors.layout), strict=True)
    return sum(n * c for n, c in held) / sum(numbers)
