# SPDX-License-Identifier: Apache-2.0
"""When the curvature is renewed: pure functions of a step count that everybody knows.

The same arithmetic serves the host, on a Python int, and `update`, on a traced count.
No device is read to decide, so that no process takes a branch that others do not.
"""

import dataclasses
from typing import Any

import jax

from dho2_jax._checks import check_integer, check_number, check_steps, shown

# The best of what was measured on the patch autoencoder, for heavy ball and for Adam.
PERIOD = 100
EARLY = (20, 50)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When curvature is renewed; `dho2` and the loop around it ask one and the same.

    Args:
      refresh_period: T, in updates, between refreshes, or between starts of sweeps.
      warmup_steps: Updates before the first.
      early_refreshes: More updates to refresh at, counted from the first, since
        curvature changes fastest at the start of training. None: (20, 50) where T is at
        least 100; with a shorter period, none.
      max_drift: Refresh also in between, when the parameters have gone farther than
        this times their own norm since the subspace in use was measured. Only `update`
        knows of it. None: by the step count alone.
      num_matvecs: m, the products of a sweep: starts within another sweep are then
        passed over. `dho2` fills it in with refresh="staggered".

    Raises:
      ValueError: If an argument is out of its range.
    """

    refresh_period: int = PERIOD
    warmup_steps: int = 0
    early_refreshes: tuple[int, ...] | None = None
    max_drift: float | None = None
    num_matvecs: int | None = None

    def __post_init__(self):
        """Checks all, and puts plain numbers in their places."""
        check_integer("refresh_period", self.refresh_period, 1)
        check_integer("warmup_steps", self.warmup_steps, 0)
        period, early = int(self.refresh_period), self.early_refreshes
        if early is None:
            early = EARLY if period >= PERIOD else ()
        early = check_steps("early_refreshes", early)
        _check_max_drift(self.max_drift)
        drift = None if self.max_drift is None else float(self.max_drift)
        products = self.num_matvecs
        if products is not None:
            check_integer("num_matvecs", products, 1)
            products = int(products)
            period, early = _sweep_starts(period, early, products)
        object.__setattr__(self, "refresh_period", period)
        object.__setattr__(self, "warmup_steps", int(self.warmup_steps))
        object.__setattr__(self, "early_refreshes", early)
        object.__setattr__(self, "max_drift", drift)
        object.__setattr__(self, "num_matvecs", products)


def one_schedule(schedule: Schedule | None, **flat: Any) -> Schedule:
    """Returns the schedule, or one made of the flat arguments."""
    if schedule is None:
        return Schedule(**flat)
    if not isinstance(schedule, Schedule):
        raise ValueError(
            f"`schedule` must be a dho2_jax.Schedule, got {type(schedule).__name__}; a "
            "factor on the rate is rate_schedule=."
        )
    if Schedule(**flat) != Schedule():
        raise ValueError(
            f"`schedule` must come without {', '.join(flat)}, got both; say all of it "
            "in the Schedule."
        )
    return schedule


def is_due(schedule: Schedule, step: Any) -> Any:
    """Returns whether to begin at `step`, an int or traced."""
    since = step - schedule.warmup_steps
    due = since % schedule.refresh_period == 0
    for early in schedule.early_refreshes or ():
        due |= since == early
    return due & (since >= 0)


def fits(schedule: Schedule, step: Any) -> Any:
    """Returns whether a sweep that begins at `step` ends before the next is due."""
    assert schedule.num_matvecs is not None
    since, period = step - schedule.warmup_steps, schedule.refresh_period
    ends = since + sweep_length(schedule.num_matvecs)
    found = (since > 0) & (ends <= since - since % period + period)
    for early in schedule.early_refreshes or ():
        found &= (since > early) | (ends <= early)
    return found


def sweep(schedule: Schedule, step: int) -> int:
    """Returns how many sweeps began up to `step`, less one."""
    since = step - schedule.warmup_steps
    if since < 0:
        return -1
    period = schedule.refresh_period
    early = [x for x in schedule.early_refreshes or () if x % period]
    return since // period + sum(x <= since for x in early)


def of_sweeps(schedule: Schedule, num_matvecs: int) -> Schedule:
    """Returns when sweeps of m products begin, where the schedule asks for them.

    Raises:
      ValueError: If a sweep does not fit into the period.
    """
    if num_matvecs > schedule.refresh_period:
        raise ValueError(
            "`num_matvecs` must be <= refresh_period with refresh='staggered', "
            f"got {num_matvecs} for {schedule.refresh_period}; a step makes one "
            "product: lower one or raise the other."
        )
    return dataclasses.replace(schedule, num_matvecs=num_matvecs)


def sweep_length(num_matvecs: int) -> int:
    """Returns how many steps after a sweep's start the next one may start.

    One goes to the start, m + 1 to the products and one to putting them to use; and
    every tenth in between, or fewer, to a probe of the rate.
    """
    return num_matvecs + 3 + (num_matvecs + 9) // 9


def _sweep_starts(
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


def _check_max_drift(value: Any) -> None:
    """Raises unless it is None or a positive number."""
    if value is None:
        return
    check_number("max_drift", value, 0.0)
    if callable(value) or isinstance(value, jax.Array) or not value > 0:
        raise ValueError(
            f"`max_drift` must be a static number > 0 or None, got {shown(value)}; "
            "pass for example 0.05."
        )
