# SPDX-License-Identifier: Apache-2.0
"""One training run: compiled programs, a clock, and rows of numbers.

Gets a task and an optimizer, knows neither files nor pictures.
"""

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dho2_jax.app.record import Progress, Row, Run
from dho2_jax.app.run import distributed
from dho2_jax.app.run.optimizers import Optimizer
from dho2_jax.app.run.programs import Programs
from dho2_jax.app.run.stepper import Stepper
from dho2_jax.app.tasks.interface import Task

Save = Callable[[Any, Any, Progress], None]  # params, state, progress
Saved = tuple[Any, Any, Progress]  # what it was called with
_RETURNS = 3  # to a checkpoint; what then leaves again is left at the last of them


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
    resumed: Saved | None = None,
    rows: Sequence[Row] = (),
    save: Save | None = None,
    save_every: int = 0,
    go_back: Callable[[], Saved | None] | None = None,
    lost_factor: float = 0.0,
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

    A run whose validation loss is not finite, or above `lost_factor` times its best,
    goes back to what was last saved, or to its beginning, and on from there with other
    batches; a row says so. It is asked before each saving too, so that nothing is
    saved that is lost. After three returns it ends at what was last saved.

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
      go_back: Returns what `save` was last called with; None: never go back.
      lost_factor: Over the best validation loss; 0: never go back.

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
    seconds, refreshes, best = begun.seconds, begun.refreshes, begun.best
    may_return = go_back is not None and lost_factor > 0

    def record(done: int, value: float | None) -> Row:
        nonlocal refreshes
        row: Row = {"step": done, "seconds": seconds}
        if losses:
            values = jax.device_get(losses)
            row["train_loss"] = float(sum(values) / len(values))
        if value is not None:
            row["val_loss"] = value
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
        rows = len(run.rows)
        return Progress(done, seconds, position, values, rows, refreshes, best)

    def evaluate() -> tuple[float, bool]:
        """Returns the validation loss, and whether the run is lost by it."""
        nonlocal best
        value = float(programs.evaluate(params))
        lost = not value <= lost_factor * best and math.isfinite(best)
        best = min(best, value) if math.isfinite(value) else best
        return value, lost and may_return

    def is_logged(done: int) -> bool:
        return done == steps or done % log_every == 0 or done % eval_every == 0

    def is_evaluated(done: int) -> bool:
        return done == steps or done % eval_every == 0

    if is_logged(begun.step):
        record(begun.step, evaluate()[0] if is_evaluated(begun.step) else None)
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
        done = begun.step
        while done < steps and not run.interrupted:
            done += 1
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
                value, lost = None, False
                if last or is_evaluated(done) or (save_now and may_return):
                    value, lost = evaluate()
                if lost:
                    assert go_back is not None
                    found = go_back() or (*programs.start(np.uint32(seed)), Progress())
                    params, state, saved = found
                    run.returns += 1
                    _say_lost(run, bar, value, best, done, saved.step)
                    row = {"step": done, "seconds": seconds, "val_loss": value}
                    run.rows.append(row | {"returned_to": saved.step})
                    write(run.rows[-1])
                    losses.clear()
                    advance.forget()
                    done, refreshes, saving = saved.step, saved.refreshes, False
                    last = run.interrupted or run.returns > _RETURNS
                    if last:
                        record(done, evaluate()[0])
                        break
                    bar.update(done - shown)
                    shown = done
                    start = time.perf_counter()
                    continue
                if save is not None and save_now:
                    save(params, state, progress(done))
                    saving = False
                if last or is_logged(done):
                    shows = last or is_evaluated(done)
                    row = record(done, value if shows else None)
                    bar.set_postfix_str(_progress(row), refresh=False)
                    bar.update(done - shown)
                    shown = done
                start = time.perf_counter()
    return run


def _say_lost(run: Run, bar: Any, value: Any, best: float, done: int, to: int) -> None:
    """Says that a run goes back, where the progress bar is."""
    if not distributed.is_first():
        return
    bar.write(
        f"{run.optimizer.label}: the validation loss has left, {value:.4g} at step "
        f"{done} for {best:.4g} before; going back to step {to}.",
        file=sys.stderr,
    )


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
