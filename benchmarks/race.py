# SPDX-License-Identifier: Apache-2.0
"""One run of one optimizer, with a clock that sees all it computes and nothing else."""

import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import contenders as who
import jax
import jax.numpy as jnp
import numpy as np
from contenders import Contender
from workloads import Workload

import dho2_jax


class Programs(NamedTuple):
    """Compiled for one contender on one workload."""

    contender: Contender
    start: Callable[[int], tuple[Any, Any]]  # seed -> params, state
    step: Callable[..., tuple[Any, Any, Any]]
    refresh: Callable[..., Any] | None
    evaluate: Callable[[Any], jax.Array]
    draw: Callable[..., Any]  # seed, step -> batch
    compile_seconds: float


class Run(NamedTuple):
    """One run, at each evaluation."""

    steps: list[int]
    seconds: list[float]
    losses: list[float]
    scales: list[float]  # s of every step; of a base alone 1


def compile_for(workload: Workload, contender: Contender) -> Programs:
    """Compiles all that a run executes, by executing it."""
    task, hybrid = workload.task, contender.refreshes is not None
    validation = jax.device_put(task.dataset.validation)

    def step(params, state, batch, *rate):
        params, state = who.step(workload, contender, *rate, params, state, batch)
        scale = jnp.ones(())
        if hybrid:
            # A copy: the next step donates the state.
            scale = 1.0 * dho2_jax.metrics(state)["base_scaling"]
        return params, state, scale

    def refresh(state, params, batch):
        return who.refresh(workload, params, state, batch)

    init = jax.jit(lambda params: contender.make(1.0, 1.0).init(params))

    def start(seed: int) -> tuple[Any, Any]:
        params = jax.tree.map(jnp.array, task.init(seed))
        return params, init(params)

    programs = Programs(
        contender,
        start,
        jax.jit(step, donate_argnums=(0, 1)),
        jax.jit(refresh, donate_argnums=0) if hybrid else None,
        jax.jit(lambda params: task.loss_fn(params, validation)),
        jax.jit(workload.batch),
        0.0,
    )
    params, state = start(0)
    batch = jax.block_until_ready(programs.draw(np.uint32(0), np.int32(0)))
    jax.block_until_ready(programs.evaluate(params))
    began = time.perf_counter()
    if programs.refresh is not None:
        state = programs.refresh(state, params, batch)
    rate = jax.device_put((np.float32(1e-4), np.float32(1.0)))
    for _ in range(2):
        params, state, _ = programs.step(params, state, batch, *rate)
    jax.block_until_ready(state)
    return programs._replace(compile_seconds=time.perf_counter() - began)


def run(
    workload: Workload,
    programs: Programs,
    *,
    seed: int,
    rate: float | Sequence[float],
    cosine: bool = False,
) -> Run:
    """Trains once.

    The clock runs while steps, refreshes and probes do. It stands still while batches
    are drawn and losses evaluated.

    Args:
      workload: What on.
      programs: Of the contender.
      seed: Of the initial parameters and the batches.
      rate: Of all steps, or of each.
      cosine: Whether it falls to zero over the workload's steps.

    Returns:
      The run.
    """
    contender, steps = programs.contender, workload.steps
    rates = [rate] * steps if isinstance(rate, float) else list(rate)
    params, state = programs.start(seed)
    found, scales, seconds, done = Run([], [], [], []), [], 0.0, 0
    while True:
        loss = float(programs.evaluate(params))
        found.steps.append(done)
        found.seconds.append(seconds)
        found.losses.append(loss)
        if done >= steps or not math.isfinite(loss):
            break
        coming = range(done, min(done + workload.eval_every, steps))
        batches = [programs.draw(np.uint32(seed), np.int32(i)) for i in coming]
        factors = [who.cosine(i, steps) if cosine else 1.0 for i in coming]
        given = jax.device_put(
            [
                (np.float32(rates[i]), np.float32(f))
                for i, f in zip(coming, factors, strict=True)
            ]
        )
        jax.block_until_ready((batches, given, params, state))
        began = time.perf_counter()
        for i, batch, pair in zip(coming, batches, given, strict=True):
            if programs.refresh is not None and contender.refreshes(i):
                state = programs.refresh(state, params, batch)
            params, state, scale = programs.step(params, state, batch, *pair)
            scales.append(scale)
        jax.block_until_ready((params, state))
        seconds += time.perf_counter() - began
        done = coming[-1] + 1
    found.scales.extend(float(x) for x in jax.device_get(scales))
    return found


def in_median_time(runs: Sequence[Run]) -> Run:
    """Returns the first of several runs of one path, each stretch in its median time.

    The first run of a program is slower than the next, and so is any while the machine
    does something else. A run that ended elsewhere does not count.
    """
    first = runs[0]
    taken = [np.diff(one.seconds) for one in runs if one.steps == first.steps]
    seconds = np.cumsum([0.0, *np.median(taken, axis=0)])
    return first._replace(seconds=seconds.tolist())


def path_of(folder: pathlib.Path, workload: str) -> pathlib.Path:
    """Returns where all runs on a workload are kept."""
    return folder / f"race-{workload.replace(' ', '-')}.json"


def reached(run: Run, target: float) -> tuple[float, float]:
    """Returns steps and seconds at the first evaluation at or below the target."""
    for step, seconds, loss in zip(*run[:3], strict=True):
        if loss <= target:
            return step, seconds
    return math.inf, math.inf
