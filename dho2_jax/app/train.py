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
import numpy as np
import optax
from tqdm import tqdm

import dho2_jax
from dho2_jax.app import distributed, placement
from dho2_jax.app.optimizers import Optimizer
from dho2_jax.app.task import Task
from dho2_jax.app.writers import Row


class Blueprint(NamedTuple):
    """A program before it is compiled: `function.lower(*arguments)`."""

    function: Any  # jitted
    arguments: tuple[Any, ...]  # ShapeDtypeStructs, with shardings on a mesh


class Blueprints(NamedTuple):
    """All that a run executes but the evaluation, which needs the validation batch."""

    start: Blueprint  # seed -> params, state
    step: Blueprint  # params, state, batch -> params, state, loss
    refresh: Blueprint | None  # state, params, batch -> state
    observe: Blueprint | None  # state -> metrics, spectrum


class Programs(NamedTuple):
    """Compiled ahead of time, so that no clock ever sees a compilation."""

    start: Callable[..., Any]  # seed, uint32 -> params, state
    step: Callable[..., Any]  # params, state, batch -> params, state, loss
    refresh: Callable[..., Any] | None  # state, params, batch -> state
    observe: Callable[..., Any] | None  # state -> metrics, spectrum
    evaluate: Callable[..., Any]  # params -> loss
    place: Callable[..., Any]  # batch in host memory -> batch on the devices
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


def build_programs(
    task: Task,
    optimizer: Optimizer,
    curvature_batch_size: int,
    mesh: jax.sharding.Mesh | None = None,
    param_specs: Any = None,
) -> Blueprints:
    """Builds what a run of this task with this optimizer executes, and nothing more.

    Nothing is computed and no array is made: the devices of the mesh may be those of
    another machine.

    Args:
      task: The task.
      optimizer: The optimizer, built for the same mesh.
      curvature_batch_size: Examples of each batch that measure curvature, spread evenly
        over it, so that on a mesh every device has its part already.
      mesh: The mesh, or None for one device.
      param_specs: How the parameters are split, from `placement.param_specs`.

    Returns:
      The programs with their abstract arguments; they serve every seed. The training
      step and the refresh donate the parameters and states that they replace.
    """
    transform = optimizer.transform
    whole = placement.replicated(mesh)
    param_shardings = placement.param_shardings(mesh, param_specs)
    params = placement.abstract(jax.eval_shape(task.init, 0), param_shardings)
    state_shardings = placement.state_shardings(
        transform, params, mesh, hybrid=optimizer.hybrid
    )
    state = placement.abstract(jax.eval_shape(transform.init, params), state_shardings)
    batch = placement.abstract(task.dataset.batch_spec, placement.batch_sharding(mesh))

    def curvature_of(batch) -> Any:
        part = placement.spread(batch, curvature_batch_size, mesh)
        return task.value_fn(part, gauss_newton=optimizer.gauss_newton)

    def start(seed):
        params = task.init(seed)
        return params, transform.init(params)

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

    seed = jax.ShapeDtypeStruct((), np.uint32, sharding=whole)
    pair = (param_shardings, state_shardings)
    return Blueprints(
        Blueprint(jax.jit(start, out_shardings=pair), (seed,)),
        Blueprint(
            jax.jit(step, out_shardings=(*pair, whole), donate_argnums=(0, 1)),
            (params, state, batch),
        ),
        Blueprint(
            jax.jit(refresh, out_shardings=state_shardings, donate_argnums=0),
            (state, params, batch),
        )
        if optimizer.refresh_at is not None
        else None,
        Blueprint(jax.jit(observe, out_shardings=whole), (state,))
        if optimizer.hybrid
        else None,
    )


def compile_programs(
    task: Task,
    optimizer: Optimizer,
    curvature_batch_size: int,
    mesh: jax.sharding.Mesh | None = None,
    param_specs: Any = None,
) -> Programs:
    """Compiles what `build_programs` builds, and the evaluation.

    Args:
      task: The task.
      optimizer: The optimizer, built for the same mesh.
      curvature_batch_size: Examples of each batch that measure curvature.
      mesh: The mesh, or None for one device.
      param_specs: How the parameters are split.

    Returns:
      The programs; they serve every seed.
    """
    began = time.perf_counter()
    blueprints = build_programs(
        task, optimizer, curvature_batch_size, mesh, param_specs
    )

    def compiled(one: Blueprint) -> Any:
        return one.function.lower(*one.arguments).compile()

    params = blueprints.step.arguments[0]
    validation = placement.put(task.dataset.validation, mesh)
    evaluate = jax.jit(task.loss_fn, out_shardings=placement.replicated(mesh))
    evaluate = evaluate.lower(params, validation).compile()
    return Programs(
        start=compiled(blueprints.start),
        step=compiled(blueprints.step),
        refresh=compiled(blueprints.refresh) if blueprints.refresh else None,
        observe=compiled(blueprints.observe) if blueprints.observe else None,
        evaluate=lambda params: evaluate(params, validation),
        place=lambda batch: placement.put(batch, mesh),
        compile_seconds=time.perf_counter() - began,
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
    refresh_at = optimizer.refresh_at
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
            batch = programs.place(task.dataset.train_batch(seed, done - 1))
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
