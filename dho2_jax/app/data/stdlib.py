# SPDX-License-Identifier: Apache-2.0
"""Text without a download: the source of Python's standard library."""

import pathlib
import sysconfig

import jax
import numpy as np

from dho2_jax.app.data.dataset import Dataset, drawn
from dho2_jax.app.errors import UserError

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

    def draw(random: np.random.Generator, rows: slice) -> np.ndarray:
        starts = random.integers(len(train) - length, size=batch_size)[rows]
        return train[starts[:, None] + window].astype(np.int32)

    def validation() -> np.ndarray:
        starts = np.linspace(0, len(held_out) - length - 1, num_validation)
        starts = starts.astype(np.int64)
        return held_out[starts[:, None] + window].astype(np.int32)

    spec = jax.ShapeDtypeStruct((batch_size, length + 1), np.int32)
    return Dataset(drawn(batch_size, draw), spec, validation)
