# SPDX-License-Identifier: Apache-2.0
"""What DHO² costs: a step, a probe, a refresh; against the bytes that must be read.

    python benchmarks/cost.py parts  [--workloads a,b] [--bases Adam,Muon]
    python benchmarks/cost.py update [--sizes 0.1,1,10,100] [--ranks 16] [--devices 1]

`parts` times a training step of the base and of DHO² on it, with and without the rate's
probe, a refresh and a gradient, in turns, and prints what a period comes to. `update`
times `update` alone at sizes in millions of parameters, against a plain pass over
the bytes that it must read: V three times, or twice under a linear base. With several
devices (`JAX_NUM_CPU_DEVICES=8` in the environment makes as many of a CPU, which share
its cores) V lies in slices over a mesh of them.

All are medians over rounds in turns, compilation apart, on whatever device there is.
On Linux `MALLOC_TOP_PAD_=1000000000 MALLOC_MMAP_THRESHOLD_=4000000000
MALLOC_TRIM_THRESHOLD_=4000000000` in the environment keeps glibc from giving large
arrays back to the kernel after every step, which costs a CPU a third of an update.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import contenders as who
import jax
import jax.numpy as jnp
import numpy as np
import workloads
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_jax

DEFAULTS = 16, 200  # k and T where nothing is said


def parts(options: argparse.Namespace) -> None:
    """Prints the parts of a step on each workload and base."""
    print(
        "| workload, base | k, T | gradient | base step | DHO² step | with a probe "
        "| refresh | refresh in gradients | refresh and probes, of a base step "
        "| in all |\n" + "|---" * 10 + "|"
    )
    for name in options.workloads:
        workload = workloads.build(name)
        for base in options.bases or who.BASES:
            # As raced, and as the library has it where nothing is said.
            raced = who.rank_on(workload, base), who.PERIOD
            for k, period in (raced, DEFAULTS):
                print(_parts(workload, base, k, period), flush=True)


def _parts(workload: workloads.Workload, base: str, k: int, period: int) -> str:
    task, params = workload.task, workload.task.init(0)
    alone = who.contenders(workload)[base]
    ours = who.hybrid("", base, {base: alone.rates}, num_largest=k)
    batch = jax.jit(workload.batch)(np.uint32(0), np.int32(0))
    rate = jnp.float32(1e-4)

    def at(state: Any, steps: jax.Array):
        """The state so many steps after its first: the rule probes at tens."""
        curvature = state.curvature
        rule = curvature.rate._replace(steps=steps, probed=steps - 5)
        return state._replace(curvature=curvature._replace(rate=rule, count=steps))

    # All of them take the batch as an argument, which XLA would fold as a constant,
    # and give their parameters and states away, as a training loop does.
    held = {}
    for one in (alone, ours):
        copy = jax.tree.map(jnp.array, params)
        held[one.name] = copy, jax.jit(one.make(rate, 1.0).init)(copy)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def step(one: who.Contender, params, state, batch, count):
        state = at(state, count) if one is ours else state
        return who.step(workload, one, rate, 1.0, params, state, batch)

    def stepped(one: who.Contender, count: int):
        held[one.name] = step(one, *held[one.name], batch, np.int32(count))
        return held[one.name]

    def refreshed():
        point, state = held[ours.name]
        held[ours.name] = point, refresh(point, state, batch)
        return held[ours.name]

    refresh = jax.jit(functools.partial(who.refresh, workload), donate_argnums=1)
    gradient = jax.jit(jax.grad(task.loss_fn))
    refreshed()  # without a subspace nothing is probed
    times = in_turns(
        {
            "gradient": lambda: gradient(params, batch),
            "base": lambda: stepped(alone, 0),
            "step": lambda: stepped(ours, 101),
            "probe": lambda: stepped(ours, 110),
            "refresh": refreshed,
        },
        rounds=12 if workload.small else 3,
    )
    probe = times["probe"] - times["step"]
    curvature = probe / 10 + times["refresh"] / period
    whole = times["step"] - times["base"] + curvature
    cells = [f"{workload.name}, {base}", f"{k}, {period}"]
    cells += [f"{times[x]:.2f} ms" for x in times]
    cells += [
        f"{times['refresh'] / times['gradient']:.1f}",
        f"{100 * curvature / times['base']:.1f} %",
        f"{100 * whole / times['base']:.0f} %",
    ]
    return "| " + " | ".join(cells) + " |"


def update(options: argparse.Namespace) -> None:
    """Prints the time of `update` at each size."""
    print(
        "| parameters, k, devices | base | its update | DHO²'s update | V a device "
        "| plain pass over V | reads needed | DHO²'s over those |\n" + "|---" * 8 + "|"
    )
    for size in options.sizes:
        for rank in options.ranks:
            for number in options.devices:
                # Muon's own update would hide what is asked here.
                for base in options.bases or ("heavy ball", "Adam"):
                    print(_update(size, rank, number, base), flush=True)


def _update(millions: float, rank: int, devices: int, base: str) -> str:
    edge = max(256, int(np.sqrt(millions * 1e6 / 8)) // 256 * 256)
    number = max(1, round(millions * 1e6 / edge**2))
    shapes = {f"w{i}": (edge, edge) for i in range(number)}
    shapes |= {f"b{i}": (edge,) for i in range(number)}
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    params = jax.device_put(
        {name: jnp.zeros(shape) for name, shape in shapes.items()},
        NamedSharding(mesh, P()),
    )
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    grads = jax.jit(lambda: jax.tree.map(lambda x: jnp.cos(x + 1), params))()
    tx = dho2_jax.dho2(
        who.BASES[base](1e-3, 1.0),
        num_largest=rank,
        refresh="external",
        linear_base=base == "heavy ball",
        mesh=mesh if devices > 1 else None,
    )
    alone = who.BASES[base](1e-3, 1.0)

    @functools.partial(jax.jit, donate_argnums=0)
    def fill(state):
        """A subspace of any rows: what is in them does not matter here."""
        ours = state.curvature
        space = ours.subspace
        rows = jax.tree.map(lambda x: x + 1e-4, space.eigenvectors)
        space = space._replace(
            eigenvectors=rows,
            eigenvalues=1.0 + jnp.arange(rank),
            valid=jnp.ones(rank, bool),
        )
        return state._replace(curvature=ours._replace(subspace=space))

    state, base_state = fill(jax.jit(tx.init)(params)), alone.init(params)
    hybrid = jax.jit(tx.update, donate_argnums=1)
    plain = jax.jit(alone.update, donate_argnums=1)
    held = {"hybrid": state, "plain": base_state}
    del state, base_state

    def advance(name: str, step: Callable):
        updates, held[name] = step(grads, held[name], params)
        return updates

    # The same arrays that the step reads, each number once.
    total_of = jax.jit(lambda rows: sum(map(jnp.sum, jax.tree.leaves(rows))))
    times = in_turns(
        {
            "base": lambda: advance("plain", plain),
            "update": lambda: advance("hybrid", hybrid),
            "pass": lambda: total_of(held["hybrid"].curvature.subspace.eigenvectors),
        },
        rounds=8,
    )
    reads = 2 if base == "heavy ball" else 3
    rows = jax.tree.leaves(held["hybrid"].curvature.subspace.eigenvectors)
    share = sum(x.addressable_shards[0].data.nbytes for x in rows)
    cells = (
        f"{total / 1e6:.2f}M, {rank}, {devices}",
        base,
        f"{times['base']:.2f} ms",
        f"{times['update']:.2f} ms",
        f"{share / 1e6:.1f} MB",
        f"{times['pass']:.2f} ms",
        f"{reads}",
        f"{times['update'] / (reads * times['pass']):.2f}",
    )
    return "| " + " | ".join(cells) + " |"


def in_turns(
    programs: dict[str, Callable[[], Any]], rounds: int, calls: int = 4
) -> dict[str, float]:
    """Returns median milliseconds of each, called in turns of several in a row.

    A loop, too, calls the same program again and again, and waits for none of them: the
    caches are warm, and handing over a program is hidden behind the one before.
    """
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds + 1):  # the first compiles
        for name, program in programs.items():
            jax.block_until_ready(program())
            began = time.perf_counter()
            for _ in range(calls):
                done = program()
            jax.block_until_ready(done)
            taken[name].append(1e3 * (time.perf_counter() - began) / calls)
    return {name: statistics.median(x[1:]) for name, x in taken.items()}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("parts", "update"))
    parser.add_argument("--workloads", default=",".join(workloads.SMALL))
    parser.add_argument("--bases", default="")
    parser.add_argument("--sizes", default="0.1,1,10")
    parser.add_argument("--ranks", default="16")
    parser.add_argument("--devices", default="1")
    options = parser.parse_args()
    options.workloads = options.workloads.split(",")
    options.bases = [x for x in options.bases.split(",") if x]
    options.sizes = [float(x) for x in options.sizes.split(",")]
    options.ranks = [int(x) for x in options.ranks.split(",")]
    options.devices = [int(x) for x in options.devices.split(",")]
    {"parts": parts, "update": update}[options.command](options)


if __name__ == "__main__":
    main()
