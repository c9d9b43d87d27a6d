# SPDX-License-Identifier: Apache-2.0
"""When the curvature is renewed: pure functions of a step count that everybody knows.

The same arithmetic serves the host, on a Python int, and `update`, on a traced count.
No device is read to decide, so that no process takes a branch that others do not.
"""

from typing import Any

from dho2_jax._state.config import check_integer, check_steps, sweep_starts


def should_refresh(
    step: int,
    refresh_period: int = 200,
    warmup_steps: int = 0,
    early_refreshes: tuple[int, ...] = (),
) -> bool:
    """Tells on the host whether to refresh before a step.

    A pure function of numbers that every process knows; no device is read.

    Args:
      step: Updates done so far, a Python int.
      refresh_period: T, steps between refreshes.
      warmup_steps: Steps before the first refresh.
      early_refreshes: More steps to refresh at, counted from the first refresh.

    Returns:
      True at `warmup_steps`, `warmup_steps + T`, ..., and at the early ones.

    Raises:
      ValueError: If an argument is not an integer in its range.
    """
    early = _checked(step, refresh_period, warmup_steps, early_refreshes)
    return is_due(step - warmup_steps, refresh_period, early)


def sweep_index(
    step: int,
    refresh_period: int = 200,
    warmup_steps: int = 0,
    early_refreshes: tuple[int, ...] = (),
    num_matvecs: int | None = None,
) -> int:
    """Tells on the host which sweep of a staggered refresh a step belongs to.

    The loop keeps its curvature batch, and whatever else the curvature depends on, for
    as long as this number stays the same: all products of a sweep must be of one
    function. Arguments as `dho2` got them.

    Args:
      step: Updates done so far, a Python int.
      refresh_period: T, steps between the starts of sweeps.
      warmup_steps: Steps before the first sweep.
      early_refreshes: More steps to start at, counted from the first start.
      num_matvecs: m; needed with `early_refreshes`, and where T is shorter than a
        sweep, to tell which starts are passed over because a sweep is under way.

    Returns:
      How many sweeps have started up to this step, less one; -1 before the first.

    Raises:
      ValueError: If an argument is not an integer in its range, or `num_matvecs` is
        missing.
    """
    early = _checked(step, refresh_period, warmup_steps, early_refreshes)
    if num_matvecs is not None:
        check_integer("num_matvecs", num_matvecs, 1)
        refresh_period, early = sweep_starts(refresh_period, early, num_matvecs)
    elif early:
        raise ValueError(
            f"`num_matvecs` must be given to sweep_index with early_refreshes={early}, "
            "got None; pass that of dho2, by default num_largest + num_smallest + 4."
        )
    since = step - warmup_steps
    if since < 0:
        return -1
    return since // refresh_period + sum(
        one <= since for one in early if one % refresh_period
    )


def is_due(since: Any, refresh_period: int, early_refreshes: tuple[int, ...]) -> Any:
    """Returns whether to begin `since` steps after the warm-up, an int or traced."""
    due = since % refresh_period == 0
    for early in early_refreshes:
        due |= since == early
    return due & (since >= 0)


def _checked(
    step: int, refresh_period: int, warmup_steps: int, early_refreshes: tuple[int, ...]
) -> tuple[int, ...]:
    check_integer("step", step, 0)
    check_integer("refresh_period", refresh_period, 1)
    check_integer("warmup_steps", warmup_steps, 0)
    return check_steps("early_refreshes", early_refreshes)
