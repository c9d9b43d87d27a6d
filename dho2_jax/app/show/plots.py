# SPDX-License-Identifier: Apache-2.0
"""The picture of a run: loss against steps and seconds, and the curvature over time.

Reads rows only. Uses Matplotlib's object interface, so that no global backend is set.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    StrMethodFormatter,
)

from dho2_jax.app.record import Row, Run
from dho2_jax.app.show.spectrum import Spectrum

# Okabe and Ito's blue and vermilion differ to every kind of colour vision.
COLOURS = {"dho2": "#0072B2", "base": "#D55E00"}
STYLES = {"dho2": "-", "base": (0, (5, 1.5))}
GREY = "#555555"


def plot_runs(
    path: pathlib.Path, runs: Sequence[Run], *, title: str, loss_label: str
) -> None:
    """Draws runs of DHO² and of its base into one PNG.

    Args:
      path: The file to write.
      runs: Runs of one or more seeds; with several, the median and the range.
      title: What was trained.
      loss_label: What the loss is, with its unit.
    """
    names = list(dict.fromkeys(run.optimizer.name for run in runs))
    groups = {name: [r for r in runs if r.optimizer.name == name] for name in names}
    hybrid = groups.get("dho2", [])
    figure = Figure(figsize=(15, 4.6), dpi=150)
    steps, seconds, spectrum = figure.subplots(1, 3)
    for name, group in groups.items():
        _draw_losses(steps, group, COLOURS[name], STYLES[name], against=0)
        _draw_losses(seconds, group, COLOURS[name], STYLES[name], against=1)
    _mark_target(steps, groups, against=0)
    _mark_target(seconds, groups, against=1)
    _finish_losses(steps, groups, "training steps", loss_label)
    _finish_losses(seconds, groups, "training time (seconds)", loss_label)
    steps.set_title("Loss against steps")
    seconds.set_title("Loss against time (curvature in, compilation out)")
    run = hybrid[0] if hybrid else None
    rows = [row for row in run.rows if "eigenvalues" in row] if run else []
    _draw_history(spectrum, rows, run.rows[-1]["step"] if run else 1)
    seed = f" (seed {run.seed})" if run else ""
    spectrum.set_title(f"Curvature kept in the subspace{seed}")
    figure.suptitle(title, fontsize="x-large")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.06, wspace=0.03)
    figure.savefig(path)


def _draw_losses(
    axes: Axes, group: Sequence[Run], colour: str, style: object, against: int
) -> None:
    """Draws one optimizer's losses; `against` picks steps (0) or seconds (1)."""
    if len(group) == 1:
        train = group[0].series("train_loss")
        axes.plot(train[against], train[2], color=colour, alpha=0.25, linewidth=0.8)
    curves = [run.series("val_loss") for run in group]
    length = min(len(curve[0]) for curve in curves)
    if length == 0:
        return
    x = np.median([curve[against][:length] for curve in curves], axis=0)
    losses = np.array([curve[2][:length] for curve in curves], dtype=float)
    median = np.median(losses, axis=0)
    label = f"{group[0].optimizer.label}: {median[-1]:.4g}"
    axes.plot(x, median, color=colour, linestyle=style, label=label, linewidth=2)
    if len(curves) > 1:
        axes.fill_between(
            x, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.2, lw=0
        )


def _mark_target(axes: Axes, groups: dict[str, list[Run]], against: int) -> None:
    """Marks where DHO² first is as good as its base in the end."""
    if set(groups) != set(COLOURS):
        return
    target = np.median([run.series("val_loss")[2][-1] for run in groups["base"]])
    hits = [
        next((x for x, y in zip(*curve, strict=True) if y <= target), np.nan)
        for run in groups["dho2"]
        for curve in [(run.series("val_loss")[against], run.series("val_loss")[2])]
    ]
    hit = float(np.median(hits))
    axes.axhline(target, color=GREY, linewidth=0.8, linestyle=":")
    if np.isfinite(hit):
        axes.plot(
            hit,
            target,
            marker="o",
            color=COLOURS["dho2"],
            linestyle="",
            label=f"DHO² gets there after {hit:.3g} {('steps', 's')[against]}",
        )


def _finish_losses(
    axes: Axes, groups: dict[str, list[Run]], x_label: str, loss_label: str
) -> None:
    """Sets scales, limits and labels of a loss panel."""
    curves = [
        np.array(run.series("val_loss")[2], float)
        for group in groups.values()
        for run in group
    ]
    losses = np.concatenate(curves) if curves else np.array([])
    losses = losses[np.isfinite(losses) & (losses > 0)]
    axes.set(xlabel=x_label, ylabel=loss_label, xlim=(0, None))
    if len(losses):
        # The first steep steps, or a run that diverges, must not press the rest flat.
        early = [curve[min(len(curve) - 1, len(curve) // 20 + 1)] for curve in curves]
        early = [loss for loss in early if np.isfinite(loss)]
        starts = [curve[0] for curve in curves if np.isfinite(curve[0])]
        top = min(max(starts, default=np.inf), 2 * max(early, default=np.inf))
        top = min(top, losses.max())
        axes.set_yscale("log")
        axes.set_ylim(losses.min() / 1.2, 1.1 * max(top, 1.5 * losses.min()))
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        single = all(len(group) == 1 for group in groups.values())
        spread = "faint: training" if single else "median; band: all seeds"
        axes.legend(title=f"final validation loss ({spread})", frameon=False)
    _quiet(axes)


def plot_spectrum(
    path: pathlib.Path, spectrum: Spectrum, rows: Sequence[Row], *, title: str
) -> None:
    """Draws the curvature that a checkpoint holds into one PNG.

    Args:
      path: The file to write.
      spectrum: What it holds.
      rows: Spectra up to that one, one a refresh.
      title: Where it was found.
    """
    figure = Figure(figsize=(12.5, 4.8), dpi=150)
    now, history = figure.subplots(1, 2, width_ratios=(1, 1.25))
    metrics = spectrum.metrics
    _draw_now(now, spectrum)
    measured = metrics["count"] - metrics["age"]
    now.set_title(f"Kept at step {metrics['count']}, measured at step {measured}")
    _draw_history(history, rows, int(metrics["count"]))
    history.set_title("How they moved, refresh by refresh")
    figure.suptitle(title, fontsize="large")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.06, wspace=0.03)
    figure.savefig(path)


def _draw_now(axes: Axes, spectrum: Spectrum) -> None:
    """Draws each eigenvalue with its bound, and what is left to the base."""
    axes.set(xlabel="rank", ylabel="eigenvalue of the loss curvature")
    _quiet(axes)
    values, following = spectrum.eigenvalues, spectrum.next_eigenvalue
    if not len(values):
        axes.text(0.5, 0.5, "no refresh yet", ha="center", transform=axes.transAxes)
        return
    ranks = np.arange(1, len(values) + 1)
    _scale(axes, np.array([*values, following]))
    floor = axes.get_ylim()[0] if axes.get_yscale() == "log" else 0.0
    for rank, value, bound, colour in zip(
        ranks, values, spectrum.residuals, _colours(len(values)), strict=True
    ):
        axes.plot((rank, rank), (floor, value), color=colour, alpha=0.35, linewidth=5)
        axes.plot(rank, value, marker="o", markersize=7, color=colour)
        if bound > 0.02 * abs(value):  # else it is hidden by the dot
            axes.errorbar(rank, value, yerr=bound, color=GREY, capsize=4, linewidth=1)
    axes.axhline(
        following,
        color=GREY,
        linestyle=":",
        linewidth=2,
        label=f"next (left to the base): {following:.3g}",
    )
    axes.plot([], [], color=GREY, marker="|", linestyle="", label="bound on the error")
    axes.annotate(
        f"{values[0]:.3g}", (1, values[0]), xytext=(9, -3), textcoords="offset points"
    )
    axes.legend(frameon=False, loc="upper right")
    axes.set_xlim(0.3, len(values) + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _draw_history(axes: Axes, rows: Sequence[Row], last: int) -> None:
    """Draws the kept eigenvalues and the next one, from each refresh to the next."""
    axes.set(xlabel="training steps", ylabel="eigenvalue of the loss curvature")
    _quiet(axes)
    # A row is logged some steps after the refresh whose eigenvalues it has.
    steps = [row["step"] - row["age"] for row in rows]
    spectra = [row["eigenvalues"] for row in rows]
    if not spectra:
        axes.text(0.5, 0.5, "no refresh yet", ha="center", transform=axes.transAxes)
        return
    rank = max(len(one) for one in spectra)
    values = np.full((len(spectra), rank), np.nan)
    for row, one in zip(values, spectra, strict=True):
        row[: len(one)] = one[::-1]
    colours = _colours(rank)
    marker = "o" if len(steps) < 3 else ""
    for index in range(rank):
        label = {0: "largest", rank - 1: "smallest kept"}.get(index)
        axes.step(
            [*steps, last],
            np.append(values[:, index], values[-1, index]),
            where="post",
            color=colours[index],
            label=label,
            linewidth=1.3,
            marker=marker,
            markersize=3,
        )
    following = [row["next_eigenvalue"] for row in rows]
    axes.step(
        [*steps, last],
        [*following, following[-1]],
        where="post",
        color=GREY,
        linestyle=":",
        linewidth=2,
        label="next (left to the base)",
    )
    _scale(axes, np.array([*values.ravel(), *following], dtype=float))
    axes.set_xlim(0, max(last, 1))
    axes.legend(frameon=False)


def _colours(count: int) -> np.ndarray:
    """Returns a colour for each rank, dark for the sharpest."""
    return colormaps["viridis"](np.linspace(0, 0.85, count))


def _scale(axes: Axes, values: np.ndarray) -> None:
    """Makes the axis of eigenvalues logarithmic, around zero where some are not > 0."""
    values = values[np.isfinite(values)]
    sizes = np.abs(values[values != 0])
    if len(sizes) and values.min() > 0:
        axes.set_yscale("log")
        axes.set_ylim(values.min() / 1.6, values.max() * 1.6)
    elif len(sizes):
        # Linear around zero, up to a power of ten a decade below the typical size.
        threshold = 10.0 ** np.floor(np.log10(np.median(sizes)) - 1)
        axes.set_yscale("symlog", linthresh=threshold, linscale=0.5)
        exponents = np.arange(
            round(np.log10(threshold)), np.ceil(np.log10(sizes.max())) + 1
        )
        powers = 10.0**exponents
        axes.yaxis.set_major_locator(FixedLocator([*-powers[::-1], 0, *powers]))
        axes.set_ylim(1.5 * min(values.min(), -threshold / 2), 1.8 * values.max())


def _quiet(axes: Axes) -> None:
    """Takes away the ink that says nothing."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
