# SPDX-License-Identifier: Apache-2.0
"""The curvature that a checkpoint holds, found by its names: needs no config or model.

Any directory that Orbax wrote will do, by `dho2 train` or by a loop of one's own. Only
a few numbers are read, never the eigenvectors.
"""

import pathlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from dho2_jax.app.errors import UserError
from dho2_jax.app.record import Row
from dho2_jax.app.show import saved, table, writers

Names = tuple[str, ...]  # the way from the top of a saved tree to a node

DEPTH = 5  # runs/NAME/dho2/checkpoints/STEP/state
# What is read of a DHO² state, and by what it is known.
WANTED = (
    *(("count",), ("enabled",), ("base_scaling",), ("momentum",)),
    *(("subspace", name) for name in ("eigenvalues", "valid", "residuals")),
    ("subspace", "next_eigenvalue"),
    *(("counters", name) for name in ("refreshes", "rejected", "recurrence_defect")),
    *(("anchor", name) for name in ("count", "norm", "path")),
    ("rate", "cuts"),
)
OPTIONAL = {("rate", "cuts")}  # base_rate="fixed" has none
NEEDED = {"step", "age", "eigenvalues", "next_eigenvalue"}  # in a row, to draw it


class Spectrum(NamedTuple):
    """The curvature in one checkpoint."""

    path: pathlib.Path  # of the saved tree
    eigenvalues: np.ndarray  # of the pairs found, descending
    residuals: np.ndarray  # bounds on how far each is from one of the curvature's
    next_eigenvalue: float
    metrics: dict[str, float]  # of those of `dho2_jax.metrics`, what needs no vectors


def load(where: str) -> tuple[Spectrum, list[Row]]:
    """Finds and reads the curvature.

    Args:
      where: A run's directory, the latest checkpoint of which counts; or one of its
        checkpoints; or any directory in which Orbax saved a DHO² state.

    Returns:
      The spectrum, and rows of earlier ones: those of `metrics.jsonl` if it is there,
      else those of the checkpoints before.

    Raises:
      UserError: If there is none, or more than one to choose from.
    """
    path = pathlib.Path(where)
    if not path.is_dir():
        raise UserError(f"there is no directory `{where}`; give that of a checkpoint.")
    items = [*saved.trees_in(path, DEPTH)]
    if not items:
        raise UserError(
            f"`{where}` holds no complete Orbax checkpoint; give the directory of a "
            "run, or of a checkpoint in it."
        )
    found = {item: names for item in items if (names := _curvatures(item))}
    if not found:
        raise UserError(
            f"`{where}` holds checkpoints, but no DHO² state in them; give those of a "
            "run with dho2_jax.dho2."
        )
    runs = sorted({_run_of(item) for item in found})
    if len(runs) > 1:
        raise UserError(
            f"`{where}` holds the curvature of {len(runs)} runs; name one of them, "
            f"such as `{runs[0]}`."
        )
    latest = max(found, key=_step_of)
    if len(found[latest]) > 1:
        ways = ", ".join(".".join(names) for names in found[latest])
        raise UserError(
            f"`{latest}` holds {len(found[latest])} DHO² states ({ways}), and this "
            "command draws one; save them apart."
        )
    spectrum = _read(latest, found[latest][0])
    return spectrum, _history(spectrum, found[latest][0])


def _step_dir(item: pathlib.Path) -> pathlib.Path | None:
    """Returns the directory of a saved tree that is named after a step, if one is."""
    for one in (item, item.parent):
        if re.fullmatch(r"(.*[_-])?\d+", one.absolute().name):
            return one
    return None


def _step_of(item: pathlib.Path) -> int:
    """Returns the step that a saved tree's directory names, or -1."""
    place = _step_dir(item)
    digits = place and re.search(r"\d+$", place.absolute().name)
    return int(digits[0]) if digits else -1


def _run_of(item: pathlib.Path) -> pathlib.Path:
    """Returns the directory that all checkpoints of a saved tree's run share."""
    place = _step_dir(item)
    return place.parent if place else item


def _curvatures(item: pathlib.Path) -> list[Names]:
    """Returns the ways to the DHO² states in a saved tree."""
    flat = {_unboxed(names) for names in ocp.tree.to_flat_dict(_tree(item))}
    mark = ("subspace", "eigenvalues")
    starts = {names[:-2] for names in flat if names[-2:] == mark}
    needed = set(WANTED) - OPTIONAL
    return sorted(s for s in starts if all((*s, *one) in flat for one in needed))


def _tree(item: pathlib.Path) -> Any:
    try:
        return saved.read_tree(item)
    except saved.DAMAGED as error:
        raise UserError(
            f"the checkpoint `{item}` cannot be read ({error}); give an earlier one."
        ) from error


def _unboxed(names: Names) -> Names:
    """Takes away what Flax NNX's variables add to the name of an array."""
    return names[:-1] if names[-1] == "value" else names


def _read(item: pathlib.Path, start: Names) -> Spectrum:
    """Reads one spectrum, and no other array of the tree."""
    tree = _tree(item)

    def is_wanted(names: Names) -> bool:
        within = names[: len(start)] == start
        return within and _unboxed(names)[len(start) :] in WANTED

    flat = {
        names: 0 if is_wanted(names) else ocp.PLACEHOLDER
        for names in ocp.tree.to_flat_dict(tree)
    }
    template = ocp.tree.from_flat_dict(flat, target=tree)
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), template)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            item.absolute(),
            args=ocp.args.PyTreeRestore(item=template, restore_args=arguments),
        )
    values = {
        _unboxed(names)[len(start) :]: np.asarray(x)
        for names, x in ocp.tree.to_flat_dict(restored).items()
        if x is not ocp.PLACEHOLDER
    }
    return _spectrum(item, values)


def _spectrum(item: pathlib.Path, values: dict[Names, np.ndarray]) -> Spectrum:
    valid = values["subspace", "valid"].astype(bool)
    eigenvalues = values["subspace", "eigenvalues"][valid]
    residuals = values["subspace", "residuals"][valid]
    order = np.argsort(eigenvalues)[::-1]
    number = {names: x.item() for names, x in values.items() if x.shape == ()}
    norm, path = number["anchor", "norm"], number["anchor", "path"]
    metrics = {
        "count": number["count",],
        "enabled": int(number["enabled",]),
        "refreshes": number["counters", "refreshes"],
        "rejected": number["counters", "rejected"],
        "age": number["count",] - number["anchor", "count"],
        "drift": path / norm if norm > 0 else 0.0,
        "recurrence_defect": number["counters", "recurrence_defect"],
        "base_scaling": number["base_scaling",],
        "rate_cuts": number.get(("rate", "cuts"), 0),
        "momentum_norm": float(np.linalg.norm(values["momentum",])),
    }
    return Spectrum(
        item,
        eigenvalues[order].astype(float),
        residuals[order].astype(float),
        number["subspace", "next_eigenvalue"],
        metrics,
    )


def _history(spectrum: Spectrum, start: Names) -> list[Row]:
    """Returns rows of the spectra up to this one, each refresh once."""
    item, last = spectrum.path, spectrum.metrics["count"]
    for directory in item.absolute().parents[:3]:
        rows = writers.read_rows(directory / writers.METRICS)
        rows = [row for row in rows if NEEDED <= row.keys()]  # may be anybody's file
        rows = [row for row in rows if row["eigenvalues"] and row["step"] <= last]
        if rows:
            return rows
    place = _step_dir(item)
    others = []
    if place is not None:
        relative = item.relative_to(place)
        beside = (one / relative for one in place.parent.iterdir())
        before = (one for one in beside if _step_of(one) < _step_of(item))
        others = [one for one in before if saved.is_tree(one)]
    spectra = [
        _read(one, start)
        for one in sorted(others, key=_step_of)
        if start in _curvatures(one)
    ]
    rows = {one.metrics["refreshes"]: _row(one) for one in (*spectra, spectrum)}
    return [row for row in rows.values() if row["eigenvalues"]]


def _row(one: Spectrum) -> Row:
    return {
        "step": one.metrics["count"],
        "age": one.metrics["age"],
        "eigenvalues": one.eigenvalues[::-1].tolist(),
        "next_eigenvalue": one.next_eigenvalue,
    }


def report(spectrum: Spectrum) -> str:
    """Lays a spectrum out for a terminal.

    Args:
      spectrum: From `load`.

    Returns:
      Lines of at most 88 columns.
    """
    metrics, following = spectrum.metrics, spectrum.next_eigenvalue
    lines = [f"DHO² state in {spectrum.path}", ""]
    if len(spectrum.eigenvalues):
        rows = [["rank", "eigenvalue", "error below", "/ next"]]
        rounding = np.finfo(np.float32).eps * np.abs(spectrum.eigenvalues).max()
        for rank, (value, bound) in enumerate(
            zip(spectrum.eigenvalues, spectrum.residuals, strict=True), start=1
        ):
            share = f"{value / following:.1f}" if following > 0 else "-"
            error = max(bound, rounding)  # what Lanczos promises, or float32
            rows.append([str(rank), f"{value:.5g}", f"{error:.2g}", share])
        rows.append(["next", f"{following:.5g}"])
        lines += table.lines(rows, "r")
        lines[-1] += "  (largest not kept: left to the base)"
    else:
        lines.append("No eigenpairs yet: there was no refresh, or all were rejected.")
    found = [(name, f"{value:.5g}") for name, value in metrics.items()]
    return "\n".join([*lines, "", *table.lines(found, "l")])
