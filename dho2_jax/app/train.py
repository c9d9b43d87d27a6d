# SPDX-License-Identifier: Apache-2.0
"""One training run: compiled programs, a clock, and rows of numbers.

Gets a task and an optimizer, knows neither files nor pictures.
"""

import contextlib
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dho2_jax.app import distributed
from dho2_jax.app.optimizers import Optimizer
from dho2_jax.app.programs import Programs
from dho2_jax.app.task import Task
from dho2_jax.app.writers import Row


@dataclasses.dataclass
class Run:
    """What one training run left behind."""

    optimizer: Optimizer
    seed: int
    compile_seconds: float
    rows: list[Row] = dataclasses.field(default_factory=list)
    interrupted: bool = False

    def series(self, name: str) -> tuple[list[int], list[float], list[Any]]:
        """Returns steps, seconds and values of the rows that have `name`."""
        rows = [row for row in self.rows if name in row]
        return (
            [row["step"] for row in rows],
            [row["seconds"] for row in rows],
            [row[name] for row in rows],
        )


def train(
    task: Task,
    optimizer: Optimizer,
    programs: Programs,
    *,
    seed: int,
    steps: int,
    log_every: int,
    eval_every: int,
    write: Callable[[Row], None],
    should_stop: Callable[[], bool],
) -> Run:
    """Trains from scratch and reports as it goes.

    The clock runs while batches are gathered, steps, refreshes and probes execute. It
    stands still during evaluation and logging. The host waits for the device at logged
    steps only.

    Args:
      task: The task.
      optimizer: The optimizer.
      programs: Compiled for both.
      seed: Of the initial parameters and the batches.
      steps: Number of updates.
      log_every: Updates between rows.
      eval_every: Updates between evaluations on the validation batch.
      write: Called with each row.
      should_stop: Asked before every update.

    Returns:
      The run, with the rows written so far if it was stopped.
    """
    run = Run(optimizer, seed, programs.compile_seconds)
    params, state = programs.start(np.uint32(seed))
    losses: list[jax.Array] = []
    advance = stepper(task, optimizer, programs, seed)
    seconds, refreshes = 0.0, 0

    def record(done: int, evaluate: bool) -> Row:
        nonlocal refreshes
        row: Row = {"step": done, "seconds": seconds}
        if losses:
            values = jax.device_get(losses)
            row["train_loss"] = float(sum(values) / len(values))
        if evaluate:
            row["val_loss"] = float(programs.evaluate(params))
        if programs.observe is not None:
            metrics, (eigenvalues, valid) = jax.device_get(programs.observe(state))
            row |= {name: value.item() for name, value in metrics.items()}
            if row["refreshes"] != refreshes:
                refreshes = row["refreshes"]
                row["eigenvalues"] = eigenvalues[valid].tolist()
        run.rows.append(row)
        write(row)
        return row

    record(0, True)
    with tqdm(
        total=steps,
        desc=f"{optimizer.label}, seed {seed}",
        unit="step",
        mininterval=0.5,
        disable=not distributed.is_first(),
    ) as bar:
        start, logged = time.perf_counter(), 0
        run.interrupted = should_stop()  # pressed while the programs compiled
        for done in range(1, steps + 1):
            if run.interrupted:
                break
            params, state, loss = advance(done - 1, params, state)
            losses.append(loss)
            run.interrupted = should_stop()
            last = done == steps or run.interrupted
            if last or done % log_every == 0 or done % eval_every == 0:
                jax.block_until_ready((params, state))
                seconds += time.perf_counter() - start
                row = record(done, last or done % eval_every == 0)
                losses.clear()
                bar.set_postfix_str(_progress(row), refresh=False)
                bar.update(done - logged)
                start, logged = time.perf_counter(), done
    return run


def stepper(
    task: Task, optimizer: Optimizer, programs: Programs, seed: int
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """Returns what does one step of a run, the curvature's share of it included.

    Args:
      task: The task.
      optimizer: The optimizer.
      programs: Compiled for both.
      seed: Of the batches.

    Returns:
      `advance(step, params, state) -> (params, state, loss)`, for steps that follow
      each other, from any on; the host waits for no device.
    """
    refresh_at, launch_at = optimizer.refresh_at, optimizer.launch_at
    sweep_of, overlap = optimizer.sweep_of, programs.overlap
    part, sweep = (), None  # a sweep's curvature batch, and which sweep it is
    pending, due = None, None  # a refresh under way elsewhere, and when it lands

    def advance(step: int, params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        nonlocal part, sweep, pending, due
        on_host = task.dataset.train_batch(seed, step)
        batch = programs.place(on_host)
        if programs.refresh is not None and refresh_at is not None and refresh_at(step):
            state = programs.refresh(state, params, batch)
        if overlap is not None and step == due:
            state, pending = overlap.land(state, pending), None
        if overlap is not None and launch_at is not None and launch_at(step):
            pending = overlap.launch(state, params, on_host)
            due = step + optimizer.land_after
        if programs.take_part is not None and sweep_of is not None:
            if not part or sweep_of(step) != sweep:
                # That of its first step, also where a run is resumed in mid-sweep.
                sweep, first = sweep_of(step), step
                while first > 0 and sweep_of(first - 1) == sweep:
                    first -= 1
                then = task.dataset.train_batch(seed, first)
                part = (programs.take_part(programs.place(then)),)
        return programs.step(params, state, batch, *part)

    return advance


def _progress(row: Row) -> str:
    """Returns what the progress bar says beside the step count."""
    parts = [f"loss {row['train_loss']:.4g}"]
    if "refreshes" in row:
        parts += [f"sharpness {row['sharpness']:.3g}", f"refreshes {row['refreshes']}"]
    return ", ".join(parts)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a question that the loop asks; a second one raises.

    Among many processes the first one raises: a process that stops while the others
    take the next step would leave them waiting.

    Yields:
      A function that says whether Ctrl-C was pressed.
    """
    pressed = threading.Event()
    in_main = threading.current_thread() is threading.main_thread()
    if jax.distributed.is_initialized() or not in_main:
        yield pressed.is_set
        return
    previous = signal.getsignal(signal.SIGINT)

    def handler(number, frame):
        pressed.set()
        tqdm.write("Stopping; Ctrl-C again to drop everything.", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, handler)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, previous)
