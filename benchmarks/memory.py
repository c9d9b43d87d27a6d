# SPDX-License-Identifier: Apache-2.0
"""Memory of the curvature per device, asked of the TPU compiler; no TPU is needed.

    python benchmarks/memory.py [--models gpt2_124m,resnet152,vit_b16] [--chips 4,16]

For each model, number of v5e chips and kind of mesh, two ratios to an even split:

    basis    D (bytes of the stored eigenvectors per device) / (k n 4)
    Lanczos  D (temp(m=24) - temp(m=8)) / (16 n 4), temporaries of a refresh

1 is what no layout can beat; what is above it is padding. Below 1 the temporaries peak
elsewhere in the refresh than in the recursion. Fails where a ratio is above its bound.
Where some of the rows fit into a chip's vector memory, which is no temporary in HBM, as
on 64 chips, the second jumps by whole sets of rows and says little.
The second takes a minute for each line (`--basis-only`: without). It is of the part of
the refresh that holds rows, on a stand-in for the product, which holds none.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
import time

from dho2_jax.app.plan import topology as topologies

ROOT = pathlib.Path(__file__).resolve().parent
GRIDS = {4: (2, 2), 16: (4, 4), 64: (8, 8), 256: (16, 16)}
NUM_LARGEST = 16
BASIS = {"gpt2_124m": 1.02, "resnet152": 1.05, "vit_b16": 1.05}
LANCZOS = 1.05


def measure(model: str, chips: int, basis_only: bool) -> None:
    """Prints one JSON line for each kind of mesh; runs in a process of its own."""
    import jax
    import numpy as np
    import optax
    from jax.sharding import AxisType, Mesh

    import dho2_jax
    from dho2_jax._refresh.at_once import compute_subspace
    from dho2_jax._vectors.slices import lay_out
    from dho2_jax.app.plan import measure as measuring
    from dho2_jax.app.run import experiment as experiments
    from dho2_jax.app.run import placement

    name = "x".join(map(str, GRIDS[chips]))
    devices = topologies.devices(topologies.parse(f"v5e:{name}"))
    file = ROOT.parent / "configs" / f"{model}.py"
    experiment = experiments.build(
        model, experiments.read_config(str(file), []), devices
    )
    shapes = jax.eval_shape(experiment.task.init, 0)
    size = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))

    def recursion(state):
        """The part of a refresh that holds rows, on a product that holds none."""
        ours = state.curvature
        layout = ours.subspace.eigenvectors.layout
        found, *_ = compute_subspace(
            ours.config,
            layout,
            lambda v: jax.tree.map(lambda x: 2.0 * x, v),
            ours.counters.refreshes,
        )
        curvature = ours._replace(subspace=found)
        return lay_out(layout, state._replace(curvature=curvature))

    for kind, grid in (("one axis", (chips,)), ("two axes", GRIDS[chips])):
        names = ("data", "model")[: len(grid)]

        mesh = Mesh(
            np.array(devices).reshape(grid), names, (AxisType.Auto,) * len(grid)
        )
        params = placement.abstract(shapes, placement.replicated(mesh))

        def state_of(num_largest, num_matvecs, m=mesh, p=params):
            tx = dho2_jax.dho2(
                optax.sgd(0.1),
                mesh=m,
                num_largest=num_largest,
                num_matvecs=num_matvecs,
                refresh="external",
            )
            return placement.abstract(
                jax.eval_shape(tx.init, p), dho2_jax.state_shardings(tx, p)
            )

        def temporaries(num_matvecs, state_of=state_of):
            # Eight pairs in both: the difference is that of the Lanczos basis.
            lowered = jax.jit(recursion).lower(state_of(8, num_matvecs))
            return lowered.compile().memory_analysis().temp_size_in_bytes

        start = time.perf_counter()
        vectors = state_of(NUM_LARGEST, NUM_LARGEST + 8).curvature.subspace.eigenvectors
        basis = chips * measuring.argument_bytes(vectors) / (NUM_LARGEST * size * 4)
        slope = None
        if not basis_only:
            slope = (temporaries(24) - temporaries(8)) * chips / (16 * size * 4)
        row = {
            "model": model,
            "chips": chips,
            "mesh": kind,
            "basis": basis,
            "lanczos": slope,
            "seconds": time.perf_counter() - start,
        }
        print(json.dumps(row), flush=True)


def table(rows: list[dict]) -> str:
    """Returns the rows as a table in Markdown."""
    lines = [
        "| model | chips | mesh | eigenbasis | Lanczos basis |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']} | {row['chips']} | {row['mesh']} "
        f"| {row['basis']:.4f} | {_ratio(row['lanczos'])} |"
        for row in rows
    ]
    return "\n".join(lines)


def _ratio(number: float | None) -> str:
    return "" if number is None else f"{number:.4f}"


def main() -> None:
    """Measures what the arguments ask for and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(BASIS))
    parser.add_argument("--chips", default=",".join(map(str, GRIDS)))
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    parser.add_argument("--basis-only", action="store_true", help="no Lanczos basis")
    options = parser.parse_args()
    rows: list[dict] = []
    for model in options.models.split(","):
        for chips in map(int, options.chips.split(",")):
            request = f"{model!r}, {chips}, {options.basis_only}"
            code = f"import memory; memory.measure({request})"
            name = "x".join(map(str, GRIDS[chips]))
            environment = topologies.environment(topologies.parse(f"v5e:{name}"))
            child = subprocess.run(
                [sys.executable, "-c", code],
                env=environment,
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            if child.returncode:
                sys.exit(f"{model} on {chips} chips: {child.stderr[-2000:]}")
            found = [
                json.loads(line) for line in child.stdout.splitlines() if line[0] == "{"
            ]
            for row in found:
                print(json.dumps(row), file=sys.stderr, flush=True)
            rows += found
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    above = [
        row
        for row in rows
        if row["basis"] > BASIS[row["model"]] or (row["lanczos"] or 0) > LANCZOS
    ]
    if above:
        sys.exit(f"above the bound: {above}")


if __name__ == "__main__":
    main()
