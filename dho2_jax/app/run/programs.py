# SPDX-License-Identifier: Apache-2.0
"""The programs of a training run, for each way to compute curvature beside it.

Built from a task and an optimizer for devices that need not be there, and compiled
ahead of time for those that are.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import dho2_jax
from dho2_jax.app.data import share
from dho2_jax.app.run import placement
from dho2_jax.app.run.optimizers import Optimizer
from dho2_jax.app.tasks.interface import Task


class Blueprint(NamedTuple):
    """A program before it is compiled: `function.lower(*arguments)`."""

    function: Any  # jitted
    arguments: tuple[Any, ...]  # ShapeDtypeStructs, with shardings on a mesh


class Blueprints(NamedTuple):
    """All that a run executes but the evaluation, which needs the validation batch."""

    start: Blueprint  # seed -> params, state
    step: Blueprint  # params, state, batch[, part] -> params, state, loss
    refresh: Blueprint | None  # state, params, batch -> state
    take_part: Blueprint | None  # batch -> part: what a sweep measures curvature on
    observe: Blueprint | None  # state -> metrics, spectrum


class Programs(NamedTuple):
    """Compiled ahead of time, so that no clock ever sees a compilation."""

    start: Callable[..., Any]  # seed, uint32 -> params, state
    step: Callable[..., Any]  # params, state, batch[, part] -> params, state, loss
    refresh: Callable[..., Any] | None  # state, params, batch -> state
    take_part: Callable[..., Any] | None  # batch -> part
    overlap: Any  # of dho2_jax.overlapped_refresh; None: no devices of its own
    observe: Callable[..., Any] | None  # state -> metrics, spectrum
    evaluate: Callable[..., Any]  # params -> loss
    place: Callable[..., Any]  # this process's part of a batch -> batch on the devices
    compile_seconds: float


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
        over it, so that on a mesh every device has its part already. With a stagger
        axis each group along it gets all of them.
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

    part_sharding = placement.batch_sharding(mesh, but=optimizer.stagger_axis)

    def take_part(batch) -> Any:
        return placement.spread(batch, curvature_batch_size, part_sharding)

    def curvature_of(part) -> Any:
        return task.value_fn(part, gauss_newton=optimizer.gauss_newton)

    def start(seed):
        params = task.init(seed)
        return params, transform.init(params)

    def finish(grads, state, params, loss, **extra):
        updates, state = transform.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, loss

    def plain_step(params, state, batch, part=None):
        loss, grads = jax.value_and_grad(task.loss_fn)(params, batch)
        if not optimizer.hybrid:
            return finish(grads, state, params, loss)
        part = take_part(batch) if part is None else part
        return finish(grads, state, params, loss, value_fn=curvature_of(part))

    def staggered_step(params, state, batch, part):
        assert mesh is not None
        svag = dho2_jax.staggered_value_and_grad(
            _loss_of(task, optimizer),
            mesh=mesh,
            stagger_axis=optimizer.stagger_axis,
            curvature=optimizer.curvature,
        )
        loss, grads, product = svag(params, batch, part, state)
        return finish(grads, state, params, loss, product=product)

    step = staggered_step if optimizer.stagger_axis else plain_step

    def refresh(state, params, batch):
        return dho2_jax.refresh(state, params, curvature_of(take_part(batch)))

    def observe(state):
        subspace = dho2_jax.subspace(state)
        return dho2_jax.metrics(state), (subspace.eigenvalues, subspace.valid)

    seed = jax.ShapeDtypeStruct((), np.uint32, sharding=whole)
    pair = (param_shardings, state_shardings)
    arguments = (params, state, batch)
    if optimizer.sweep_of is not None:
        part = jax.eval_shape(take_part, task.dataset.batch_spec)
        arguments += (placement.abstract(part, part_sharding),)
    return Blueprints(
        Blueprint(jax.jit(start, out_shardings=pair), (seed,)),
        Blueprint(
            jax.jit(step, out_shardings=(*pair, whole), donate_argnums=(0, 1)),
            arguments,
        ),
        Blueprint(
            jax.jit(refresh, out_shardings=state_shardings, donate_argnums=0),
            (state, params, batch),
        )
        if optimizer.refresh_at is not None
        else None,
        Blueprint(jax.jit(take_part, out_shardings=part_sharding), (batch,))
        if optimizer.sweep_of is not None
        else None,
        Blueprint(jax.jit(observe, out_shardings=whole), (state,))
        if optimizer.hybrid
        else None,
    )


def _loss_of(task: Task, optimizer: Optimizer) -> Any:
    """Returns the loss of parameters and a batch, in two parts if curvature="ggn"."""
    if optimizer.gauss_newton:
        return task.outputs_fn, task.output_loss
    return task.loss_fn


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

    def place(part: Any) -> Any:
        return share.join(part, mesh)

    start = compiled(blueprints.start)
    overlap = None
    if optimizer.curvature_mesh is not None:
        overlap = _overlap(task, optimizer, curvature_batch_size)
        # Compiles when it is called: once here, on what is thrown away.
        params, state = start(np.uint32(0))
        batch = task.dataset.train_batch(0, 0)
        overlap.land(state, overlap.launch(state, params, batch))
    return Programs(
        start=start,
        step=compiled(blueprints.step),
        refresh=compiled(blueprints.refresh) if blueprints.refresh else None,
        take_part=compiled(blueprints.take_part) if blueprints.take_part else None,
        overlap=overlap,
        observe=compiled(blueprints.observe) if blueprints.observe else None,
        evaluate=lambda params: evaluate(params, validation),
        place=place,
        compile_seconds=time.perf_counter() - began,
    )


def _overlap(task: Task, optimizer: Optimizer, curvature_batch_size: int) -> Any:
    """Returns what refreshes on devices of its own, from this process's part."""
    mesh = optimizer.curvature_mesh
    assert mesh is not None
    size = curvature_batch_size // len(mesh.devices)  # a row of them a process
    apart = dho2_jax.overlapped_refresh(_loss_of(task, optimizer), mesh=mesh)

    def launch(state, params, batch):
        part = placement.spread(batch, size, None)
        return apart.launch(state, params, share.join(part, mesh))

    return apart._replace(launch=launch)
