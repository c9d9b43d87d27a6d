# SPDX-License-Identifier: Apache-2.0
"""From `config.optimizer` to the base optimizer alone and to DHO² on top of it.

The only file of the application that builds optimizers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import dho2_jax
from dho2_jax.app.errors import UserError, nearest
from dho2_jax.app.fields import Config, keyword_defaults

# Fields of `config.optimizer` that shape the base; all others are dho2's own keywords.
BASE_DEFAULTS: dict[str, Any] = {
    "base": "adam",
    "learning_rate": 1e-3,  # where DHO² starts; the base alone has base_learning_rate
    "schedule": "constant",
    "momentum": 0.9,  # heavy_ball, nesterov, muon
    "b1": 0.9,  # adam, adamw
    "b2": 0.999,
    "weight_decay": 1e-4,  # adamw
}
# `config.optimizer.schedule` takes the place of the first; the others follow from
# `config.mesh_shape` and the fields beside it.
NOT_FIELDS = (
    "rate_schedule",
    "schedule",
    "mesh",
    "param_specs",
    "axis_name",
    "curvature_mask",
)


# Those of a `Schedule`.
TIMES = ("refresh_period", "warmup_steps", "early_refreshes", "max_drift")


class Optimizer(NamedTuple):
    """A transformation and how the loop has to drive it."""

    name: str  # for files: "dho2" or "base"
    label: str  # for people: "DHO² (Adam)"
    transform: optax.GradientTransformationExtraArgs
    hybrid: bool = False  # takes a value_fn and has dho2 metrics
    curvature: str = "hessian"
    refresh_at: Callable[[int], bool] | None = None  # steps at which the loop refreshes
    sweep_of: Callable[[int], int] | None = None  # the staggered sweep of a step
    stagger_axis: str = ""  # the mesh axis along which sweeps are staggered too
    launch_at: Callable[[int], bool] | None = None  # steps at which it launches one
    curvature_mesh: Any = None  # devices that refresh while the others train
    land_after: int = 0  # steps from such a refresh's launch to its use

    @property
    def gauss_newton(self) -> bool:
        """Whether that value_fn is a pair of functions."""
        return self.curvature == "ggn"


BASES: dict[str, tuple[str, Callable[..., optax.GradientTransformation]]] = {
    "sgd": ("SGD", lambda rate, c: optax.sgd(rate)),
    "heavy_ball": ("heavy ball", lambda rate, c: optax.sgd(rate, momentum=c.momentum)),
    "nesterov": (
        "Nesterov",
        lambda rate, c: optax.sgd(rate, momentum=c.momentum, nesterov=True),
    ),
    "adam": ("Adam", lambda rate, c: optax.adam(rate, b1=c.b1, b2=c.b2)),
    "adamw": (
        "AdamW",
        lambda rate, c: optax.adamw(
            rate, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay
        ),
    ),
    "muon": ("Muon", lambda rate, c: optax.contrib.muon(rate, beta=c.momentum)),
}


Schedule = Callable[[float, int], optax.ScalarOrSchedule]  # peak, steps -> rate


def _constant(rate: float, steps: int) -> optax.ScalarOrSchedule:
    return rate


def _cosine(rate: float, steps: int) -> optax.ScalarOrSchedule:
    return optax.schedules.cosine_decay_schedule(rate, steps)


def _warmup_cosine(rate: float, steps: int) -> optax.ScalarOrSchedule:
    return optax.schedules.warmup_cosine_decay_schedule(
        0.0, rate, max(1, steps // 10), max(2, steps)
    )


SCHEDULES: dict[str, Schedule] = {
    "constant": _constant,
    "cosine": _cosine,
    "warmup_cosine": _warmup_cosine,
}


def optimizer_defaults() -> dict[str, Any]:
    """Returns every field of `config.optimizer` with its default."""
    found = BASE_DEFAULTS | keyword_defaults(dho2_jax.dho2, skip=NOT_FIELDS)
    return found | {"early_refreshes": dho2_jax.Schedule().early_refreshes}


def _schedule(name: str, where: str) -> Schedule:
    """Looks a schedule up by its name."""
    if name not in SCHEDULES:
        raise UserError(
            f"`config.{where}` must name a schedule, got {name!r}; "
            + nearest(name, SCHEDULES)
        )
    return SCHEDULES[name]


def _base(
    config: Config, schedule: Schedule, *, rate: float
) -> optax.GradientTransformation:
    """Builds the base optimizer with a rate and a schedule."""
    name = config.optimizer.base
    if name not in BASES:
        raise UserError(
            f"`config.optimizer.base` must name a base optimizer, got {name!r}; "
            + nearest(name, BASES)
        )
    return BASES[name][1](schedule(rate, config.steps), config.optimizer)


def build_base(config: Config) -> Optimizer:
    """Builds the base optimizer alone, at its own rate.

    Args:
      config: A completed config.

    Returns:
      The optimizer of the comparison.

    Raises:
      UserError: If the config names an unknown base or schedule.
    """
    schedule = _schedule(config.base_schedule, "base_schedule")
    transform = _base(config, schedule, rate=config.base_learning_rate)
    label = BASES[config.optimizer.base][0]
    return Optimizer("base", label, optax.with_extra_args_support(transform))


def build_dho2(
    config: Config,
    mesh: jax.sharding.Mesh | None = None,
    param_specs: Any = None,
    curvature_mesh: jax.sharding.Mesh | None = None,
) -> Optimizer:
    """Builds DHO² on top of the base optimizer.

    Args:
      config: A completed config.
      mesh: Over which the curvature is split, or None.
      param_specs: How the parameters are split over it.
      curvature_mesh: Of the devices set aside for the refresh, or None.

    Returns:
      The optimizer, with what the loop needs to know about its refreshes.

    Raises:
      UserError: If the config names an unknown base, or dho2 rejects a value.
    """
    fields = config.optimizer
    # A rate that the curvature sets would undo a schedule within the base.
    inside = fields.base_rate == "fixed"
    schedule = _schedule(fields.schedule, "optimizer.schedule")
    base = _base(config, schedule if inside else _constant, rate=fields.learning_rate)
    outside = _constant if inside else schedule
    arguments = {
        name: value
        for name, value in fields.items()
        # None stands for the library's own default.
        if name not in BASE_DEFAULTS and value is not None
    }
    if mesh is not None:
        arguments |= {"mesh": mesh, "param_specs": param_specs}
    beside = fields.refresh == "staggered" or curvature_mesh is not None
    try:
        times = dho2_jax.Schedule(
            **{name: arguments.pop(name) for name in TIMES if name in arguments}
        )
        period, first = times.refresh_period, times.warmup_steps
        # With curvature that is made beside the steps the first ones are the loop's.
        later = dataclasses.replace(
            times, warmup_steps=first + period, early_refreshes=()
        )
        arguments["schedule"] = later if fields.refresh == "staggered" else times
        transform = dho2_jax.dho2(
            base, rate_schedule=outside(1.0, config.steps), **arguments
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"config.optimizer: {error}") from error
    refresh_at = launch_at = sweep_of = None
    if beside:
        # Nothing would be known of the curvature until the first one is through, and in
        # the beginning it changes faster than a slow one follows.
        early = times.early_refreshes or ()
        at_once = {first + step for step in (0, *early) if step < period}
        refresh_at = at_once.__contains__
    elif fields.refresh == "external":
        refresh_at = functools.partial(dho2_jax.should_refresh, of=transform)
    if fields.refresh == "staggered":
        sweep_of = functools.partial(dho2_jax.sweep_index, of=transform)
    elif beside:
        launch_at = functools.partial(dho2_jax.should_refresh, of=later)
    return Optimizer(
        "dho2",
        f"DHO² ({BASES[fields.base][0]})",
        transform,
        hybrid=True,
        curvature=fields.curvature,
        refresh_at=refresh_at,
        launch_at=launch_at,
        sweep_of=sweep_of,
        stagger_axis=config.stagger_axis,
        curvature_mesh=curvature_mesh,
        land_after=config.land_after or max(1, period // 4),
    )


def num_matvecs(config: Config) -> int:
    """Returns m, the Lanczos steps of a refresh, with dho2's own default.

    Args:
      config: A completed config.
    """
    fields = config.optimizer
    return fields.num_matvecs or fields.num_largest + fields.num_smallest + 4
