# SPDX-License-Identifier: Apache-2.0
"""Trains on all devices of all hosts, and goes on where it stopped.

    python train_pod.py --workdir gs://BUCKET/RUN          # Cloud TPU, Slurm, MPI, GKE
    python train_pod.py --workdir /shared/run --coordinator HOST0:1234 \
        --num-processes 2 --process-id 0                   # anywhere else

Every process runs this same program. README.md beside it has the commands.
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_sample_images

import dho2_jax

SCHEDULE = {"refresh_period": 100, "early_refreshes": (20, 50)}


def parse_options() -> argparse.Namespace:
    """Reads the command line; sizes are for all devices together."""
    parser = argparse.ArgumentParser(description="Trains on all devices of all hosts.")
    parser.add_argument("--workdir", required=True, help="absolute; all hosts see it")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    numbers = {"num-processes": None, "process-id": None, "steps": 1000}
    numbers |= {"batch-size": 4096, "width": 1024, "num-largest": 16}
    numbers |= {"save-every": 100, "log-every": 20}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def init_params(width: int) -> list[dict[str, jax.Array]]:
    """Makes an autoencoder's weights; under jit each device makes its own part."""
    sizes = list(itertools.pairwise([256, width, width // 2, 16, width // 2, 256]))
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return [
        {"w": jax.random.normal(key, shape) / shape[0] ** 0.5, "b": jnp.zeros(shape[1])}
        for key, shape in zip(keys, sizes, strict=True)
    ]


def loss_fn(params, batch: jax.Array) -> jax.Array:
    """Returns the mean over all patches, of all hosts, of the squared error."""
    x = batch
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    x = x @ params[-1]["w"] + params[-1]["b"]
    return jnp.mean(jnp.sum((x - batch) ** 2, axis=-1))


def make_loader(batch_size: int, sharding: NamedSharding):
    """Returns `step -> batch`; each process reads its own columns of the pictures.

    A batch depends on the step and the process alone: nothing of the loader must be
    saved. Put your own loader here, sharded by `jax.process_index()`.
    """
    index, count = jax.process_index(), jax.process_count()
    pictures = np.stack(load_sample_images().images).mean(-1).astype(np.float32) / 255
    mine = np.array_split(pictures, count, axis=2)[index]
    windows = np.lib.stride_tricks.sliding_window_view(mine, (16, 16), axis=(1, 2))

    def load(step: int) -> jax.Array:
        random = np.random.default_rng((step, index))
        size = batch_size // count
        chosen = [random.integers(length, size=size) for length in windows.shape[:3]]
        local = windows[tuple(chosen)].reshape(size, -1)
        return jax.make_array_from_process_local_data(sharding, local)

    return load


def main() -> None:
    """Trains."""
    options = parse_options()
    # Before anything else of JAX. Without flags JAX asks Cloud TPU, Slurm or MPI.
    jax.distributed.initialize(
        options.coordinator, options.num_processes, options.process_id
    )
    who = f"process {jax.process_index()} of {jax.process_count()} has"
    print(who, jax.local_device_count(), f"of {jax.device_count()} devices", flush=True)
    # One axis: batches are divided over it, and so are the parameters (FSDP).
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    divides = lambda x: x.shape[0] % mesh.size == 0  # noqa: E731
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            *(x.shape, x.dtype),
            sharding=NamedSharding(mesh, P("data") if divides(x) else P()),
        ),
        jax.eval_shape(lambda: init_params(options.width)),
    )
    specs = jax.tree.map(lambda x: x.sharding.spec, params)
    k, layout = options.num_largest, {"mesh": mesh, "param_specs": specs}
    tx = dho2_jax.dho2_adam(1e-3, num_largest=k, refresh="external", **layout)
    target = {"params": params, "state": dho2_jax.abstract_state(tx, params)}
    where = jax.tree.map(lambda x: x.sharding, target)

    def init():
        params = init_params(options.width)
        return {"params": params, "state": tx.init(params)}

    @jax.jit(donate_argnums=0, out_shardings=(where, NamedSharding(mesh, P())))
    def train_step(run, batch):
        params, state = run["params"], run["state"]
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        value_fn = lambda p: loss_fn(p, batch[::4])  # noqa: E731
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return {"params": optax.apply_updates(params, updates), "state": state}, loss

    @jax.jit(donate_argnums=0, out_shardings=where)
    def refresh(run, batch):
        value_fn = lambda p: loss_fn(p, batch[::4])  # noqa: E731
        return run | {"state": dho2_jax.refresh(run["state"], run["params"], value_fn)}

    every = options.save_every
    settings = ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=3)
    load = make_loader(options.batch_size, NamedSharding(mesh, P("data")))
    with ocp.CheckpointManager(options.workdir, options=settings) as manager:
        start = manager.latest_step() or 0
        if start:
            run = manager.restore(start, args=ocp.args.StandardRestore(target))
        else:
            run = jax.jit(init, out_shardings=where)()
        for step in range(start, options.steps):
            batch = load(step)
            if dho2_jax.should_refresh(step, **SCHEDULE):
                run = refresh(run, batch)
            run, loss = train_step(run, batch)
            is_last = step + 1 == options.steps
            if (step + 1) % options.log_every == 0 or is_last:
                print(f"step {step + 1}: loss {float(loss)!r}", flush=True)
            # By the interval, and when the cloud says that it stops the machines.
            manager.save(step + 1, args=ocp.args.StandardSave(run), force=is_last)
            if manager.reached_preemption(step + 1):
                break  # in all processes at the same step
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
