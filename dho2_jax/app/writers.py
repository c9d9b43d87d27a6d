# SPDX-License-Identifier: Apache-2.0
"""Where a run's numbers go: one JSON object a line, and TensorBoard events.

Imports nothing of the application.
"""

import contextlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tensorboardX import SummaryWriter

Row = dict[str, Any]


def free_directory(wanted: str) -> pathlib.Path:
    """Creates `wanted`, or `wanted-1`, `wanted-2`, ... if that holds files already.

    Args:
      wanted: The path asked for.

    Returns:
      An empty directory; nothing that exists is ever written over.
    """
    directory, index = pathlib.Path(wanted), 0
    while directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        index += 1
        directory = pathlib.Path(f"{wanted}-{index}")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def finite(value: Any) -> Any:
    """Returns `value` with numbers that JSON cannot say (nan, inf) replaced by None."""
    if isinstance(value, Mapping):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes plain data as indented JSON.

    Args:
      path: The file to write.
      value: Nested dicts and lists of numbers and strings.
    """
    path.write_text(json.dumps(finite(value), indent=2) + "\n", encoding="utf-8")


def read_rows(path: pathlib.Path) -> list[Row]:
    """Reads what `open_log` wrote.

    Args:
      path: A `metrics.jsonl`.

    Returns:
      Its rows; nan where JSON could not say the number. A last line that a process did
      not live to finish is left out.
    """
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
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
    path = directory / "metrics.jsonl"
    before = path.with_suffix(".tmp")
    before.write_text("".join(map(_line, kept)), encoding="utf-8")
    before.replace(path)  # at no time is there half a file
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
