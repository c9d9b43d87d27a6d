"""Small problems and independent oracles, shared by the numerics tests.

Oracles are dense: `jax.hessian`, NumPy in float64, or spectra known by construction.
"""

import itertools
import os
import signal
import socket
import subprocess

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

import dho2_jax


def jit(function):
    """`jax.jit` compiled with few optimisations: most tests run a program once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def reflections(n, seed, count=3):
    """Orthogonal (n, n) in float64, a product of a few Householder reflections."""
    rng = np.random.default_rng(seed)
    q = np.eye(n)
    for _ in range(count):
        w = rng.standard_normal(n)
        w /= np.linalg.norm(w)
        q -= 2 * np.outer(w, w @ q)
    return q


def symmetric(eigenvalues, seed=0):
    """Float64 `(A, Q)`: A = Q^T diag(eigenvalues) Q, eigenvectors in the rows of Q."""
    q = reflections(len(eigenvalues), seed)
    return (q.T * np.asarray(eigenvalues, np.float64)) @ q, q


def outlying(n, top=(6.0, 8.0, 11.0, 15.0), bottom=(-9.0, -6.0, -4.0), seed=0):
    """A spectrum with well-separated pairs at both ends and a bulk in [-1, 1]."""
    bulk = np.random.default_rng(seed).uniform(-1, 1, n - len(top) - len(bottom))
    return np.sort(np.concatenate([bottom, bulk, top]))


def quadratic(matrix, linear=None):
    """The loss x^T A x / 2 - b^T x, of `{"a": head, "b": tail}` or one array."""
    a = jnp.asarray(matrix, jnp.float32)
    b = jnp.zeros(a.shape[0]) if linear is None else jnp.asarray(linear, jnp.float32)

    def loss(params):
        x = jnp.concatenate([jnp.ravel(v) for v in jax.tree.leaves(params)])
        high = jax.lax.Precision.HIGHEST
        return 0.5 * jnp.vdot(x, jnp.matmul(a, x, precision=high)) - jnp.vdot(b, x)

    return loss


def split(x):
    """A vector as a pytree of two leaves, one a matrix; 4 must divide its length."""
    half = len(x) // 2
    x = jnp.asarray(x, jnp.float32)
    return {"a": x[:half], "b": x[half:].reshape(-1, 2)}


def flat(tree):
    """One vector, float64 NumPy."""
    return np.concatenate(
        [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    )


def flat_rows(tree):
    """Stacked vectors as a float64 matrix `(rows, n)`."""
    return np.concatenate(
        [
            np.asarray(x, np.float64).reshape(x.shape[0], -1)
            for x in jax.tree.leaves(tree)
        ],
        axis=1,
    )


def mlp(sizes, batch=48, seed=0, scale=1.0):
    """`(loss, params)` of a tanh network with a squared error on random data.

    The first input is 1 and serves as a bias. `loss` carries its two halves as
    attributes, for Gauss-Newton.
    """
    rng = np.random.default_rng(seed)
    params = {
        f"layer{i}": jnp.asarray(
            scale * rng.standard_normal((a, b)) / np.sqrt(a), jnp.float32
        )
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    }
    inputs = rng.standard_normal((batch, sizes[0]))
    inputs[:, 0] = 1.0
    inputs = jnp.asarray(inputs, jnp.float32)
    targets = jnp.asarray(rng.standard_normal((batch, sizes[-1])), jnp.float32)

    def outputs_fn(params):
        h = inputs
        for i, weights in enumerate(params.values()):
            h = jnp.tanh(h) if i else h
            h = h.astype(weights.dtype) @ weights
        return h

    def loss_fn(outputs):
        return jnp.mean(jnp.sum((outputs - targets) ** 2, -1)).astype(jnp.float32)

    def loss(params):
        return loss_fn(outputs_fn(params))

    loss.outputs_fn, loss.loss_fn = outputs_fn, loss_fn
    return loss, params


def dense_hessian(value_fn, params):
    """`jax.hessian` as one symmetric float64 matrix, leaves in flattened order."""
    vector, unravel = jax.flatten_util.ravel_pytree(params)
    hessian = jax.jit(jax.hessian(lambda x: value_fn(unravel(x))))(vector)
    hessian = np.asarray(hessian, np.float64)
    return (hessian + hessian.T) / 2


def extreme(matrix, num_largest, num_smallest):
    """Float64 `eigh`: `(values, rows)`, [smallest ascending, largest ascending]."""
    values, vectors = np.linalg.eigh(matrix)
    n = len(values)
    chosen = np.r_[0:num_smallest, n - num_largest : n]
    return values[chosen], vectors.T[chosen]


def train(tx, loss, params, steps, state=None, **kwargs):
    """Runs `steps` updates in one jitted scan: `(params, state, trajectory)`."""

    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params, value_fn=loss, **kwargs)
        params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates)
        return (params, state), params

    @jit
    def run(params, state):
        return jax.lax.scan(step, (params, state), None, length=steps)

    state = tx.init(params) if state is None else state
    (params, state), trajectory = run(params, state)
    return params, state, trajectory


def refreshed(tx, params, value_fn=None, state=None, **kwargs):
    """The state after one jitted refresh."""
    state = tx.init(params) if state is None else state
    return jit(lambda s, p: dho2_jax.refresh(s, p, value_fn, **kwargs))(state, params)


def up_to_sign(rows, reference):
    """Largest distance between rows of unit vectors, each up to its sign."""
    signs = np.sign(np.sum(rows * reference, axis=1))
    return np.max(np.linalg.norm(rows * signs[:, None] - reference, axis=1))


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def surroundings(num_devices, **more):
    """The environment of a short process with so many virtual CPU devices."""
    kept = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    return (
        kept
        | more
        | {
            "JAX_NUM_CPU_DEVICES": str(num_devices),
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
    )


def hear_interrupts():
    """Has what is started next hear Ctrl-C, also where a shell started this by `&`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start_processes(command, directory, number=2, num_devices=4, said="said"):
    """Starts a command in processes that join; what they say goes to files by number.

    Each finds the others by its environment, and has so many virtual CPU devices.
    """
    environment = surroundings(
        num_devices,
        JAX_COORDINATOR_ADDRESS=f"localhost:{free_port()}",
        JAX_NUM_PROCESSES=str(number),
    )
    hear_interrupts()
    processes = []
    for index in range(number):
        with open(directory / f"{said}{index}", "w") as file:
            processes.append(
                subprocess.Popen(
                    [str(one) for one in command],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment | {"JAX_PROCESS_ID": str(index)},
                )
            )
    return processes
