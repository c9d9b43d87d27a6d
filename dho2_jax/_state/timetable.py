# SPDX-License-Identifier: Apache-2.0
"""When to refresh, asked of whatever knows: a schedule, a transformation or a state."""

from typing import Any

from dho2_jax._checks import check_integer, shown
from dho2_jax._numerics import schedules
from dho2_jax._numerics.schedules import Schedule
from dho2_jax._state.config import Config
from dho2_jax._state.states import find_boxed


def should_refresh(
    step: int,
    of: Any = None,
    warmup_steps: int | None = None,
    early_refreshes: tuple[int, ...] | None = None,
    *,
    refresh_period: int | None = None,
    where: Any = None,
) -> bool:
    """Tells on the host whether to refresh before a step.

    A pure function of numbers that every process knows; no device is read. Ask the
    state, or the transformation: then the loop cannot disagree with them.

    Args:
      step: Updates done so far, a Python int.
      of: What knows: the state, in any nest of Optax states; `dho2`'s transformation
        itself; or a `Schedule`. None: what the other arguments say. A number stands
        for `refresh_period`.
      warmup_steps: As in `Schedule`, in place of `of`.
      early_refreshes: As in `Schedule`, in place of `of`.
      refresh_period: As in `Schedule`, in place of `of`.
      where: Which DHO² state is meant, if the nest holds several; see `metrics`.

    Returns:
      True at `warmup_steps`, `warmup_steps + T`, ..., and at the early ones.

    Raises:
      ValueError: If an argument is not an integer in its range, or `of` knows nothing.
    """
    schedule = _schedule(
        step, of, warmup_steps, early_refreshes, refresh_period, None, where
    )
    return schedules.is_due(schedule, step)


def sweep_index(
    step: int,
    of: Any = None,
    warmup_steps: int | None = None,
    early_refreshes: tuple[int, ...] | None = None,
    num_matvecs: int | None = None,
    *,
    refresh_period: int | None = None,
    where: Any = None,
) -> int:
    """Tells on the host which sweep of a staggered refresh a step belongs to.

    The loop keeps its curvature batch, and whatever else the curvature depends on, for
    as long as this number stays the same: all products of a sweep must be of one
    function.

    Args:
      step: Updates done so far, a Python int.
      of: As for `should_refresh`.
      warmup_steps: As in `Schedule`, in place of `of`.
      early_refreshes: As in `Schedule`, in place of `of`.
      num_matvecs: As in `Schedule`, in place of `of`; needed with early refreshes, and
        where T is shorter than a sweep, to tell which starts are passed over because a
        sweep is under way.
      refresh_period: As in `Schedule`, in place of `of`.
      where: As for `should_refresh`.

    Returns:
      How many sweeps have started up to this step, less one: -1 before the first.

    Raises:
      ValueError: As for `should_refresh`; or if `num_matvecs` is missing.
    """
    schedule = _schedule(
        step, of, warmup_steps, early_refreshes, refresh_period, num_matvecs, where
    )
    if schedule.num_matvecs is None and schedule.early_refreshes:
        raise ValueError(
            "`num_matvecs` must be given to sweep_index with "
            f"early_refreshes={schedule.early_refreshes}, got None; ask the state, or "
            "pass that of dho2, by default num_largest + num_smallest + 4."
        )
    return schedules.sweep(schedule, step)


def _schedule(
    step: Any,
    of: Any,
    warmup_steps: Any,
    early_refreshes: Any,
    refresh_period: Any,
    num_matvecs: Any,
    where: Any,
) -> Schedule:
    """Returns the schedule that is meant."""
    check_integer("step", step, 0)
    if hasattr(of, "__index__") and refresh_period is None:
        of, refresh_period = None, of
    given = {
        "refresh_period": refresh_period,
        "warmup_steps": warmup_steps,
        "early_refreshes": early_refreshes,
        "num_matvecs": num_matvecs,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if of is None:
        return Schedule(**given)
    if given:
        raise ValueError(
            f"`of` must come without {', '.join(given)}, got both; what you ask knows "
            "its own schedule."
        )
    if isinstance(of, Schedule):
        return of
    update = getattr(of, "update", None)
    for made_of in getattr(update, "args", ()):
        if isinstance(getattr(made_of, "config", None), Config):
            return made_of.config.schedule
    if callable(update):
        raise ValueError(
            "`of` must be a transformation of dho2 itself, a state or a Schedule, got "
            f"{shown(type(of).__name__)} around one or without; pass the state that "
            "its init returned."
        )
    # In every step of a loop: no leaf need be looked at.
    return find_boxed(of, where).config.schedule
