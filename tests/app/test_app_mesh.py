"""`dho2 train` on a mesh of eight virtual devices: the curve of one, in parts."""

import pathlib
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dho2_jax.app.errors import UserError
from dho2_jax.app.run import experiment, placement
from dho2_jax.app.run.programs import build_programs

DIGITS = pathlib.Path(__file__).parents[2] / "configs" / "digits_mlp.py"
SMALL = [
    "--config.task.widths=(16,)",
    "--config.steps=12",
    "--config.log_every=3",
    "--config.eval_every=6",
    "--config.batch_size=64",
    "--config.curvature_batch_size=16",
    "--config.optimizer.num_largest=3",
    "--config.optimizer.num_matvecs=6",
    "--config.optimizer.refresh_period=6",
]
XY = {"x": 2, "y": 4}
FSDP = [
    "--config.mesh_shape=(4,-1)",
    "--config.mesh_axes=data,fsdp",
    "--config.param_sharding=fsdp",
]


pytestmark = pytest.mark.usefixtures("quick_compilation")


def build(*overrides):
    config = experiment.read_config(str(DIGITS), [*SMALL, *overrides])
    return experiment.build("digits", config)


def train(*overrides, optimizer="dho2"):
    """Returns the rows of a run, and its programs."""
    built = build(*overrides)
    chosen = getattr(built, optimizer)
    programs = experiment.compile_for(built, chosen)
    run = experiment.run_one(
        built, chosen, programs, seed=0, directory=None, should_stop=lambda: False
    )
    return run.rows, programs


@pytest.fixture(scope="module")
def one_device():
    return train("--config.mesh_shape=(1,)")[0]


def check_same_curve(rows, expected):
    assert [row["step"] for row in rows] == [0, 3, 6, 9, 12]
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name in ("train_loss", "val_loss", "sharpness", "base_scaling"):
            if name in row:
                np.testing.assert_allclose(row[name], other[name], rtol=2e-4)
        if "eigenvalues" in row:
            largest = max(map(abs, other["eigenvalues"]))
            np.testing.assert_allclose(
                row["eigenvalues"], other["eigenvalues"], atol=1e-3 * largest
            )
    assert rows[-1]["refreshes"] == expected[-1]["refreshes"] >= 2


def shardings(tree):
    return {str(x.sharding.spec) for x in jax.tree.leaves(tree)}


def test_all_devices_are_the_default(one_device):
    rows, programs = train()
    check_same_curve(rows, one_device)
    params, state = programs.start(np.uint32(0))
    batch = programs.place((np.zeros((64, 64), np.float32), np.zeros(64, np.int32)))
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(params))
    assert shardings(batch) == {str(P(("data",)))}
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(state))


def test_parameters_in_parts(one_device):
    rows, programs = train(*FSDP)
    check_same_curve(rows, one_device)
    params, state = programs.start(np.uint32(0))
    for x in jax.tree.leaves(params):
        share = x.addressable_shards[0].data.size
        assert share == x.size / 2, (x.shape, x.sharding)
    # Three rows of the basis: an eighth of each on a device, if padded generously.
    n = sum(x.size for x in jax.tree.leaves(params))
    basis = jax.tree.leaves(state.curvature.subspace.eigenvectors)
    share = sum(x.addressable_shards[0].data.size for x in basis)
    assert share <= 2 * 3 * n / 8, (share, 3 * n)


def test_the_base_alone_in_parts():
    rows, programs = train(*FSDP, optimizer="base")
    expected, _ = train("--config.mesh_shape=(1,)", optimizer="base")
    for row, other in zip(rows, expected, strict=True):
        for name in row.keys() - {"seconds"}:
            np.testing.assert_allclose(row[name], other[name], rtol=1e-4)
    _, state = programs.start(np.uint32(0))
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert len(moments) == 8  # two for each of Adam's four parameters
    for x in moments:
        assert x.addressable_shards[0].data.size == x.size / 2


def test_building_makes_no_array(monkeypatch):
    """What `dho2 plan` lowers for devices that this machine does not have."""
    built = build(*FSDP)

    def fail(*args):
        raise AssertionError("data was read")

    dataset = built.task.dataset
    task = built.task._replace(
        dataset=type(dataset)(fail, dataset.batch_spec, fail),
    )
    before = len(jax.live_arrays())
    programs = build_programs(task, built.dho2, 16, built.mesh, built.param_specs)
    assert programs.step.function.lower(*programs.step.arguments).as_text()
    assert len(jax.live_arrays()) <= before + 2  # a constant may be


def test_the_curvature_batch_lies_where_it_was():
    mesh = build(*FSDP).mesh
    batch = jax.ShapeDtypeStruct(
        (64, 5), np.float32, sharding=placement.batch_sharding(mesh)
    )
    taken = jax.jit(lambda x: placement.spread(x, 16, batch.sharding))
    taken = taken.lower(batch).compile()
    text = taken.as_text() or ""
    assert text and not re.search(r"all-(gather|to-all|reduce)|collective", text)
    assert taken.output_shardings.spec == P(("data", "fsdp"))
    x = np.arange(64 * 5, dtype=np.float32).reshape(64, 5)
    np.testing.assert_array_equal(taken(placement.put(x, mesh)), x[::4])
    np.testing.assert_array_equal(placement.spread(x, 10, None), x[:60:6])


def test_a_batch_that_does_not_divide_lies_whole_on_each():
    mesh = build().mesh
    x = placement.put(np.ones((12, 3), np.float32), mesh)
    assert x.sharding.is_fully_replicated
    x = placement.put(np.ones((16, 3), np.float32), mesh)
    assert x.addressable_shards[0].data.shape == (2, 3)


def test_largest_dimension_that_divides_is_split():
    mesh = build(*FSDP).mesh
    params = {
        name: jax.ShapeDtypeStruct(shape, np.float32)
        for name, shape in (
            ("a", (3, 8, 4)),
            ("b", (4, 9)),
            ("c", (7,)),
            ("d", ()),
            ("e", (6, 6)),
        )
    }
    specs = placement.param_specs(params, mesh, "fsdp")
    assert specs == {
        "a": P(None, "fsdp"),
        "b": P("fsdp"),
        "c": P(),
        "d": P(),
        "e": P("fsdp"),
    }
    assert set(placement.param_specs(params, mesh, "replicated").values()) == {P()}


@pytest.mark.parametrize(
    ("overrides", "axes"),
    [
        ([], {"data": 8}),
        (["--config.param_sharding=fsdp"], {"fsdp": 8}),
        (["--config.mesh_shape=(4,)"], {"data": 4}),
        (["--config.mesh_shape=(-1,4)", "--config.mesh_axes=('x','y')"], XY),
        (["--config.mesh_shape=(1,)"], None),
        (["--config.mesh_shape=(1,1)", "--config.mesh_axes=x,y"], None),
    ],
)
def test_meshes(overrides, axes):
    mesh = build(*overrides).mesh
    if mesh is None or axes is None:
        assert mesh is axes
        return
    assert dict(mesh.shape) == axes
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["mesh_shape=(3,3)"],
            "must fit the devices, of which there are 8, got (3, 3)",
        ),
        (["mesh_shape=(3,-1)"], "must fit the devices, of which there are 8"),
        (["mesh_shape=(-1,-1)"], "must hold at most one -1"),
        (["mesh_shape=(0,)"], "must hold positive integers"),
        (["mesh_shape=('a',)"], "must hold positive integers"),
        (["mesh_shape=(4,2)"], "`config.mesh_axes` must name the 2 axes"),
        (["mesh_axes=data,fsdp"], "`config.mesh_axes` must name the 1 axes"),
        (["mesh_shape=(4,2)", "mesh_axes=a,a"], "each differently"),
        (["param_sharding=fdsp"], "got 'fdsp'; did you mean `fsdp`?"),
        (["param_sharding=fsdp", "mesh_axes=data"], "must have an axis `fsdp`"),
        (["batch_size=60"], "`config.batch_size` must be a multiple of the 8 devices"),
        (["curvature_batch_size=12"], "got 12; choose one of 8, 16, 32, 64."),
        (["curvature_batch_size=24"], "must divide config.batch_size=64"),
        (["seed=4294967296"], "`config.seed` must be below 2**32"),
    ],
)
def test_mistakes(overrides, expected):
    with pytest.raises(UserError) as error_info:
        build(*(f"--config.{one}" for one in overrides))
    assert expected in str(error_info.value)
