# SPDX-License-Identifier: Apache-2.0
"""Where a run's numbers go: one JSON object a line, and TensorBoard events."""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tensorboardX import SummaryWriter

from dho2_jax.app.record import Row

METRICS = "metrics.jsonl"  # in the directory of each optimizer's run


def finite(value: Any) -> Any:
    """Returns `value` with numbers that JSON cannot say (nan, inf) replaced by None."""
    if isinstance(value, Mapping):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(value: Any) -> str:
    """Returns plain data as indented JSON.

    Args:
      value: Nested dicts and lists of numbers and strings.
    """
    return json.dumps(finite(value), indent=2) + "\n"


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes plain data as JSON, so that at no time there is half a file.

    Args:
      path: The file to write or to replace.
      value: Nested dicts and lists of numbers and strings.
    """
    _replace(path, to_json(value))


def _replace(path: pathlib.Path, text: str) -> None:
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """Reads what `write_json` wrote of a dict.

    Args:
      path: A file, which need not exist.

    Returns:
      The dict, or None if there is none that can be read.
    """
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return None


def read_rows(path: pathlib.Path) -> list[Row]:
    """Reads what `open_log` wrote.

    Args:
      path: A `metrics.jsonl`, which need not exist.

    Returns:
      Its rows up to the first that is damaged, which is the last one where a process
      did not live to finish it; nan where JSON could not say the number.
    """
    rows = []
    if not path.is_file():
        return rows
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict):
            break
        rows.append({k: math.nan if v is None else v for k, v in row.items()})
    return rows


@contextlib.contextmanager
def open_log(
    directory: pathlib.Path | None, kept: Sequence[Row] = ()
) -> Iterator[Callable[[Row], None]]:
    """Opens `metrics.jsonl` and TensorBoard events in `directory`.

    Args:
      directory: Created if it does not exist; None writes nothing.
      kept: Rows of a run that is continued, to which those to come are added; all else
        that the file held is dropped.

    Yields:
      A function that writes one row. Each line is flushed at once, so that a run that
      dies keeps what it wrote.
    """
    if directory is None:
        yield lambda row: None
        return
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / METRICS
    _replace(path, "".join(map(_line, kept)))
    purge = kept[-1]["step"] + 1 if kept else None
    with (
        open(path, "a", encoding="utf-8") as lines,
        contextlib.closing(SummaryWriter(str(directory), purge_step=purge)) as events,
    ):

        def write(row: Row) -> None:
            lines.write(_line(row))
            lines.flush()
            for name, value in row.items():
                number = isinstance(value, (int, float)) and math.isfinite(value)
                if name != "step" and number:
                    events.add_scalar(name, value, row["step"])
            if row.get("eigenvalues"):
                for rank, value in enumerate(reversed(row["eigenvalues"]), start=1):
                    events.add_scalar(f"eigenvalues/{rank}", value, row["step"])

        yield write


def _line(row: Row) -> str:
    return json.dumps(finite(row)) + "\n"
