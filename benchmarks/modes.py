# SPDX-License-Identifier: Apache-2.0
"""What each way of computing curvature costs, in time, in loss and in FLOPs.

    python benchmarks/modes.py convergence [--configs a,b] [--seeds 3]
    python benchmarks/modes.py times [--config char_lm --batch-size 64]
    python benchmarks/modes.py totals [--periods 50,100,200]
    python benchmarks/modes.py flops [--config char_lm --batch-size 64]

The modes, on eight virtual CPU devices:

    base             the base optimizer alone, at its own best rate
    periodic         all products in one step
    staggered        one product a step
    across an axis   one product a step, made by one of eight devices in turn while the
                     others make the gradient
    overlapped       one more device refreshes while four train; to compare with
    base of four     the base optimizer on four devices

`convergence` compares final losses with everything else equal. `times` measures every
step of each mode apart, and draws `modes.png`; `totals` the time of whole runs, the
host waiting at every tenth step only, relative to the base's. Both go in rounds of all
modes, since the clock of a shared machine drifts. Compilation is never in a time.
`flops` counts what the busiest device computes: on two cores eight devices take turns,
on a pod they do not.
"""

import argparse
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
# Threads of XLA's pool. With fewer than programs in flight hold, collectives starve.
os.environ.setdefault("NPROC", "32")

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

import dho2_jax
from dho2_jax.app.run import experiment as experiments
from dho2_jax.app.run import optimizers
from dho2_jax.app.run.experiment import Experiment
from dho2_jax.app.run.programs import Programs
from dho2_jax.app.run.stepper import Stepper

jax.config.update("jax_num_cpu_devices", 8)

ROOT = pathlib.Path(__file__).resolve().parent
MODES: dict[str, tuple[str, ...]] = {
    "base": (),
    "periodic": ("optimizer.refresh=periodic",),
    "staggered": ("optimizer.refresh=staggered",),
    "across an axis": ("optimizer.refresh=staggered", "stagger_axis=data"),
    "base of four": ("mesh_shape=(4,)",),
    # XLA's CPU runtime runs programs of several devices one after another.
    "overlapped": (
        "optimizer.refresh=external",
        "mesh_shape=(4,)",
        "curvature_devices=1",
    ),
}
BASES = ("base", "base of four")
# Okabe and Ito's colours.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#E69F00")
WARM = 3  # steps before the clock counts


class Mode(NamedTuple):
    """One way to train, built and compiled."""

    name: str
    experiment: Experiment
    optimizer: Any
    programs: Programs


def build(config: str, name: str, *overrides: str) -> Experiment:
    """Builds the experiment of a mode."""
    file = ROOT.parent / "configs" / f"{config}.py"
    changes = [f"--config.{one}" for one in (*MODES[name], *overrides)]
    return experiments.build(config, experiments.read_config(str(file), changes))


def compiled(config: str, name: str, *overrides: str) -> Mode:
    """Builds and compiles a mode."""
    experiment = build(config, name, *overrides)
    optimizer = experiment.base if name in BASES else experiment.dho2
    return Mode(
        name, experiment, optimizer, experiments.compile_for(experiment, optimizer)
    )


def convergence(options: argparse.Namespace) -> None:
    """Prints the final losses of all modes on all seeds."""
    names = [name for name in MODES if name != "base of four"]
    lines = ["| config | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for config in options.configs.split(","):
        cells = []
        for name in names:
            changes = []
            if name in ("base", "periodic", "staggered"):
                # The same on any number of devices, and faster on one.
                changes += ["mesh_shape=(1,)"]
            if options.period and name not in ("base", "periodic"):
                early = (20,) if options.period > 20 else ()
                changes += [f"optimizer.refresh_period={options.period}"]
                changes += [f"optimizer.early_refreshes={early}".replace(" ", "")]
            mode = compiled(config, name, *changes)
            finals, counts = [], []
            for seed in range(options.seeds):
                run = experiments.run_one(
                    mode.experiment,
                    mode.optimizer,
                    mode.programs,
                    seed=seed,
                    directory=None,
                    should_stop=lambda: False,
                )
                finals.append(run.series("val_loss")[2][-1])
                last = run.rows[-1]
                counts.append((last.get("refreshes"), last.get("rejected")))
            middle = statistics.median(finals)
            cells.append(f"{middle:.4g} [{min(finals):.4g}, {max(finals):.4g}]")
            print(config, name, finals, counts, flush=True)
        lines.append(f"| {config} | " + " | ".join(cells) + " |")
    print("\n".join(lines))


def times(options: argparse.Namespace) -> None:
    """Prints percentiles of the time of a step and draws all steps."""
    modes = [_timed(options, name) for name in MODES]
    seconds: dict[str, list[float]] = {mode.name: [] for mode in modes}
    runs = [_Run(mode) for mode in modes]
    for _ in range(WARM):
        for run in runs:
            run.step()
            run.wait()
    rounds = 6
    for number in range(rounds):
        for mode, run in zip(modes, runs, strict=True):
            for _ in range(options.steps // rounds):
                began = time.perf_counter()
                run.step()
                jax.block_until_ready(run.params)
                seconds[mode.name].append(time.perf_counter() - began)
            run.wait()
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    base = {name: np.percentile(seconds[name], 99) for name in BASES}
    print("| mode | median | mean | 99th percentile | over the base's | maximum |")
    print("|---|---|---|---|---|---|")
    for name, found in seconds.items():
        ms, high = 1e3 * np.array(found), np.percentile(found, 99)
        print(
            f"| {name} | {np.median(ms):.1f} ms | {ms.mean():.1f} ms "
            f"| {1e3 * high:.1f} ms | {high / base[_base_of(name)]:.2f} "
            f"| {ms.max():.0f} ms |"
        )
    _draw(
        options.out,
        seconds,
        f"{options.config}, eight devices on {os.cpu_count()} cores",
    )


def totals(options: argparse.Namespace) -> None:
    """Prints the time of whole runs relative to the base's, in rounds of them all."""
    periods = [int(one) for one in options.periods.split(",")]
    modes = [name for name in MODES if name not in BASES]
    runs = {(name, 0): _Run(_timed(options, name)) for name in BASES}
    for period in periods:
        for name in modes:
            more = (f"optimizer.refresh_period={period}",)
            runs[name, period] = _Run(_timed(options, name, *more))
    seconds = dict.fromkeys(runs, 0.0)
    rounds = 10
    for number in range(rounds):
        for key, run in runs.items():
            began = time.perf_counter()
            for step in range(options.steps // rounds):
                run.step()
                if step % 10 == 9:  # as often as dho2 train logs
                    jax.block_until_ready(run.params)
            run.wait()
            seconds[key] += time.perf_counter() - began
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    print("| mode | " + " | ".join(f"T = {one}" for one in periods) + " |")
    print("|---" * (len(periods) + 1) + "|")
    for name in modes:
        base = seconds[_base_of(name), 0]
        cells = [f"{seconds[name, period] / base:.2f}" for period in periods]
        print(f"| {name} | " + " | ".join(cells) + " |")


def flops(options: argparse.Namespace) -> None:
    """Prints what the busiest device computes in a step, in units of a gradient.

    From the compiler's count for a gradient and a product; the steps are sums of these.
    The Newton step's own passes over V are a matter of bytes, and not counted; nor are
    the rate's probes, which all modes make, in every tenth step.
    """
    experiment = build(options.config, "across an axis", *_sizes(options))
    task, config, devices = experiment.task, experiment.config, options.devices
    batch = config.batch_size

    def of(examples: int, function: Callable[..., Any]) -> float:
        """FLOPs of a function of the parameters and this many examples."""
        params = jax.eval_shape(task.init, 0)
        some = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((examples, *x.shape[1:]), x.dtype),
            task.dataset.batch_spec,
        )
        cost = jax.jit(function).lower(params, some).compile().cost_analysis()
        return float((cost or {})["flops"])

    def product(params, some):
        loss = task.value_fn(some, gauss_newton=False)
        return dho2_jax.hvp(loss, params)(params)

    own, group = batch // devices, batch // options.groups
    one = of(own, jax.value_and_grad(task.loss_fn))
    each = of(own, product) / one  # a product on as many examples
    part = batch // 8
    m, period = optimizers.num_matvecs(config), config.optimizer.refresh_period
    busy, shared = (m + 1) / period, each * part / batch
    balanced = max(1, int(group / each))
    rows = [
        ("base", 1.0, 1.0),
        ("periodic", 1 + busy * shared, 1 + (m + 1) * shared),
        ("staggered", 1 + busy * shared, 1 + shared),
    ]
    for examples in (part, balanced):
        longest = max(1.0, each * examples / group)
        name = f"across {options.groups} groups, product on {examples} examples"
        rows.append((name, 1 + busy * (longest - 1), longest))
    # As many apart as are through with one refresh before the next.
    apart = math.ceil((m + 1) * each * part / own / period)
    more = devices / (devices - apart)
    rows.append((f"overlapped, {apart} of {devices} apart", more, more))
    print(f"{options.config}: 1 is a gradient on a device's {own}, {one:.3g} FLOPs;")
    print(f"a product on as many is {each:.2f}, on an eighth of the batch over all")
    print(f"devices {shared:.3f}. m = {m}, T = {period}.")
    print("| mode | mean of a period | longest step |")
    print("|---|---|---|")
    for name, mean, longest in rows:
        print(f"| {name} | {mean:.3f} | {longest:.2f} |")


class _Run:
    """A run under way: its state, and how to go on."""

    def __init__(self, mode: Mode):
        self.mode = mode
        self.restart()

    def restart(self) -> None:
        mode = self.mode
        self.count = 0
        self.params, self.state = mode.programs.start(np.uint32(0))
        self.advance = Stepper(
            mode.experiment.task, mode.optimizer, mode.programs, seed=0
        )
        jax.block_until_ready((self.params, self.state))

    def step(self) -> None:
        self.params, self.state, _ = self.advance(self.count, self.params, self.state)
        self.count += 1

    def wait(self) -> None:
        """Waits for all devices, those that refresh included."""
        mesh = self.mode.optimizer.curvature_mesh
        jax.block_until_ready((self.params, self.state))
        if mesh is not None:
            for device in mesh.devices.flat:
                jax.block_until_ready(jax.device_put(0.0, device) + 1)


def _base_of(name: str) -> str:
    """Returns the base that a mode is compared with, on as many devices."""
    return BASES[name in ("base of four", "overlapped")]


def _sizes(options: argparse.Namespace) -> list[str]:
    """Returns the sizes of all but `convergence`: an eighth of the batch for V."""
    return [
        f"batch_size={options.batch_size}",
        f"curvature_batch_size={options.batch_size // 8}",
        f"optimizer.refresh_period={options.period}",
        "optimizer.early_refreshes=()",
        f"optimizer.num_largest={options.num_largest}",
    ]


def _timed(options: argparse.Namespace, name: str, *overrides: str) -> Mode:
    return compiled(options.config, name, *_sizes(options), *overrides)


def _draw(path: pathlib.Path, seconds: dict[str, Sequence[float]], title: str) -> None:
    """Draws the time of each step against its number, a panel for each mode."""
    figure = Figure(figsize=(11, 8.5), dpi=130)
    panels = figure.subplots(len(seconds), 1, sharex=True)
    low = 1e3 * min(map(min, seconds.values()))
    high = 1e3 * max(map(max, seconds.values()))
    usual = 1e3 * float(np.median(seconds["base"]))
    for axes, colour, (name, found) in zip(
        panels, COLOURS, seconds.items(), strict=True
    ):
        ms = 1e3 * np.array(found)
        axes.axhline(usual, color="#999999", linewidth=1)
        axes.plot(ms, ".", color=colour, markersize=4)
        axes.vlines(range(len(ms)), usual, ms, color=colour, linewidth=0.8, alpha=0.5)
        axes.set_yscale("log")
        axes.set_ylim(0.8 * low, 1.25 * high)
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel("ms")
        axes.set_title(name, loc="left", fontsize="medium")
        axes.grid(axis="y", alpha=0.3)
    panels[-1].set_xlabel("training step")
    figure.suptitle(f"Time of a step: {title} (grey: median of the base)")
    figure.set_layout_engine("constrained")
    figure.savefig(path)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("convergence")
    one.add_argument("--configs", default="patch_autoencoder,digits_mlp,char_lm")
    one.add_argument("--seeds", type=int, default=3)
    one.add_argument("--period", type=int, help="of all modes but the periodic")
    one.set_defaults(run=convergence)
    for function in (times, totals, flops):
        one = commands.add_parser(function.__name__)
        one.add_argument("--config", default="patch_autoencoder")
        one.add_argument("--batch-size", type=int, default=4096)
        one.add_argument("--num-largest", type=int, default=16)
        one.add_argument("--period", type=int, default=200)
        one.add_argument("--steps", type=int, default=300)
        one.set_defaults(run=function)
        if function is times:
            one.add_argument("--out", type=pathlib.Path, default=ROOT / "modes.png")
        if function is flops:
            one.add_argument("--devices", type=int, default=8)
            one.add_argument("--groups", type=int, default=8)
        if function is totals:
            one.set_defaults(steps=500)
            one.add_argument("--periods", default="50,100,200")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
