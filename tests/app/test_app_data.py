"""The data: no overlap, batches a pure function of (seed, step), known ranges."""

import json
import types

import grain
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dho2_jax.app.data import images, share, stdlib
from dho2_jax.app.data.dataset import Dataset, generator
from dho2_jax.app.errors import UserError

DATASETS = {
    "patches": lambda: images.patches(
        32, patch_size=16, tile_size=64, num_validation=64
    ),
    "digits": lambda: images.digits(32, num_validation=360),
    "scenes": lambda: images.scenes(
        32, image_size=40, num_classes=12, num_validation=20
    ),
    "characters": lambda: stdlib.characters(
        32, length=16, max_bytes=300_000, num_validation=64
    ),
}


def leaves(batch):
    return batch if isinstance(batch, tuple) else (batch,)


@pytest.mark.parametrize("name", DATASETS)
def test_batches_depend_on_seed_and_step_only(name):
    first, second = DATASETS[name](), DATASETS[name]()
    first.train_batch(3, 0)  # a call in between leaves no trace
    for a, b in zip(
        leaves(first.train_batch(3, 7)), leaves(second.train_batch(3, 7)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
        assert len(a) == 32 and a.dtype in (np.float32, np.int32)
    reference = leaves(first.train_batch(3, 7))[0]
    for seed, step in ((3, 8), (4, 7), (7, 3)):
        assert not np.array_equal(reference, leaves(first.train_batch(seed, step))[0])
    for a, b in zip(leaves(first.validation), leaves(second.validation), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", DATASETS)
def test_the_parts_of_all_processes_make_the_batch(name):
    dataset = DATASETS[name]()
    for count in (2, 4):
        parts = [
            dataset.batches(3, share.Share(index, count))[7] for index in range(count)
        ]
        assert all(len(leaves(part)[0]) == 32 // count for part in parts)
        whole = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        for a, b in zip(leaves(whole), leaves(dataset.train_batch(3, 7)), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", DATASETS)
def test_an_iterator_goes_on_where_another_stopped(name):
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    dataset = DATASETS[name]()
    iterator = iter(dataset.batches(3).to_iter_dataset(options))
    for _ in range(3):
        next(iterator)
    position = json.loads(json.dumps(iterator.get_state()))
    again = iter(DATASETS[name]().batches(3).to_iter_dataset(options))
    again.set_state(position)
    for step in (3, 4):
        for a, b, c in zip(
            leaves(next(iterator)),
            leaves(next(again)),
            leaves(dataset.train_batch(3, step)),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(a, c)


def test_batches_do_not_end():
    dataset = DATASETS["digits"]()
    assert dataset.batches(0) is dataset.batches(0)
    assert len(dataset.batches(0)) > 2**50
    dataset.train_batch(0, 2**40)


@pytest.mark.parametrize(
    ("examples", "shape", "spec"),
    [
        (16, (8,), P("a")),
        (16, (4, 2), P(("a", "b"))),
        (12, (4, 2), P("a")),  # eight do not divide it, four do
        (10, (8,), P()),
    ],
)
def test_parts_become_a_global_batch(examples, shape, spec):
    kinds = (jax.sharding.AxisType.Auto,) * len(shape)
    mesh = jax.make_mesh(shape, ("a", "b")[: len(shape)], axis_types=kinds)
    batch = np.arange(examples * 3.0).reshape(examples, 3), np.arange(examples)
    joined = share.join(batch, mesh)
    for a, b in zip(joined, batch, strict=True):
        np.testing.assert_array_equal(a, b)
        wanted = jax.sharding.NamedSharding(mesh, spec)
        assert a.sharding.is_equivalent_to(wanted, a.ndim)
    assert share.join(batch, None) is batch
    assert share.of_this_process() == share.Share(0, 1)


def test_processes_must_have_equally_many_devices():
    devices = [types.SimpleNamespace(process_index=i) for i in (1, 0, 0, 1)]
    share.check_processes(devices)
    with pytest.raises(UserError, match=r"each process.* got \[2, 1\]; use hosts"):
        share.check_processes(devices[:-1])


@pytest.mark.parametrize("name", DATASETS)
def test_the_spec_describes_a_batch(name):
    dataset = DATASETS[name]()
    batch = dataset.train_batch(0, 0)
    assert dataset.batch_spec == jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch
    )
    # A validation batch has the same form, and another number of examples.
    for spec, x in zip(
        leaves(dataset.batch_spec), leaves(dataset.validation), strict=True
    ):
        assert x.shape[1:] == spec.shape[1:] and x.dtype == spec.dtype


def test_validation_is_made_once_when_asked_for():
    made = []

    def load():
        made.append(1)
        return np.zeros(3)

    dataset = Dataset(lambda seed, step: None, None, load)
    assert not made
    assert dataset.validation is dataset.validation
    assert len(made) == 1


def test_patches_share_no_pixel():
    train, held_out = images.patch_positions(16, 64)
    shape = images.photographs().shape

    def covered(positions):
        pixels = np.zeros(shape, bool)
        windows = np.lib.stride_tricks.sliding_window_view(
            pixels, (16, 16), axis=(1, 2), writeable=True
        )
        for image, row, column in positions:
            windows[image, row, column] = True
        return pixels

    by_train, by_held_out = covered(train), covered(held_out)
    assert not (by_train & by_held_out).any()
    assert by_train.mean() > 0.6 and 0.15 < by_held_out.mean() < 0.25


def test_patches_are_cut_where_they_say():
    dataset = DATASETS["patches"]()
    pixels = images.photographs()
    assert pixels.min() >= 0 and pixels.max() <= 1
    train, _ = images.patch_positions(16, 64)
    # Same generator, same choice, but positions are looked up the slow way.
    chosen = generator(1, 2).choice(len(train), size=32)
    expected = [
        pixels[image, row : row + 16, column : column + 16].ravel()
        for image, row, column in train[chosen]
    ]
    np.testing.assert_array_equal(dataset.train_batch(1, 2), expected)


def test_digits_are_split():
    dataset = images.digits(1437, num_validation=360)
    pixels, labels = dataset.train_batch(0, 0)
    together = np.concatenate([pixels, dataset.validation[0]])
    assert together.shape == (1797, 64) and len(np.unique(together, axis=0)) == 1797
    assert set(labels) == set(range(10)) and pixels.max() == 1


def test_scenes_show_digits_on_photographs():
    dataset = images.scenes(64, image_size=40, num_classes=10, num_validation=20)
    pixels, labels = dataset.train_batch(0, 0)
    assert pixels.min() >= 0 and 0.9 < pixels.max() <= 1
    assert len(np.unique(labels)) == 10
    (train, train_labels), (held_out, _) = images.digits_split(20)
    assert len(train) == 1777 and len(held_out) == len(dataset.validation[0]) == 20
    # Where a digit is black, half of a photograph is left, and that alone.
    chosen = generator(0, 0).integers(1777, size=64)
    np.testing.assert_array_equal(train_labels[chosen], labels)
    windows = np.lib.stride_tricks.sliding_window_view(
        images.colours(), (5, 5), axis=(1, 2)
    )
    digit = train[chosen[0]].reshape(8, 8)
    row, column = np.argwhere(digit == 0)[0]
    piece = pixels[0, row * 5 :, column * 5 :][:5, :5].transpose(2, 0, 1)
    assert (windows / 2 == piece).all((-3, -2, -1)).any()
    # And where it is not, its value is added: in every image its own digit's.
    cells = 2 * pixels.reshape(64, 8, 5, 8, 5, 3)
    values = train[chosen].reshape(64, 8, 1, 8, 1, 1)
    assert (cells >= values - 1e-6).all() and (cells <= values + 1 + 1e-6).all()
    row, column = np.unravel_index(digit.argmax(), (8, 8))
    piece = pixels[0, row * 5 :, column * 5 :][:5, :5].transpose(2, 0, 1)
    background = 2 * piece - digit[row, column]
    nearest = np.abs(windows - background).max((-3, -2, -1)).min()
    assert nearest < 1e-6


def test_source_text_is_split_by_file():
    train, held_out = stdlib.source_texts(300_000)
    files = stdlib.source_files()
    for tokens, number in ((train, 0), (held_out, 5)):
        text = files[number].read_text(encoding="utf-8", errors="ignore")
        expected = stdlib.encode(text)
        assert np.array_equal(tokens[: len(expected)], expected)
    assert len(train) + len(held_out) >= 300_000
    assert train.max() < len(stdlib.VOCABULARY)
    # A long piece of the held-out text does not occur in the training text.
    piece = held_out[len(held_out) // 2 :][:400].tobytes()
    assert piece not in train.tobytes()


def test_encode_drops_what_it_has_no_word_for():
    text = "".join(stdlib.VOCABULARY[i] for i in stdlib.encode("a\té\nZ~\x00"))
    assert text == "a    \nZ~"
