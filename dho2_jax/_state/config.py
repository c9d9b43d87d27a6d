# SPDX-License-Identifier: Apache-2.0
"""The static configuration that the state carries, checked once, at construction."""

import dataclasses
import difflib
import numbers
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh

from dho2_jax._numerics.operators import OPERATORS
from dho2_jax._vectors.sharding import is_spec

REFRESH_MODES = ("periodic", "staggered", "external")
BASE_RATES = ("curvature", "fixed")
MOMENTA = ("ema", "heavy_ball", "nesterov")
NEGATIVE_CURVATURE = ("abs", "base")

STATIC_ARGS = (
    "num_largest",
    "num_smallest",
    "num_matvecs",
    "refresh",
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
    refresh_period: int
    warmup_steps: int
    early_refreshes: tuple[int, ...]
    max_drift: float | None
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


def make_config(
    *,
    num_largest: int,
    num_smallest: int,
    num_matvecs: int | None,
    refresh: str,
    refresh_period: int,
    warmup_steps: int,
    early_refreshes: tuple[int, ...],
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
    check_choice("refresh", refresh, REFRESH_MODES)
    check_integer("refresh_period", refresh_period, 1)
    check_integer("warmup_steps", warmup_steps, 0)
    early_refreshes = check_steps("early_refreshes", early_refreshes)
    if refresh == "staggered":
        if num_matvecs > refresh_period:
            raise ValueError(
                "`num_matvecs` must be <= refresh_period with refresh='staggered', "
                f"got {num_matvecs} for {refresh_period}; a step makes one product: "
                "lower one or raise the other."
            )
        refresh_period, early_refreshes = sweep_starts(
            refresh_period, early_refreshes, num_matvecs
        )
    _check_max_drift(max_drift, refresh)
    check_choice("subspace_momentum", subspace_momentum, MOMENTA)
    check_choice("base_rate", base_rate, BASE_RATES)
    check_choice("curvature", curvature, tuple(OPERATORS))
    if negative_curvature is None:
        negative_curvature = "abs" if base_rate == "fixed" else "base"
    check_choice("negative_curvature", negative_curvature, NEGATIVE_CURVATURE)
    check_integer("seed", seed, 0)
    axis_name = _check_where(mesh, param_specs, axis_name)
    if shard_base_state is None:
        shard_base_state = mesh is not None
    if not isinstance(shard_base_state, bool):
        raise ValueError(
            f"`shard_base_state` must be True, False or None, got "
            f"{_shown(shard_base_state)}; leave it None for True with mesh=."
        )
    return Config(
        num_largest=int(num_largest),
        num_smallest=int(num_smallest),
        num_matvecs=int(num_matvecs),
        refresh=refresh,
        refresh_period=int(refresh_period),
        warmup_steps=int(warmup_steps),
        early_refreshes=early_refreshes,
        max_drift=None if max_drift is None else float(max_drift),
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


def sweep_length(num_matvecs: int) -> int:
    """Returns how many steps after a sweep's start the next one may start.

    One goes to the start, m + 1 to the products and one to putting them to use; and
    every tenth in between, or fewer, to a probe of the rate.
    """
    return num_matvecs + 3 + (num_matvecs + 9) // 9


def sweep_starts(
    refresh_period: int, early_refreshes: tuple[int, ...], num_matvecs: int
) -> tuple[int, tuple[int, ...]]:
    """Returns when sweeps really start: a start within a sweep is passed over.

    Returns:
      The period, a multiple of `refresh_period`, and the early starts, from the first.
    """
    length = sweep_length(num_matvecs)
    period, kept = -(-length // refresh_period) * refresh_period, []
    for step in sorted(early_refreshes):
        last = max([step // period * period, *kept])
        if step - last >= length and step % period + length <= period:
            kept.append(step)
    return int(period), tuple(kept)


def _check_max_drift(value: Any, refresh: str) -> None:
    """Raises unless it is None, or a positive number where `update` can act on it."""
    if value is None:
        return
    check_number("max_drift", value, 0.0)
    if callable(value) or isinstance(value, jax.Array) or not value > 0:
        raise ValueError(
            f"`max_drift` must be a static number > 0 or None, got {_shown(value)}; "
            "pass for example 0.05."
        )
    if refresh == "external":
        raise ValueError(
            f"`max_drift` must be None with refresh='external', got {value}; call "
            "refresh where metrics(state)['drift'] has passed your bound."
        )


def _check_where(mesh: Any, param_specs: Any, axis_name: Any) -> tuple[str, ...]:
    """Returns `axis_name` as a tuple, or raises if the three do not go together."""
    if mesh is not None and not isinstance(mesh, Mesh):
        raise ValueError(
            f"`mesh` must be a jax.sharding.Mesh, got {_shown(mesh)}; make one with "
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
            f"{_shown(axis_name)}; pass for example 'data'."
        )
    if mesh is not None:
        raise ValueError(
            f"`axis_name` must be None with `mesh`, got {_shown(axis_name)}; use mesh= "
            "for global arrays and axis_name= inside your own shard_map or pmap."
        )
    return tuple(names)


def frozen_specs(specs: Any) -> tuple[Any, tuple[Any, ...]]:
    """Returns a tree of partition specs as hashable parts."""
    leaves, treedef = jax.tree.flatten(specs, is_leaf=is_spec)
    return treedef, tuple(leaves)


def check_integer(name: str, value: Any, least: int) -> None:
    """Raises unless `value` is a Python (or NumPy) integer of at least `least`."""
    is_integer = hasattr(value, "__index__") and not isinstance(value, bool)
    if isinstance(value, jax.Array) or not is_integer:
        raise ValueError(
            f"`{name}` must be a static integer, got {_shown(value)}; under "
            "optax.inject_hyperparams pass static_args=dho2_jax.STATIC_ARGS."
        )
    if value < least:
        raise ValueError(f"`{name}` must be >= {least}, got {value}; raise it.")


def check_steps(name: str, value: Any) -> tuple[int, ...]:
    """Returns `value` as a tuple of steps >= 1, or raises."""
    if not isinstance(value, tuple | list):
        raise ValueError(
            f"`{name}` must be a tuple of steps, got {_shown(value)}; "
            "pass for example (20, 50), or ()."
        )
    for step in value:
        check_integer(name, step, 1)
    return tuple(int(step) for step in value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises unless `value` is one of `choices`; names the nearest."""
    if isinstance(value, str) and value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, 1)
    hint = f"the nearest is '{near[0]}'" if near else "choose one of them"
    options = ", ".join(f"'{c}'" for c in choices)
    raise ValueError(f"`{name}` must be one of {options}, got {_shown(value)}; {hint}.")


def check_number(name: str, value: Any, low: float, high: float | None = None) -> None:
    """Raises when a plain number is out of range; JAX scalars and schedules pass."""
    if callable(value) or (isinstance(value, jax.Array) and value.shape == ()):
        return
    is_number = isinstance(value, numbers.Real | np.ndarray)
    if isinstance(value, bool) or not is_number or np.shape(cast(Any, value)) != ():
        raise ValueError(
            f"`{name}` must be a number, a scalar array or a schedule, got "
            f"{_shown(value)}; pass one number, or a function of the step count."
        )
    number = float(cast(float, value))
    inside = number >= low and (high is None or number < high)
    if not inside:
        rule = f">= {low:g}" if high is None else f"in [{low:g}, {high:g})"
        raise ValueError(
            f"`{name}` must be {rule}, got {value}; choose a value in that range."
        )


def _shown(value: Any) -> str:
    """A value and its type on one short line."""
    text = " ".join(repr(value).split())
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{text} ({type(value).__name__})"
