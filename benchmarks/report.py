# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of a race that was run; called by `time_to_target.py report`."""

import json
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import contenders as who
import race
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from dho2_jax.app.show import table as tables

BASES = tuple(who.BASES)
COLOURS = {  # Okabe and Ito's
    "heavy ball": "#0072B2",
    "Adam": "#D55E00",
    "Muon": "#009E73",
    "Kron": "#CC79A7",
    "K-FAC": "#000000",
    "L-BFGS": "#56B4E9",
}


class Row(NamedTuple):
    """All seeds of one entry."""

    label: str
    contender: str
    records: list[dict[str, Any]]

    def final(self) -> float:
        """Returns the median final loss; of two seeds that which both get to."""
        return statistics.median_high(_last(one) for one in self.records)

    def finals(self) -> tuple[float, float]:
        """Returns the range of final losses."""
        found = [_last(one) for one in self.records]
        return min(found), max(found)

    def to(self, target: float) -> tuple[float, float, int]:
        """Returns median steps and seconds to a target, and how many runs got there."""
        found = [_reach(one, target) for one in self.records]
        steps, seconds = (statistics.median(x) for x in zip(*found, strict=True))
        return steps, seconds, sum(x[0] < math.inf for x in found)

    def per_step(self) -> float:
        """Returns milliseconds a step, refreshes and probes included."""
        return statistics.median(
            1e3 * one["seconds"][-1] / max(1, one["steps"][-1]) for one in self.records
        )


def report(names: Sequence[str], folder: pathlib.Path) -> None:
    """Prints the tables of all workloads that were raced, and draws their pictures."""
    for name in names:
        path = race.path_of(folder, name)
        if not path.exists():
            continue
        rows = load(path)
        raced = [base for base in BASES if any(r.contender == base for r in rows)]
        targets = {base: _tuned(rows, base).final() for base in raced}
        print(f"\n### {name}\n\n{table(rows, targets)}\n\n{ratios(rows, targets)}")
        draw(path.with_name(f"{path.stem.removeprefix('race-')}.png"), rows, targets)


def load(path: pathlib.Path) -> list[Row]:
    """Returns the rows of a race."""
    rows: dict[str, Row] = {}
    for one in json.loads(path.read_text())["records"]:
        row = rows.setdefault(one["label"], Row(one["label"], one["contender"], []))
        row.records.append(one)
    return list(rows.values())


def table(rows: Sequence[Row], targets: dict[str, float]) -> str:
    """Returns a Markdown table: final losses, and seconds (steps) to each target."""
    head = ["optimizer", "final loss [min, max]"]
    head += [f"to {base}'s {goal:.4g}" for base, goal in targets.items()]
    lines = [[*head, "ms a step", "compilation"]]
    for row in rows:
        low, high = row.finals()
        cells = [row.label, f"{row.final():.4g} [{low:.4g}, {high:.4g}]"]
        for goal in targets.values():
            steps, seconds, number = row.to(goal)
            if steps == math.inf:
                cells.append(f"never ({number}/{len(row.records)})" if number else "-")
            else:
                cells.append(f"{_seconds(seconds)} ({steps:.0f})")
        compilation = row.records[0]["compile_seconds"]
        lines.append([*cells, f"{row.per_step():.3g}", f"{compilation:.0f} s"])
    return "\n".join(tables.markdown(lines))


def ratios(rows: Sequence[Row], targets: dict[str, float]) -> str:
    """Returns sentences: each base's own time to its target over that of DHO² on it."""
    lines = []
    for base, goal in targets.items():
        own = [r for r in rows if r.contender == base and "at its" not in r.label]
        alone = _soonest(own, goal)
        ours = [r for r in rows if r.label.startswith(f"DHO² on {base}")]
        untuned = [r for r in ours if r.label == f"DHO² on {base}, untuned"]
        best = _soonest([r for r in ours if "α = 0" not in r.label], goal)
        parts = [
            f"untuned {_ratio(untuned[0].to(goal), alone.to(goal))}",
            f"best ({best.label}) {_ratio(best.to(goal), alone.to(goal))}",
        ]
        lines.append(
            f"* {base}'s target, time (steps) of DHO² on it over {alone.label}: "
            + "; ".join(parts)
        )
    goal = targets["Adam"]
    peers = [r for r in rows if not r.label.startswith(("DHO²", "FOSI"))]
    peers = [r for r in peers if "at its rate" not in r.label]
    hybrids = [r for r in rows if r.label.startswith("DHO²") and "α" not in r.label]
    peer, ours = _soonest(peers, goal), _soonest(hybrids, goal)
    lines.append(
        f"* Adam's target, all rows: best of DHO² ({ours.label}) over best peer "
        f"({peer.label}): {_ratio(ours.to(goal), peer.to(goal))}"
    )
    return "\n".join(lines)


def draw(path: pathlib.Path, rows: Sequence[Row], targets: dict[str, float]) -> None:
    """Draws validation losses against seconds: the median seed of each row."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    shown = [
        *(_tuned(rows, base) for base in targets),
        *(r for r in rows if r.contender in ("K-FAC", "Kron", "L-BFGS")),
        *(r for r in rows if r.label.endswith("untuned") and "α" not in r.label),
    ]
    for row in shown:
        base = row.contender.removeprefix("DHO² on ")
        ordered = sorted(row.records, key=_last)
        one = ordered[len(ordered) // 2]
        axes.plot(
            one["seconds"],
            one["losses"],
            color=COLOURS[base],
            linestyle="-" if row.contender.startswith("DHO²") else "--",
            linewidth=2 if row.contender.startswith("DHO²") else 1.2,
            label=row.label,
        )
    goal = targets["Adam"]
    axes.axhline(goal, color="0.6", linewidth=0.8)
    axes.annotate(
        "tuned Adam's final loss",
        (0.005, goal),
        xycoords=("axes fraction", "data"),
        xytext=(0, -2),
        textcoords="offset points",
        va="top",
        color="0.4",
    )
    last = max(one["seconds"][-1] for one in _tuned(rows, "Adam").records)
    longest = max(one["seconds"][-1] for row in shown for one in row.records)
    axes.set(
        yscale="log",
        xlim=(0, min(2.2 * last, 1.02 * longest)),
        ylim=(0.85 * min(r.final() for r in shown), 6 * goal),
        xlabel="seconds, compilation apart",
        ylabel="validation loss",
        title=f"{path.stem}: tuned peers (dashed) and DHO², nothing tuned",
    )
    for choose in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        choose(ScalarFormatter())
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _tuned(rows: Sequence[Row], contender: str) -> Row:
    """Returns the row of a contender with the best final loss."""
    own = [r for r in rows if r.contender == contender and "at its" not in r.label]
    return min(own, key=lambda row: row.final())


def _soonest(rows: Sequence[Row], target: float) -> Row:
    return min(rows, key=lambda row: (row.to(target)[1], row.final()))


def _ratio(ours: tuple[float, float, int], other: tuple[float, float, int]) -> str:
    if math.inf in (ours[0], other[0]):
        return "never there"
    return f"{ours[1] / other[1]:.2f} ({ours[0] / other[0]:.2f})"


def _seconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds < 0.5 else f"{seconds:.2f} s"


def _last(record: dict[str, Any]) -> float:
    last = record["losses"][-1]
    return last if math.isfinite(last) else math.inf


def _reach(record: dict[str, Any], target: float) -> tuple[float, float]:
    run = race.Run(record["steps"], record["seconds"], record["losses"], [])
    return race.reached(run, target)
