# SPDX-License-Identifier: Apache-2.0
"""Real data without a download; every batch is a pure function of (seed, step).

First stage of the flow `data -> tasks -> train -> report`. Imports from `errors` only.
"""

import functools
import pathlib
import sysconfig
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dho2_jax.app.errors import UserError

Batch = Any  # a pytree of arrays that share their leading dimension


class Dataset(NamedTuple):
    """Training batches on demand, and one fixed validation batch."""

    train_batch: Callable[[int, int], Batch]  # (seed, step) -> batch
    validation: Batch


def generator(seed: int, step: int) -> np.random.Generator:
    """Returns the random generator that belongs to one step of one run.

    Args:
      seed: The run's seed, not negative.
      step: The step's number, not negative.

    Returns:
      A generator that depends on nothing else: a run can be repeated or resumed.
    """
    return np.random.default_rng((seed, step))


@functools.cache
def photographs() -> np.ndarray:
    """Returns scikit-learn's two photographs in grey, `(2, 427, 640)` in [0, 1]."""
    from sklearn.datasets import load_sample_images

    colours = np.stack(load_sample_images().images).astype(np.float32) / 255
    return colours @ np.array([0.299, 0.587, 0.114], np.float32)


def patch_positions(patch_size: int, tile_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds where training and validation patches may start.

    The photographs are cut into tiles and every fifth tile is held out, in a pattern
    that leaves no two held-out tiles with a common edge. A validation patch lies wholly
    in held-out pixels, a training patch wholly outside of them, so that no pixel is
    in both.

    Args:
      patch_size: Edge of a patch in pixels.
      tile_size: Edge of a tile in pixels, at least `patch_size`.

    Returns:
      Training and validation positions, each `(number, 3)`: image, row, column.
    """
    images, height, width = photographs().shape
    rows, columns = np.arange(height) // tile_size, np.arange(width) // tile_size
    pattern = rows[:, None] + 2 * columns + np.arange(images)[:, None, None]
    # Sums of the held-out pixels from the upper left corner give the number within
    # any patch from its four corners.
    sums = np.cumsum(np.cumsum(pattern % 5 == 0, axis=1), axis=2)
    sums = np.pad(sums, ((0, 0), (1, 0), (1, 0)))
    low, high = slice(None, -patch_size), slice(patch_size, None)
    number = (
        sums[:, high, high]
        - sums[:, low, high]
        - sums[:, high, low]
        + sums[:, low, low]
    )
    return np.argwhere(number == 0), np.argwhere(number == patch_size**2)


def patches(
    batch_size: int, *, patch_size: int, tile_size: int, num_validation: int
) -> Dataset:
    """Builds square grey patches of the two photographs.

    Args:
      batch_size: Patches in a training batch.
      patch_size: Edge of a patch in pixels.
      tile_size: Edge of the held-out image regions in pixels.
      num_validation: Patches in the validation batch.

    Returns:
      A dataset whose batches are `(batch, patch_size ** 2)`, float32 in [0, 1].

    Raises:
      UserError: If the patches do not fit the tiles or the tiles the photographs.
    """
    if not 1 <= patch_size <= tile_size <= 128:
        raise UserError(
            "config.task: 1 <= patch_size <= tile_size <= 128 must hold (the "
            f"photographs are 427 by 640 pixels), got patch_size={patch_size}, "
            f"tile_size={tile_size}."
        )
    train, held_out = patch_positions(patch_size, tile_size)
    if not len(train):
        raise UserError(
            f"config.task.patch_size={patch_size} leaves no room for training patches "
            f"between held-out tiles of {tile_size} pixels; make tile_size larger."
        )
    pixels = photographs()
    # One flat gather a batch: where the patch starts, plus where each pixel lies in it.
    train_starts, held_out_starts = (
        np.ravel_multi_index(tuple(positions.T), pixels.shape)
        for positions in (train, held_out)
    )
    edge = np.arange(patch_size)
    offsets = (edge[:, None] * pixels.shape[2] + edge).ravel()
    pixels = pixels.ravel()

    def train_batch(seed: int, step: int) -> np.ndarray:
        starts = generator(seed, step).choice(train_starts, size=batch_size)
        return pixels[starts[:, None] + offsets]

    starts = np.random.default_rng(0).choice(held_out_starts, size=num_validation)
    return Dataset(train_batch, pixels[starts[:, None] + offsets])


def digits(batch_size: int, *, num_validation: int) -> Dataset:
    """Builds scikit-learn's 1797 handwritten digits of 8 by 8 pixels.

    Args:
      batch_size: Images in a training batch, drawn without replacement.
      num_validation: Images held out.

    Returns:
      A dataset of pairs: pixels `(batch, 64)` in [0, 1] and labels `(batch,)`.

    Raises:
      UserError: If fewer training images are left than a batch holds.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = (pixels / 16).astype(np.float32), labels.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, held_out = order[num_validation:], order[:num_validation]
    if not 1 <= batch_size <= len(train):
        raise UserError(
            f"config.batch_size must be between 1 and the {len(train)} training images "
            f"that config.task.num_validation={num_validation} leaves, "
            f"got {batch_size}."
        )

    def train_batch(seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = train[generator(seed, step).permutation(len(train))[:batch_size]]
        return pixels[chosen], labels[chosen]

    return Dataset(train_batch, (pixels[held_out], labels[held_out]))


VOCABULARY = "\n" + "".join(chr(code) for code in range(32, 127))


def encode(text: str) -> np.ndarray:
    """Returns the vocabulary indices of `text`; characters outside it are dropped.

    Args:
      text: Any text; a tab counts as four spaces.

    Returns:
      Indices into `VOCABULARY`, uint8: newline and printable ASCII.
    """
    codes = np.frombuffer(
        text.replace("\t", "    ").encode("ascii", errors="ignore"), dtype=np.uint8
    )
    table = np.full(256, 255, np.uint8)
    table[[ord(one) for one in VOCABULARY]] = np.arange(len(VOCABULARY))
    tokens = table[codes]
    return tokens[tokens != 255]


def source_files() -> list[pathlib.Path]:
    """Returns the standard library's top-level modules, sorted by name."""
    return sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))


def source_texts(max_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads the standard library's source; every tenth file is held out.

    Args:
      max_bytes: Files are read in order of their names until they hold this much.

    Returns:
      Training and validation tokens, one after the other in each.

    Raises:
      UserError: If this Python has no readable source.
    """
    train, held_out, size = [], [], 0
    for number, path in enumerate(source_files()):
        if size >= max_bytes:
            break
        tokens = encode(path.read_text(encoding="utf-8", errors="ignore"))
        size += len(tokens)
        (held_out if number % 10 == 5 else train).append(tokens)
    if not train or not held_out:
        raise UserError(
            f"the standard library at {sysconfig.get_path('stdlib')} holds too few .py "
            "files for training and validation; raise config.task.max_bytes or use a "
            "Python that ships its source."
        )
    return np.concatenate(train), np.concatenate(held_out)


def characters(
    batch_size: int, *, length: int, max_bytes: int, num_validation: int
) -> Dataset:
    """Builds windows of the standard library's source text.

    Args:
      batch_size: Windows in a training batch.
      length: Characters predicted in a window, which holds one more.
      max_bytes: Upper bound on the text that is read, to within one file.
      num_validation: Windows in the validation batch, spread over the held-out files.

    Returns:
      A dataset whose batches are `(batch, length + 1)`, int32 vocabulary indices.
    """
    train, held_out = source_texts(max_bytes)
    if min(len(train), len(held_out)) <= length + 1:
        raise UserError(
            f"config.task.max_bytes={max_bytes} leaves fewer characters than one "
            f"window of config.task.length={length}; raise max_bytes."
        )
    window = np.arange(length + 1)

    def train_batch(seed: int, step: int) -> np.ndarray:
        starts = generator(seed, step).integers(len(train) - length, size=batch_size)
        return train[starts[:, None] + window].astype(np.int32)

    starts = np.linspace(0, len(held_out) - length - 1, num_validation).astype(np.int64)
    return Dataset(train_batch, held_out[starts[:, None] + window].astype(np.int32))
