# SPDX-License-Identifier: Apache-2.0
"""The fields of a config: completes, overrides (`--config.NAME=VALUE`), checks them.

Every mistake becomes a `UserError` of one sentence. What the tasks and the
optimizer accept is passed in as their keyword arguments.
"""

import dataclasses
import inspect
import operator
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from absl import flags
from ml_collections import config_dict, config_flags

from dho2_jax.app.errors import UserError, nearest

Default = TypeVar("Default")
Group = Any  # a ConfigDict, whose fields follow from the signatures of functions


def _free(default: Default) -> Default:
    """Marks a field that may change in a run: where it computes and what it keeps."""
    return dataclasses.field(default=default, metadata={"free": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Every field of a run; a config file may leave out those with a default."""

    steps: int
    batch_size: int
    base_learning_rate: float
    task: Group  # its name and the keyword arguments of that task
    optimizer: Group  # the base, and the keyword arguments of dho2
    seed: int = 0
    num_seeds: int = _free(3)  # `dho2 compare` runs seeds seed, seed + 1, ...
    curvature_batch_size: int = 0  # 0: a quarter of the batch; less with `stagger_axis`
    stagger_axis: str = ""  # of the mesh: groups along it take turns at the curvature
    curvature_devices: int = 0  # of each process: they refresh while the others train
    land_after: int = 0  # steps until its refresh is used; 0: a quarter of the period
    log_every: int = 10
    eval_every: int = 50
    checkpoint_every: int = _free(500)  # and at the end and by Ctrl-C; 0: never
    keep_checkpoints: int = _free(2)
    lost_factor: float = _free(10.0)  # over its best val_loss: back to a checkpoint
    resume: str = _free("auto")  # or "never", or the directory of a run to go on with
    train_base: bool = True
    base_schedule: str = "constant"
    workdir: str = _free("")  # empty: runs/<name of the config file>
    mesh_shape: tuple[int, ...] = _free(())  # empty: all on one axis; -1: the rest
    mesh_axes: tuple[str, ...] = _free(())  # a name for each; one axis needs none
    param_sharding: str = _free("replicated")  # "fsdp": split over the axis `fsdp`

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, the groups as dicts."""
        groups = {"task": self.task.to_dict(), "optimizer": self.optimizer.to_dict()}
        return vars(self) | groups


FIELDS = dataclasses.fields(Config)
DEFAULTS = {f.name: f.default for f in FIELDS if f.default is not dataclasses.MISSING}
REQUIRED: dict[str, Any] = {
    f.name: config_dict.ConfigDict if f.type is Group else f.type
    for f in FIELDS
    if f.name not in DEFAULTS
}


def keyword_defaults(
    function: Callable[..., Any], skip: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns the keyword arguments of `function` with their defaults.

    Args:
      function: Any function with a readable signature.
      skip: Names to leave out.

    Returns:
      Defaults by name; a default of None becomes a placeholder of the annotated type.
    """
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in skip or parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        default = parameter.default
        if default is None:
            allowed = typing.get_args(parameter.annotation)
            kind = next((one for one in (str, bool, int) if one in allowed), float)
            default = config_dict.placeholder(kind)
        found[name] = default
    return found


def complete(
    config: Group,
    tasks: Mapping[str, Callable[..., Any]],
    optimizer_defaults: Mapping[str, Any],
) -> Group:
    """Checks the names in a config and fills in what it leaves out.

    Args:
      config: As loaded from a file.
      tasks: Functions whose keyword arguments are the fields of `config.task`.
      optimizer_defaults: The fields of `config.optimizer`.

    Returns:
      A locked copy with every field that an override may set.

    Raises:
      UserError: If a field is unknown, missing or of the wrong type.
    """
    config = config.copy_and_resolve_references()
    for name, kind in REQUIRED.items():
        if name not in config:
            raise UserError(f"`config.{name}` is missing; add it to the config file.")
        number = kind is float and isinstance(config[name], int)
        if not (isinstance(config[name], kind) or number):
            raise UserError(
                f"`config.{name}` must be of type {kind.__name__}, "
                f"got {config[name]!r}."
            )
    if "name" not in config.task or config.task.name not in tasks:
        name = str(config.task.get("name", ""))
        raise UserError(
            f"`config.task.name` must name a task, got {name!r}; {nearest(name, tasks)}"
        )
    task_defaults = {"name": "", **keyword_defaults(tasks[config.task.name])}
    _fill(config, {**dict.fromkeys(REQUIRED), **DEFAULTS}, "config")
    _fill(config.task, task_defaults, "config.task")
    _fill(config.optimizer, optimizer_defaults, "config.optimizer")
    config.base_learning_rate = float(config.base_learning_rate)
    return config.lock()


def _fill(config: Group, defaults: Mapping[str, Any], where: str) -> None:
    """Adds missing fields with their types, and rejects names that are none of them."""
    for name in config.keys():
        if name not in defaults:
            raise UserError(
                f"`{where}.{name}` is not a field; "
                + nearest(f"{where}.{name}", [f"{where}.{one}" for one in defaults])
            )
    with config.unlocked():
        for name, default in defaults.items():
            given = config.get(name)
            if given is None:
                config[name] = default
            elif isinstance(default, config_dict.FieldReference):
                # A value for a field that may also be None: keep it resettable.
                config[name] = default
                config[name] = given
            elif isinstance(default, float) and type(given) is int:
                config[name] = float(given)
            elif default is not None and not isinstance(given, type(default)):
                raise UserError(
                    f"`{where}.{name}` must be of type {type(default).__name__}, "
                    f"got {given!r}."
                )


def override(
    config: Group,
    overrides: Sequence[str],
    optimizer_defaults: Mapping[str, Any],
) -> None:
    """Applies `--config.NAME=VALUE` arguments, in place.

    Args:
      config: A completed config.
      overrides: Arguments, each with its `=`.
      optimizer_defaults: As for `complete`; says which fields may be None.

    Raises:
      UserError: If a name is not a field or a value does not fit its type.
    """
    fields = dict(_leaves(config, "config."))
    for argument in overrides:
        name, _, value = argument.removeprefix("--").partition("=")
        if name not in fields:
            if any(one.startswith(name + ".") for one in fields):
                raise UserError(
                    f"`{name}` is a group of fields; set one of them, as in "
                    f"`--{next(one for one in fields if one.startswith(name + '.'))}=`."
                )
            raise UserError(f"`{name}` is not a field; {nearest(name, fields)}")
        group, _, field = name.rpartition(".")
        default = optimizer_defaults.get(field)
        optional = isinstance(default, config_dict.FieldReference)
        if value == "None" and group == "config.optimizer" and optional:
            config.optimizer[field] = None  # config_flags has no word for it
            continue
        values, argv = flags.FlagValues(), ["dho2", argument]
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=argv, lock_config=True
        )
        try:
            values(argv)
        except (flags.Error, TypeError, ValueError) as error:
            raise UserError(
                f"`{name}` must be of type {fields[name].__name__}, got {value!r}."
            ) from error


def _leaves(config: Group, prefix: str) -> Iterator[tuple[str, type]]:
    """Yields each field's full name with its type."""
    for name in config.keys():
        if isinstance(config[name], config_dict.ConfigDict):
            yield from _leaves(config[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", config.get_type(name)


def checked(found: Group) -> Config:
    """Checks the ranges of the fields that belong to a run.

    Args:
      found: A completed config with its overrides.

    Returns:
      The same values, with static types.

    Raises:
      UserError: If a value is out of its range.
    """
    values: dict[str, Any] = {field.name: found[field.name] for field in FIELDS}
    config = Config(**values)
    counts = ("steps", "batch_size", "num_seeds", "log_every", "eval_every")
    for name in (*counts, "keep_checkpoints"):
        if getattr(config, name) < 1:
            value = getattr(config, name)
            raise UserError(f"`config.{name}` must be at least 1, got {value}.")
    if (every := config.checkpoint_every) < 0:
        rule = f"must not be negative, got {every}; 0 saves no checkpoints"
        raise UserError(f"`config.checkpoint_every` {rule}.")
    if (factor := config.lost_factor) != 0 and not factor > 1:
        rule = f"must be above 1, or 0, got {factor}; 0 never goes back"
        raise UserError(f"`config.lost_factor` {rule}.")
    for name, value in config.task.items():
        if type(value) is int and value < 1:
            raise UserError(f"`config.task.{name}` must be at least 1, got {value}.")
    for name in ("seed", "base_learning_rate", "optimizer.learning_rate"):
        value = operator.attrgetter(name)(config)
        if not value >= 0:
            raise UserError(f"`config.{name}` must not be negative, got {value}.")
    for name in ("workdir", "resume"):
        if "://" in (value := getattr(config, name)):
            raise UserError(
                f"`config.{name}` must be a path of this machine, got {value!r}; "
                "mount the bucket and give the path of that."
            )
    if config.seed + config.num_seeds > 2**32:
        raise UserError(
            f"`config.seed` must be below 2**32 - num_seeds, got {config.seed}."
        )
    for name in ("momentum", "b1", "b2"):
        value = config.optimizer[name]
        if not 0 <= value < 1:
            raise UserError(
                f"`config.optimizer.{name}` must lie in [0, 1), got {value}."
            )
    if not 0 <= config.curvature_batch_size <= config.batch_size:
        raise UserError(
            "`config.curvature_batch_size` must be between 0 (a quarter of the batch) "
            f"and config.batch_size={config.batch_size}, "
            f"got {config.curvature_batch_size}."
        )
    for name, kind in (
        ("stagger_axis", "staggered"),
        ("curvature_devices", "external"),
    ):
        if getattr(config, name) and config.optimizer.refresh != kind:
            raise UserError(
                f"`config.{name}` must come with config.optimizer.refresh='{kind}', "
                f"got it with '{config.optimizer.refresh}'; change one of them."
            )
    if config.curvature_devices < 0 or config.land_after < 0:
        raise UserError(
            "`config.curvature_devices` and `config.land_after` must not be negative, "
            f"got {config.curvature_devices} and {config.land_after}; 0 is the default."
        )
    longest = config.optimizer.refresh_period
    if config.land_after >= longest and config.curvature_devices:
        raise UserError(
            "`config.land_after` must be below config.optimizer.refresh_period="
            f"{longest}, got {config.land_after}; a refresh lands before the next."
        )
    return config


def changed(
    there: Mapping[str, Any], here: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Returns the fields in which two configs differ.

    Args:
      there: A config as plain data.
      here: Another one.

    Returns:
      The values of both by name; fields that are free to change are left out.
    """
    old, new = dict(_values(there)), dict(_values(here))
    free = {field.name for field in FIELDS if field.metadata.get("free")}
    return {
        name: (old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name not in free
    }


def _values(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each field's full name with its value."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _values(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
