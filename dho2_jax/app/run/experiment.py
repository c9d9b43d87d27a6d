# SPDX-License-Identifier: Apache-2.0
"""From a config to runs on disk: what `dho2 train` and `dho2 compare` share."""

import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from dho2_jax.app import config_files, fields
from dho2_jax.app.errors import UserError
from dho2_jax.app.record import Row, Run, outcome
from dho2_jax.app.run import checkpoint, distributed, optimizers, placement, resume
from dho2_jax.app.run.programs import Programs, compile_programs
from dho2_jax.app.run.train import train
from dho2_jax.app.show import plots, writers
from dho2_jax.app.tasks.interface import Task
from dho2_jax.app.tasks.registry import TASKS


class Experiment(NamedTuple):
    """A checked config with all that follows from it."""

    name: str
    config: fields.Config
    task: Task
    dho2: optimizers.Optimizer
    base: optimizers.Optimizer
    mesh: jax.sharding.Mesh | None  # None: one device
    param_specs: Any  # of PartitionSpecs, with a mesh
    directory: pathlib.Path | None = None  # None: nothing is written by this process
    place: resume.Place | None = None  # None: without checkpoints


def prepare(
    path: str, overrides: Sequence[str], may_resume: bool = False
) -> Experiment:
    """Loads a config file and builds the experiment that it describes.

    Args:
      path: The config file, or the name of one that is shipped.
      overrides: `--config.NAME=VALUE` arguments.
      may_resume: Whether the command saves checkpoints and goes on from them.

    Returns:
      The experiment; its directory exists and holds `config.json`. It is new, unless a
      run is resumed. Among many processes only the first has one.

    Raises:
      UserError: If anything in the config is wrong.
    """
    config = read_config(path, overrides)
    if not may_resume and config.resume not in ("auto", "never"):
        raise UserError(
            "`config.resume` must be left out where no checkpoints are saved, got "
            f"{config.resume!r}; only `dho2 train` goes on with a run."
        )
    experiment = build(pathlib.Path(path).stem, config)
    names = [one.name for one in chosen(experiment)] if may_resume else []
    place = resume.choose(config, experiment.name, names)
    if place.is_resumed:
        try:
            distributed.from_first(lambda: _check_fits(experiment, place))
        except BaseException:
            resume.release(place)
            raise
    directory = place.directory if distributed.is_first() else None
    if directory is not None and place.is_resumed:
        writers.write_json(directory / resume.CONFIG, config.to_dict())
    saves = may_resume and (place.is_resumed or config.checkpoint_every > 0)
    if saves and not place.is_shared:
        if directory is not None:
            tqdm.write(
                f"Without checkpoints: not all processes see {directory}; give a "
                "directory that they share as --config.workdir.",
                file=sys.stderr,
            )
        saves = False
    return experiment._replace(directory=directory, place=place if saves else None)


def _check_fits(experiment: Experiment, place: resume.Place) -> None:
    """Checks that what was saved has the shape of what the config describes."""
    for optimizer in chosen(experiment):
        params = placement.abstract(
            jax.eval_shape(experiment.task.init, 0),
            placement.param_shardings(experiment.mesh, experiment.param_specs),
        )
        state = jax.eval_shape(optimizer.transform.init, params)
        resume.check_fits(place, optimizer.name, experiment.config, params, state)


def chosen(experiment: Experiment) -> list[optimizers.Optimizer]:
    """Returns the optimizers that `dho2 train` runs, in order."""
    return [experiment.dho2] + [experiment.base] * experiment.config.train_base


def read_config(path: str, overrides: Sequence[str]) -> fields.Config:
    """Loads, completes and checks a config.

    Args:
      path: The config file, or the name of one that is shipped.
      overrides: `--config.NAME=VALUE` arguments.

    Returns:
      A config with every field.

    Raises:
      UserError: If anything in it is wrong that does not depend on the devices.
    """
    defaults = optimizers.optimizer_defaults()
    found = fields.complete(config_files.load(path), TASKS, defaults)
    fields.override(found, overrides, defaults)
    # Again, since an override may have named another task.
    return fields.checked(fields.complete(found, TASKS, defaults))


def build(
    name: str, config: fields.Config, devices: Sequence[Any] | None = None
) -> Experiment:
    """Builds what a config describes; nothing is computed and nothing written.

    Args:
      name: Of the experiment.
      config: A completed config.
      devices: Those to use, also of another machine; default: all that there are.

    Returns:
      The experiment, without a directory.

    Raises:
      UserError: If the task, an optimizer or the devices reject a value.
    """
    arguments = dict(config.task.items())
    task = TASKS[arguments.pop("name")](config.batch_size, **arguments)
    devices, curvature_mesh = placement.set_aside(config, devices)
    mesh = placement.make_mesh(config, devices)
    specs = placement.param_specs(
        jax.eval_shape(task.init, 0), mesh, config.param_sharding
    )
    if mesh is None and (config.stagger_axis or config.curvature_devices):
        raise UserError(
            "`config.mesh_shape` must be of at least two devices, those set apart not "
            f"counted, with config.stagger_axis={config.stagger_axis!r} or "
            f"config.curvature_devices={config.curvature_devices}, got one; use more "
            "devices."
        )
    dho2 = optimizers.build_dho2(config, mesh, specs, curvature_mesh)
    base = optimizers.build_base(config)
    return Experiment(name, config, task, dho2, base, mesh, specs)


def compile_for(experiment: Experiment, optimizer: optimizers.Optimizer) -> Programs:
    """Compiles the programs of one of the experiment's optimizers.

    Args:
      experiment: The experiment.
      optimizer: Its `dho2` or its `base`.

    Returns:
      Programs that serve every seed.

    Raises:
      UserError: If the optimizer rejects the parameters or the loss.
    """
    size = placement.curvature_batch_size(experiment.config, experiment.mesh)
    if distributed.is_first():
        devices = experiment.mesh.size if experiment.mesh else 1
        where = f" for {devices} devices" if devices > 1 else ""
        tqdm.write(f"Compiling {optimizer.label}{where} ...", file=sys.stderr)
    try:
        return compile_programs(
            experiment.task, optimizer, size, experiment.mesh, experiment.param_specs
        )
    except ValueError as error:
        # What dho2 can check only when it sees the parameters.
        raise UserError(f"config.optimizer: {error}") from error


def run_one(
    experiment: Experiment,
    optimizer: optimizers.Optimizer,
    programs: Programs,
    *,
    seed: int,
    directory: pathlib.Path | None,
    should_stop: Callable[[], bool],
) -> Run:
    """Trains once and logs into `directory`.

    Args:
      experiment: The experiment.
      optimizer: Its `dho2` or its `base`.
      programs: Compiled for it.
      seed: Of the parameters and the batches.
      directory: Where metrics and events go; None writes nothing.
      should_stop: Asked before every update.

    Returns:
      The run.
    """
    config, place = experiment.config, experiment.place
    saved = place and place.directory / optimizer.name / resume.CHECKPOINTS
    steps = place.steps[optimizer.name] if place else []
    with checkpoint.open_manager(saved, config.keep_checkpoints) as manager:
        resumed, rows = None, []
        if steps:
            params, state = programs.start(np.uint32(seed))
            resumed = checkpoint.restore(manager, steps[-1], params, state)
            rows = _rows(directory)[: resumed[2].rows]
            if distributed.is_first():
                tqdm.write(
                    f"Going on with {optimizer.label} from step {steps[-1]}, as saved "
                    f"in {saved}.",
                    file=sys.stderr,
                )

        def last():
            return checkpoint.restore_last(manager, *programs.start(np.uint32(seed)))

        save = go_back = None
        if manager is not None and config.checkpoint_every:
            save, go_back = functools.partial(checkpoint.save, manager), last
        with writers.open_log(directory, rows) as write:
            return train(
                experiment.task,
                optimizer,
                programs,
                seed=seed,
                steps=config.steps,
                log_every=config.log_every,
                eval_every=config.eval_every,
                write=write,
                should_stop=should_stop,
                resumed=resumed,
                rows=rows,
                save=save,
                save_every=config.checkpoint_every,
                go_back=go_back,
                lost_factor=config.lost_factor,
            )


def _rows(directory: pathlib.Path | None) -> list[Row]:
    """Returns the rows that an earlier call wrote, in the process that writes."""
    return [] if directory is None else writers.read_rows(directory / writers.METRICS)


def below(experiment: Experiment, name: str) -> pathlib.Path | None:
    """Returns the path of a run's directory, or None if nothing is written."""
    return None if experiment.directory is None else experiment.directory / name


def draw(experiment: Experiment, runs: Sequence[Run]) -> pathlib.Path | None:
    """Draws the runs that there are.

    Args:
      experiment: The experiment.
      runs: At least one run.

    Returns:
      The path of the picture; None without a directory.
    """
    if experiment.directory is None:
        return None
    path = experiment.directory / "plot.png"
    plots.plot_runs(
        path,
        runs,
        title=f"{experiment.name}: {max(run.rows[-1]['step'] for run in runs)} steps",
        loss_label=experiment.task.loss_label,
    )
    return path


def train_both(experiment: Experiment, should_stop: Callable[[], bool]) -> list[Run]:
    """Runs DHO² and, if the config says so, its base; writes `summary.json`.

    Args:
      experiment: The experiment.
      should_stop: Asked before every update.

    Returns:
      The runs, DHO² first; the last may have been interrupted.
    """
    try:
        return _train_all(experiment, should_stop)
    finally:
        resume.release(experiment.place)


def _train_all(experiment: Experiment, should_stop: Callable[[], bool]) -> list[Run]:
    place, seed, runs = experiment.place, experiment.config.seed, []
    for optimizer in chosen(experiment):
        where = below(experiment, optimizer.name)
        if place is not None and optimizer.name in place.finished:
            seconds = place.finished[optimizer.name]["compile_seconds"]
            runs.append(Run(optimizer, seed, seconds, _rows(where)))
            continue
        programs = compile_for(experiment, optimizer)
        if should_stop() and runs:
            break
        run = run_one(
            experiment,
            optimizer,
            programs,
            seed=seed,
            directory=where,
            should_stop=should_stop,
        )
        runs.append(run)
        if experiment.directory is not None:
            resume.note(experiment.directory, optimizer.name, outcome(run))
        if run.interrupted:
            break
    return runs
