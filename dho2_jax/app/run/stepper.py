# SPDX-License-Identifier: Apache-2.0
"""One step of a run after another, with the curvature's share of each."""

from typing import Any

import grain

from dho2_jax.app.run.optimizers import Optimizer
from dho2_jax.app.run.programs import Programs
from dho2_jax.app.tasks.interface import Task

# Batches are made ahead of the loop, by few threads: they share the CPU with it.
READING = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


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

    def forget(self) -> None:
        """Goes on with another state: what is under way belongs to the one before."""
        self._pending, self._due, self._part = None, None, ()

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
