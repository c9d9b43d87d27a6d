# SPDX-License-Identifier: Apache-2.0
"""Trains one problem with kfac-jax, as a peer to measure against.

kfac-jax 0.0.8 needs an older JAX than this library (0.6.2 works), so it runs in an
environment of its own, and this file imports nothing else of the repository:

    pip install "jax==0.6.2" "kfac-jax==0.0.8"
    python benchmarks/kfac_worker.py DIRECTORY < runs.json > results.jsonl

DIRECTORY holds `problem.json` (name, model, loss, num_heads, steps, eval_every),
`params-SEED.npz`, `batches-SEED.npz` and `validation.npz`. Standard input is a JSON
list of runs, each with the fields of `DEFAULTS`; each gives one JSON line. Standard
error says which parameters got which curvature block.

Every layer is registered by hand, none is left to the graph matcher: matrices, the
token embedding too (as a matrix that multiplies one-hot rows), get Kronecker factors,
layer norms and positions diagonals. The Fisher matrix is estimated by
"fisher_gradients": gradients for targets drawn from the network's own predictions.
"""

import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np

Params = Any  # nested dicts of arrays
Batch = Any  # an array, or a tuple of inputs and labels

DEFAULTS: dict[str, Any] = {
    "seed": 0,
    "method": "fixed",  # or "adaptive": rate and momentum from the quadratic model
    "learning_rate": 0.01,  # of "fixed" only, as the schedule and the momentum
    "schedule": "constant",  # or "cosine": to 0 over the problem's steps
    "momentum": 0.9,
    "damping": 0.001,  # the first one, if it is adapted
    "adaptive_damping": None,  # whether; None: with "adaptive" only
    "damping_adaptation_decay": 0.95,  # per step, when it is adapted
    "min_damping": 1e-5,
    "max_damping": 1e3,
    "norm_constraint": None,  # of "fixed" only: bound on a step's squared Fisher norm
    "curvature_ema": 0.95,
    "curvature_update_period": 1,
    "inverse_update_period": 5,
    "num_burnin_steps": 5,
    "estimation_mode": "fisher_gradients",
}
DAMPING_INTERVAL = 5  # steps between adaptations of the damping
# Runs that differ in these only share their programs.
TRACED = {"seed", "learning_rate", "schedule", "momentum", "damping"}
PASSED_ON = DEFAULTS.keys() - TRACED - {"method", "adaptive_damping"}  # as they are


def dense(x: jax.Array, layer: Params) -> jax.Array:
    """Applies a linear layer along the last of 2 or 3 axes, and registers it."""
    kernel, bias = layer["kernel"], layer.get("bias")
    y = x @ kernel if bias is None else x @ kernel + bias
    variant = "dense" if x.ndim == 2 else "repeated_dense"
    return kfac_jax.register_dense(y, x, kernel, bias, variant=variant)


def layer_norm(x: jax.Array, layer: Params) -> jax.Array:
    """Normalizes the last axis, scales and shifts it, and registers the latter two."""
    x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    scale, bias = layer["scale"], layer["bias"]
    return kfac_jax.register_scale_and_shift(x * scale + bias, x, scale, bias)


def mlp(params: Params, x: jax.Array) -> jax.Array:
    """Applies dense layers with tanh between them and a linear end."""
    layers = in_order(params["layers"])
    for layer in layers[:-1]:
        x = jnp.tanh(dense(x, layer))
    return dense(x, layers[-1])


def transformer(params: Params, tokens: jax.Array, num_heads: int) -> jax.Array:
    """Applies the causal pre-norm transformer, and gives the logits."""
    embedding = params["token_embedding"]["embedding"]
    positions = params["position_embedding"]["embedding"][: tokens.shape[-1]]
    one_hot = jax.nn.one_hot(tokens, len(embedding), dtype=embedding.dtype)
    tokens = dense(one_hot, {"kernel": embedding})
    x = kfac_jax.register_scale_and_shift(tokens + positions, tokens, shift=positions)
    for block in in_order(params["blocks"]):
        projected = dense(
            layer_norm(x, block["attention_norm"]), block["query_key_value"]
        )
        heads = (*x.shape[:-1], num_heads, x.shape[-1] // num_heads)
        query, key, value = (
            one.reshape(heads) for one in jnp.split(projected, 3, axis=-1)
        )
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + dense(mixed.reshape(x.shape), block["attention_out"])
        hidden = jax.nn.gelu(dense(layer_norm(x, block["mlp_norm"]), block["mlp_in"]))
        x = x + dense(hidden, block["mlp_out"])
    return dense(layer_norm(x, params["final_norm"]), params["output"])


def in_order(layers: dict[str, Params]) -> list[Params]:
    """Returns the entries of a list that was stored as a dict of its indices."""
    return [layers[key] for key in sorted(layers, key=int)]


def make_loss(problem: dict[str, Any]) -> Callable[[Params, Batch], jax.Array]:
    """Returns the mean loss of parameters and batch, with its registration."""

    def outputs(params, inputs):
        if problem["model"] == "mlp":
            return mlp(params, inputs)
        return transformer(params, inputs, problem["num_heads"])

    def squared_error(params, batch):
        predicted = outputs(params, batch)
        kfac_jax.register_squared_error_loss(predicted, batch)
        return jnp.mean(jnp.sum((predicted - batch) ** 2, axis=-1))

    def cross_entropy(params, inputs, labels):
        logits = outputs(params, inputs)
        # kfac-jax divides by the first axis only; the loss is a mean over the others.
        kfac_jax.register_softmax_cross_entropy_loss(
            logits, labels, weight=1 / math.prod(labels.shape[1:])
        )
        chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)

    def language(params, tokens):
        return cross_entropy(params, tokens[:, :-1], tokens[:, 1:])

    if problem["loss"] == "classification":
        return lambda params, batch: cross_entropy(params, *batch)
    return {"squared_error": squared_error, "language": language}[problem["loss"]]


class Problem:
    """A directory's arrays, and the programs compiled for them."""

    def __init__(self, directory: Path):
        """Reads all that belongs to no seed."""
        self.directory = directory
        fields = json.loads((directory / "problem.json").read_text())
        self.steps, self.eval_every = fields["steps"], fields["eval_every"]
        self.loss_fn = make_loss(fields)
        self.evaluate = jax.jit(self.loss_fn)
        self.validation = as_batch(self.read("validation"))
        self.compiled: dict[str, tuple[kfac_jax.Optimizer, float]] = {}

    def read(self, name: str) -> dict[str, np.ndarray]:
        """Returns the arrays of one file."""
        with np.load(self.directory / f"{name}.npz") as arrays:
            return dict(arrays)

    def params(self, seed: int) -> Params:
        """Returns fresh initial parameters: an optimizer's steps overwrite theirs."""
        nested: Params = {}
        for path, array in self.read(f"params-{seed}").items():
            *parents, name = path.split("/")
            parent = nested
            for key in parents:
                parent = parent.setdefault(key, {})
            parent[name] = jnp.array(array)
        return nested

    def optimizer(self, run: dict[str, Any]) -> tuple[kfac_jax.Optimizer, float]:
        """Returns a run's optimizer, compiled, and the seconds that took."""
        key = json.dumps({name: run[name] for name in run if name not in TRACED})
        if key not in self.compiled:
            began = time.perf_counter()
            adaptive = run["method"] == "adaptive"
            optimizer = kfac_jax.Optimizer(
                value_and_grad_func=jax.value_and_grad(self.loss_fn),
                l2_reg=0.0,
                use_adaptive_learning_rate=adaptive,
                use_adaptive_momentum=adaptive,
                use_adaptive_damping=run["adaptive_damping"],
                initial_damping=run["damping"],
                damping_adaptation_interval=DAMPING_INTERVAL,
                **{name: run[name] for name in PASSED_ON},
            )
            # Steps on a copy until each kind has followed each: with and without new
            # curvature or damping. New inverses are a branch within one program.
            kinds = math.lcm(run["curvature_update_period"], DAMPING_INTERVAL)
            list(train(self, optimizer, run, [min(kinds + 1, self.steps)]))
            # No public way leads to the blocks.
            blocks = optimizer._estimator.indices_to_block_map
            leaves = jax.tree_util.tree_leaves_with_path(self.params(run["seed"]))
            for indices, block in blocks.items():
                own = [jax.tree_util.keystr(leaves[index][0]) for index in indices]
                print(type(block).__name__, *own, file=sys.stderr)
            self.compiled[key] = optimizer, time.perf_counter() - began
        return self.compiled[key]


def as_batch(arrays: dict[str, np.ndarray], index: Any = ...) -> Batch:
    """Returns one of stacked batches, copied to the device."""
    parts = tuple(jnp.array(arrays[key][index]) for key in sorted(arrays))
    return parts[0] if len(parts) == 1 else parts


def train(
    problem: Problem,
    optimizer: kfac_jax.Optimizer,
    run: dict[str, Any],
    stops: Iterable[int],
) -> Iterator[tuple[int, float, float]]:
    """Trains from the initial parameters; the clock runs for the optimizer only.

    Yields:
      At each of the rising `stops`: it, the seconds so far and the validation loss.
    """
    arrays, params = problem.read(f"batches-{run['seed']}"), problem.params(run["seed"])
    key = jax.random.PRNGKey(run["seed"])
    state = optimizer.init(params, key, as_batch(arrays, 0))
    given: dict[str, Any] = {}
    if run["method"] == "fixed":
        given["momentum"] = np.float32(run["momentum"])
    if run["adaptive_damping"]:
        # The optimizer may have been built for a run with another one.
        state.damping = jnp.asarray(run["damping"], state.damping.dtype)
    else:
        given["damping"] = np.float32(run["damping"])
    done, seconds = 0, 0.0
    for stop in stops:
        order = list(range(done, stop))
        if done == 0 < stop:  # the burn-in sees batches of the training ahead of it
            order[:0] = [i % problem.steps for i in range(run["num_burnin_steps"])]
        batches = [as_batch(arrays, index) for index in order]
        keys = [jax.random.fold_in(key, step) for step in range(done, stop)]
        jax.block_until_ready((batches, keys, params, state))
        feed = iter(batches)
        began = time.perf_counter()
        for step, step_key in zip(range(done, stop), keys, strict=True):
            if run["method"] == "fixed":
                factor = 1.0
                if run["schedule"] == "cosine":
                    factor = 0.5 * (1 + math.cos(math.pi * step / problem.steps))
                given["learning_rate"] = np.float32(run["learning_rate"] * factor)
            params, state, _ = optimizer.step(
                params, state, step_key, feed, global_step_int=step, **given
            )
        jax.block_until_ready((params, state))
        seconds += time.perf_counter() - began
        done = stop
        yield done, seconds, float(problem.evaluate(params, problem.validation))


def complete(run: dict[str, Any]) -> dict[str, Any]:
    """Returns a run with its defaults filled in, and refuses what it does not know."""
    if unknown := sorted(run.keys() - DEFAULTS.keys()):
        raise ValueError(f"unknown fields: {', '.join(unknown)}")
    run = DEFAULTS | run
    known = {"method": ("fixed", "adaptive"), "schedule": ("constant", "cosine")}
    for field, words in known.items():
        if run[field] not in words:
            raise ValueError(f"unknown {field} {run[field]!r}")
    if run["adaptive_damping"] is None:
        run["adaptive_damping"] = run["method"] == "adaptive"
    return run


def measure(problem: Problem, run: dict[str, Any]) -> dict[str, Any]:
    """Makes one run; returns its line of the results, a failure as "error"."""
    result: dict[str, Any] = {"run": run, "compile_seconds": None}
    result |= {"steps": [], "seconds": [], "val_loss": []}
    result |= {"initial_val_loss": None, "error": None}
    try:
        result["run"] = run = complete(run)
        optimizer, result["compile_seconds"] = problem.optimizer(run)
        stops = (*range(0, problem.steps, problem.eval_every), problem.steps)
        for step, seconds, loss in train(problem, optimizer, run, stops):
            if not math.isfinite(loss):
                result["error"] = f"the loss is {loss} after {step} steps"
                break
            if step == 0:
                result["initial_val_loss"] = loss
            result["steps"].append(step)
            result["seconds"].append(seconds)
            result["val_loss"].append(loss)
    except Exception as error:  # one run's failure must not cost the others
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {error}"
    return result


def main() -> None:
    """Reads the runs from standard input, and writes a line for each."""
    problem = Problem(Path(sys.argv[1]))
    for run in json.load(sys.stdin):
        print(json.dumps(measure(problem, run)), flush=True)


if __name__ == "__main__":
    main()
