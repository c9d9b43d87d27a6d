# SPDX-License-Identifier: Apache-2.0
"""Data by name: images and text from the Hugging Face hub, or from files like its own.

Imports the library `datasets` when it is needed.
"""

import functools
import itertools
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dho2_jax.app.data.dataset import Dataset, epochs
from dho2_jax.app.data.share import Share
from dho2_jax.app.errors import UserError, nearest


def load_split(field: str, path: str, subset: str, split: str) -> Any:
    """Loads one split of a dataset: from a directory, the cache or the network.

    Args:
      field: The field of `config.task` that holds `split`, for what is said.
      path: The dataset's name on the hub, or a directory of Parquet or text files.
      subset: Which of its configurations; "" if it has one only.
      split: Such as "train", or "train[:10%]" for a part of it.

    Returns:
      A `datasets.Dataset`.

    Raises:
      UserError: If `datasets` is not installed, or finds no such data.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(
            "config.task needs the package `datasets`, which is not installed; run: "
            "pip install 'dho2-jax[data]'"
        ) from error
    try:
        found = datasets.load_dataset(
            os.path.expanduser(path), subset or None, split=split
        )
        if not len(found):
            raise ValueError("it is empty")
    except Exception as error:  # of many kinds: network, names, damaged files
        reason = next(iter(str(error).splitlines()), "").rstrip(".")
        raise UserError(
            f"config.task: cannot load path={path!r}, subset={subset!r}, "
            f"{field}={split!r} ({type(error).__name__}: {reason}); check these and "
            "the network, or give the directory of a copy as config.task.path."
        ) from error
    return found


def check_columns(rows: Any, **columns: str) -> None:
    """Checks that a dataset has the columns that a config names.

    Args:
      rows: From `load_split`.
      **columns: Their names, by field of `config.task`.

    Raises:
      UserError: If one is missing.
    """
    for field, name in columns.items():
        if name not in rows.column_names:
            raise UserError(
                f"config.task.{field} must name a column of the data, got {name!r}; "
                + nearest(name, rows.column_names)
            )


def crop_and_flip(
    pixels: np.ndarray, random: np.random.Generator, margin: int = 4
) -> np.ndarray:
    """Moves an image at random and mirrors every other one.

    Args:
      pixels: `(height, width, channels)`.
      random: What decides.
      margin: Pixels by which it moves at most; what is uncovered is black.

    Returns:
      An image of the same size.
    """
    height, width, channels = pixels.shape
    row, column, mirrored = random.integers((2 * margin + 1, 2 * margin + 1, 2))
    canvas = np.zeros((height + 2 * margin, width + 2 * margin, channels), pixels.dtype)
    canvas[margin:-margin, margin:-margin] = pixels
    moved = canvas[row : row + height, column : column + width]
    return moved[:, ::-1] if mirrored else moved


def labelled_images(
    batch_size: int,
    *,
    path: str,
    subset: str,
    splits: tuple[str, str],
    image_column: str,
    label_column: str,
    image_size: int,
    num_classes: int,
    num_validation: int,
    augment: bool,
) -> Dataset:
    """Builds batches of labelled images.

    Training images are decoded before the first batch, and held in memory: 150 MB for
    CIFAR-10. Decoding them again in every epoch would cost more time than a small
    network.

    Args:
      batch_size: Images in a training batch.
      path: The dataset's name on the hub, or a directory.
      subset: Which of its configurations; "" if it has one only.
      splits: Those to train and to validate with.
      image_column: The column of the images.
      label_column: The column of the labels, integers from 0.
      image_size: Edge of all images in pixels.
      num_classes: Labels that there may be.
      num_validation: Images in the validation batch, from all over its split.
      augment: Whether training images are moved and mirrored at random.

    Returns:
      A dataset of pairs: pixels `(batch, image_size, image_size, 3)` in [-1, 1] and
      labels `(batch,)`.

    Raises:
      UserError: If the data cannot be loaded or are something else.
    """
    train, held_out = (
        load_split(field, path, subset, split)
        for field, split in zip(
            ("train_split", "validation_split"), splits, strict=True
        )
    )
    for rows in (train, held_out):
        check_columns(rows, image_column=image_column, label_column=label_column)
        labels = np.asarray(rows[label_column][:])
        integers = np.issubdtype(labels.dtype, np.integer)
        if not integers or labels.min() < 0 or labels.max() >= num_classes:
            largest = labels.max() if integers else repr(labels[0])
            raise UserError(
                f"config.task.label_column={label_column!r} must hold integers from 0 "
                f"to config.task.num_classes={num_classes} less one, got {largest}; "
                "change one of them."
            )
    _check_number(num_validation, len(held_out), "images")
    size = (image_size, image_size)

    def decode(row: dict[str, Any]) -> tuple[np.ndarray, np.integer]:
        image = row[image_column]
        if getattr(image, "size", None) != size:
            found = getattr(image, "size", type(image).__name__)
            raise UserError(
                f"config.task.image_column={image_column!r} must hold images of "
                f"{size} pixels, got {found}; name another column or data."
            )
        return np.asarray(image.convert("RGB")), np.int32(row[label_column])

    def scale(pixels: np.ndarray) -> np.ndarray:
        return pixels.astype(np.float32) / 127.5 - 1

    decoded = functools.cache(lambda: [decode(row) for row in train])

    def read(example: Any, random: np.random.Generator) -> Any:
        pixels, label = example
        return scale(crop_and_flip(pixels, random) if augment else pixels), label

    def make_batches(seed: int, share: Share) -> Any:
        return epochs(batch_size, decoded(), read)(seed, share)

    def validation() -> tuple[np.ndarray, np.ndarray]:
        chosen = np.linspace(0, len(held_out) - 1, num_validation).astype(int)
        pairs = (decode(held_out[int(i)]) for i in chosen)
        pixels, labels = map(np.stack, zip(*pairs, strict=True))
        return scale(pixels), labels

    decode(train[0])  # so that a wrong column is noticed at once
    spec = (
        jax.ShapeDtypeStruct((batch_size, *size, 3), np.float32),
        jax.ShapeDtypeStruct((batch_size,), np.int32),
    )
    return Dataset(make_batches, spec, validation)


def read_bytes(rows: Any, text_column: str, max_bytes: int) -> np.ndarray:
    """Reads text as UTF-8 bytes; every row ends a line.

    Args:
      rows: From `load_split`.
      text_column: The column of the text.
      max_bytes: Bytes to read at most, from the first row on.

    Returns:
      One byte after the other, uint8.

    Raises:
      UserError: If there is no such column, or it holds something else.
    """
    check_columns(rows, text_column=text_column)
    pieces: list[bytes] = []
    size = 0
    for row in rows.select_columns([text_column]):
        text = row[text_column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise UserError(
                f"config.task.text_column={text_column!r} must hold text, got "
                f"{type(text).__name__}; "
                + nearest("text", [one for one in rows.column_names])
            )
        pieces.append((text.removesuffix("\n") + "\n").encode(errors="replace"))
        size += len(pieces[-1])
        if size >= max_bytes:
            break
    return np.frombuffer(b"".join(pieces)[:max_bytes], np.uint8)


def byte_windows(
    batch_size: int,
    *,
    path: str,
    subset: str,
    splits: Sequence[str],
    text_column: str,
    length: int,
    max_bytes: int,
    num_validation: int,
) -> Dataset:
    """Builds windows of text, byte by byte, which lie end to end.

    An epoch predicts every byte once, but for the first and for those that are left at
    the end, fewer than a window.

    Args:
      batch_size: Windows in a training batch.
      path: The dataset's name on the hub, or a directory.
      subset: Which of its configurations; "" if it has one only.
      splits: Those to train and to validate with.
      text_column: The column of the text.
      length: Bytes predicted in a window, which holds one more.
      max_bytes: Bytes of each split to read at most; they are held in memory.
      num_validation: Windows in the validation batch, from all over its split.

    Returns:
      A dataset whose batches are `(batch, length + 1)`, int32 below 256.

    Raises:
      UserError: If the data cannot be loaded, are something else or too few.
    """

    def windows(field: str, split: str) -> np.ndarray:
        text = read_bytes(
            load_split(field, path, subset, split), text_column, max_bytes
        )
        if len(text) <= length:
            raise UserError(
                f"config.task.{field}={split!r} holds {len(text)} bytes of "
                f"config.task.max_bytes={max_bytes}, fewer than one window of "
                f"config.task.length={length} and one more; make it shorter."
            )
        return np.lib.stride_tricks.sliding_window_view(text, length + 1)[::length]

    train, held_out = itertools.starmap(
        windows, zip(("train_split", "validation_split"), splits, strict=True)
    )
    _check_number(num_validation, len(held_out), "windows")

    def read(window: np.ndarray, random: np.random.Generator) -> np.ndarray:
        return window.astype(np.int32)

    def validation() -> np.ndarray:
        chosen = np.linspace(0, len(held_out) - 1, num_validation).astype(int)
        return held_out[chosen].astype(np.int32)

    spec = jax.ShapeDtypeStruct((batch_size, length + 1), np.int32)
    return Dataset(epochs(batch_size, train, read), spec, validation)


def _check_number(num_validation: int, number: int, what: str) -> None:
    """Checks that there are as many examples as are to be validated with."""
    if not 1 <= num_validation <= number:
        raise UserError(
            "config.task.num_validation must be at least 1 and at most the "
            f"{number} {what} of config.task.validation_split, got {num_validation}; "
            "change one of them."
        )
