# SPDX-License-Identifier: Apache-2.0
"""Time to a target that was fixed beforehand, against tuned peers.

    python benchmarks/time_to_target.py race [--workloads a,b] [--contenders "A;B"]
                                             [--kfac PYTHON] [--repeats 3]
    python benchmarks/time_to_target.py report

The protocol, fixed before the results:

* Every contender has the same budget: five rates, each constant and with a cosine, on
  two seeds that no table reports (`sweeps.py tune`). Its setting is the one that was
  best at the end; Muon and Kron, which pass Adam's loss long before, and DHO² on Muon
  race also with the one that was soonest there.
* The targets on a workload are the median final losses of tuned Adam, tuned heavy ball
  and tuned Muon after the workload's steps, seeds 0 to 2 of this race.
* All contenders run in turns, seed after seed, on one machine that does nothing else,
  `--repeats` times over; each stretch between two evaluations counts with the median
  of its times. The clock counts steps, refreshes and probes; compilation is reported
  apart. (Before, each row ran once; the repeats came when the results were known, for
  all rows alike, and change times alone.)
* K-FAC (kfac-jax) runs in an environment of its own, by `kfac_worker.py`, on the same
  parameters and batches, in the same race, each `eval_every` steps of it evaluated too;
  on the small workloads, whose networks it has been told.

`race` writes `results/race-<workload>.json`, `report` prints the tables and draws
`results/<workload>.png`; `--results` names another folder, for another machine. A
workload may be "autoencoder x4": the bases and DHO² on them at four times the batch, by
the settings of `sweeps.py batches`.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import contenders as who
import fleet
import jax
import numpy as np
import race
import sweep_records
import workloads
from workloads import RESULTS, Workload

TWICE = ("Muon", "Kron", "DHO² on Muon", "DHO² on Muon, fixed")
KFAC: dict[str, dict[str, Any]] = {  # damping: best of three tried on another seed
    "autoencoder": {"method": "adaptive", "damping": 1.0},
    "digits": {"method": "adaptive", "damping": 0.03},
    "transformer": {"method": "adaptive", "damping": 0.01},
}
KFAC_STEPS = {"autoencoder": 400, "digits": 100, "transformer": 200}
KFAC_SEEDS = {"transformer": (0,)}  # a step takes ten of the others'
MODELS = {
    "autoencoder": ("mlp", "squared_error"),
    "digits": ("mlp", "classification"),
    "transformer": ("transformer", "language"),
}


class Entry(NamedTuple):
    """A row of the race."""

    label: str
    contender: str
    rate: float
    cosine: bool
    recorded_from: str = ""  # a row whose rates, s times its start, it repeats


def entries(workload: Workload, wanted: Sequence[str] = ()) -> list[Entry]:
    """Returns the rows of a workload, from the sweeps; of all contenders or of some."""
    rows: list[Entry] = []
    usual = workload.name in who.RATES
    tuned = _sweep(workload, "Adam")
    assert tuned is not None, f"no sweep of Adam on {workload.name}"
    _, goal = fleet.best(tuned)
    for name, one in who.chosen(workload, wanted).items():
        if not usual and name.removeprefix("DHO² on ") not in who.BASES:
            continue
        if not one.rates:
            if workload.name == "digits":
                rows.append(Entry(name, name, 1.0, False))
            continue
        if one.default is not None:
            rows.append(Entry(f"{name}, untuned", name, one.default, False))
            if "α" in name:
                continue
        swept = _sweep(workload, name)
        if swept is None:
            continue
        goals = (math.nan, goal) if name in TWICE else (math.nan,)
        chosen = dict.fromkeys(fleet.best(swept, x)[0] for x in goals)
        chosen.pop((one.default, False), None)  # is there as "untuned"
        for rate, cosine in chosen:
            label = f"{name}, {rate:g} {who.schedule_name(cosine)}"
            rows.append(Entry(label, name, rate, cosine))
    for base in ("heavy ball", "Adam") if usual else ():
        start, source = who.STARTS[base], f"DHO² on {base}, untuned"
        if any(row.label == source for row in rows):
            rows.append(Entry(f"{base}, at its rate", base, start, False, source))
    return rows


def _sweep(workload: Workload, contender: str) -> fleet.Fleet | None:
    kind = "tune" if workload.name in who.RATES else "batches"
    return sweep_records.load(kind, workload.name, contender)


def run_race(options: argparse.Namespace) -> None:
    """Runs every row on every seed, in turns."""
    options.results.mkdir(parents=True, exist_ok=True)
    for name in options.workloads:
        workload = workloads.build(name)
        rows, compiled = entries(workload, options.contenders), {}
        for row in rows:
            if row.contender not in compiled:
                one = who.contenders(workload)[row.contender]
                compiled[row.contender] = race.compile_for(workload, one)
                seconds = compiled[row.contender].compile_seconds
                print(
                    f"{name}: compiled {row.contender} in {seconds:.1f} s", flush=True
                )
        records: list[dict[str, Any]] = []
        for seed in options.seeds:
            runs = {row.label: [] for row in rows}
            for row in rows * options.repeats:
                rate: Any = row.rate
                if row.recorded_from:
                    source = runs[row.recorded_from][0]
                    rate = [row.rate * x for x in source.scales]
                programs = compiled[row.contender]
                done = race.run(
                    workload, programs, seed=seed, rate=rate, cosine=row.cosine
                )
                runs[row.label].append(done)
                print(
                    f"{name}: {row.label}, seed {seed}: {done.losses[-1]:.4g} after "
                    f"{done.steps[-1]} steps, {done.seconds[-1]:.2f} s",
                    flush=True,
                )
            for row in rows:
                seconds = compiled[row.contender].compile_seconds
                records.append(row._asdict() | _record(runs[row.label], seed, seconds))
            with_kfac = options.kfac and name in KFAC
            if with_kfac and seed in KFAC_SEEDS.get(name, options.seeds):
                records += _kfac(workload, options.kfac, seed, options.repeats)
            text = json.dumps({"workload": name, "records": records})
            race.path_of(options.results, name).write_text(text)


def _record(
    runs: Sequence[race.Run], seed: int, compile_seconds: float
) -> dict[str, Any]:
    """Returns what is kept of a row's runs on a seed."""
    kept = race.in_median_time(runs)._asdict()
    del kept["scales"]
    return {"seed": seed, "compile_seconds": compile_seconds} | kept


def _kfac(
    workload: Workload, python: str, seed: int, repeats: int
) -> list[dict[str, Any]]:
    """Runs K-FAC on the same parameters and batches, in its own environment."""
    name, steps = workload.name, KFAC_STEPS[workload.name]
    model, loss = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        there = pathlib.Path(folder)
        problem = {"name": name, "model": model, "loss": loss, "num_heads": 4}
        problem |= {"steps": steps, "eval_every": workload.eval_every}
        (there / "problem.json").write_text(json.dumps(problem))
        paths = jax.tree_util.tree_leaves_with_path(workload.task.init(seed))
        params = {
            "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path): x
            for path, x in paths
        }
        np.savez(there / f"params-{seed}.npz", **params)
        draw = jax.jit(workload.batch)
        drawn = [draw(np.uint32(seed), np.int32(i)) for i in range(steps)]
        for file, batches in (
            (f"batches-{seed}", jax.tree.map(lambda *x: np.stack(x), *drawn)),
            ("validation", workload.task.dataset.validation),
        ):
            arrays = {str(i): x for i, x in enumerate(jax.tree.leaves(batches))}
            np.savez(there / f"{file}.npz", **arrays)
        wanted = json.dumps([KFAC[name] | {"seed": seed}] * repeats)
        worker = pathlib.Path(__file__).with_name("kfac_worker.py")
        done = subprocess.run(
            [python, str(worker), folder], input=wanted, capture_output=True, text=True
        )
    if done.returncode:
        sys.exit(f"K-FAC failed: {done.stderr[-2000:]}")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    fields = "steps", "seconds", "val_loss"
    runs = [race.Run(*(line[x] for x in fields), scales=[]) for line in lines]
    found = _record(runs, seed, lines[0]["compile_seconds"])
    last, error = found["losses"][-1], lines[0]["error"]
    print(f"{name}: K-FAC, seed {seed}: {last:.4g}, {error}")
    return [{"label": "K-FAC, adaptive", "contender": "K-FAC"} | found]


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("race", "report"))
    parser.add_argument("--workloads", default=",".join(workloads.SMALL))
    parser.add_argument(
        "--contenders", default="", type=who.names, help='all, or some: "A;B"'
    )
    parser.add_argument("--kfac", default="", help="a Python that has kfac-jax 0.0.8")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--repeats", default=3, type=int, help="runs of each row on each seed"
    )
    parser.add_argument(
        "--results",
        type=pathlib.Path,
        default=RESULTS,
        help="a folder, for each machine",
    )
    options = parser.parse_args()
    options.workloads = options.workloads.split(",")
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    if options.command == "race":
        run_race(options)
    else:
        import report

        report.report(options.workloads, options.results)


if __name__ == "__main__":
    main()
