# SPDX-License-Identifier: Apache-2.0
"""Where a run's numbers go: one JSON object a line, and TensorBoard events.

Imports nothing of the application.
"""

import contextlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
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


@contextlib.contextmanager
def open_log(directory: pathlib.Path | None) -> Iterator[Callable[[Row], None]]:
    """Opens `metrics.jsonl` and TensorBoard events in `directory`.

    Args:
      directory: Created if it does not exist; None writes nothing.

    Yields:
      A function that writes one row. Each line is flushed at once, so that a run that
      dies keeps what it wrote.
    """
    if directory is None:
        yield lambda row: None
        return
    directory.mkdir(parents=True, exist_ok=True)
    with (
        open(directory / "metrics.jsonl", "w", encoding="utf-8") as lines,
        contextlib.closing(SummaryWriter(str(directory))) as events,
    ):

        def write(row: Row) -> None:
            lines.write(json.dumps(finite(row)) + "\n")
            lines.flush()
            for name, value in row.items():
                number = isinstance(value, (int, float)) and math.isfinite(value)
                if name != "step" and number:
                    events.add_scalar(name, value, row["step"])
            if row.get("eigenvalues"):
                for rank, value in enumerate(reversed(row["eigenvalues"]), start=1):
                    events.add_scalar(f"eigenvalues/{rank}", value, row["step"])

        yield write
