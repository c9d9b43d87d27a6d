# SPDX-License-Identifier: Apache-2.0
"""The table that `dho2 plan` prints."""

from collections.abc import Callable
from typing import Any

from dho2_jax.app.plan import topology
from dho2_jax.app.show import table

Measured = dict[str, Any]

GROUPS = {
    "parameters": "parameters",
    "base_state": "base optimizer's state",
    "eigenbasis": "eigenbasis",
    "curvature": "rest of the curvature state",
    "batch": "batch",
}


def report(measured: dict[str, Measured], name: str) -> str:
    """Lays out what `plan.plan` found.

    Args:
      measured: By topology.
      name: The topology that was asked for.

    Returns:
      Lines for a terminal, a column for each topology.
    """
    columns = {key: one for key, one in measured.items() if "refused" not in one}
    wanted = measured[name]
    lines = [
        f"{wanted['num_parameters']:,} parameters, k + l = {wanted['num_pairs']}, "
        f"m = {wanted['num_matvecs']}, batch {wanted['batch_size']} "
        f"({wanted['curvature_batch_size']} of it for curvature)",
        "",
    ]
    rows: list[tuple[str, ...]] = [("for each chip", *columns)]
    for label, cell in _rows(columns):
        cells = [cell(key, one) for key, one in columns.items()] if cell else []
        if cell is None or any(cells):
            rows.append((label, *cells))
    lines += table.ruled(rows)
    notes = _notes(measured)
    return "\n".join([*lines, "", *notes] if notes else lines)


Cell = Callable[[str, Measured], str]


def _rows(columns: dict[str, Measured]) -> list[tuple[str, Cell | None]]:
    """Returns labels with what stands beside them; None for a heading."""
    rows: list[tuple[str, Cell | None]] = [
        ("chips in use", lambda key, one: str(one["devices"])),
        (
            "mesh",
            lambda key, one: (
                ", ".join(f"{axis} {size}" for axis, size in one["mesh"].items())
                or "none"
            ),
        ),
        ("", None),
    ]
    for group, label in GROUPS.items():
        rows.append((label, _bytes("groups", group)))
    rows += [
        ("temporaries of a step", _bytes("step", "temporaries")),
        ("temporaries of a refresh", _bytes("refresh", "temporaries")),
        ("new results and code of a step", _sum("step", "new_results", "code")),
        ("new results and code of a refresh", _sum("refresh", "new_results", "code")),
        ("in all during a step", _total("step")),
        ("in all during a refresh", _total("refresh")),
        ("the chip's memory", lambda key, one: _memory(key)),
        ("", None),
    ]
    for heading, program, part in (
        ("collectives of a step", "step", "collectives"),
        ("  and in its branches (probes, periodic refreshes)", "step", "in_branches"),
        ("collectives of one Lanczos product", "product", "collectives"),
    ):
        found = [_get(one, program, part) for one in columns.values()]
        kinds = list(dict.fromkeys(kind for one in found for kind in one or ()))
        if kinds or (part != "in_branches" and any(one is not None for one in found)):
            rows.append((heading if kinds else f"{heading}: none", None))
        rows += [(f"  {kind}", _collective(program, part, kind)) for kind in kinds]
    rows += [
        ("", None),
        ("FLOPs of a step", _flops("step")),
        ("FLOPs of one product alone", _flops("product")),
        ("", None),
        ("eigenbasis of all chips together, over (k + l) n floats", None),
    ]
    counts = sorted({int(k) for one in columns.values() for k in one["padding"]})
    return rows + [(f"  with k + l = {count}", _padding(count)) for count in counts]


def _get(one: Measured, *path: str) -> Any:
    found: Any = one
    for name in path:
        found = None if found is None else found.get(name)
    return found


def _bytes(*path: str) -> Cell:
    return lambda key, one: _size(_get(one, *path))


def _sum(program: str, *names: str) -> Cell:
    def cell(key: str, one: Measured) -> str:
        parts = [_get(one, program, name) for name in names]
        return "" if None in parts else _size(sum(parts))

    return cell


def _total(program: str) -> Cell:
    def cell(key: str, one: Measured) -> str:
        if _get(one, program, "too_large"):
            return "too large"
        total = _get(one, program, "total")
        usable = _generation(key).usable
        if total is None or usable is None:
            return _size(total)
        return f"{_size(total)} = {total / usable:.1%}"

    return cell


def _collective(program: str, part: str, kind: str) -> Cell:
    def cell(key: str, one: Measured) -> str:
        found = _get(one, program, part, kind)
        return f"{found['count']} x, {_size(found['bytes'])}" if found else ""

    return cell


def _flops(program: str) -> Cell:
    def cell(key: str, one: Measured) -> str:
        flops = _get(one, program, "flops")
        return "" if flops is None else f"{flops:.3g}"

    return cell


def _padding(count: int) -> Cell:
    def cell(key: str, one: Measured) -> str:
        ratio = one["padding"].get(str(count))
        return "" if ratio is None else f"{ratio:.4f}"

    return cell


def _generation(key: str) -> topology.Generation:
    return topology.GENERATIONS[topology.parse(key).generation]


def _memory(key: str) -> str:
    """Returns what the compiler lets programs use of a chip's memory."""
    generation = _generation(key)
    if generation.memory is None or generation.usable is None:
        return ""
    return f"{generation.usable / 2**30:.4g} of {generation.memory / 2**30:.4g} GiB"


def _size(size: int | None) -> str:
    """Writes bytes in the unit that suits them."""
    if size is None:
        return ""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size} B"


def _notes(measured: dict[str, Measured]) -> list[str]:
    """Says what the columns cannot."""
    notes = []
    for key, one in measured.items():
        if "refused" in one:
            notes.append(f"{key}: {one['refused']}")
            continue
        for program, label in (("step", "a step"), ("refresh", "a refresh")):
            if reason := _get(one, program, "too_large"):
                notes.append(f"{key}: {label} does not fit: it {reason}.")
        if one["devices"] < one["chips"]:
            notes.append(
                f"{key}: the mesh leaves {one['chips'] - one['devices']} chips idle."
            )
    return notes
