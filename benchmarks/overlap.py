# SPDX-License-Identifier: Apache-2.0
"""The overlapped refresh: are curvature and training in flight at once?

    python benchmarks/overlap.py [--split 7+1] [--steps 60] [--period 20] [--lag 15]

On eight virtual CPU devices, some of which train a small network while the others
compute its curvature. First the host's clock: when the refresh was launched, when each
training step began and when its loss was there, and when the result of the refresh was.
Fails unless training steps began and ended in between. Then the time of N steps with
overlapped refreshes, with the same refreshes inline on the training devices, and
without any. All devices share the cores of this machine, so that the sums say what the
overlap costs here, and not what it saves where devices are real.

One device computes the curvature: XLA's CPU runtime runs programs of several devices
one after another, whatever devices they are on. With 6+2 the numbers are right and
nothing overlaps; the assertion is left out then.
"""

import argparse
import os
import threading
import time

os.environ["JAX_PLATFORMS"] = "cpu"
# Threads of XLA's pool. With fewer than programs in flight hold, collectives starve.
os.environ.setdefault("NPROC", "32")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_jax

jax.config.update("jax_num_cpu_devices", 8)

WIDTH, LAYERS = 256, 3
BATCH, CURVATURE_BATCH = 8 * 3 * 7, 8 * 3 * 7 * 4
LEAST = 2  # steps that must begin and end while a refresh is in flight


def loss(params, batch):
    """A deep tanh network on random targets."""
    x, y = batch
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return jnp.mean((x @ params[-1] - y) ** 2)


def make_params():
    """Matrices of one shape and a last one."""
    keys = jax.random.split(jax.random.PRNGKey(0), LAYERS + 1)
    shapes = [(WIDTH, WIDTH)] * LAYERS + [(WIDTH, 8)]
    pairs = zip(keys, shapes, strict=True)
    return [jax.random.normal(k, s) * 1.4 / np.sqrt(WIDTH) for k, s in pairs]


def make_batch(size, mesh):
    """Examples, split over a mesh."""
    x, y = (np.random.default_rng(1).standard_normal((size, n)) for n in (WIDTH, 8))
    where = NamedSharding(mesh, P("d"))
    return tuple(jax.device_put(a.astype(np.float32), where) for a in (x, y))


class Run:
    """One optimizer, its programs and where it is."""

    def __init__(self, near, far, num_matvecs):
        """Compiles nothing yet."""
        self.tx = dho2_jax.dho2(
            optax.adam(1e-3),
            num_largest=8,
            num_matvecs=num_matvecs,
            refresh="external",
            mesh=near,
        )
        self.params = jax.device_put(make_params(), NamedSharding(near, P()))
        self.state = self.tx.init(self.params)
        self.batch = make_batch(BATCH, near)
        self.near_batch = make_batch(CURVATURE_BATCH, near)
        self.far_batch = make_batch(CURVATURE_BATCH, far)
        self.overlap = dho2_jax.overlapped_refresh(loss, mesh=far)
        self.step = jax.jit(self._step, donate_argnums=(0, 1))
        self.renew = jax.jit(self._renew, donate_argnums=0)

    def _step(self, params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = self.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def _renew(self, state, params, batch):
        return dho2_jax.refresh(state, params, lambda p: loss(p, batch))

    def train(self):
        """One step; returns when it began and when its loss was there."""
        began = time.perf_counter()
        self.params, self.state, value = self.step(self.params, self.state, self.batch)
        value.block_until_ready()
        # Virtual devices share few threads, which collectives hold: one step at a time.
        jax.block_until_ready((self.params, self.state))
        return began, time.perf_counter()

    def launch(self):
        """Dispatches a refresh."""
        return self.overlap.launch(self.state, self.params, self.far_batch)

    def land(self, pending):
        """Puts it to use."""
        self.state = self.overlap.land(self.state, pending)

    def refresh(self):
        """Does the same on the training devices, at once."""
        self.state = self.renew(self.state, self.params, self.near_batch)


def compile_all(run):
    """Runs every program once."""
    run.train()
    run.refresh()
    run.land(jax.block_until_ready(run.launch()))
    run.train()


def show_flight(run):
    """Prints the timestamps of one refresh; returns steps within it, and its length."""
    ready = []

    def watch(pieces):
        jax.block_until_ready(pieces)
        ready.append(time.perf_counter())

    zero = time.perf_counter()
    pending = run.launch()
    launched = time.perf_counter()
    watcher = threading.Thread(target=watch, args=(pending.pieces,))
    watcher.start()
    steps = []
    while not ready:
        steps.append(run.train())
    watcher.join()
    found = ready[0]
    run.land(pending)
    jax.block_until_ready(run.state)
    landed = time.perf_counter()
    print(
        f"{0:9.1f} ms  refresh launched (launch returned {1e3 * (launched - zero):.1f})"
    )
    inside = 0
    for number, (began, ended) in enumerate(steps):
        within = ended < found
        inside += within
        if number < 5 or not within:
            note = "" if within else "  (refresh ready meanwhile)"
            times = f"{1e3 * (began - zero):9.1f} ms  step {number} begins, loss ready "
            print(f"{times}{1e3 * (ended - zero):.1f}{note}")
        elif number == 5:
            print("          ...")
    print(f"{1e3 * (found - zero):9.1f} ms  result of the refresh ready")
    print(f"{1e3 * (landed - zero):9.1f} ms  landed, and its program done")
    seen = dho2_jax.metrics(run.state)
    assert seen["rejected"] == 0 and seen["age"] == len(steps)
    return inside, found - zero


def timed(run, steps, period, lag, mode):
    """Returns the seconds of `steps` steps and the last loss."""
    start, pending = time.perf_counter(), None
    for i in range(steps):
        if mode == "inline" and i % period == 0:
            run.refresh()
            jax.block_until_ready(run.state)
        if mode == "overlapped" and i % period == 0:
            pending = run.launch()
        if pending is not None and i % period == lag:
            run.land(pending)
            pending = None
        run.train()
    return time.perf_counter() - start


def main():
    """Measures, prints and asserts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", default="7+1", help="devices: training+curvature")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--period", type=int, default=20)
    parser.add_argument("--lag", type=int, default=15, help="steps, < period")
    parser.add_argument("--matvecs", type=int, default=16)
    args = parser.parse_args()
    first, second = map(int, args.split.split("+"))
    devices = jax.devices()
    near = jax.make_mesh((first,), ("d",), (AxisType.Auto,), devices=devices[:first])
    rest = devices[first : first + second]
    far = jax.make_mesh((second,), ("d",), (AxisType.Auto,), devices=rest)
    run = Run(near, far, args.matvecs)
    compile_all(run)

    alone = min(ended - began for began, ended in (run.train() for _ in range(10)))
    print(f"{first} devices train, {second} compute curvature; {os.cpu_count()} cores")
    print(f"a step alone takes {1e3 * alone:.1f} ms")
    inside, length = show_flight(run)
    print(f"{inside} steps began and ended while the refresh was in flight", end="")
    print(f" for {1e3 * length:.1f} ms")
    assert inside >= LEAST or second > 1, "no overlap"

    for mode in ("none", "inline", "overlapped"):
        seconds = timed(run, args.steps, args.period, args.lag, mode)
        each = f"{1e3 * seconds / args.steps:6.1f} ms a step"
        print(f"{args.steps} steps, refreshes {mode:10s} {seconds:7.2f} s  {each}")


if __name__ == "__main__":
    main()
