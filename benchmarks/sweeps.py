# SPDX-License-Identifier: Apache-2.0
"""What is measured in steps: tuning, random starts, larger batches.

    python benchmarks/sweeps.py tune    [--workloads a,b] [--contenders "A;B"]
    python benchmarks/sweeps.py starts  [...]
    python benchmarks/sweeps.py batches [...]
    python benchmarks/sweeps.py report

Each writes one JSON for a contender on a workload into `benchmarks/results/sweeps/`,
and passes over those that are there. All runs of one are one program (`fleet.py`), so
that an accelerator does them in seconds, and a CPU in a night; what they say is the
same on both, to rounding.

`tune`: five rates, each constant and with a cosine, on two seeds that no table reports;
on one of them where networks are large.
`starts`: a hundred and two runs of 300 steps, untuned, from seeds, batch sizes and
initial rates over four decades, all drawn at random.
`batches`: `tune` on one seed at 4 and 16 times the batch, of "gpt2" at a quarter of it.
`report`: the tables of those that were made.
"""

import argparse
import json
import time

import fleet
import jax
import numpy as np
import sweep_records
import sweep_report
import workloads
from contenders import BASES, Contender, chosen, names

TUNING_SEEDS = (100, 101)


def tune(options: argparse.Namespace) -> None:
    """Sweeps every contender's settings."""
    for name in options.workloads:
        workload = workloads.build(name)
        seeds = TUNING_SEEDS if workload.small else TUNING_SEEDS[:1]
        for one in _chosen(workload, options):
            _sail("tune", workload, one, fleet.grid(one, seeds))


def batches(options: argparse.Namespace) -> None:
    """Sweeps the settings of the bases and of DHO² on them at larger batches."""
    for name in options.workloads:
        for factor in sweep_records.FACTORS[name]:
            workload = workloads.build(name, factor)
            for one in _chosen(workload, options):
                _sail("batches", workload, one, fleet.grid(one, TUNING_SEEDS[:1]))


def starts(options: argparse.Namespace) -> None:
    """Runs DHO² untuned from anywhere."""
    for name in options.workloads:
        for factor in (0.25, 1, 4):
            workload = workloads.build(name, factor, steps=300)
            random = np.random.default_rng([int(4 * factor), len(name)])
            for one in _chosen(workload, options):
                if one.default is None:
                    continue
                decades = random.uniform(-2, 2, 34)
                settings = [
                    fleet.Setting(1000 + i, float(one.default * 10**decade))
                    for i, decade in enumerate(decades)
                ]
                _sail("starts", workload, one, settings)


def _chosen(workload: workloads.Workload, options: argparse.Namespace):
    """Yields the contenders that were asked for and have something to tune."""
    for one in chosen(workload, options.contenders).values():
        if one.rates:
            yield one


def _sail(
    kind: str,
    workload: workloads.Workload,
    contender: Contender,
    settings: list[fleet.Setting],
) -> None:
    path = sweep_records.path_of(kind, workload.name, contender.name)
    if path.exists():
        return
    began = time.perf_counter()
    # Large networks one at a time, for their memory, and in the race's own precision.
    with jax.default_matmul_precision("highest" if workload.small else "default"):
        at_once = None if workload.small else 1
        found = fleet.sail(workload, contender, settings, at_once)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                "workload": workload.name,
                "contender": contender.name,
                "device": jax.devices()[0].device_kind,
                "settings": [one._asdict() for one in settings],
                "steps": found.steps.tolist(),
                "losses": [[_short(x) for x in run] for run in found.losses],
                "cuts": found.cuts.tolist(),
            }
        )
    )
    print(
        f"{kind}: {workload.name}, {contender.name}: {len(settings)} runs in "
        f"{time.perf_counter() - began:.0f} s, best "
        f"{np.nanmin(found.losses[:, -1]):.4g}",
        flush=True,
    )


def _short(x: float) -> float | None:
    return float(f"{x:.5g}") if np.isfinite(x) else None


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("tune", "starts", "batches", "report"))
    parser.add_argument("--workloads", default=",".join(workloads.SMALL))
    parser.add_argument("--contenders", default="", type=names)
    options = parser.parse_args()
    options.workloads = options.workloads.split(",")
    if options.kind == "report":
        return sweep_report.report(options.workloads)
    if options.kind == "batches" and not options.contenders:
        options.contenders = [
            one for base in BASES for one in (base, f"DHO² on {base}")
        ]
    {"tune": tune, "starts": starts, "batches": batches}[options.kind](options)


if __name__ == "__main__":
    main()
