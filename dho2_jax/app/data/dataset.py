# SPDX-License-Identifier: Apache-2.0
"""What a dataset is: every batch is a pure function of (seed, step).

Each process makes its own part of it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from dho2_jax.app.data.share import Share, of_this_process

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
