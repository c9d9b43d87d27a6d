# SPDX-License-Identifier: Apache-2.0
"""The static configuration that the state carries, checked once, at construction."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from dho2_jax._checks import check_choice, check_integer, shown
from dho2_jax._numerics import schedules
from dho2_jax._numerics.operators import OPERATORS
from dho2_jax._numerics.rules import RULES, Rule
from dho2_jax._numerics.schedules import Schedule
from dho2_jax._vectors.sharding import frozen_specs

MOMENTA = ("ema", "heavy_ball", "nesterov")
NEGATIVE_CURVATURE = ("abs", "base")

STATIC_ARGS = (
    "num_largest",
    "num_smallest",
    "num_matvecs",
    "refresh",
    "schedule",
    "refresh_period",
    "warmup_steps",
    "early_refreshes",
    "max_drift",
    "subspace_momentum",
    "base_rate",
    "curvature",
    "negative_curvature",
    "seed",
    "mesh",
    "param_specs",
    "axis_name",
    "curvature_mask",
    "shard_base_state",
    "linear_base",
)
"""Arguments of `dho2` and its aliases that `optax.inject_hyperparams` must keep static.
"""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Config:
    """What `refresh`, `subspace` and `metrics` must know; a node without leaves."""

    num_largest: int
    num_smallest: int
    num_matvecs: int
    refresh: str
    schedule: Schedule
    subspace_momentum: str
    base_rate: str
    curvature: str
    negative_curvature: str
    seed: int
    mesh: Mesh | None
    param_specs: tuple[Any, tuple[Any, ...]] | None  # flattened: tree and leaves
    axis_name: tuple[str, ...]
    shard_base_state: bool

    @property
    def size(self) -> int:
        """Slots in the subspace, k + l."""
        return self.num_largest + self.num_smallest

    @property
    def rule(self) -> Rule:
        """What sets s."""
        return RULES[self.base_rate]


def make_config(
    *,
    num_largest: int,
    num_smallest: int,
    num_matvecs: int | None,
    refresh: str,
    schedule: Schedule | None,
    refresh_period: int,
    warmup_steps: int,
    early_refreshes: tuple[int, ...] | None,
    max_drift: float | None,
    subspace_momentum: str,
    base_rate: str,
    curvature: str,
    negative_curvature: str | None,
    seed: int,
    mesh: Any,
    param_specs: Any,
    axis_name: Any,
    shard_base_state: bool | None,
) -> Config:
    """Returns the checked configuration with its defaults filled in.

    Raises:
      ValueError: For each argument out of its range, in one sentence.
    """
    check_integer("num_largest", num_largest, 0)
    check_integer("num_smallest", num_smallest, 0)
    size = num_largest + num_smallest
    if size < 1:
        raise ValueError(
            "`num_largest` + `num_smallest` must be >= 1, got 0; to train without "
            "curvature use the base optimizer alone."
        )
    if num_matvecs is None:
        num_matvecs = size + 4
    check_integer("num_matvecs", num_matvecs, 1)
    if num_matvecs < size:
        raise ValueError(
            f"`num_matvecs` must be >= num_largest + num_smallest = {size}, got "
            f"{num_matvecs}; leave it None for {size + 4}."
        )
    schedule = schedules.one_schedule(
        schedule,
        refresh_period=refresh_period,
        warmup_steps=warmup_steps,
        early_refreshes=early_refreshes,
        max_drift=max_drift,
    )
    if refresh == "staggered":
        schedule = schedules.of_sweeps(schedule, num_matvecs)
    if schedule.max_drift is not None and refresh == "external":
        raise ValueError(
            "`max_drift` must be None with refresh='external', got "
            f"{schedule.max_drift}; call refresh where metrics(state)['drift'] has "
            "passed your bound."
        )
    check_choice("subspace_momentum", subspace_momentum, MOMENTA)
    check_choice("base_rate", base_rate, tuple(RULES))
    check_choice("curvature", curvature, tuple(OPERATORS))
    if negative_curvature is None:
        negative_curvature = RULES[base_rate].negative_curvature
    check_choice("negative_curvature", negative_curvature, NEGATIVE_CURVATURE)
    check_integer("seed", seed, 0)
    axis_name = _check_where(mesh, param_specs, axis_name)
    if shard_base_state is None:
        shard_base_state = mesh is not None
    if not isinstance(shard_base_state, bool):
        raise ValueError(
            f"`shard_base_state` must be True, False or None, got "
            f"{shown(shard_base_state)}; leave it None for True with mesh=."
        )
    return Config(
        num_largest=int(num_largest),
        num_smallest=int(num_smallest),
        num_matvecs=int(num_matvecs),
        refresh=refresh,
        schedule=schedule,
        subspace_momentum=subspace_momentum,
        base_rate=base_rate,
        curvature=curvature,
        negative_curvature=negative_curvature,
        seed=int(seed),
        mesh=mesh,
        param_specs=None if param_specs is None else frozen_specs(param_specs),
        axis_name=axis_name,
        shard_base_state=shard_base_state,
    )


def _check_where(mesh: Any, param_specs: Any, axis_name: Any) -> tuple[str, ...]:
    """Returns `axis_name` as a tuple, or raises if the three do not go together."""
    if mesh is not None and not isinstance(mesh, Mesh):
        raise ValueError(
            f"`mesh` must be a jax.sharding.Mesh, got {shown(mesh)}; make one with "
            "jax.make_mesh."
        )
    if mesh is None and param_specs is not None:
        raise ValueError(
            "`param_specs` must come with `mesh`, got it without; pass mesh= too."
        )
    if axis_name is None:
        return ()
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(names, tuple | list) or not names:
        raise ValueError(
            "`axis_name` must be the name of an axis or a tuple of names, got "
            f"{shown(axis_name)}; pass for example 'data'."
        )
    if mesh is not None:
        raise ValueError(
            f"`axis_name` must be None with `mesh`, got {shown(axis_name)}; use mesh= "
            "for global arrays and axis_name= inside your own shard_map or pmap."
        )
    return tuple(names)
