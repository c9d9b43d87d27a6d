# SPDX-License-Identifier: Apache-2.0
"""Long runs: what a step may destroy, and does not.

    python benchmarks/long.py train digits equations starts faults    # runs and keeps
    python benchmarks/long.py report                                  # prints that

Every row says the median and the worst, and the base optimizer alone stands beside it:
a median hides the run that was lost. `--seeds`, `--steps` and `--only TEXT` (rows whose
name has it) make a part of it. Each run is one program on the device.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import workloads
from contenders import EARLY

import dho2_jax
from dho2_jax._numerics.schedules import is_due  # `should_refresh`, traced too

KEPT = workloads.RESULTS / "long.json"


# --- problems ------------------------------------------------------------------------


class Problem(NamedTuple):
    """A loss with its parameters and batches; full batches are None."""

    init: Callable[[Any], Any]  # seed -> params
    loss: Callable[[Any, Any], jax.Array]  # params, batch -> ()
    batch: Callable[[Any, Any], Any] = lambda seed, step: None
    part: Callable[[Any], Any] = lambda batch: batch  # what measures curvature
    final: Callable[[Any], jax.Array] | None = None  # params -> what a run is judged by


def _network(widths: tuple[int, ...]) -> Callable[[Any], Any]:
    def init(seed: Any) -> Any:
        keys = jax.random.split(jax.random.key(seed), len(widths))
        pairs = zip(keys, widths, widths[1:], strict=False)
        scale = jax.nn.initializers.glorot_normal()
        return [{"w": scale(k, (a, b)), "b": jnp.zeros(b)} for k, a, b in pairs]

    return init


def _apply(params: Any, x: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return (x @ params[-1]["w"] + params[-1]["b"])[..., 0]


def poisson() -> Problem:
    """-u'' = f on [0, 1], u = sin 2 pi x + 0.2 sin 8 pi x; 1-32-32-1, 128 points."""
    x, pi = jnp.linspace(0, 1, 128), jnp.pi
    f = (2 * pi) ** 2 * jnp.sin(2 * pi * x) + 0.2 * (8 * pi) ** 2 * jnp.sin(8 * pi * x)

    def loss(params, _):
        def u(x):
            return _apply(params, x[None])

        residual = jax.vmap(jax.grad(jax.grad(u)))(x) + f
        ends = u(jnp.zeros(())) ** 2 + u(jnp.ones(())) ** 2
        return jnp.mean(residual**2) / 100 + ends

    return Problem(_network((1, 32, 32, 1)), loss)


def convection() -> Problem:
    """u_t + 20 u_x = 0 on [0, 2 pi] x [0, 1], u = sin x at 0; 2-50-50-50-1, 1000."""
    x = jnp.linspace(0, 2 * jnp.pi, 40, endpoint=False)
    t = jnp.linspace(0, 1, 25)
    at_x, at_t = (a.ravel() for a in jnp.meshgrid(x, t))

    def loss(params, _):
        def u(x, t):
            return _apply(params, jnp.stack([x, t], -1))

        ones = jnp.ones_like(at_x)
        u_x = jax.jvp(lambda x: u(x, at_t), (at_x,), (ones,))[1]
        u_t = jax.jvp(lambda t: u(at_x, t), (at_t,), (ones,))[1]
        start = jnp.mean((u(x, 0 * x) - jnp.sin(x)) ** 2)
        ends = jnp.mean((u(0 * t, t) - u(0 * t + 2 * jnp.pi, t)) ** 2)
        return jnp.mean((u_t + 20 * u_x) ** 2) + start + ends

    return Problem(_network((2, 50, 50, 50, 1)), loss)


def noisy() -> Problem:
    """A small badly scaled regression on batches of 128 of 512 examples; 8-16-1."""
    x = jax.random.normal(jax.random.key(0), (512, 8)) * jnp.logspace(0, 1, 8)
    y = jnp.sin(0.3 * x.sum(-1))

    def init(seed):
        key = jax.random.fold_in(jax.random.key(100), seed)
        return {"w": jax.random.normal(key, (8, 16)) / 3, "v": jnp.full(16, 0.1)}

    def loss(params, batch):
        x, y = batch
        return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2)

    def batch(seed, step):
        key = jax.random.fold_in(jax.random.key(seed), step)
        chosen = jax.random.randint(key, (128,), 0, 512)
        return x[chosen], y[chosen]

    return Problem(init, loss, batch, final=lambda params: loss(params, (x, y)))


def digits() -> Problem:
    """The application's digits: zero training loss after some hundred steps."""
    load = workloads.build("digits")
    validation = jax.device_put(load.task.dataset.validation)
    return Problem(
        load.task.init,
        load.task.loss_fn,
        load.batch,
        load.part,
        lambda params: load.task.loss_fn(params, validation),
    )


# --- optimizers ----------------------------------------------------------------------


def _sgd(momentum: float) -> tuple[Callable, Callable]:
    def base(rate):
        return optax.sgd(rate, momentum=momentum or None)

    def hybrid(rate, **kwargs):
        return dho2_jax.dho2(base(rate), linear_base=True, **kwargs)

    return base, hybrid


def _over(base: Callable) -> tuple[Callable, Callable]:
    return base, lambda rate, **kwargs: dho2_jax.dho2(base(rate), **kwargs)


BASES = {
    "gradient descent": _sgd(0.0),
    "heavy ball": _sgd(0.9),
    "heavy ball 0.99": _sgd(0.99),
    "Adam": _over(optax.adam),
    "AdamW": _over(lambda rate: optax.adamw(rate, weight_decay=1e-4)),
    "Muon": _over(optax.contrib.muon),
}


# --- faults --------------------------------------------------------------------------

FAULTS = (
    *(f"gradient x {x}" for x in ("1e6", "1e12", "1e30")),
    *("NaN gradient", "ten NaN gradients", "Inf gradient", "ten Inf gradients"),
    *(f"loss x {x} from then on" for x in ("1e-6", "1e-3", "1e3", "1e6")),
    "other parameters",
    "an all-zero batch",
    "labels at random, ten steps",
    "curvature of one example",
)
# Of a base that is given NaN nothing is left; Optax's own remedy goes around it.
_NOT_FINITE = [i for i, name in enumerate(FAULTS) if "NaN" in name or "Inf" in name]


def _faulty(fault: Any, since: Any, batch: Any) -> tuple[Any, Any, Any, Any]:
    """Returns batch, curvature batch, factor on the gradient and on the loss."""

    def at(name: str, last: int = 0) -> Any:
        return (fault == FAULTS.index(name)) & (since >= 0) & (since <= last)

    bad, scale = jnp.ones(()), jnp.ones(())
    for i, name in enumerate(FAULTS):
        value = name.split(" x ")[-1].split()[0]
        if name.startswith("gradient"):
            bad = jnp.where(at(name), float(value), bad)
        elif "gradient" in name:
            number = jnp.nan if "NaN" in name else jnp.inf
            last = 9 if name.startswith("ten") else 0
            bad = jnp.where(at(name, last), number, bad)
        elif name.startswith("loss"):
            scale = jnp.where((fault == i) & (since >= 0), float(value), scale)
    x, y = batch
    zero = at("an all-zero batch")
    mixed = at("labels at random, ten steps", 9)
    noise = jax.random.normal(jax.random.key(7), y.shape) * 2
    batch = jnp.where(zero, 0.0, x), jnp.where(mixed, noise, jnp.where(zero, 0.0, y))
    one = at("curvature of one example", 9)
    part = jax.tree.map(lambda a: jnp.where(one, a[:1], a), batch)
    return batch, part, bad, scale


# --- runs ----------------------------------------------------------------------------


class Run(NamedTuple):
    """What one run came to."""

    final: float
    start: float
    best: float
    rise: float  # the largest loss over the best before it, from step 100 on
    counts: tuple[int, ...]  # of `COUNTS`


COUNTS = ("rate_cuts", "bounds", "trials", "refusals", "rejected")


def runner(
    problem: Problem,
    make: Callable[[Any], Any],
    steps: int,
    mode: str | None,
    period: int = 100,
    faults: bool = False,
) -> Callable[..., Run]:
    """Returns a run of a seed, a rate and a fault at a step; compiled once."""
    hybrid = mode is not None
    across = mode == "across an axis"
    if across:
        svag = dho2_jax.staggered_value_and_grad(
            lambda params, batch, scale: scale * problem.loss(params, batch),
            mesh=_mesh(2),
            stagger_axis="data",
        )

    def whole(params, seed, rate, fault, when):
        tx = optax.with_extra_args_support(make(rate))
        other = problem.init(seed + 1000)

        def advance(carry, step):
            params, state = carry
            batch = problem.batch(seed, step)
            # All products of a sweep are of one function.
            sweeping = across or mode == "staggered"
            held = step - step % period if sweeping else step
            measured = problem.batch(seed, held)
            part, bad, scale = problem.part(measured), 1.0, 1.0
            if faults:
                _, part, _, _ = _faulty(fault, held - when, measured)
                batch, _, bad, scale = _faulty(fault, step - when, batch)
                swap = (fault == FAULTS.index("other parameters")) & (step == when)
                params = jax.tree.map(lambda a, b: jnp.where(swap, b, a), params, other)

            def value(params):
                return scale * problem.loss(params, part)

            if across:
                loss, grads, product = svag(params, batch, part, state, scale)
                loss, grads = loss / scale, jax.tree.map(lambda g: bad * g, grads)
                extra = {"product": product}
            else:
                loss, grads = jax.value_and_grad(problem.loss)(params, batch)
                grads = jax.tree.map(lambda g: scale * bad * g, grads)
                extra = {"value_fn": value} if hybrid else {}
            if mode == "external":
                state = jax.lax.cond(
                    is_due(dho2_jax.Schedule(period, early_refreshes=EARLY), step),
                    lambda state: dho2_jax.refresh(state, params, value),
                    lambda state: state,
                    state,
                )
            updates, state = tx.update(grads, state, params, **extra)
            found = dho2_jax.metrics(state) if hybrid else {}
            counts = [found.get(name, jnp.zeros((), jnp.int32)) for name in COUNTS]
            return (optax.apply_updates(params, updates), state), (loss, *counts)

        carry = params, tx.init(params)
        (params, _), traced = jax.lax.scan(advance, carry, jnp.arange(steps))
        judge = problem.final or (lambda params: problem.loss(params, None))
        return judge(params), traced

    program = jax.jit(whole)
    start = jax.jit(problem.init, out_shardings=_all(_mesh(2)) if across else None)

    def run(seed: int, rate: float, fault: int = 0, when: int = -1) -> Run:
        final, (losses, *counts) = jax.device_get(
            program(start(seed), seed, jnp.float32(rate), fault, when)
        )
        losses = np.where(np.isfinite(losses), losses, np.inf).astype(np.float64)
        best = np.minimum.accumulate(losses)
        first = min(100, len(losses) // 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            rise = np.nanmax(losses[first:] / best[first:])
        final = float(final) if math.isfinite(final) else math.inf
        last = tuple(int(x[-1]) for x in counts)
        return Run(final, float(losses[0]), float(best[-1]), float(rise), last)

    return run


def _mesh(count: int, first: int = 0) -> jax.sharding.Mesh:
    devices = np.array(jax.devices()[first : first + count])
    return jax.sharding.Mesh(devices, ("data",))


def _all(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def overlapped(
    problem: Problem, tx: Any, steps: int, period: int
) -> Callable[..., float]:
    """Returns a run whose refreshes are made on the next device, by a loop."""

    def at(params, seed, step, fault, when):
        batch = problem.batch(seed, step)
        whole, part, bad, scale = _faulty(fault, step - when, batch)
        swap = (fault == FAULTS.index("other parameters")) & (step == when)
        other = problem.init(seed + 1000)
        params = jax.tree.map(lambda a, b: jnp.where(swap, b, a), params, other)
        return params, whole, (part, scale), bad

    @jax.jit
    def advance(params, state, seed, step, fault, when):
        params, batch, (part, scale), bad = at(params, seed, step, fault, when)
        grads = jax.grad(problem.loss)(params, batch)
        grads = jax.tree.map(lambda g: scale * bad * g, grads)
        value = lambda params: scale * problem.loss(params, part)  # noqa: E731
        updates, state = tx.update(grads, state, params, value_fn=value)
        return optax.apply_updates(params, updates), state

    measured = jax.jit(lambda *args: at(*args)[2])
    overlap = dho2_jax.overlapped_refresh(
        lambda params, batch: batch[1] * problem.loss(params, batch[0]),
        mesh=_mesh(1, 1),
        batch_spec=jax.sharding.PartitionSpec(),
    )
    start = jax.jit(problem.init, out_shardings=_all(_mesh(1)))
    begin, judge = jax.jit(tx.init), jax.jit(problem.final)
    schedule = dho2_jax.Schedule(period, early_refreshes=EARLY)

    def run(seed: int, fault: int, when: int) -> float:
        params, pending, due = start(seed), None, None
        state = begin(params)
        for step in range(steps):
            args = seed, step, fault, when
            if step == due:
                state, pending = overlap.land(state, pending), None
            if pending is None and dho2_jax.should_refresh(step, schedule):
                pending = overlap.launch(state, params, measured(params, *args))
                due = step + 5
            params, state = advance(params, state, *args)
        return float(judge(params))

    return run


# --- sections ------------------------------------------------------------------------


def _hybrid(base: str, mode: str, period: int = 100, k: int = 8) -> Callable:
    refresh = {"across an axis": "staggered", "overlapped": "external"}.get(mode, mode)
    more = {} if refresh == "external" else {"refresh_period": period}
    if mode == "periodic":
        more["early_refreshes"] = EARLY
    if mode != refresh:
        more["mesh"] = _mesh(2 if mode == "across an axis" else 1)
    return lambda rate: BASES[base][1](rate, num_largest=k, refresh=refresh, **more)


def _summary(runs: list[Run], own: bool = True) -> dict[str, Any]:
    finals = [run.final for run in runs]
    row = {
        "runs": len(runs),
        "median": float(np.median(finals)),
        "worst": max(finals),
        "above start": sum(not run.final <= run.start for run in runs),
        "above 2 medians": sum(not x <= 2 * np.median(finals) for x in finals),
    }
    if own:
        row["end / best"] = max(run.final / max(run.best, 1e-30) for run in runs)
        row["rise"] = max(run.rise for run in runs)
    counts = zip(*(run.counts for run in runs), strict=True)
    return row | dict(zip(COUNTS, (int(np.median(x)) for x in counts), strict=True))


Rows = dict[str, dict[str, Any]]


def run_digits(args: Any, keep: Callable[[str, Any], None]) -> None:
    """Past zero training loss, by validation loss; 20,000 steps on the first seed."""
    rates = {"Adam": (1e-3, 8e-3), "heavy ball": (1e-2, 0.2), "Muon": (1e-2, 2e-2)}
    problem = digits()
    for base, (rate, alone) in rates.items():
        for steps in (args.steps,) if args.steps else (3000, 20_000):
            seeds = range(args.seeds or 3) if steps < 20_000 else range(1)
            label = f"digits, {base}, {steps} steps"
            if args.only not in label:
                continue
            run = runner(problem, BASES[base][0], steps, None)
            keep(f"{label}, alone", _summary([run(s, alone) for s in seeds], False))
            for mode in ("periodic", "staggered", "external"):
                run = runner(problem, _hybrid(base, mode), steps, mode)
                keep(f"{label}, {mode}", _summary([run(s, rate) for s in seeds], False))


def run_equations(args: Any, keep: Callable[[str, Any], None]) -> None:
    """Differential equations on the full batch, by the loss."""
    starts = {
        "poisson": {"Adam": 1e-3, "heavy ball": 1e-4, "heavy ball 0.99": 1e-4},
        "convection": {"Adam": 1e-3, "heavy ball": 1e-3, "heavy ball 0.99": 1e-3},
    }
    for name, make in (("poisson", poisson), ("convection", convection)):
        problem, seeds = make(), range(args.seeds or 10)
        for base, rate in starts[name].items():
            label = f"{name}, {base}, alone"
            steps = args.steps or 5000
            if args.only in label:
                run = runner(problem, BASES[base][0], steps, None)
                keep(label, _summary([run(s, rate) for s in seeds]))
            for period in (100, 20):
                for k in (24, 64):
                    label = f"{name}, {base}, T = {period}, k = {k}"
                    if args.only not in label:
                        continue
                    make_tx = _hybrid(base, "periodic", period, k)
                    run = runner(problem, make_tx, steps, "periodic")
                    keep(label, _summary([run(s, rate) for s in seeds]))


def run_starts(args: Any, keep: Callable[[str, Any], None]) -> None:
    """Random seeds and initial rates over six decades, 1e-5 to 10."""
    problem, steps = noisy(), args.steps or 2000
    rng = np.random.default_rng(0)
    rates = 10 ** rng.uniform(-5, 1, args.seeds or 100)
    for base in BASES:
        for mode in (None, "periodic"):
            label = f"starts, {base}, {mode or 'alone'}"
            if args.only not in label:
                continue
            make = _hybrid(base, mode, 50, 4) if mode else BASES[base][0]
            run = runner(problem, make, steps, mode, 50)
            runs = [run(seed, rate) for seed, rate in enumerate(rates)]
            keep(label, _summary(runs, False))


FAULTY = ("periodic", "staggered", "external", "across an axis", "overlapped")


def run_faults(args: Any, keep: Callable[[str, Any], None]) -> None:
    """Faults at random steps; 200 steps later the loss over that of the base alone."""
    problem, count = noisy(), args.seeds or 20
    rng = np.random.default_rng(1)
    whens = rng.integers(60, 260, count)
    rates = {"gradient descent": 3e-3, "heavy ball": 3e-3, "Adam": 1e-2, "Muon": 1e-2}
    steps = 200  # after the fault

    # Runs end 200 steps after the latest fault: of earlier ones more.
    length = int(whens.max()) + steps

    def finals(base: str, mode: str | None) -> np.ndarray:
        make = _hybrid(base, mode, 50, 4) if mode else BASES[base][0]
        guarded = lambda rate: optax.apply_if_finite(make(rate), 20)  # noqa: E731

        def one(of: Callable[[Any], Any]) -> Callable[[int, int, int], float]:
            rate = rates[base]
            if mode == "overlapped":
                return overlapped(problem, of(rate), length, 50)
            run = runner(problem, of, length, mode, 50, faults=True)
            return lambda seed, fault, when: run(seed, rate, fault, when).final

        plain, safe = one(make), one(guarded)
        found = np.zeros((len(FAULTS), count))
        for i in range(len(FAULTS)):
            run = safe if i in _NOT_FINITE else plain
            for j, when in enumerate(whens):
                found[i, j] = run(j, i, int(when))
        return np.where(np.isfinite(found), found, np.inf)

    for base in rates:
        if args.only not in base:
            continue
        alone = finals(base, None)
        for mode in args.modes or FAULTY:
            ratio = finals(base, mode) / alone
            for i, fault in enumerate(FAULTS):
                ratios = np.where(np.isnan(ratio[i]), 1.0, ratio[i])
                keep(
                    f"faults, {base}, {mode}: {fault}",
                    {
                        "runs": count,
                        "median": float(np.median(ratios)),
                        "worst": float(ratios.max()),
                        "above 2": int((ratios > 2).sum()),
                    },
                )


TRAINED = {  # each at ten times its steps: the base's own tuned rate
    "digits_mlp": {"adam": 8e-3, "heavy_ball": 0.2, "muon": 2e-2},
    "patch_autoencoder": {"adam": 2e-3, "heavy_ball": 1.5e-3, "muon": 3e-2},
    "char_lm": {"adam": 2e-3},
}
STARTS = {"adam": 1e-3, "heavy_ball": 1e-2, "muon": 1e-2}
MODES = {
    "external": ("mesh_shape=(1,)",),
    "periodic": ("mesh_shape=(1,)", "optimizer.refresh=periodic"),
    "staggered": ("mesh_shape=(1,)", "optimizer.refresh=staggered"),
    "across an axis": (
        *("optimizer.refresh=staggered", "stagger_axis=data"),
        *("mesh_shape=(2,)", "mesh_axes=data"),
    ),
    "overlapped": ("mesh_shape=(2,)", "curvature_devices=1"),
}


def run_train(args: Any, keep: Callable[[str, Any], None]) -> None:
    """`dho2 train` of the shipped configs, by the validation loss."""
    from dho2_jax.app.run import experiment

    configs = workloads.RESULTS.parents[1] / "configs"
    for name, bases in TRAINED.items():
        for base, alone in bases.items():
            for mode, changes in {"alone": MODES["external"], **MODES}.items():
                label = f"train {name}, {base}, {mode}"
                if args.only not in label:
                    continue
                path = str(configs / f"{name}.py")
                steps = args.steps or 10 * experiment.read_config(path, ()).steps
                fields = (
                    *(f"steps={steps}", f"optimizer.base={base}", *changes),
                    f"optimizer.learning_rate={STARTS[base]}",
                    f"base_learning_rate={alone}",
                )
                config = experiment.read_config(path, [f"--config.{x}" for x in fields])
                built = experiment.build(name, config)
                chosen = built.base if mode == "alone" else built.dho2
                programs = experiment.compile_for(built, chosen)
                runs = []
                for seed in range(args.seeds or 3):
                    found = experiment.run_one(
                        built,
                        chosen,
                        programs,
                        seed=seed,
                        directory=None,
                        should_stop=lambda: False,
                    )
                    losses = found.series("val_loss")[2]
                    counts = [found.rows[-1].get(name, 0) for name in COUNTS]
                    runs.append(
                        Run(losses[-1], losses[0], min(losses), 0.0, tuple(counts))
                    )
                row = _summary(runs)
                row.pop("rise")
                keep(label, row)


SECTIONS = {
    "train": run_train,
    "digits": run_digits,
    "equations": run_equations,
    "starts": run_starts,
    "faults": run_faults,
}


def table(rows: Rows) -> str:
    """Returns what is kept as text, a line a row."""
    lines = []
    for name, row in rows.items():
        cells = (f"{k} {v:.3g}" for k, v in row.items() if k != "seconds")
        lines.append(f"{name}: {', '.join(cells)}")
    return "\n".join(lines)


def main() -> None:
    """Runs sections, keeps their rows and prints them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="+", choices=[*SECTIONS, "report"])
    parser.add_argument("--seeds", type=int, help="of each row; None: as documented")
    parser.add_argument("--steps", type=int, help="of each run")
    parser.add_argument("--only", default="", help="rows whose name has this text")
    parser.add_argument("--modes", nargs="*", help="of the faults; None: all")
    args = parser.parse_args()
    if {"train", "faults"} & set(args.what):
        jax.config.update("jax_num_cpu_devices", 3)  # before anything asks for one
    rows: Rows = json.loads(KEPT.read_text()) if KEPT.exists() else {}

    def keep(name: str, row: dict[str, Any]) -> None:
        nonlocal began
        rows.pop(name, None)
        rows[name] = row | {"seconds": round(time.monotonic() - began, 1)}
        print(table({name: row}), flush=True)
        if not args.steps:
            KEPT.write_text(json.dumps(rows, indent=1) + "\n")
        began = time.monotonic()

    began = time.monotonic()
    for what in args.what:
        if what == "report":
            print(table(rows))
        else:
            SECTIONS[what](args, keep)


if __name__ == "__main__":
    main()
