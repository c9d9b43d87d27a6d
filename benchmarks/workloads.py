# SPDX-License-Identifier: Apache-2.0
"""What is raced on: a task of the application with a budget, its data in memory.

A batch is a function of (seed, step) that runs on the device, so that no optimizer
waits for data and many runs fit into one program.
"""

import functools
import pathlib
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dho2_jax.app.data import images, stdlib
from dho2_jax.app.tasks.interface import Task
from dho2_jax.app.tasks.registry import TASKS

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
    num_largest: int  # k of DHO², chosen on tuning seeds
    small: bool  # needs no accelerator
    curvature_loss: Callable[[Any, Any], jax.Array]  # params, examples -> their loss

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


def _characters(batch_size: int, length: int = 64) -> Callable[[jax.Array], Any]:
    text, _ = stdlib.source_texts(4_000_000)
    text, window = jnp.asarray(text), jnp.arange(length + 1)

    def draw(key: jax.Array) -> jax.Array:
        starts = jax.random.randint(key, (batch_size,), 0, len(text) - length)
        return text[starts[:, None] + window].astype(jnp.int32)

    return draw


def _scenes(batch_size: int, edge: int = 64) -> Callable[[jax.Array], Any]:
    """Draws as `images.scenes` does: a digit over a piece of a photograph."""
    (pixels, labels), _ = images.digits_split(256)
    pixels, labels = jnp.asarray(pixels.reshape(-1, 8, 8)), jnp.asarray(labels)
    photographs = jnp.asarray(images.colours())
    number, height, width, _ = photographs.shape
    nearest = np.arange(edge) * 8 // edge

    def paint(digit: jax.Array, which: Any, row: Any, column: Any) -> jax.Array:
        at, size = (which, row, column, 0), (1, edge, edge, 3)
        piece = jax.lax.dynamic_slice(photographs, at, size)[0]
        return (piece + digit[nearest[:, None], nearest, None]) / 2

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        ends = (len(labels), number, height - edge + 1, width - edge + 1)
        chosen, *places = (
            jax.random.randint(one, (batch_size,), 0, end)
            for one, end in zip(jax.random.split(key, 4), ends, strict=True)
        )
        return jax.vmap(paint)(pixels[chosen], *places), labels[chosen]

    return draw


class _Size(NamedTuple):
    task: str  # of the application
    draw: Callable[[int], Callable[[jax.Array], Any]]  # batch size -> key -> batch
    batch: int
    part: int  # examples that measure curvature
    steps: int
    every: int  # steps between evaluations
    k: int
    least: int = 64  # curvature of fewer examples misleads more than it saves
    options: Mapping[str, Any] = types.MappingProxyType({})  # of the task


_SIZES = {
    "autoencoder": _Size("patch_autoencoder", _patches, 1024, 128, 1000, 10, 20),
    "digits": _Size("digits_mlp", _digits, 256, 64, 100, 2, 8),
    "transformer": _Size("char_lm", _characters, 32, 8, 300, 5, 4, 8),
    "resnet": _Size(
        "resnet",
        _scenes,
        *(256, 64, 200, 5, 16),
        options={"stage_sizes": (3, 4, 6, 3), "image_size": 64, "num_classes": 10},
    ),
    "gpt2": _Size(
        "gpt2",
        functools.partial(_characters, length=1024),
        *(32, 4, 100, 10, 16, 4),
        options={"num_validation": 16, "remat": True, "scan_layers": True},
    ),
}
SMALL = ("autoencoder", "digits", "transformer")
"""Workloads that need no accelerator. None needs a download."""


def build(name: str, factor: float = 1, *, steps: int | None = None) -> Workload:
    """Builds a workload, its batches `factor` times as large; or "autoencoder x4".

    "resnet" is ResNet-50 on images of 64 pixels, "gpt2" GPT-2 124M on windows of 1024.
    """
    if " x" in name:
        name, _, times = name.partition(" x")
        factor *= float(times)
    size = _SIZES[name]
    batch, part = int(size.batch * factor), int(size.part * factor)
    part = min(batch, max(part, size.least))
    label = name if factor == 1 else f"{name} x{factor:g}"
    # Of its own dataset only the validation batch is used.
    task = TASKS[size.task](1, **size.options)
    steps = steps or size.steps
    loss = task.loss_fn
    if size.options.get("scan_layers"):
        loss = one_by_one(TASKS[size.task], **size.options)
    return Workload(
        name=label,
        task=task,
        draw=size.draw(batch),
        batch_size=batch,
        curvature_size=part,
        steps=steps,
        eval_every=size.every,
        num_largest=size.k,
        small=name in SMALL,
        curvature_loss=loss,
    )


def one_by_one(
    make: Callable[..., Task], **options: Any
) -> Callable[[Any, Any], jax.Array]:
    """Returns the loss of a task that was made with `remat` and `scan_layers`, cheaper.

    It takes the same parameters. What a training batch has no memory for, the few
    examples of a curvature product have: no layer is computed again in each product,
    and none waits for a loop.
    """
    plain = make(1, **{**options, "remat": False, "scan_layers": False})

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        stacked = params["blocks"]
        number = len(jax.tree.leaves(stacked)[0])
        blocks = {i: jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(number)}
        return plain.loss_fn({**params, "blocks": blocks}, batch)

    return loss_fn
