# SPDX-License-Identifier: Apache-2.0
"""What a dataset is, and text without a download.

Every batch is a pure function of (seed, step), and each process makes its own part of
it. First stage of the flow `data -> tasks -> train -> report`, with `images` and `hub`.
Imports from `share` and `errors` only.
"""

import dataclasses
import functools
import pathlib
import sysconfig
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np

from dho2_jax.app.errors import UserError
from dho2_jax.app.share import Share, of_this_process

Batch = Any  # a pytree of arrays that share their leading dimension


ENDLESS = 2**62  # batches: more than any run takes
MakeBatches = Callable[[int, Share], grain.MapDataset]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training batches on demand, and one fixed validation batch."""

    make_batches: MakeBatches  # seed and share -> parts of batches
    batch_spec: Any  # ShapeDtypeStructs of a training batch, all its parts together
    load_validation: Callable[[], Batch]

    def batches(self, seed: int, share: Share | None = None) -> grain.MapDataset:
        """Returns the training batches of one run, without an end.

        Args:
          seed: The run's seed, not negative.
          share: The part of each batch to make; default: this process's.

        Returns:
          A Grain dataset with random access: its element `step` is this part of batch
          `step`, a pure function of seed and step. A loop reads it by `iter` of its
          `to_iter_dataset()`, which has `get_state` and `set_state`.
        """
        key = seed, share or of_this_process()
        if key not in self._made:
            self._made[key] = self.make_batches(*key)
        return self._made[key]

    def train_batch(self, seed: int, step: int) -> Batch:
        """Returns this process's part of one batch."""
        return self.batches(seed)[step]

    @functools.cached_property
    def _made(self) -> dict[tuple[int, Share], grain.MapDataset]:
        return {}

    @functools.cached_property
    def validation(self) -> Batch:
        """The validation batch, whole, made when it is first asked for."""
        return self.load_validation()


def generator(seed: int, step: int) -> np.random.Generator:
    """Returns the random generator that belongs to one step of one run.

    Args:
      seed: The run's seed, not negative.
      step: The step's number, not negative.

    Returns:
      A generator that depends on nothing else: a run can be repeated or resumed.
    """
    return np.random.default_rng((seed, step))


def drawn(
    batch_size: int, draw: Callable[[np.random.Generator, slice], Batch]
) -> MakeBatches:
    """Makes batches whose examples are drawn anew at every step.

    Args:
      batch_size: Examples in a whole batch.
      draw: Makes the given rows of a batch. All that is random must be drawn for the
        whole batch, so that the rows do not depend on who makes the others.

    Returns:
      What `Dataset` takes.
    """

    def make(seed: int, share: Share) -> grain.MapDataset:
        rows = share.rows(batch_size)
        return grain.MapDataset.range(ENDLESS).map(
            lambda step: draw(generator(seed, step), rows)
        )

    return make


def epochs(
    batch_size: int,
    source: Any,
    read: Callable[[Any, np.random.Generator], Any],
) -> MakeBatches:
    """Makes batches that go through a source again and again, each time shuffled.

    Args:
      batch_size: Examples in a whole batch.
      source: What has a length and, at every index below it, an example.
      read: Makes arrays of an example, with the generator that belongs to it in this
        run and this epoch, if anything in it is random.

    Returns:
      What `Dataset` takes.
    """

    def make(seed: int, share: Share) -> grain.MapDataset:
        shuffled = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
        # Parts of batches in order, of which each process takes every `count`-th: the
        # parts of all make the batch that one process would.
        parts = shuffled.random_map(read).batch(batch_size // share.count)
        return parts.slice(slice(share.index, None, share.count))

    return make


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
