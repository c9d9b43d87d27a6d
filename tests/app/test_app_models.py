"""The large networks: published sizes, and sound derivatives at tiny ones."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dho2_jax
from dho2_jax.app import config_files, fields
from dho2_jax.app.errors import UserError
from dho2_jax.app.run import experiment, optimizers
from dho2_jax.app.tasks.registry import TASKS

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TEXT = {
    "vocabulary_size": 128,
    "length": 16,
    "width": 16,
    "num_layers": 2,
    "num_heads": 2,
    "max_bytes": 100_000,
    "num_validation": 8,
}
IMAGES = {"image_size": 32, "num_classes": 10, "num_validation": 8}
TINY = {
    "gpt2": TEXT,
    "resnet": {**IMAGES, "stage_sizes": (1, 2), "width": 4},
    "vit": {**IMAGES, "patch_size": 8, "width": 16, "num_layers": 2, "num_heads": 2},
}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """These programs run once: compiling takes far longer than running."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def tiny(name, **changed):
    return TASKS[name](8, **TINY[name] | changed)


def random_like(params, seed):
    leaves, structure = jax.tree.flatten(params)
    random = np.random.default_rng(seed)
    drawn = [random.standard_normal(x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(structure, drawn)


def vdot(a, b):
    return float(sum(map(jnp.vdot, jax.tree.leaves(a), jax.tree.leaves(b))))


def curvature(task, batch):
    def product(params, vector):
        return dho2_jax.hvp(lambda p: task.loss_fn(p, batch), params)(vector)

    return jax.jit(product)


def test_the_last_of_two_overrides_counts_and_fields_have_types():
    more = ["--config.optimizer.num_matvecs=9", "--config.mesh_axes=('a','b')"]
    more += ["--config.steps=3", "--config.optimizer.num_matvecs=None"]
    found = experiment.read_config("digits_mlp", [*more, "--config.steps=4"])
    assert found.steps == 4 and found.mesh_axes == ("a", "b")
    assert found.optimizer.num_matvecs is None and found.num_seeds == 3
    plain = found.to_dict()
    assert set(plain) == {field.name for field in fields.FIELDS}
    assert fields.changed(plain, plain | {"workdir": "x"}) == {}
    assert fields.changed(plain, plain | {"seed": 7}) == {"seed": (0, 7)}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2_124m", 124_439_808),
        ("gpt2_1p5b", 1_557_611_200),
        ("resnet152", 60_192_808),
        ("vit_b16", 86_567_656),
    ],
)
def test_configs_have_the_published_sizes(name, count):
    defaults = optimizers.optimizer_defaults()
    found = config_files.load(str(CONFIGS / f"{name}.py"))
    found = fields.checked(fields.complete(found, TASKS, defaults))
    arguments = dict(found.task.items())
    task = TASKS[arguments.pop("name")](found.batch_size, **arguments)
    params = jax.eval_shape(task.init, 0)
    leaves = jax.tree.leaves(params)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
    assert sum(math.prod(x.shape) for x in leaves) == count
    assert {x.dtype for x in leaves} == {np.dtype("float32")}
    loss = jax.eval_shape(task.loss_fn, params, task.dataset.batch_spec)
    assert loss.shape == () and loss.dtype == np.float32
    # 256 chips get at least one example each, of the curvature batch too.
    assert found.batch_size % found.curvature_batch_size == 0
    assert found.curvature_batch_size % 256 == 0
    assert found.optimizer.num_largest % 8 == found.optimizer.num_matvecs % 8 == 0
    optimizers.build_dho2(found)
    optimizers.build_base(found)


@pytest.mark.parametrize("name", TINY)
def test_derivatives_are_sound(name):
    task = tiny(name)
    params, batch = task.init(0), task.dataset.train_batch(0, 0)
    loss, grads = jax.jit(jax.value_and_grad(task.loss_fn))(params, batch)
    classes = TINY[name].get("vocabulary_size", 10)
    assert abs(float(loss) - math.log(classes)) < 0.1
    for leaf in jax.tree.leaves(grads):  # every layer is used
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0
    product = curvature(task, batch)
    u, v = random_like(params, 1), random_like(params, 2)
    hu, hv = product(params, u), product(params, v)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(hv))
    scale = math.sqrt(vdot(u, u) * vdot(hv, hv))
    assert abs(vdot(u, hv) - vdot(v, hu)) < 1e-4 * scale
    other = task.init(1)
    assert float(task.loss_fn(other, batch)) != float(loss)


@pytest.mark.parametrize("name", TINY)
def test_computing_blocks_again_changes_nothing(name):
    plain, again = tiny(name), tiny(name, remat=True)
    params, batch = plain.init(0), plain.dataset.train_batch(0, 0)
    vector = random_like(params, 1)
    expected = curvature(plain, batch)(params, vector)
    found = curvature(again, batch)(params, vector)
    scale = math.sqrt(vdot(expected, expected))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * scale)
    text = str(jax.make_jaxpr(jax.grad(again.loss_fn))(params, batch))
    assert "remat" in text or "checkpoint" in text


@pytest.mark.parametrize("remat", [False, True])
def test_stacked_blocks_compute_the_same(remat):
    plain, stacked = tiny("gpt2"), tiny("gpt2", scan_layers=True, remat=remat)
    params, batch = plain.init(0), plain.dataset.train_batch(0, 0)
    blocks = [params["blocks"][i] for i in range(2)]
    together = params | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}
    shapes = jax.tree.map(lambda x: x.shape, jax.eval_shape(stacked.init, 0))
    assert jax.tree.map(lambda x: x.shape, together) == shapes
    first, second = (
        jax.jit(jax.value_and_grad(task.loss_fn))(p, batch)
        for task, p in ((plain, params), (stacked, together))
    )
    np.testing.assert_allclose(first[0], second[0], rtol=1e-6)
    for i in range(2):
        for a, b in zip(
            jax.tree.leaves(first[1]["blocks"][i]),
            jax.tree.leaves(second[1]["blocks"]),
            strict=True,
        ):
            np.testing.assert_allclose(a, b[i], atol=1e-6)
    # Layers start from different weights.
    kernel = stacked.init(0)["blocks"]["mlp_in"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])


def test_arithmetic_in_bfloat16():
    plain, low = tiny("gpt2"), tiny("gpt2", dtype="bfloat16")
    params, batch = plain.init(0), plain.dataset.train_batch(0, 0)
    assert {x.dtype for x in jax.tree.leaves(low.init(0))} == {np.dtype("float32")}
    logits = low.outputs_fn(params, batch)
    assert logits.dtype == np.float32
    difference = np.abs(logits - plain.outputs_fn(params, batch)).max()
    assert 1e-4 < difference < 0.05


def test_gpt2_does_not_look_ahead():
    task = tiny("gpt2")
    params, batch = task.init(0), task.dataset.train_batch(0, 0)
    changed = batch.copy()
    changed[:, 9] = (batch[:, 9] + 1) % 96
    before, after = (task.outputs_fn(params, one) for one in (batch, changed))
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert (np.abs(before - after)[:, 9:].max((0, 2)) > 1e-4).all()


def test_batches_are_normalized_by_themselves():
    """A kernel's scale does not matter; an image's logits depend on the others."""
    task = tiny("resnet")
    params, batch = task.init(0), task.dataset.train_batch(0, 0)
    outputs = jax.jit(task.outputs_fn)
    logits = outputs(params, batch)
    larger = jax.tree.map(lambda x: 8 * x if x.ndim == 4 else x, params)
    # Not exactly: what is added to the variances does not grow with the kernels.
    np.testing.assert_allclose(logits, outputs(larger, batch), atol=1e-3)
    alone = outputs(params, jax.tree.map(lambda x: x[:4], batch))
    assert np.abs(alone - logits[:4]).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "changed", "expected"),
    [
        ("gpt2", {"num_heads": 3}, "config.task.num_heads must divide"),
        ("vit", {"num_heads": 3}, "config.task.num_heads must divide"),
        ("gpt2", {"vocabulary_size": 95}, "must be at least the text's 96, got 95"),
        ("gpt2", {"dtype": "float16"}, "must be one of float32, bfloat16"),
        ("vit", {"patch_size": 5}, "must divide config.task.image_size, got 5 and 32"),
        ("resnet", {"stage_sizes": ()}, "config.task.stage_sizes must hold positive"),
        ("resnet", {"num_classes": 9}, "must be at least the data's 10, got 9"),
        ("resnet", {"image_size": 428}, "photographs' 427, got 428"),
        ("vit", {"num_validation": 1797}, "leave some of the 1797 images"),
    ],
)
def test_mistakes_are_explained(name, changed, expected):
    with pytest.raises(UserError) as error:
        tiny(name, **changed)
    assert expected in str(error.value)
    assert str(error.value).startswith("config.task.")
