# SPDX-License-Identifier: Apache-2.0
"""How good the subspace of a refresh is, for what it costs.

    python benchmarks/refresh.py quality [--workload autoencoder]
    python benchmarks/refresh.py training [--workload autoencoder]

`quality`: at a point of training (tuned Adam, 300 steps), subspaces by several methods
against the exact one on 4096 other examples (a long recursion, to convergence):

    cost        products, and the time of all in gradients on the training batch
    top 4, all  cosine of the largest principal angle between the 4 (k) sharpest exact
                directions and the subspace, and the mean cosine over the k
    left        the largest curvature that is left in the complement, on those other
                examples, over the one that the exact subspace leaves

Warm methods start from the subspace of 100 steps ago. `training` compares final losses
with m = k + 4 and m = 4k.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import contenders as who
import cost
import fleet
import jax
import jax.numpy as jnp
import numpy as np
import optax
import workloads
from jax.flatten_util import ravel_pytree

import dho2_jax
from dho2_jax._numerics.linalg import tridiagonal

RATES = {"autoencoder": 2e-3, "digits": 1.6e-2, "transformer": 4e-3}
SEED, AGO, NOW = 200, 200, 300
MatVec = Callable[[jax.Array], jax.Array]
Method = Callable[[Any, jax.Array, jax.Array], jax.Array]  # examples, point, old V


def quality(workload: workloads.Workload) -> None:
    """Prints the table of methods."""
    task, k = workload.task, workload.num_largest
    before, params, unravel = _trained(workload)
    batch = jax.jit(workload.batch)(np.uint32(SEED), np.int32(NOW))
    others = _others(workload)

    def product(examples: Any, at: jax.Array) -> MatVec:
        return dho2_jax.hvp(lambda x: task.loss_fn(unravel(x), examples), at)

    def lanczos(matvec: MatVec, m: int) -> jax.Array:
        """The library's recursion, from a random vector in the operator's range."""
        start = matvec(jax.random.normal(jax.random.key(1), params.shape))
        found = dho2_jax.lanczos_tridiag(matvec, start, m)
        small = tridiagonal(found.alphas, found.betas)
        return jnp.linalg.eigh(small)[1][:, -k:].T @ found.basis

    def power(matvec: MatVec, rows: jax.Array) -> jax.Array:
        """One step of subspace iteration: k products."""
        return jnp.linalg.qr(jax.lax.map(matvec, rows).T)[0].T

    def block(matvec: MatVec, rows: jax.Array) -> jax.Array:
        """Rayleigh-Ritz on the span of V and H V: 2k products."""
        images = jax.lax.map(matvec, rows)
        basis = jnp.linalg.qr(jnp.concatenate([rows, images]).T)[0].T
        small = basis @ jax.lax.map(matvec, basis[k:]).T
        # H V in the basis, whose first rows are a rotation of V.
        first = basis @ images.T
        rotation = basis[:k] @ rows.T
        small = jnp.concatenate([first @ rotation.T, small], axis=1)
        return jnp.linalg.eigh((small + small.T) / 2)[1][:, -k:].T @ basis

    def rotated(matvec: MatVec, rows: jax.Array) -> jax.Array:
        """Eigenvalues only: the same span, k products."""
        small = rows @ jax.lax.map(matvec, rows).T
        return jnp.linalg.eigh((small + small.T) / 2)[1].T @ rows

    part = workload.part(batch)
    half = jax.tree.map(lambda x: x[::2], part)
    long = min(6 * k + 60, params.size)
    exact = jax.jit(lambda *at: lanczos(product(*at), long))(others, params)
    old_part = workload.part(jax.jit(workload.batch)(np.uint32(SEED), np.int32(AGO)))
    old = jax.jit(lambda *at: lanczos(product(*at), 4 * k))(old_part, before)

    def recursion(m: int) -> Method:
        return lambda examples, at, _: lanczos(product(examples, at), m)

    # Products, the method, the examples.
    methods: dict[str, tuple[int, Method, Any]] = {
        "m = k + 4": (k + 5, recursion(k + 4), part),
        "m = 2k": (2 * k + 1, recursion(2 * k), part),
        "m = 4k": (4 * k + 1, recursion(4 * k), part),
        "m = k + 4, half of the part": (k + 5, recursion(k + 4), half),
        "m = k + 4, whole batch": (k + 5, recursion(k + 4), batch),
        "m = 4k, whole batch": (4 * k + 1, recursion(4 * k), batch),
        "old subspace kept": (0, lambda examples, at, old: old, part),
        "old, eigenvalues only": (k, lambda *x: rotated(product(*x[:2]), x[2]), part),
        "old, one power step": (k, lambda *x: power(product(*x[:2]), x[2]), part),
        "old, block of two": (2 * k, lambda *x: block(product(*x[:2]), x[2]), part),
        "m = k + 4, linearised once": (
            k + 5,
            lambda *x: lanczos(_linearised(task, unravel, *x[:2]), k + 4),
            part,
        ),
    }
    # All that they need as arguments: XLA would fold constants.
    programs = {
        name: functools.partial(jax.jit(method), examples, params, old)
        for name, (_, method, examples) in methods.items()
    }
    gradient = jax.jit(
        lambda at, batch: jax.grad(lambda x: task.loss_fn(unravel(x), batch))(at)
    )
    grads = functools.partial(gradient, params, batch)
    times = cost.in_turns({"gradient": grads, **programs}, rounds=7)

    def left(rows: jax.Array) -> float:
        return _left(product, others, params, rows)

    left_by_exact = left(exact)
    print(f"\n### {workload.name}, k = {k}, part of {workload.curvature_size}\n")
    print("| method | products | gradients | top 4 | all | left |\n" + "|---" * 6 + "|")
    for name, (number, *_) in methods.items():
        rows = programs[name]()
        cosines = np.linalg.svd(np.asarray(exact[-4:] @ rows.T, np.float64))[1]
        whole_span = np.linalg.svd(np.asarray(exact @ rows.T, np.float64))[1]
        print(
            f"| {name} | {number} | {times[name] / times['gradient']:.1f} "
            f"| {min(cosines.min(), 1):.4f} | {min(whole_span.mean(), 1):.3f} "
            f"| {left(rows) / left_by_exact:.2f} |",
            flush=True,
        )


def _linearised(task, unravel, examples, at: jax.Array) -> MatVec:
    """Returns the product with the forward pass done once and kept."""
    loss = lambda x: task.loss_fn(unravel(x), examples)  # noqa: E731
    return jax.linearize(jax.grad(loss), at)[1]


def _trained(workload: workloads.Workload):
    """Returns flat parameters at both steps, and how to unravel them."""
    tx = optax.adam(RATES[workload.name])
    task = workload.task

    @jax.jit
    def step(params, state, i):
        grads = jax.grad(task.loss_fn)(params, workload.batch(SEED, i))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = task.init(SEED)
    state, before = tx.init(params), params
    for i in range(NOW):
        before = params if i == AGO else before
        params, state = step(params, state, np.int32(i))
    flat, unravel = ravel_pytree(params)
    return ravel_pytree(before)[0], flat, unravel


def _others(workload: workloads.Workload) -> Any:
    """Returns examples that no method saw: of batches that come later."""
    number = max(1, min(4096, 4 * workload.batch_size) // workload.batch_size)
    draw = jax.jit(workload.batch)
    found = [draw(np.uint32(SEED), np.int32(NOW + 1 + i)) for i in range(number)]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *found)


def _left(product: Any, examples: Any, at: jax.Array, rows: jax.Array) -> float:
    """Returns the largest curvature in the complement of orthonormal rows."""

    @jax.jit
    def run(examples, at, rows):
        def apart(v: jax.Array) -> jax.Array:
            return v - rows.T @ (rows @ v)

        matvec = product(examples, at)
        start = apart(jax.random.normal(jax.random.key(2), rows.shape[1:]))
        return dho2_jax.lanczos_tridiag(lambda v: apart(matvec(apart(v))), start, 40)

    found = run(examples, at, rows)
    return float(np.linalg.eigvalsh(tridiagonal(found.alphas, found.betas))[-1])


def training(workload: workloads.Workload) -> None:
    """Prints final losses with more and with fewer products."""
    k = workload.num_largest
    for base in ("Adam", "heavy ball"):
        for m in (k + 4, 4 * k):
            one = who.hybrid(
                f"m = {m}",
                base,
                who.RATES[workload.name],
                num_largest=k,
                num_matvecs=m,
            )
            seeds = [fleet.Setting(seed, who.STARTS[base]) for seed in (0, 1, 2)]
            final = fleet.sail(workload, one, seeds).losses[:, -1]
            print(
                f"{workload.name}, {base}, m = {m}: {np.median(final):.4g} "
                f"[{final.min():.4g}, {final.max():.4g}]",
                flush=True,
            )


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("quality", "training"))
    parser.add_argument("--workload", default="autoencoder")
    options = parser.parse_args()
    workload = workloads.build(options.workload)
    {"quality": quality, "training": training}[options.command](workload)


if __name__ == "__main__":
    main()
