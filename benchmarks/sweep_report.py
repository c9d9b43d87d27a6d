# SPDX-License-Identifier: Apache-2.0
"""Tables of the sweeps that were made; called by `sweeps.py report`."""

import math
from collections.abc import Iterator, Sequence

import contenders as who
import fleet
import numpy as np
import sweep_records

from dho2_jax.app.show import table


def report(names: Sequence[str]) -> None:
    """Prints what tuning, larger batches and random starts came to."""
    for title, head, rows in (
        ("Tuning: steps to the base's tuned loss", TUNE, _tuned),
        ("Larger batches: steps to the base's tuned loss", BATCHES, _batches),
        ("Random starts", STARTS, _starts),
    ):
        cells = [head, *(row for name in names for row in rows(name))]
        print(f"\n### {title}\n", *table.markdown(cells), sep="\n")


TUNE = (
    "workload, base",
    "tuned, ends at",
    "DHO², untuned",
    "DHO², tuned",
    "tuned's rate",
    "untuned over tuned",
)


def _tuned(name: str) -> Iterator[Sequence[str]]:
    """Yields, for each base, how much tuning the hybrid's start would give."""
    for base, start in who.STARTS.items():
        alone = sweep_records.load("tune", name, base)
        ours = sweep_records.load("tune", name, f"DHO² on {base}")
        if alone is None or ours is None:
            continue
        _, goal = fleet.best(alone)
        found = fleet.steps_to(ours, goal)
        nearest = _nearest(found, start)
        soonest = min(found, key=lambda at: found[at])
        steps, least = found[nearest], found[soonest]
        yield (
            f"{name}, {base}",
            f"{goal:.4g}",
            f"{_count(steps)} (from {nearest[0]:g})",
            _count(least),
            f"{soonest[0]:g} {who.schedule_name(soonest[1])}",
            f"{steps / least:.2f}" if least < math.inf else "-",
        )


BATCHES = (
    "workload, base",
    "tuned, ends at",
    "its rate",
    "after steps",
    "DHO², untuned, is there after",
    "of the steps",
    "ends at",
)


def _batches(name: str) -> Iterator[Sequence[str]]:
    """Yields a row for each factor of the batch and each base."""
    for factor in sweep_records.FACTORS.get(name, ()):
        for base, start in who.STARTS.items():
            label = f"{name} x{factor:g}"
            alone = sweep_records.load("batches", label, base)
            ours = sweep_records.load("batches", label, f"DHO² on {base}")
            if alone is None:
                continue
            (rate, cosine), goal = fleet.best(alone)
            own = min(fleet.steps_to(alone, goal).values())
            row = [f"{label}, {base}", f"{goal:.4g}"]
            row += [f"{rate:g} {who.schedule_name(cosine)}", _count(own)]
            if ours is not None:
                found = fleet.steps_to(ours, goal)
                at = _nearest(found, start)
                row += [_count(found[at]), f"{found[at] / own:.2f}"]
                row += [f"{fleet.finals(ours)[at]:.4g}"]
            else:
                row += ["not run"] * 3
            yield row


STARTS = (
    "workload, base",
    "starts",
    "not finite",
    "ended above its start",
    "above twice the median",
    "median [best, worst] by batch, small to large",
)


def _starts(name: str) -> Iterator[Sequence[str]]:
    """Yields a row for each base."""
    for base in who.STARTS:
        found = [
            sweep_records.load("starts", workload, f"DHO² on {base}")
            for workload in (f"{name} x0.25", name, f"{name} x4")
        ]
        made = [one for one in found if one is not None]
        if not made:
            continue
        ends = [one.losses[:, -1] for one in made]
        finite = [x[np.isfinite(x)] for x in ends]
        above = sum(
            int(np.sum(x > one.losses[:, 0])) for x, one in zip(ends, made, strict=True)
        )
        yield (
            f"{name}, {base}",
            str(sum(map(len, ends))),
            str(sum(map(len, ends)) - sum(map(len, finite))),
            str(above),
            str(sum(int(np.sum(x > 2 * np.median(x))) for x in finite)),
            "; ".join(
                "not run"
                if one is None
                else f"{np.median(one.losses[:, -1]):.4g} "
                f"[{np.min(one.losses[:, -1]):.4g}, {np.max(one.losses[:, -1]):.4g}]"
                for one in found
            ),
        )


def _nearest(found: dict[fleet.Choice, float], start: float) -> fleet.Choice:
    """Returns the constant setting nearest to where an untuned run starts."""
    return min(found, key=lambda at: (at[1], abs(math.log(at[0] / start))))


def _count(steps: float) -> str:
    return "never" if steps == math.inf else f"{steps:.0f}"
