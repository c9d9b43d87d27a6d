# SPDX-License-Identifier: Apache-2.0
"""What the programs of a training run need of each device, asked of their compiler.

Compiles what `dho2 train` would run, for devices that need not be there, and reads
bytes, collectives and FLOPs. As a program, which `plan` starts in a process of its own:
a request as JSON on standard input, answers as lines of JSON on standard output.
"""

import json
import math
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

import dho2_jax
from dho2_jax.app.errors import UserError
from dho2_jax.app.plan import collectives, topology
from dho2_jax.app.run import experiment, placement
from dho2_jax.app.run.experiment import Experiment
from dho2_jax.app.run.programs import Blueprint, build_programs

TILE_ROWS = 8  # a TPU pads the rows of the basis to multiples of this


def measure(
    experiment: Experiment,
    devices: Sequence[Any],
    report: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Compiles an experiment's step, refresh and product, and reads what they need.

    Args:
      experiment: Built for these devices.
      devices: Of any machine.
      report: Called with the name of each program before it is compiled.

    Returns:
      Plain data, all of it for one device: `groups` has the bytes of the step's
      arguments by what they are, `step` and `refresh` what each program needs (only
      `too_large`, a sentence, where the compiler refuses it for its size), `product`
      what one Lanczos product does (None where that is not known), `padding` the
      bytes of the eigenbasis over the ideal ones, by the number of pairs.

    Raises:
      UserError: If the optimizer rejects the parameters or the loss.
    """
    task, mesh = experiment.task, experiment.mesh
    size = placement.curvature_batch_size(experiment.config, mesh)
    try:
        programs = build_programs(
            task, experiment.dho2, size, mesh, experiment.param_specs
        )
        step = _on_devices(programs.step, mesh, devices)
        params, state, batch, *_ = step.arguments
        report("training step")
        measured, text = _measure_program(step)
        refreshed = None
        if programs.refresh is not None:
            report("refresh")
            refresh = _on_devices(programs.refresh, mesh, devices)
            refreshed, text = _measure_program(refresh)
        report("product")
        product, _ = _measure_program(_product(experiment, size, params, batch))
    except ValueError as error:
        # What dho2 can check only when it sees the parameters.
        raise UserError(f"config.optimizer: {error}") from error

    report("parts of the state")
    vectors = state.curvature.subspace.eigenvectors
    groups = {
        "parameters": params,
        "base_state": state.base_state,
        "eigenbasis": vectors,
        "curvature": _without(state.curvature, vectors),
        "batch": batch,
    }
    num_params = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    config = state.curvature.config
    count = mesh.size if mesh else 1

    def padding(rows: int) -> float:
        ideal = rows * num_params * 4
        return count * argument_bytes(_with_rows(vectors, rows)) / ideal

    return {
        "chips": len(devices),
        "devices": count,
        "mesh": dict(mesh.shape) if mesh else {},
        "num_parameters": num_params,
        "num_pairs": config.size,
        "num_matvecs": config.num_matvecs,
        "batch_size": experiment.config.batch_size,
        "curvature_batch_size": size,
        "groups": {name: argument_bytes(tree) for name, tree in groups.items()},
        "step": measured,
        "refresh": refreshed,
        "product": {
            "flops": product.get("flops"),
            "collectives": _of_one_product(text, min(config.num_matvecs, num_params)),
        },
        "padding": {str(rows): padding(rows) for rows in _nearby(config.size)},
    }


def argument_bytes(tree: Any) -> int:
    """Returns the bytes that a pytree takes on each device, padding of tiles included.

    Args:
      tree: `ShapeDtypeStruct`s with shardings.
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return 0
    takes_all = jax.jit(lambda *leaves: None, keep_unused=True)
    try:
        memory: Any = takes_all.lower(*leaves).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if len(leaves) == 1:  # larger than a chip: no use in asking how much padding
            (leaf,) = leaves
            return (
                math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            )
        return sum(map(argument_bytes, leaves))
    return memory.argument_size_in_bytes


def _on_devices(program: Blueprint, mesh: Any, devices: Sequence[Any]) -> Blueprint:
    """Puts a program without a mesh onto the first of the devices."""
    if mesh is not None:
        return program
    where = SingleDeviceSharding(devices[0])
    return program._replace(arguments=placement.abstract(program.arguments, where))


def _measure_program(program: Blueprint) -> tuple[dict[str, Any], str]:
    """Compiles a program and reads what it needs; returns its text as well."""
    lowered = program.function.lower(*program.arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        found = re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", text)
        reason = text.splitlines()[0]
        if found:
            reason = f"needs {found[1]} GiB for temporaries, {found[2]} GiB are there"
        return {"too_large": reason}, ""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    costs = compiled.cost_analysis() or {}
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        # What is donated is written over and takes no new memory.
        "new_results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    found = collectives.read(text)
    return {
        **sizes,
        "total": sum(sizes.values()),
        "flops": costs.get("flops"),
        "collectives": _sums(one for one in found if not one.in_conditional),
        "in_branches": _sums(one for one in found if one.in_conditional),
    }, text


def _product(experiment: Experiment, size: int, params: Any, batch: Any) -> Blueprint:
    """Returns the curvature product alone, with a vector that lies as parameters do."""
    task, curvature = experiment.task, experiment.config.optimizer.curvature

    def product(params, part, vector):
        loss = task.value_fn(part, gauss_newton=experiment.dho2.gauss_newton)
        return dho2_jax.curvature_matvec(curvature, loss, params)(vector)

    where = placement.batch_sharding(experiment.mesh, but=experiment.dho2.stagger_axis)
    part = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (size, *x.shape[1:]), x.dtype, sharding=where or x.sharding
        ),
        batch,
    )
    shardings = jax.tree.map(lambda x: x.sharding, params)
    return Blueprint(jax.jit(product, out_shardings=shardings), (params, part, params))


def _of_one_product(text: str, num_matvecs: int) -> dict[str, Any] | None:
    """Returns what one turn of the Lanczos loop executes; None where there is none."""
    if not text:
        return None
    found = collectives.read(text)
    # One more product than there are steps of Lanczos makes the first row.
    inside = collectives.within_loop(found, num_matvecs + 1)
    return _sums(inside) if inside or not found else None


def _sums(found: Any) -> dict[str, dict[str, int]]:
    """Adds collectives up by kind, as plain data."""
    return {kind: one._asdict() for kind, one in collectives.summary(found).items()}


def _without(curvature: Any, vectors: Any) -> list[Any]:
    """Returns the leaves of the curvature state but for the eigenvectors."""
    left_out = {id(x) for x in jax.tree.leaves(vectors)}
    return [x for x in jax.tree.leaves(curvature) if id(x) not in left_out]


def _with_rows(vectors: Any, rows: int) -> list[jax.ShapeDtypeStruct]:
    """Returns an eigenbasis of another number of pairs, laid out as this one."""
    return [
        jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=x.sharding)
        for x in jax.tree.leaves(vectors)
    ]


def _nearby(rows: int) -> list[int]:
    """Returns a number of pairs between the multiples of 8 next to it."""
    below = (rows - 1) // TILE_ROWS * TILE_ROWS
    above = (rows // TILE_ROWS + 1) * TILE_ROWS
    return [one for one in (below, rows, above) if one]


def _first_line(error: Exception) -> str:
    """Returns the kind of an exception, and what it says first."""
    said = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *said[:1]])


def main() -> None:
    """Answers the request on standard input."""
    request = json.load(sys.stdin)

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), flush=True)

    try:
        config = experiment.read_config(request["config"], request["overrides"])
        target = topology.parse(request["topology"])
        devices = topology.devices(target)
        name = pathlib.Path(request["config"]).stem
        built = experiment.build(name, config, devices)
        result = measure(built, devices, lambda what: answer(compiling=what))
    except UserError as error:
        answer(error=str(error))
    except Exception as error:  # said here: what JAX prints ends with another notice
        answer(crash=_first_line(error))
        raise
    else:
        answer(result=result)


if __name__ == "__main__":
    main()
