# SPDX-License-Identifier: Apache-2.0
"""One training run: compiled programs, a clock, and rows of numbers.

Gets a task and an optimizer, knows neither files nor pictures.
"""

import contextlib
import dataclasses
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from tqdm import tqdm

from dho2_jax.app import distributed
from dho2_jax.app.optimizers import Optimizer
from dho2_jax.app.programs import Programs
from dho2_jax.app.task import Task
from dho2_jax.app.writers import Row

# Batches are made ahead of the loop, by few threads: they share the CPU with it.
READING = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


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
    }


class Progress(NamedTuple):
    """How far a run is, beside its parameters and optimizer state; plain data."""

    step: int = 0  # updates done
    seconds: float = 0.0  # of the clock
    position: dict[str, Any] | None = None  # of the data; None: the beginning
    losses: tuple[float, ...] = ()  # since the last row
    rows: int = 0  # written before `step`
    refreshes: int = 0  # that a row has shown


Save = Callable[[Any, Any, Progress], None]  # params, state, progress


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
    resumed: tuple[Any, Any, Progress] | None = None,
    rows: Sequence[Row] = (),
    save: Save | None = None,
    save_every: int = 0,
) -> Run:
    """Trains and reports as it goes.

    The clock runs while batches are gathered, steps, refreshes and probes execute. It
    stands still during evaluation, logging and saving. The host waits for the device at
    logged and saved steps only.

    A run that is taken up again does, and writes, exactly what it would have without a
    break. What is saved at a step is what was before that step's row; and nothing is
    saved while a refresh is under way on other devices, but as soon as it has landed.
    After the last step only, such a refresh is lost: a longer run that goes on from
    there keeps the curvature that it has until the next one.

    Args:
      task: The task.
      optimizer: The optimizer.
      programs: Compiled for both.
      seed: Of the initial parameters and the batches.
      steps: Number of updates.
      log_every: Updates between rows.
      eval_every: Updates between evaluations on the validation batch.
      write: Called with each row.
      should_stop: Asked before the first and after every update. A run that is to be
        saved goes on until a refresh under way has landed.
      resumed: What `save` was called with; None begins anew.
      rows: Those written before that.
      save: Called with parameters, state and progress, which it must copy before it
        returns; None: never.
      save_every: Updates between calls of it, which is called at the end too.

    Returns:
      The run, with the rows written so far if it was stopped.
    """
    run = Run(optimizer, seed, programs.compile_seconds, [*rows])
    if resumed is None:
        begun, (params, state) = Progress(), programs.start(np.uint32(seed))
    else:
        params, state, begun = resumed
    losses: list[Any] = [np.float32(loss) for loss in begun.losses]
    advance = Stepper(task, optimizer, programs, seed, begun.position)
    seconds, refreshes = begun.seconds, begun.refreshes

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
        losses.clear()
        return row

    def progress(done: int) -> Progress:
        values = tuple(float(x) for x in jax.device_get(losses))
        position = advance.position()
        return Progress(done, seconds, position, values, len(run.rows), refreshes)

    def is_logged(done: int) -> bool:
        return done == steps or done % log_every == 0 or done % eval_every == 0

    def is_evaluated(done: int) -> bool:
        return done == steps or done % eval_every == 0

    if is_logged(begun.step):
        record(begun.step, is_evaluated(begun.step))
    with tqdm(
        total=steps,
        initial=begun.step,
        desc=f"{optimizer.label}, seed {seed}",
        unit="step",
        mininterval=0.5,
        disable=not distributed.is_first(),
    ) as bar:
        start, shown, saving = time.perf_counter(), begun.step, False
        run.interrupted = should_stop()  # pressed while the programs compiled
        for done in range(begun.step + 1, steps + 1):
            if run.interrupted:
                break
            params, state, loss = advance(done - 1, params, state)
            losses.append(loss)
            settled = save is None or not advance.is_pending()
            run.interrupted = should_stop() and settled
            last = done == steps or run.interrupted
            saving |= last or (save_every > 0 and done % save_every == 0)
            save_now = save is not None and saving and (settled or last)
            if last or save_now or is_logged(done):
                jax.block_until_ready((params, state))
                seconds += time.perf_counter() - start
                if save is not None and save_now:
                    save(params, state, progress(done))
                    saving = False
                if last or is_logged(done):
                    row = record(done, last or is_evaluated(done))
                    bar.set_postfix_str(_progress(row), refresh=False)
                    bar.update(done - shown)
                    shown = done
                start = time.perf_counter()
    return run


class Stepper:
    """Does one step of a run after another, the curvature's share of it included.

    It holds what must be remembered between steps, and waits for no device.
    """

    def __init__(
        self,
        task: Task,
        optimizer: Optimizer,
        programs: Programs,
        seed: int,
        position: dict[str, Any] | None = None,
    ):
        """Prepares the first step, which may be any with the `position` of its batch.

        Args:
          task: The task.
          optimizer: The optimizer.
          programs: Compiled for both.
          seed: Of the batches.
          position: Where the data iterator stands; None: at its beginning.
        """
        self._task, self._optimizer, self._programs = task, optimizer, programs
        self._seed = seed
        dataset = task.dataset.batches(seed)
        self._batches = iter(dataset.to_iter_dataset(READING))
        if position is not None:
            self._batches.set_state(position)
        self._part, self._sweep = (), None  # a sweep's curvature batch, and its number
        self._pending, self._due = None, None  # a refresh elsewhere; when it lands

    def __call__(self, step: int, params: Any, state: Any) -> tuple[Any, Any, Any]:
        """Returns parameters, state and loss after a step; steps follow each other."""
        optimizer, programs = self._optimizer, self._programs
        on_host = next(self._batches)
        batch = programs.place(on_host)
        refresh_at, launch_at = optimizer.refresh_at, optimizer.launch_at
        if programs.refresh is not None and refresh_at is not None and refresh_at(step):
            state = programs.refresh(state, params, batch)
        if programs.overlap is not None and step == self._due:
            state, self._pending = programs.overlap.land(state, self._pending), None
        if programs.overlap is not None and launch_at is not None and launch_at(step):
            self._pending = programs.overlap.launch(state, params, on_host)
            self._due = step + optimizer.land_after
        return programs.step(params, state, batch, *self._part_of(step))

    def is_pending(self) -> bool:
        """Returns whether a refresh is under way that no state knows of."""
        return self._pending is not None

    def position(self) -> dict[str, Any]:
        """Returns where the data iterator stands."""
        return self._batches.get_state()

    def _part_of(self, step: int) -> tuple[Any, ...]:
        """Returns the curvature batch of a staggered sweep, or nothing."""
        programs, sweep_of = self._programs, self._optimizer.sweep_of
        if programs.take_part is None or sweep_of is None:
            return ()
        if not self._part or sweep_of(step) != self._sweep:
            # That of its first step, also where a run is resumed in mid-sweep.
            self._sweep, first = sweep_of(step), step
            while first > 0 and sweep_of(first - 1) == self._sweep:
                first -= 1
            then = self._task.dataset.train_batch(self._seed, first)
            self._part = (programs.take_part(programs.place(then)),)
        return self._part


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
    take the next step would leave them waiting. There the question is whether one of
    them was sent SIGTERM.

    Yields:
      A function that says whether to stop.
    """
    if jax.distributed.is_initialized():
        yield distributed.until_preempted()
        return
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
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
