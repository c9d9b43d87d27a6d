# SPDX-License-Identifier: Apache-2.0
"""The base optimizer alone against DHO² on the same budget, over several seeds."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dho2_jax.app.record import Run, outcome
from dho2_jax.app.run.experiment import Experiment, below, compile_for, run_one
from dho2_jax.app.show import table
from dho2_jax.app.show.writers import write_json


def compare(experiment: Experiment, should_stop: Callable[[], bool]) -> list[Run]:
    """Runs both optimizers on every seed, one after the other.

    Args:
      experiment: The experiment; `config.num_seeds` says how many seeds.
      should_stop: Asked before every update.

    Returns:
      The runs; the last may have been interrupted.
    """
    config, runs = experiment.config, []
    optimizers = (experiment.base, experiment.dho2)
    chosen = [(one, compile_for(experiment, one)) for one in optimizers]
    for seed in range(config.seed, config.seed + config.num_seeds):
        for optimizer, programs in chosen:
            run = run_one(
                experiment,
                optimizer,
                programs,
                seed=seed,
                directory=below(experiment, f"{optimizer.name}-seed{seed}"),
                should_stop=should_stop,
            )
            runs.append(run)
            if run.interrupted:
                return runs
    return runs


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Condenses runs to medians and ranges.

    Args:
      runs: Runs of both optimizers; interrupted ones are left out.

    Returns:
      Plain data: the target, which is the base's median final validation loss, and for
      each optimizer its outcomes and how soon they reached the target.
    """
    complete = [run for run in runs if not run.interrupted]
    groups: dict[str, list[Run]] = {}
    for run in complete:
        groups.setdefault(run.optimizer.name, []).append(run)
    target = None
    if "base" in groups:
        finals = [outcome(run)["final_val_loss"] for run in groups["base"]]
        target = float(np.median(finals))
    return {
        "target": target,
        "optimizers": {
            name: _summarise_group(group, target) for name, group in groups.items()
        },
    }


def _summarise_group(group: Sequence[Run], target: float | None) -> dict[str, Any]:
    """Condenses one optimizer's runs."""
    outcomes = [outcome(run) for run in group]

    def spread(name: str) -> dict[str, float]:
        values = [one[name] for one in outcomes]
        return {
            "median": float(np.median(values)),
            "min": float(np.min(values)),
            "max": float(np.max(values)),
        }

    reached = [found for run in group if (found := _reach(run, target)) is not None]
    soonest = np.median(reached, axis=0).tolist() if reached else (None, None)
    return {
        "label": group[0].optimizer.label,
        "final_val_loss": spread("final_val_loss"),
        "best_val_loss": spread("best_val_loss"),
        "seconds": spread("seconds"),
        "compile_seconds": group[0].compile_seconds,
        "reached_target": len(reached),
        "steps_to_target": soonest[0],
        "seconds_to_target": soonest[1],
        "runs": outcomes,
    }


def _reach(run: Run, target: float | None) -> tuple[int, float] | None:
    """Returns steps and seconds of the first evaluation at or below the target."""
    for step, seconds, loss in zip(*run.series("val_loss"), strict=True):
        if target is not None and loss <= target:
            return step, seconds
    return None


def report(summary: dict[str, Any], loss_label: str) -> str:
    """Lays a summary out for a terminal.

    Args:
      summary: From `summarise`.
      loss_label: What the loss is, with its unit.

    Returns:
      Lines of at most 100 columns.
    """
    header = (
        "optimizer",
        "final median [min, max]",
        "best",
        "time",
        "compile",
        "steps to target",
        "time to target",
    )
    if not summary["optimizers"]:
        return "No run was completed."
    rows: list[tuple[str, ...]] = [header]
    for group in summary["optimizers"].values():
        final = group["final_val_loss"]
        count = f"{group['reached_target']}/{len(group['runs'])}"
        steps, seconds = group["steps_to_target"], group["seconds_to_target"]
        rows.append(
            (
                group["label"],
                f"{final['median']:.4g} [{final['min']:.4g}, {final['max']:.4g}]",
                f"{group['best_val_loss']['min']:.4g}",
                f"{group['seconds']['median']:.1f} s",
                f"{group['compile_seconds']:.1f} s",
                "never" if steps is None else f"{steps:.0f} ({count})",
                "never" if seconds is None else f"{seconds:.1f} s",
            )
        )
    lines = table.ruled(rows, "llr")
    if summary["target"] is not None:
        lines.append("")
        lines.append(f"Loss: validation {loss_label}.")
        lines.append(
            f"Target: the base's median final loss, {summary['target']:.4g}, at the "
            "first evaluation that reaches it"
        )
        lines.append(
            "(median over the runs that do; how many do). Time excludes compilation "
            "and evaluation."
        )
    return "\n".join(lines)


def write_summary(experiment: Experiment, summary: dict[str, Any]) -> None:
    """Writes `compare.json` into the experiment's directory, if it has one.

    Args:
      experiment: The experiment.
      summary: From `summarise`.
    """
    if experiment.directory is not None:
        write_json(experiment.directory / "compare.json", summary)
