# SPDX-License-Identifier: Apache-2.0
"""The command `dho2`: reads arguments, prints results, says mistakes in one sentence.

The heavy imports happen inside the commands, so that `dho2 --help` is quick and a
missing extra can be explained.
"""

import argparse
import contextlib
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from dho2_jax.app import record
from dho2_jax.app.errors import UserError, nearest
from dho2_jax.app.run import distributed

EXTRA = (
    *"PIL absl filelock flax grain matplotlib ml_collections orbax sklearn".split(),
    *("tensorboardX", "tqdm"),
)
INTERRUPTED, TERMINATED = 130, 143  # what a shell expects after SIGINT and SIGTERM

COMMANDS = ("train", "compare", "plan", "spectrum")
OPTIONS = ("--help", "--topology", "--json", "--picture", *distributed.OPTIONS)

CONFIG = "a config file, or the name of one in configs/, such as digits_mlp"
DESCRIPTION = """\
Train with DHO²: a Newton step in the sharpest directions of the loss, any Optax
optimizer in all others.
"""
EPILOG = """\
example:
  dho2 train patch_autoencoder --config.optimizer.num_largest=20
  dho2 compare digits_mlp --config.num_seeds=3
  dho2 spectrum runs/patch_autoencoder
  dho2 plan gpt2_124m --topology v5e:16x16

Every field of a config file can be set by --config.NAME=VALUE.
"""
TRAIN = """\
Trains with DHO², then with its base optimizer alone on the same budget, and writes
metrics.jsonl, TensorBoard events, checkpoints, config.json, summary.json and plot.png
into config.workdir (default: runs/<name of the config>).

Stopped by Ctrl-C or killed, the same command goes on from the last checkpoint, also on
other devices (--config.mesh_shape); so does a run whose loss has left its best. Nothing
finished, or of another config, is written over. --config.resume=never begins anew,
--config.resume=DIRECTORY goes on with other values, such as more steps (without a
refresh that was under way on other devices). --config.checkpoint_every=0 saves none.
"""
COMPARE = """\
Trains the base optimizer alone and DHO² on the same budget with several seeds
(--config.num_seeds=3), prints a table and writes it to compare.json, with plot.png.
"""
PLAN = """\
Says what a training run will need, before there is a machine for it: compiles the very
programs that `dho2 train` runs for the chips named by --topology, and prints memory,
collectives and FLOPs for each chip, also for half and for double as many. No TPU is
needed, but its compiler, libtpu, is (pip install libtpu). A compilation for 256 chips
takes a minute or more; its results are remembered.
"""
SPECTRUM = """\
Prints the curvature that a checkpoint holds (eigenvalues with bounds on their errors,
refreshes, age and more) and draws it. CHECKPOINT is the directory of a run, of one of
its checkpoints, or any other in which Orbax saved a DHO² state, in any nest.
"""


class _Parser(argparse.ArgumentParser):
    """Says mistakes as `UserError` instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` shows what there is.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dho2",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text, brief in (
        ("train", TRAIN, "train with DHO² and its base, and draw the picture"),
        ("compare", COMPARE, "base against DHO² over several seeds, as a table"),
    ):
        command = _add(
            commands,
            name,
            help=brief,
            description=text,
            epilog="Fields of the config are set by --config.NAME=VALUE, for instance\n"
            "--config.steps=300 or --config.optimizer.base=muon.\n\n"
            + distributed.HELP,
            usage=f"dho2 {name} [-h] CONFIG [--config.NAME=VALUE ...] [options]",
        )
        command.add_argument("config", metavar="CONFIG", help=CONFIG)
        distributed.add_options(command)
    _add_plan(commands)
    _add_spectrum(commands)
    return parser


def _add(
    commands: "argparse._SubParsersAction[_Parser]", name: str, **texts: Any
) -> _Parser:
    """Adds a command whose texts are printed as they are."""
    return commands.add_parser(
        name,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **texts,
    )


def _add_plan(commands: "argparse._SubParsersAction[_Parser]") -> None:
    """Adds the command that trains nothing."""
    command = _add(
        commands,
        "plan",
        help="what a run will need of each chip of a TPU pod, without the pod",
        description=PLAN,
        usage="dho2 plan [-h] CONFIG --topology NAME [--json FILE] "
        "[--config.NAME=VALUE ...]",
    )
    command.add_argument("config", metavar="CONFIG", help=CONFIG)
    command.add_argument(
        "--topology",
        metavar="NAME",
        required=True,
        help="such as v5e:16x16, v6e:8x8, v4:2x2x4, v5p:4x4x4 or cpu:8",
    )
    command.add_argument(
        "--json", metavar="FILE", help="write what was measured there as well"
    )


def _add_spectrum(commands: "argparse._SubParsersAction[_Parser]") -> None:
    """Adds the command that reads what others saved."""
    command = _add(
        commands,
        "spectrum",
        help="the curvature that a checkpoint holds, as a table and a picture",
        description=SPECTRUM,
        usage="dho2 spectrum [-h] CHECKPOINT [--picture FILE]",
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a directory")
    command.add_argument(
        "--picture",
        metavar="FILE",
        default="spectrum.png",
        help="where to draw it, default spectrum.png",
    )


def _split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates `--config.NAME=VALUE` and `--config.NAME VALUE` from all else."""
    overrides, others = [], []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if not argument.startswith("--config."):
            others.append(argument)
        elif "=" in argument:
            overrides.append(argument)
        elif queue and not queue[0].startswith("--"):
            overrides.append(f"{argument}={queue.pop(0)}")
        else:
            raise UserError(f"`{argument}` needs a value: {argument}=VALUE.")
    return overrides, others


def _run(arguments: Sequence[str]) -> int:
    """Does what the arguments ask for and returns the exit status."""
    overrides, others = _split_overrides(arguments)
    parser = _parser()
    if others and not others[0].startswith("-") and others[0] not in COMMANDS:
        raise UserError(
            f"there is no command `{others[0]}`; {nearest(others[0], COMMANDS)}"
        )
    for argument in others:
        if argument.startswith("--") and argument.partition("=")[0] not in OPTIONS:
            raise UserError(
                f"`{argument}` is not an option; a field of the config is set by "
                "--config.NAME=VALUE."
            )
    options = parser.parse_args(others)
    if options.command is None:
        parser.print_help()
        return 0
    if options.command == "plan":
        return _plan(options, overrides)
    if options.command == "spectrum":
        return _spectrum(options, overrides)
    distributed.join(
        distributed.members(vars(options), os.environ), options.heartbeat_seconds
    )
    import jax

    from dho2_jax.app.run import compare, experiment, train
    from dho2_jax.app.show import saved

    saved.quieten_orbax()
    with train.interruptible() as should_stop:
        training = options.command == "train"
        prepared = experiment.prepare(options.config, overrides, may_resume=training)
        if training:
            runs = experiment.train_both(prepared, should_stop)
        else:
            runs = compare.compare(prepared, should_stop)
        picture = experiment.draw(prepared, runs)
    has_joined = jax.distributed.is_initialized()  # see `train.interruptible`
    how, status = ("SIGTERM", TERMINATED) if has_joined else ("Ctrl-C", INTERRUPTED)
    is_stopped = should_stop()
    if prepared.directory is None:  # the first of many processes writes and prints
        return status if is_stopped else 0
    if training:
        for run in runs:
            print(_sentence(record.outcome(run)))
    else:
        summary = compare.summarise(runs)
        compare.write_summary(prepared, summary)
        print(compare.report(summary, prepared.task.loss_label))
    if is_stopped:
        print(
            f"Stopped by {how} at step {runs[-1].rows[-1]['step']} of "
            f"{runs[-1].optimizer.label}; what was written is kept in "
            f"{prepared.directory}, with the picture {picture}."
            + " The same command goes on from there."
            * (prepared.place is not None)
        )
        return status
    print(f"Wrote {picture} and, beside it, metrics as JSONL and TensorBoard events.")
    return 0


def _plan(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Prints what a run will need."""
    file = None if options.json is None else pathlib.Path(options.json)
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise UserError(
            f"`--json` must name a file in a directory that exists, got `{file}`."
        )
    from dho2_jax.app.plan import figures, forecast
    from dho2_jax.app.show import writers

    measured = forecast.plan(options.config, overrides, options.topology)
    print(figures.report(measured, options.topology))
    if file is not None:
        file.write_text(writers.to_json(measured), encoding="utf-8")  # may be a pipe
    return 0


def _spectrum(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Prints and draws the curvature in a checkpoint."""
    if overrides:
        raise UserError(
            f"`dho2 spectrum` takes no fields of a config, got `{overrides[0]}`; give "
            "it a directory alone."
        )
    picture = pathlib.Path(options.picture)
    if picture.is_dir() or not picture.parent.is_dir():
        raise UserError(
            f"`--picture` must name a file in a directory that exists, got `{picture}`."
        )
    from dho2_jax.app.show import plots, saved, spectrum

    saved.quieten_orbax()
    found, rows = spectrum.load(options.checkpoint)
    print(spectrum.report(found))
    plots.plot_spectrum(
        picture, found, rows, title=f"DHO² curvature in {options.checkpoint}"
    )
    print(f"\nDrew {picture}.")
    return 0


def _sentence(outcome: dict) -> str:
    """Says in one line what a run came to."""
    back = f" It went back {outcome['returns']} times." if outcome["returns"] else ""
    return (
        f"{outcome['label']}: validation loss {outcome['final_val_loss']:.4g} after "
        f"{outcome['steps']} steps in {outcome['seconds']:.1f} s "
        f"(compilation {outcome['compile_seconds']:.1f} s apart).{back}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits.

    Args:
      arguments: Without the program's name; default: those of the process.
    """
    with contextlib.suppress(AttributeError, ValueError):
        # A terminal without UTF-8 shows "DHO?" rather than an encoding error.
        sys.stdout.reconfigure(errors="replace")  # pyright: ignore
    try:
        status = _run(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"dho2: error: {error}", file=sys.stderr)
        status = 2
    except OSError as error:
        print(
            f"dho2: error: cannot use `{error.filename}`: {error.strerror}.",
            file=sys.stderr,
        )
        distributed.leave(2)
        status = 2
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in EXTRA:
            raise
        print(
            f"dho2: error: `{missing}` is not installed, and training needs it; "
            "run: pip install 'dho2-jax[train]'",
            file=sys.stderr,
        )
        status = 2
    except KeyboardInterrupt:
        print("dho2: stopped by Ctrl-C; what was written is kept.", file=sys.stderr)
        distributed.leave(INTERRUPTED)
        status = INTERRUPTED
    except Exception as error:
        distributed.fail(error)
        raise
    sys.exit(status)


if __name__ == "__main__":
    main()
