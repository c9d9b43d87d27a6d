"""Images and text by name, from small files in the hub's own format; no network."""

import io
import json
import pathlib
import sys

import datasets
import grain
import jax
import numpy as np
import PIL.Image
import pytest

from dho2_jax.app import cli
from dho2_jax.app.data import hub
from dho2_jax.app.data.share import Share
from dho2_jax.app.errors import UserError
from dho2_jax.app.run import experiment
from dho2_jax.app.tasks.registry import TASKS

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
NUMBER = 24  # of training images and of training windows
LENGTH = 5
READING = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
TEXT = {"train": ["Größe", "", None, "x" * 40, *"abcdefghijklmnopqrstuvwxyz"][:40]}
TEXT["validation"] = [str(i) for i in range(30)]
TINY = {
    "cifar10": {"num_validation": 8, "stage_sizes": (1, 1), "width": 4},
    "hub_text": {
        "subset": "",
        "length": LENGTH,
        "num_validation": 8,
        "width": 8,
        "num_layers": 1,
        "num_heads": 2,
    },
}


def picture(label, size=32):
    """A picture that says which it is in its upper left corner."""
    pixels = np.random.default_rng(label).integers(255, size=(size, size, 3))
    pixels[0, 0] = label, 0, 255
    return pixels.astype(np.uint8)


def png(pixels):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory for each task, as a copy of a dataset of the hub has it."""
    root = tmp_path_factory.mktemp("hub")
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = root / "cache"
    image = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
    )
    for split, numbers in (("train", range(NUMBER)), ("test", range(100, 112))):
        rows = {
            "img": [png(picture(i)) for i in numbers],
            "label": [i % 10 for i in numbers],
        }
        name = f"{split}-00000-of-00001.parquet"
        table = datasets.Dataset.from_dict(rows, features=image)
        table.to_parquet(root / "cifar10" / name)
        text = TEXT["train" if split == "train" else "validation"]
        table = datasets.Dataset.from_dict({"text": text, "id": list(range(len(text)))})
        table.to_parquet(root / "hub_text" / name.replace("test", "validation"))
    yield root
    datasets.config.HF_DATASETS_CACHE = before


def build(files, name, batch_size=8, **changed):
    fields = {"path": str(files / name)} | TINY[name] | changed
    return TASKS[name](batch_size, **fields)


def leaves(batch):
    return batch if isinstance(batch, tuple) else (batch,)


def same(one, other):
    for a, b in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def pixels_of(label):
    return picture(label).astype(np.float32) / 127.5 - 1


# --- what a batch holds --------------------------------------------------------------


def test_images_are_those_of_the_files(files):
    dataset = build(files, "cifar10", augment=False).dataset
    epoch = [dataset.train_batch(0, step) for step in range(2 * NUMBER // 8)]
    for pixels, labels in epoch:
        assert pixels.shape == (8, 32, 32, 3) and pixels.dtype == np.float32
        assert labels.dtype == np.int32
        for image, label in zip(pixels, labels, strict=True):
            which = round((image[0, 0, 0] + 1) * 127.5)
            np.testing.assert_array_equal(image, pixels_of(which))
            assert label == which % 10
    seen = [
        np.concatenate([x[:, 0, 0, 0] for x, _ in half])
        for half in (epoch[: NUMBER // 8], epoch[NUMBER // 8 :])
    ]
    # Each once in an epoch, and in another order in the next.
    assert all(len(np.unique(one)) == NUMBER for one in seen)
    assert not np.array_equal(*seen)
    pixels, labels = dataset.validation
    assert len(pixels) == 8 and pixels.dtype == np.float32
    same((pixels[0], labels[-1]), (pixels_of(100), 111 % 10))
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), epoch[0])
    assert dataset.batch_spec == spec


def test_images_are_moved_and_mirrored():
    image = picture(3)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    expected = {}
    for row in range(9):
        for column in range(9):
            moved = padded[row : row + 32, column : column + 32]
            expected[moved.tobytes()] = row, column, False
            expected[moved[:, ::-1].tobytes()] = row, column, True
    random = np.random.default_rng(0)
    found = [expected[hub.crop_and_flip(image, random).tobytes()] for _ in range(2000)]
    assert len(expected) == len(set(found)) == 162


def test_augmentation_is_new_in_every_epoch(files):
    dataset = build(files, "cifar10", batch_size=NUMBER).dataset
    first, second = (dataset.train_batch(0, step)[0] for step in (0, 1))
    assert first.shape == second.shape
    distances = np.abs(first[:, None] - second).max((2, 3, 4))
    assert (distances.min(1) > 0).sum() > NUMBER / 2


def test_text_is_cut_end_to_end(files):
    dataset = build(files, "hub_text", batch_size=4).dataset
    text = "".join(f"{one}\n" for one in TEXT["train"] if one is not None).encode()
    windows = [text[i : i + LENGTH + 1] for i in range(0, len(text) - LENGTH, LENGTH)]
    steps = len(windows) // 4
    epoch = np.concatenate([dataset.train_batch(1, i) for i in range(steps)])
    assert epoch.dtype == np.int32 and epoch.shape == (4 * steps, LENGTH + 1)
    found = sorted(bytes(one.astype(np.uint8)) for one in epoch)
    assert steps * 4 >= len(windows) - 3
    remaining = sorted(windows)
    for one in found:
        remaining.remove(one)  # each at most once
    assert dataset.validation.shape == (8, LENGTH + 1)
    assert bytes(dataset.validation[0].astype(np.uint8)) == b"0\n1\n2\n"
    assert dataset.batch_spec == jax.ShapeDtypeStruct((4, LENGTH + 1), np.int32)


def test_text_may_be_plain_files_and_is_read_up_to_a_limit(files, tmp_path):
    (tmp_path / "train.txt").write_text("one\n\ntwo")
    rows = hub.load_split("train_split", str(tmp_path), "", "train")
    assert hub.read_bytes(rows, "text", 99).tobytes() == b"one\n\ntwo\n"
    assert hub.read_bytes(rows, "text", 6).tobytes() == b"one\n\nt"


# --- who makes it, and when ----------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_batches_depend_on_seed_and_step_only(files, name):
    first, second = build(files, name).dataset, build(files, name).dataset
    first.train_batch(3, 0)
    same(first.train_batch(3, 7), second.train_batch(3, 7))
    for seed, step in ((3, 8), (4, 7)):
        other = leaves(second.train_batch(seed, step))[0]
        assert not np.array_equal(leaves(first.train_batch(3, 7))[0], other)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("count", [2, 4])
def test_the_parts_of_all_processes_make_the_batch(files, name, count):
    dataset = build(files, name).dataset
    for step in (0, 5):
        parts = [
            dataset.batches(2, Share(index, count))[step] for index in range(count)
        ]
        assert all(len(leaves(part)[0]) == 8 // count for part in parts)
        whole = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        same(whole, dataset.train_batch(2, step))


@pytest.mark.parametrize("name", TINY)
def test_an_iterator_goes_on_where_another_stopped(files, name):
    dataset = build(files, name).dataset
    iterator = iter(dataset.batches(1).to_iter_dataset(READING))
    for step in range(4):
        same(next(iterator), dataset.train_batch(1, step))
    position = json.loads(json.dumps(iterator.get_state()))
    again = iter(build(files, name).dataset.batches(1).to_iter_dataset(READING))
    again.set_state(position)
    for _ in range(2):
        same(next(iterator), next(again))


# --- training ------------------------------------------------------------------------


def overrides(files, name):
    fields = {"path": files / name} | TINY[name]
    return [f"--config.task.{field}={value}" for field, value in fields.items()]


def test_the_text_trains(files, tmp_path, quick_compilation):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(
            [
                *("train", str(CONFIGS / "hub_text.py"), *overrides(files, "hub_text")),
                f"--config.workdir={tmp_path}",
                "--config.mesh_shape=(1,)",
                "--config.batch_size=8",
                "--config.curvature_batch_size=4",
                "--config.steps=3",
                "--config.log_every=1",
                "--config.train_base=False",
                "--config.optimizer.num_largest=1",
                "--config.optimizer.num_matvecs=2",
            ]
        )
    assert exit_info.value.code == 0
    lines = (tmp_path / "dho2" / "metrics.jsonl").read_text().splitlines()
    first, last = (json.loads(lines[i]) for i in (0, -1))
    assert last["step"] == 3 and last["refreshes"] >= 1 and last["sharpness"] > 0
    assert last["val_loss"] < first["val_loss"] < 1.2 * np.log(256)


def test_the_images_have_a_network(files, quick_compilation):
    path = str(CONFIGS / "cifar10.py")
    config = experiment.read_config(path, overrides(files, "cifar10"))
    fields = dict(config.task.items())
    task = TASKS[fields.pop("name")](8, **fields)
    params, batch = task.init(0), task.dataset.train_batch(0, 0)
    loss, grads = jax.jit(jax.value_and_grad(task.loss_fn))(params, batch)
    assert abs(float(loss) - np.log(10)) < 0.1
    for leaf in jax.tree.leaves(grads):  # every layer is used
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0
    init = build(files, "cifar10", stage_sizes=(3, 3, 3), width=16).init
    sizes = [x.size for x in jax.tree.leaves(jax.eval_shape(init, 0))]
    # 270 thousand in ResNet-20, and here a convolution in two of the shortcuts.
    assert sum(sizes) == 272_474


# --- mistakes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changed", "expected"),
    [
        ("cifar10", {"path": "/nowhere"}, "cannot load path='/nowhere', subset='',"),
        ("cifar10", {"train_split": "trian"}, "train_split='trian' (ValueError: Unk"),
        ("hub_text", {"subset": "raw"}, "subset='raw', train_split='train' (ValueErr"),
        ("hub_text", {"validation_split": "test"}, "validation_split='test' (ValueErr"),
        ("cifar10", {"image_column": "image"}, "image_column must name a column of"),
        ("cifar10", {"label_column": "labels"}, "got 'labels'; did you mean `label`?"),
        ("cifar10", {"num_classes": 9}, "to config.task.num_classes=9 less one, got 9"),
        ("cifar10", {"label_column": "img"}, "label_column='img' must hold integers"),
        ("cifar10", {"image_column": "label"}, "of (32, 32) pixels, got int; name an"),
        ("cifar10", {"image_size": 28}, "of (28, 28) pixels, got (32, 32); name ano"),
        ("cifar10", {"num_validation": 13}, "most the 12 images of config.task.valid"),
        ("cifar10", {"stage_sizes": ()}, "stage_sizes must hold positive integers"),
        ("hub_text", {"text_column": "texts"}, "got 'texts'; did you mean `text`?"),
        ("hub_text", {"text_column": "id"}, "text_column='id' must hold text, got int"),
        ("hub_text", {"length": 90}, "validation_split='validation' holds 80 bytes of"),
        ("hub_text", {"max_bytes": 5}, "holds 5 bytes of config.task.max_bytes=5, f"),
        ("hub_text", {"num_validation": 99}, "windows of config.task.validation_split"),
        ("hub_text", {"num_heads": 3}, "num_heads must divide config.task.width"),
    ],
)
def test_mistakes_are_explained(files, name, changed, expected):
    with pytest.raises(UserError) as error_info:
        build(files, name, **changed)
    assert expected in str(error_info.value)
    assert str(error_info.value).startswith("config.task")


def test_an_image_of_another_size_is_noticed(files, tmp_path):
    sizes = {"train": (32, 32, 16), "test": (32,) * 8}
    for split, edges in sizes.items():
        rows = {"img": [png(picture(1, i)) for i in edges], "label": [0] * len(edges)}
        image = datasets.Features(
            {"img": datasets.Image(), "label": datasets.Value("int64")}
        )
        table = datasets.Dataset.from_dict(rows, features=image)
        table.to_parquet(tmp_path / f"{split}.parquet")
    dataset = build(files, "cifar10", path=str(tmp_path)).dataset
    with pytest.raises(UserError, match=r"of \(32, 32\) pixels, got \(16, 16\)"):
        dataset.batches(0)


def test_without_the_library_or_the_network(files, monkeypatch):
    def load_dataset(*arguments, **keywords):
        raise ConnectionError("Couldn't reach 'some/name' on the Hub (Offline)\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as error_info:
        build(files, "hub_text", path="some/name")
    said = str(error_info.value)
    assert "(ConnectionError: Couldn't reach 'some/name' on the Hub (Offline));" in said
    assert "the network, or give the directory of a copy" in said and "\n" not in said
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'dho2-jax\[data\]'"):
        build(files, "hub_text")
