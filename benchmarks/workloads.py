# SPDX-License-Identifier: Apache-2.0
"""What is raced on: a task of the application with a budget, its data in memory.

A batch is a function of (seed, step) that runs on the device, so that no optimizer
waits for data and many runs fit into one program.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dho2_jax.app import data, images
from dho2_jax.app.task import Task
from dho2_jax.app.tasks import TASKS

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
"""Where all that was measured is kept."""


class Workload(NamedTuple):
    """A task, a batch size and a budget of steps; all of it fixed beforehand."""

    name: str
    task: Task
    draw: Callable[[jax.Array], Any]  # key -> batch
    batch_size: int
    curvature_size: int  # examples that measure curvature, of each batch
    steps: int  # after which tuned Adam's loss is the target
    eval_every: int  # steps between evaluations, which the clock does not see
    num_largest: int  # k of DHO² here, as in the task's config

    def batch(self, seed: Any, step: Any) -> Any:
        """Returns a training batch."""
        return self.draw(jax.random.fold_in(jax.random.key(seed), step))

    def part(self, batch: Any) -> Any:
        """Returns the examples of a batch that measure curvature, spread over it."""
        stride = self.batch_size // self.curvature_size
        return jax.tree.map(lambda x: x[::stride][: self.curvature_size], batch)


def _patches(batch_size: int) -> Callable[[jax.Array], Any]:
    pixels = images.photographs()
    positions, _ = images.patch_positions(16, 64)
    starts = jnp.asarray(np.ravel_multi_index(tuple(positions.T), pixels.shape))
    edge = np.arange(16)
    offsets = jnp.asarray((edge[:, None] * pixels.shape[2] + edge).ravel())
    pixels = jnp.asarray(pixels.ravel())

    def draw(key: jax.Array) -> jax.Array:
        chosen = starts[jax.random.randint(key, (batch_size,), 0, len(starts))]
        return pixels[chosen[:, None] + offsets]

    return draw


def _digits(batch_size: int) -> Callable[[jax.Array], Any]:
    train, _ = images.digits_split(360)
    pixels, labels = map(jnp.asarray, train)

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        chosen = jax.random.permutation(key, len(labels))[:batch_size]
        return pixels[chosen], labels[chosen]

    return draw


def _characters(batch_size: int) -> Callable[[jax.Array], Any]:
    text, _ = data.source_texts(4_000_000)
    text, window = jnp.asarray(text), jnp.arange(65)

    def draw(key: jax.Array) -> jax.Array:
        starts = jax.random.randint(key, (batch_size,), 0, len(text) - 64)
        return text[starts[:, None] + window].astype(jnp.int32)

    return draw


# Task, data, batch, curvature batch, steps, steps between evaluations, k.
_SIZES: dict[str, tuple[str, Any, int, int, int, int, int]] = {
    "autoencoder": ("patch_autoencoder", _patches, 1024, 128, 1000, 10, 24),
    "digits": ("digits_mlp", _digits, 256, 64, 100, 2, 8),
    "transformer": ("char_lm", _characters, 32, 8, 300, 5, 24),
}
SMALL = tuple(_SIZES)
"""Workloads that need no download and no accelerator."""


def build(name: str, factor: float = 1, *, steps: int | None = None) -> Workload:
    """Builds a workload, its batches `factor` times as large."""
    task, sample, batch, part, usual, every, k = _SIZES[name]
    batch, part = int(batch * factor), int(part * factor)
    # Curvature of fewer examples than this misleads more than it saves.
    part = min(batch, max(part, 8 if name == "transformer" else 64))
    label = name if factor == 1 else f"{name} x{factor:g}"
    made = TASKS[task](1)  # of its own dataset only the validation batch is used
    steps = steps or usual
    return Workload(label, made, sample(batch), batch, part, steps, every, k)
