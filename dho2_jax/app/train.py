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
from typing import Any, NamedTuple

import jax
import optax
from tqdm import tqdm

import dho2_jax
from dho2_jax.app.optimizers import Optimizer
from dho2_jax.app.tasks import Task
from dho2_jax.app.writers import Row


class Programs(NamedTuple):
    """Compiled ahead of time, so that no clock ever sees a compilation."""

    step: Callable[..., Any]  # params, state, batch -> params, state, loss
    evaluate: Callable[..., Any]  # params, batch -> loss
    refresh: Callable[..., Any] | None  # state, params, curvature_batch -> state
    observe: Callable[..., Any] | None  # state -> metrics, spectrum
    compile_seconds: float


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


def compile_programs(
    task: Task, optimizer: Optimizer, curvature_batch_size: int
) -> Programs:
    """Compiles what a run of this task with this optimizer will execute.

    Args:
      task: The task.
      optimizer: The optimizer.
      curvature_batch_size: Examples at the head of each batch that measure curvature.

    Returns:
      The programs; they serve every seed. The training step and the refresh donate the
      parameters and states that they replace.
    """
    transform = optimizer.transform

    def curvature_of(batch) -> Any:
        part = jax.tree.map(lambda x: x[:curvature_batch_size], batch)
        if optimizer.gauss_newton:
            return (
                lambda params: task.outputs_fn(params, part),
                lambda outputs: task.output_loss(outputs, part),
            )
        return lambda params: task.loss_fn(params, part)

    def step(params, state, batch):
        loss, grads = jax.value_and_grad(task.loss_fn)(params, batch)
        extra = {"value_fn": curvature_of(batch)} if optimizer.hybrid else {}
        updates, state = transform.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, loss

    def refresh(state, params, batch):
        return dho2_jax.refresh(state, params, curvature_of(batch))

    def observe(state):
        subspace = dho2_jax.subspace(state)
        return dho2_jax.metrics(state), (subspace.eigenvalues, subspace.valid)

    params = task.init(0)
    state = jax.jit(transform.init)(params)
    batch = task.dataset.train_batch(0, 0)
    start = time.perf_counter()
    programs = Programs(
        jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile(),
        jax.jit(task.loss_fn).lower(params, task.dataset.validation).compile(),
        (
            jax.jit(refresh, donate_argnums=0).lower(state, params, batch).compile()
            if optimizer.refresh_at is not None
            else None
        ),
        jax.jit(observe).lower(state).compile() if optimizer.hybrid else None,
        0.0,
    )
    return programs._replace(compile_seconds=time.perf_counter() - start)


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
    params = task.init(seed)
    state = jax.jit(optimizer.transform.init)(params)
    losses: list[jax.Array] = []
    refresh_at = optimizer.refresh_at
    seconds, refreshes = 0.0, 0

    def record(done: int, evaluate: bool) -> Row:
        nonlocal refreshes
        row: Row = {"step": done, "seconds": seconds}
        if losses:
            values = jax.device_get(losses)
            row["train_loss"] = float(sum(values) / len(values))
        if evaluate:
            row["val_loss"] = float(programs.evaluate(params, task.dataset.validation))
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
    ) as bar:
        start, logged = time.perf_counter(), 0
        run.interrupted = should_stop()  # pressed while the programs compiled
        for done in range(1, steps + 1):
            if run.interrupted:
                break
            batch = task.dataset.train_batch(seed, done - 1)
            if programs.refresh and refresh_at and refresh_at(done - 1):
                state = programs.refresh(state, params, batch)
            params, state, loss = programs.step(params, state, batch)
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


def _progress(row: Row) -> str:
    """Returns what the progress bar says beside the step count."""
    parts = [f"loss {row['train_loss']:.4g}"]
    if "refreshes" in row:
        parts += [f"sharpness {row['sharpness']:.3g}", f"refreshes {row['refreshes']}"]
    return ", ".join(parts)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a question that the loop asks; a second one raises.

    Yields:
      A function that says whether Ctrl-C was pressed.
    """
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
