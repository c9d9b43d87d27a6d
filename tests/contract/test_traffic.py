"""What travels between devices, on eight CPU devices and on sixteen chips of a TPU.

Run as a program, with a directory, this file compiles the same two programs for
v5e:4x4: libtpu belongs into a process of its own.
"""

import importlib.util
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_jax
from dho2_jax.app.plan import collectives, topology

pytestmark = pytest.mark.slow

LARGEST, SMALLEST, MATVECS = 5, 2, 11
PARTS = {"b": (512,), "u": (256, 512), "v": (512, 256), "w": (256, 512)}
NUMBERS = sum(int(np.prod(shape)) for shape in PARTS.values())
STORED = NUMBERS + 512  # the vector in a slab of eight times 128
SCALARS = 8  # "a handful"
CHIPS = topology.parse("v5e:4x4")


def texts(devices):
    """A step and a refresh, compiled, with replicated parameters and Adam."""
    mesh = Mesh(np.array(devices), ("d",))

    def array(shape, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    def network(params, inputs):
        hidden = jnp.tanh(inputs @ params["w"] + params["b"])
        return jnp.mean((jnp.tanh(hidden @ params["v"]) @ params["u"]) ** 2)

    tx = dho2_jax.dho2(
        optax.adam(1e-3),
        num_largest=LARGEST,
        num_smallest=SMALLEST,
        num_matvecs=MATVECS,
        refresh="external",
        mesh=mesh,
    )

    def step(params, state, inputs):
        value, grads = jax.value_and_grad(network)(params, inputs)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def refresh(params, state, inputs):
        return dho2_jax.refresh(state, params, lambda p: network(p, inputs))

    params = {name: array(shape, P()) for name, shape in PARTS.items()}
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        dho2_jax.state_shardings(tx, params),
    )
    stored = state.curvature.subspace.eigenvectors.layout.stored
    assert sum(int(np.prod(shape)) for shape in stored) == STORED
    arguments = params, state, array((64, 256), P("d"))
    return [jax.jit(f).lower(*arguments).compile().as_text() for f in (step, refresh)]


@pytest.fixture(scope="module", params=["cpu:8", "v5e:4x4"])
def traffic(request, tmp_path_factory):
    """Collectives of the step and of the refresh."""
    if request.param == "cpu:8":
        return [collectives.read(text) for text in texts(jax.devices())]
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    directory = tmp_path_factory.mktemp("hlo")
    subprocess.run(
        [sys.executable, __file__, str(directory)],
        env=topology.environment(CHIPS),
        check=True,
        capture_output=True,
    )
    return [
        collectives.read((directory / name).read_text()) for name in ("step", "refresh")
    ]


def test_a_step_moves_one_vector_and_a_few_numbers(traffic):
    found = collectives.summary(traffic[0])
    assert found.keys() == {"all-reduce", "all-gather"}
    assert found["all-gather"].numbers <= 1.1 * STORED
    # The gradient and the loss are data parallelism's own.
    beyond = found["all-reduce"].numbers - NUMBERS - 1
    assert 2 * (LARGEST + SMALLEST) <= beyond <= 2 * (LARGEST + SMALLEST) + SCALARS


def test_a_lanczos_product_moves_its_vector_and_one_row_of_coefficients(traffic):
    inside = collectives.within_loop(traffic[1], MATVECS + 1)
    found = collectives.summary(inside)
    assert found.keys() == {"all-reduce", "all-gather"}
    assert found["all-gather"].numbers <= 1.1 * STORED
    small = [x.numbers for x in inside if x.numbers < 256]
    assert small == [1, MATVECS + 1]
    # The two terms of a product may be reduced apart.
    assert found["all-reduce"].numbers - sum(small) <= 2 * NUMBERS


def test_no_collective_moves_the_basis(traffic):
    """Nor any part of it that is longer than a vector."""
    for one in [x for program in traffic for x in program]:
        # Of a product the compiler may reduce two terms at once.
        product = one.kind == "all-reduce" and one.loops
        assert one.numbers <= (2 * NUMBERS if product else 1.1 * STORED), one
    outside = [x for x in traffic[1] if not x.loops]
    # The rate's probe, in a branch that is seldom taken, needs one vector whole.
    assert sum(x.numbers for x in outside if not x.in_conditional) < 200
    assert sum(x.numbers for x in outside) <= 1.1 * STORED


def main(directory):
    for name, text in zip(
        ("step", "refresh"), texts(topology.devices(CHIPS)), strict=True
    ):
        (pathlib.Path(directory) / name).write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
