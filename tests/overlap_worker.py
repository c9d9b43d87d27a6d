"""One of the processes of `test_overlap_distributed`: prints what it sees as JSON.

python overlap_worker.py PORT PROCESSES INDEX SPLIT
"""

import json
import sys

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_cases import OPTIONS, batch, loss, parameters

import dho2_jax

NAMES = ("scalar", "tall", "wide")
SPLITS = {
    # Of each process's four devices, by number: those that train, and the others.
    "2+2": ((0, 1), (2, 3)),
    "3+1": ((0, 1, 2), (3,)),
    "uneven": ((0, 1), (2, 3)),
    "crossed": ((0, 1), (2, 3)),
}


def grid(numbers):
    """Devices with a first axis over groups of four: processes, where there are two."""
    devices = sorted(jax.devices(), key=lambda d: d.id)
    return np.array([[devices[4 * i + j] for j in numbers] for i in range(2)])


def place(x, mesh, spec):
    """An array that every process has in full."""
    where = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


def main():
    port, processes, index, split = sys.argv[1:]
    if int(processes) > 1:
        jax.distributed.initialize(f"localhost:{port}", int(processes), int(index))
    train, rest = map(grid, SPLITS[split])
    if split == "uneven":
        rest = rest.reshape(1, -1)[:, :3]
    auto = (AxisType.Auto,) * 2
    near = Mesh(train, ("host", "d"), axis_types=auto)
    far = Mesh(rest, ("host", "d"), axis_types=auto)
    specs = {name: P() for name in NAMES} | {"tall": P(("host", "d"))}
    far_specs = {name: P() for name in NAMES} | {"tall": P("host")}
    if split == "crossed":
        far_specs["tall"] = P(("d", "host"))
    if split == "3+1":
        specs["tall"] = P("host")

    tx = dho2_jax.dho2(
        optax.adam(1e-2, eps=1e-3),
        **OPTIONS | {"refresh": "external", "num_matvecs": 6},
        mesh=near,
        param_specs=specs,
    )
    params = {k: place(x, near, specs[k]) for k, x in parameters(NAMES).items()}
    data = [place(x, near, P()) for x in batch()]
    state = jax.jit(tx.init)(params)

    def train_step(params, state, data):
        value, grads = jax.value_and_grad(loss)(params, data)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(train_step, donate_argnums=(0, 1))
    overlap = dho2_jax.overlapped_refresh(
        loss, mesh=far, param_specs=far_specs, batch_spec=P("host")
    )
    rows = []
    try:
        for _ in range(2):
            pending = overlap.launch(state, params, tuple(map(np.asarray, batch())))
            jax.block_until_ready(pending.noted)
            for _ in range(2):
                params, state, value = step(params, state, data)
                jax.block_until_ready((params, state))
                rows.append(float(value))
            state = overlap.land(state, pending)
            seen = dho2_jax.metrics(state)
            rows += np.asarray(state.curvature.subspace.eigenvalues).tolist()
            rows += [float(seen[k]) for k in ("refreshes", "age", "drift")]
            rows.append(float(np.linalg.norm(state.curvature.momentum)))
    except ValueError as error:
        print(json.dumps({"refused": str(error)}))
    else:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
