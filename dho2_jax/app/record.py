# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: rows of numbers, how far it is, what it came to.

Plain data, which the training loop makes and all else writes, reads or draws.
"""

import dataclasses
import math
from typing import Any, NamedTuple, Protocol

Row = dict[str, Any]  # what is known at a step, by name


class Named(Protocol):
    """What a run knows of the optimizer that it was made with."""

    @property
    def name(self) -> str:
        """For files."""
        ...

    @property
    def label(self) -> str:
        """For people."""
        ...


@dataclasses.dataclass
class Run:
    """What one training run left behind."""

    optimizer: Named
    seed: int
    compile_seconds: float
    rows: list[Row] = dataclasses.field(default_factory=list)
    interrupted: bool = False
    returns: int = 0  # to a checkpoint, from where the loss had left

    def series(self, name: str) -> tuple[list[int], list[float], list[Any]]:
        """Returns steps, seconds and values of the rows that have `name`."""
        rows = [row for row in self.rows if name in row]
        return (
            [row["step"] for row in rows],
            [row["seconds"] for row in rows],
            [row[name] for row in rows],
        )


def outcome(run: Run) -> Row:
    """Returns what one run came to.

    Args:
      run: A run with at least one row.

    Returns:
      Plain numbers, for JSON and for sentences.
    """
    last, losses = run.rows[-1], run.series("val_loss")[2]
    finite = [loss for loss in losses if math.isfinite(loss)]
    return {
        "label": run.optimizer.label,
        "seed": run.seed,
        "steps": last["step"],
        "seconds": last["seconds"],
        "compile_seconds": run.compile_seconds,
        "final_val_loss": losses[-1],
        "best_val_loss": min(finite, default=math.nan),
        "interrupted": run.interrupted,
        "returns": run.returns,
    }


class Progress(NamedTuple):
    """How far a run is, beside its parameters and optimizer state; plain data."""

    step: int = 0  # updates done
    seconds: float = 0.0  # of the clock
    position: dict[str, Any] | None = None  # of the data; None: the beginning
    losses: tuple[float, ...] = ()  # since the last row
    rows: int = 0  # written before `step`
    refreshes: int = 0  # that a row has shown
    best: float = math.inf  # validation loss
