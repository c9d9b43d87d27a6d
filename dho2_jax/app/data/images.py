# SPDX-License-Identifier: Apache-2.0
"""Images without a download: pieces of photographs, digits, and both in one."""

import functools

import jax
import numpy as np

from dho2_jax.app.data.dataset import Dataset, drawn, generator
from dho2_jax.app.errors import UserError


@functools.cache
def colours() -> np.ndarray:
    """Returns scikit-learn's two photographs, `(2, 427, 640, 3)` in [0, 1]."""
    from sklearn.datasets import load_sample_images

    return np.stack(load_sample_images().images).astype(np.float32) / 255


def photographs() -> np.ndarray:
    """Returns the two photographs in grey, `(2, 427, 640)` in [0, 1]."""
    return colours() @ np.array([0.299, 0.587, 0.114], np.float32)


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

    def draw(random: np.random.Generator, rows: slice) -> np.ndarray:
        starts = random.choice(train_starts, size=batch_size)[rows]
        return pixels[starts[:, None] + offsets]

    def validation() -> np.ndarray:
        starts = np.random.default_rng(0).choice(held_out_starts, size=num_validation)
        return pixels[starts[:, None] + offsets]

    spec = jax.ShapeDtypeStruct((batch_size, patch_size**2), np.float32)
    return Dataset(drawn(batch_size, draw), spec, validation)


def digits_split(
    num_validation: int,
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Splits scikit-learn's 1797 handwritten digits of 8 by 8 pixels.

    Args:
      num_validation: Images held out.

    Returns:
      Training and validation pairs: pixels `(number, 64)` in [0, 1] and labels.

    Raises:
      UserError: If no training images are left.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    pixels = np.asarray(pixels, np.float32) / 16
    labels = np.asarray(labels, np.int32)
    if num_validation >= len(labels):
        raise UserError(
            f"config.task.num_validation must leave some of the {len(labels)} images "
            f"for training, got {num_validation}."
        )
    order = np.random.default_rng(0).permutation(len(labels))
    train, held_out = order[num_validation:], order[:num_validation]
    return (pixels[train], labels[train]), (pixels[held_out], labels[held_out])


def digits(batch_size: int, *, num_validation: int) -> Dataset:
    """Builds scikit-learn's handwritten digits.

    Args:
      batch_size: Images in a training batch, drawn without replacement.
      num_validation: Images held out.

    Returns:
      A dataset of pairs: pixels `(batch, 64)` in [0, 1] and labels `(batch,)`.

    Raises:
      UserError: If fewer training images are left than a batch holds.
    """
    (pixels, labels), held_out = digits_split(num_validation)
    if not 1 <= batch_size <= len(labels):
        raise UserError(
            f"config.batch_size must be between 1 and the {len(labels)} training "
            f"images that config.task.num_validation={num_validation} leaves, "
            f"got {batch_size}."
        )

    def draw(random: np.random.Generator, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        chosen = random.permutation(len(labels))[:batch_size][rows]
        return pixels[chosen], labels[chosen]

    spec = (
        jax.ShapeDtypeStruct((batch_size, pixels.shape[1]), np.float32),
        jax.ShapeDtypeStruct((batch_size,), np.int32),
    )
    return Dataset(drawn(batch_size, draw), spec, lambda: held_out)


def scenes(
    batch_size: int, *, image_size: int, num_classes: int, num_validation: int
) -> Dataset:
    """Builds colour images of any size: a stand-in until ImageNet can be loaded.

    Each is one of the handwritten digits, enlarged, over a random piece of one of the
    photographs: real labels and real texture, but a far smaller and easier problem.
    A batch is made when it is asked for, and never more than one exists.

    Args:
      batch_size: Images in a training batch, digits drawn with replacement.
      image_size: Edge of an image in pixels.
      num_classes: Classes that the network tells apart; ten of them occur.
      num_validation: Digits held out; training and validation share the photographs.

    Returns:
      A dataset of pairs: pixels `(batch, image_size, image_size, 3)` in [0, 1] and
      labels `(batch,)`.

    Raises:
      UserError: If there are fewer than ten classes, or the images exceed the
        photographs.
    """
    if num_classes < 10:
        raise UserError(
            "config.task.num_classes must be at least the data's 10, "
            f"got {num_classes}."
        )
    height, width = colours().shape[1:3]
    if not 8 <= image_size <= height:
        raise UserError(
            "config.task.image_size must be between a digit's 8 pixels and the "
            f"photographs' {height}, got {image_size}."
        )
    train, held_out = digits_split(num_validation)
    nearest = np.arange(image_size) * 8 // image_size

    def paint(
        digits: np.ndarray, random: np.random.Generator, part: slice = slice(None)
    ) -> np.ndarray:
        number = len(digits)
        digits = digits.reshape(-1, 8, 8)
        rows = random.integers(height - image_size + 1, size=number)
        columns = random.integers(width - image_size + 1, size=number)
        which = random.integers(len(colours()), size=number)
        painted = np.empty((len(which[part]), image_size, image_size, 3), np.float32)
        pieces = (one[part] for one in (digits, which, rows, columns))
        for image, digit, photograph, row, column in zip(painted, *pieces, strict=True):
            image[:] = colours()[photograph, row:, column:][:image_size, :image_size]
            image += digit[nearest[:, None], nearest, None]
            image /= 2
        return painted

    def draw(random: np.random.Generator, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        chosen = random.integers(len(train[1]), size=batch_size)
        return paint(train[0][chosen], random, rows), train[1][chosen[rows]]

    def validation() -> tuple[np.ndarray, np.ndarray]:
        return paint(held_out[0], generator(0, 0)), held_out[1]

    spec = (
        jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), np.float32),
        jax.ShapeDtypeStruct((batch_size,), np.int32),
    )
    return Dataset(drawn(batch_size, draw), spec, validation)
