"""What travels between the groups that take turns, on a CPU and on chips of a TPU.

Run as a program, with a topology and a directory, this file compiles the same programs
for a TPU: libtpu belongs into a process of its own.
"""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from cases import FAST
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_cases import loss, parameters
from test_stagger import LEAVES, OPTIONS, TALL_AND_WIDE

import dho2_jax
from dho2_jax.app.plan import collectives, topology

pytestmark = pytest.mark.slow

TOPOLOGIES = ("cpu:8", "v5e:4x4", "v5e:16x16")
SIDES = {8: 2, 16: 4, 256: 16}  # of the second axis, by the number of devices
NUMBERS = sum(x.size for x in parameters(LEAVES).values())


def meshes(devices):
    """Replicated, except on the largest, and fully sharded over a second axis."""
    side = SIDES[len(devices)]
    devices = np.array(devices)
    found = {"fsdp": Mesh(devices.reshape(-1, side), ("data", "fsdp"))}
    if len(devices) < 256:
        found["replicated"] = Mesh(devices, ("data",))
    return found


def programs(mesh, fsdp):
    """Name to a lowered program; of arrays that need not be there."""

    def array(x, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    specs = {name: (TALL_AND_WIDE if fsdp else {}).get(name, P()) for name in LEAVES}
    params = {n: array(x, specs[n]) for n, x in parameters(LEAVES).items()}
    examples = (np.zeros((512, 9), np.float32), np.zeros(512, np.float32))
    rest = P("fsdp") if fsdp else P()
    whole = tuple(array(x, P(mesh.axis_names)) for x in examples)
    around = tuple(array(x[:64], rest) for x in examples)
    options = OPTIONS | {"refresh": "staggered", "mesh": mesh, "param_specs": specs}
    tx = dho2_jax.dho2(optax.adam(1e-2), **options)
    svag = dho2_jax.staggered_value_and_grad(loss, mesh=mesh, stagger_axis="data")
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        dho2_jax.state_shardings(tx, params),
    )

    def step(params, state, batch, curvature_batch):
        with jax.named_scope("side_by_side"):
            value, grads, product = svag(params, batch, curvature_batch, state)
        updates, state = tx.update(grads, state, params, product=product)
        return optax.apply_updates(params, updates), state, value

    yield "svag", jax.jit(svag).lower(params, whole, around, state)
    yield "step", jax.jit(step).lower(params, state, whole, around)


def texts(devices):
    """`LAYOUT-PROGRAM` to the compiled text."""
    options = FAST if devices[0].platform == "cpu" else None
    return {
        f"{layout}-{name}": lowered.compile(options).as_text()
        for layout, mesh in meshes(devices).items()
        for name, lowered in programs(mesh, layout == "fsdp")
    }


@pytest.fixture(scope="module", params=TOPOLOGIES)
def compiled(request, tmp_path_factory):
    """The topology's name, and the texts."""
    if request.param == "cpu:8":
        return request.param, texts(jax.devices())
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    directory = tmp_path_factory.mktemp("hlo")
    subprocess.run(
        [sys.executable, __file__, request.param, str(directory)],
        env=topology.environment(topology.parse(request.param))
        | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        capture_output=True,
    )
    return request.param, {path.stem: path.read_text() for path in directory.iterdir()}


def device_groups(text, devices):
    """The groups of devices that `replica_groups`, or source and target pairs, name."""
    ids = np.arange(devices)
    if text.startswith("{{"):
        each = re.findall(r"\{([\d,]+)\}", text)
        return [[int(x) for x in one.split(",")] for one in each]
    if iota := re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, source, order = (
            [int(x) for x in (part or "").split(",") if x] for part in iota.groups()
        )
        ids = ids.reshape(source)
        return (ids.transpose(order) if order else ids).reshape(shape).tolist()
    order = r"(?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))?"
    found = re.fullmatch(rf"mesh\[([^\]]*)\]{order} \{{(.*)\}}", text)
    assert found, text
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    if found[2]:
        ids = ids.reshape([int(x) for x in found[2].split(",")])
        ids = ids.transpose([int(x) for x in found[3].split(",")])
    ids = ids.reshape([int(x) for x in sizes.values()])
    over = re.fullmatch(r"'\w+'(?:, ?'\w+')*", found[4])
    assert over, text
    chosen = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", found[4])]
    ids = np.moveaxis(ids, chosen, range(-len(chosen), 0))
    count = int(np.prod(ids.shape[-len(chosen) :]))
    return ids.reshape(-1, count).tolist()


def test_groups_of_devices_are_read():
    expected = [[0, 2, 4, 6], [1, 3, 5, 7]]
    for text in (
        "{{0,2,4,6},{1,3,5,7}}",
        "[2,4]<=[4,2]T(1,0)",
        "mesh['a'=4,'b'=2] {'a'}",
        "mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'c'}",
    ):
        assert device_groups(text, 8) == expected
    assert device_groups("[2,4]<=[8]", 8) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def assert_within_groups(found, devices, across):
    """No collective has two devices of different groups along the first axis."""
    for one in found:
        for group in device_groups(one.replica_groups, devices):
            assert len({member // across for member in group}) == 1, one


def test_what_groups_decide_apart_needs_no_other_group(compiled):
    where, all_texts = compiled
    devices = topology.parse(where).chips
    for name, text in all_texts.items():
        layout, kind = name.split("-")
        assert re.search(r"\bconditional\(", text), name
        found = [x for x in collectives.read(text) if x.in_conditional]
        if kind == "step":
            found = [x for x in found if "side_by_side" in x.name]
        if layout == "replicated":
            assert found == [], name
        else:
            assert found, name
            assert_within_groups(found, devices, SIDES[devices])


def test_an_idle_step_moves_the_gradient_alone(compiled):
    """What a product needs is in loops of one turn or none."""
    where, all_texts = compiled
    for name in {"replicated-svag", "fsdp-svag"} & all_texts.keys():
        found = collectives.read(all_texts[name])
        loops = [x for x in found if x.loops]
        assert sum(x.numbers for x in loops) >= NUMBERS / 16, name
        assert all(x.trips is None for x in loops)
        outside = [x for x in found if not x.loops and not x.in_conditional]
        side = 1
        if name == "fsdp-svag":  # gathers of the parameters are the layout's own
            outside = [x for x in outside if x.kind in ("all-reduce", "reduce-scatter")]
            side = SIDES[topology.parse(where).chips]
        assert {x.kind for x in outside} == {"all-reduce"}
        assert sum(x.numbers for x in outside) <= NUMBERS / side + 3, name


def test_products_are_scattered():
    mesh = meshes(jax.devices())["replicated"]
    name, lowered = next(programs(mesh, False))
    assert name == "svag"
    assert lowered.as_text().count("stablehlo.reduce_scatter") == 3  # stored arrays


def main(where, directory):
    for name, text in texts(topology.devices(topology.parse(where))).items():
        (pathlib.Path(directory) / name).write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
