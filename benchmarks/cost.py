# SPDX-License-Identifier: Apache-2.0
"""What DHO² costs: a step, a probe, a refresh; against the bytes that must be read.

    python benchmarks/cost.py parts  [--workloads a,b]
    python benchmarks/cost.py update [--sizes 0.1,1,10,100] [--ranks 16]

`parts` times a training step of the base and of DHO² on it, with and without the rate's
probe, a refresh and a gradient, in turns, and prints what a period comes to. `update`
times `update` alone at sizes in millions of parameters, against a plain pass over
the bytes that it must read: V three times, or twice under a linear base.

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

import dho2_jax


def parts(options: argparse.Namespace) -> None:
    """Prints the parts of a step on each workload and base."""
    print(
        "| workload, base | gradient | base step | DHO² step | with a probe | refresh "
        "| refresh in gradients | refresh and probes, of a base step | in all |\n"
        + "|---" * 9
        + "|"
    )
    for name in options.workloads:
        workload = workloads.build(name)
        for base in who.BASES:
            print(_parts(workload, base), flush=True)


def _parts(workload: workloads.Workload, base: str) -> str:
    task, found = workload.task, who.contenders(workload)
    params = task.init(0)
    batch = jax.jit(workload.batch)(np.uint32(0), np.int32(0))
    rate = jnp.float32(1e-4)

    # All of them take the batch as an argument: XLA would fold a constant.
    def trainer(name: str):
        one = found[name]
        step = functools.partial(who.step, workload, one, rate, 1.0)
        return jax.jit(step), jax.jit(one.make(rate, 1.0).init)(params)

    alone, base_state = trainer(base)
    ours, state = trainer(f"DHO² on {base}")
    refresh = jax.jit(functools.partial(who.refresh, workload))
    gradient = jax.jit(jax.grad(task.loss_fn))
    state = refresh(params, state, batch)

    def at(count: int):
        """The state `count` steps after its first: the rule probes at tens."""
        steps, curvature = jnp.int32(count), state.curvature
        rule = curvature.rate._replace(steps=steps, probed=steps - 5)
        return state._replace(curvature=curvature._replace(rate=rule, count=steps))

    between, probing = at(101), at(110)
    times = in_turns(
        {
            "gradient": lambda: gradient(params, batch),
            "base": lambda: alone(params, base_state, batch),
            "step": lambda: ours(params, between, batch),
            "probe": lambda: ours(params, probing, batch),
            "refresh": lambda: refresh(params, state, batch),
        },
        rounds=25,
    )
    probe = times["probe"] - times["step"]
    curvature = probe / 10 + times["refresh"] / who.PERIOD
    whole = times["step"] - times["base"] + curvature
    cells = [f"{workload.name}, {base}"]
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
        "| parameters, k | base | its update | DHO²'s update | plain pass over V "
        "| reads needed | DHO²'s over those |\n" + "|---" * 7 + "|"
    )
    for size in options.sizes:
        for rank in options.ranks:
            for base in ("heavy ball", "Adam"):
                print(_update(size, rank, base), flush=True)


def _update(millions: float, rank: int, base: str) -> str:
    edge = max(256, int(np.sqrt(millions * 1e6 / 8)) // 256 * 256)
    number = max(1, round(millions * 1e6 / edge**2))
    shapes = {f"w{i}": (edge, edge) for i in range(number)}
    shapes |= {f"b{i}": (edge,) for i in range(number)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    grads = jax.jit(lambda: jax.tree.map(lambda x: jnp.cos(x + 1), params))()
    tx = dho2_jax.dho2(
        who.BASES[base](1e-3, 1.0),
        num_largest=rank,
        refresh="external",
        linear_base=base == "heavy ball",
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
        rounds=15,
    )
    reads = 2 if base == "heavy ball" else 3
    cells = (
        f"{total / 1e6:.2f}M, {rank}",
        base,
        f"{times['base']:.2f} ms",
        f"{times['update']:.2f} ms",
        f"{times['pass']:.2f} ms",
        f"{reads}",
        f"{times['update'] / (reads * times['pass']):.2f}",
    )
    return "| " + " | ".join(cells) + " |"


def in_turns(programs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Returns median milliseconds of each, called one after the other in rounds."""
    for program in programs.values():
        for _ in range(2):
            jax.block_until_ready(program())
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program())
            taken[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(x) for name, x in taken.items()}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("parts", "update"))
    parser.add_argument("--workloads", default=",".join(workloads.SMALL))
    parser.add_argument("--sizes", default="0.1,1,10")
    parser.add_argument("--ranks", default="16")
    options = parser.parse_args()
    options.workloads = options.workloads.split(",")
    options.sizes = [float(x) for x in options.sizes.split(",")]
    options.ranks = [int(x) for x in options.ranks.split(",")]
    {"parts": parts, "update": update}[options.command](options)


if __name__ == "__main__":
    main()
