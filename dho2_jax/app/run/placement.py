# SPDX-License-Identifier: Apache-2.0
"""Which devices a run uses, and where parameters and batches lie on them.

Everything is global-view: arrays span the whole mesh, whichever process holds which
part. Without a mesh (one device) nothing here does anything.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import dho2_jax
from dho2_jax.app.data.share import check_processes
from dho2_jax.app.errors import UserError, nearest
from dho2_jax.app.fields import Config

PARAM_SHARDINGS = ("replicated", "fsdp")
FSDP = "fsdp"  # the axis over which `param_sharding="fsdp"` splits parameters


PRODUCT = 2.5  # gradients that a product takes on the same examples, measured


def set_aside(
    config: Config, devices: Sequence[Any] | None = None
) -> tuple[Sequence[Any], Mesh | None]:
    """Divides the devices into those that train and those that refresh.

    Args:
      config: A completed config; `curvature_devices` is the number in each process.
      devices: Those to use, of any topology; default: all that JAX sees.

    Returns:
      The devices that train, and a mesh of the last ones of each process, or None.

    Raises:
      UserError: If there would be none left to train.
    """
    devices = jax.devices() if devices is None else devices
    count = config.curvature_devices
    if not count:
        return devices, None
    of_process: dict[int, list[Any]] = {}
    for device in devices:
        of_process.setdefault(device.process_index, []).append(device)
    least = min(map(len, of_process.values()))
    if count >= least:
        raise UserError(
            "`config.curvature_devices` must be below the number of devices of each "
            f"process, {least}, got {count}; the others train."
        )
    training = [one for group in of_process.values() for one in group[:-count]]
    apart = [group[-count:] for group in of_process.values()]
    kinds = (jax.sharding.AxisType.Auto,) * 2
    return training, Mesh(np.array(apart), ("process", "curvature"), axis_types=kinds)


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh | None:
    """Builds the mesh that the config asks for.

    An empty `config.mesh_shape` means all devices on one axis, and -1 in it what the
    other axes leave. A single axis need not be named.

    Args:
      config: A completed config.
      devices: Those to use, of any topology; default: all that JAX sees, in all
        processes.

    Returns:
      A mesh with Auto axes, or None for a single device: then there is nothing to
      split.

    Raises:
      UserError: If the mesh does not fit the devices, or the batch the mesh.
    """
    if config.param_sharding not in PARAM_SHARDINGS:
        raise UserError(
            "`config.param_sharding` must say where parameters lie, got "
            f"{config.param_sharding!r}; "
            + nearest(config.param_sharding, PARAM_SHARDINGS)
        )
    devices = jax.devices() if devices is None else devices
    shape = _shape(tuple(config.mesh_shape) or (-1,), len(devices))
    axes = _axes(config, len(shape))
    size = math.prod(shape)
    if config.stagger_axis and config.stagger_axis not in axes:
        raise UserError(
            f"`config.stagger_axis` must be an axis of the mesh, {axes}, got "
            f"{config.stagger_axis!r}; " + nearest(config.stagger_axis, axes)
        )
    if size < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"`config.mesh_shape` must use all {len(devices)} devices of the "
            f"{jax.process_count()} processes, got {shape}; put -1 for one of them."
        )
    if size == 1:
        return None
    if jax.process_count() > 1:
        check_processes(devices)
    mesh = jax.make_mesh(
        shape,
        axes,
        axis_types=(jax.sharding.AxisType.Auto,) * len(shape),
        devices=tuple(devices)[:size],
    )
    _check_batch(config, mesh)
    return mesh


def _shape(wanted: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Checks a mesh shape and puts a number for -1."""
    if not all(type(one) is int and (one >= 1 or one == -1) for one in wanted):
        raise UserError(
            "`config.mesh_shape` must hold positive integers and at most one -1, such "
            f"as (4, 2), got {wanted}."
        )
    if wanted.count(-1) > 1:
        raise UserError(
            f"`config.mesh_shape` must hold at most one -1, got {wanted}; say how many "
            "devices the other axes have."
        )
    given = math.prod(one for one in wanted if one != -1)
    if given > count or (-1 in wanted and count % given):
        raise UserError(
            f"`config.mesh_shape` must fit the devices, of which there are {count}, "
            f"got {wanted}; choose sizes whose product divides {count}."
        )
    return tuple(count // given if one == -1 else one for one in wanted)


def _axes(config: Config, number: int) -> tuple[str, ...]:
    """Checks the axes' names; a single axis has a default."""
    fsdp = config.param_sharding == "fsdp"
    # On the command line ("data,fsdp") arrives as one string.
    axes = tuple(
        name.strip() for one in config.mesh_axes for name in str(one).split(",")
    )
    if not axes and number == 1:
        axes = (FSDP if fsdp else "data",)
    if len(axes) != number or len(set(axes)) != number or "" in axes:
        raise UserError(
            f"`config.mesh_axes` must name the {number} axes of `config.mesh_shape`, "
            "each differently, such as ('data', 'fsdp'), "
            f"got {axes}."
        )
    if fsdp and FSDP not in axes:
        raise UserError(
            "`config.mesh_axes` must have an axis `fsdp` with "
            f"config.param_sharding='fsdp', got {axes}; rename one."
        )
    return axes


def curvature_batch_size(config: Config, mesh: Mesh | None) -> int:
    """Returns the number of examples that measure curvature.

    By default a quarter of the batch; with a stagger axis as many as make the product
    take as long as a gradient on one group's part of the batch.

    Args:
      config: A completed config.
      mesh: The mesh, or None.

    Returns:
      At least one.
    """
    if config.curvature_batch_size:
        return config.curvature_batch_size
    batch = config.batch_size
    if mesh is None or not config.stagger_axis:
        return max(1, batch // 4)
    groups = mesh.shape[config.stagger_axis]
    within = mesh.size // groups
    fitting = [one for one in range(within, batch + 1, within) if batch % one == 0]
    wanted = batch / groups / PRODUCT
    return max((one for one in fitting if one <= wanted), default=within)


def _check_batch(config: Config, mesh: Mesh) -> None:
    """Checks that each device gets as many examples as any other."""
    batch, part, size = config.batch_size, curvature_batch_size(config, mesh), mesh.size
    within = size // mesh.shape[config.stagger_axis] if config.stagger_axis else size
    if batch % size:
        raise UserError(
            f"`config.batch_size` must be a multiple of the {size} devices of the "
            f"mesh, got {batch}; change it or `config.mesh_shape`."
        )
    if part % within or batch % part:
        fitting = [one for one in range(within, batch + 1, within) if batch % one == 0]
        choice = ", ".join(map(str, fitting[-5:]))
        raise UserError(
            f"`config.curvature_batch_size` must divide config.batch_size={batch} and "
            f"be a multiple of the {within} devices that measure curvature together, "
            f"got {part}; choose one of {choice}."
        )


def param_specs(params: Any, mesh: Mesh | None, param_sharding: str) -> Any:
    """Says how parameters are split.

    Args:
      params: A pytree of arrays or `ShapeDtypeStruct`s.
      mesh: The mesh, or None.
      param_sharding: "replicated": whole on every device. "fsdp": the largest dimension
        that the axis `fsdp` divides is split over it, if there is one.

    Returns:
      A pytree of `PartitionSpec`, or None without a mesh.
    """
    if mesh is None:
        return None
    if param_sharding == "replicated":
        return jax.tree.map(lambda x: PartitionSpec(), params)
    parts = mesh.shape[FSDP]

    def spec(x: Any) -> PartitionSpec:
        fitting = [i for i, length in enumerate(x.shape) if length % parts == 0]
        if not fitting or parts == 1:
            return PartitionSpec()
        split = max(fitting, key=lambda i: x.shape[i])
        return PartitionSpec(*[None] * split, FSDP)

    return jax.tree.map(spec, params)


def param_shardings(mesh: Mesh | None, specs: Any) -> Any:
    """Returns the shardings that the specs mean, or None without a mesh."""
    if mesh is None:
        return None
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def state_shardings(
    transform: Any, params: Any, mesh: Mesh | None, *, hybrid: bool
) -> Any:
    """Says how an optimizer's state lies on the mesh.

    Args:
      transform: The optimizer.
      params: `ShapeDtypeStruct`s with their shardings.
      mesh: The mesh, or None.
      hybrid: Whether it is DHO², which knows; of any other, what has the shape of a
        parameter lies as that parameter, and all else is whole.

    Returns:
      A pytree with the structure of `transform.init(params)`, or None without a mesh.
    """
    if mesh is None:
        return None
    if hybrid:
        return dho2_jax.state_shardings(transform, params, mesh)
    whole = replicated(mesh)
    by_shape = {x.shape: x.sharding for x in jax.tree.leaves(params)}
    state = jax.eval_shape(transform.init, params)
    return jax.tree.map(lambda x: by_shape.get(x.shape, whole), state)


def batch_sharding(mesh: Mesh | None, but: str = "") -> NamedSharding | None:
    """Returns how a batch lies: examples over all axes but one; None without a mesh."""
    if mesh is None:
        return None
    axes = tuple(name for name in mesh.axis_names if name != but)
    return NamedSharding(mesh, PartitionSpec(axes) if axes else PartitionSpec())


def replicated(mesh: Mesh | None) -> NamedSharding | None:
    """Returns the sharding of what every device has whole; None without a mesh."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def abstract(tree: Any, shardings: Any) -> Any:
    """Attaches shardings to a pytree of arrays or `ShapeDtypeStruct`s.

    Args:
      tree: Anything with shapes and dtypes.
      shardings: A pytree of the same structure, one sharding for all, or None.

    Returns:
      `ShapeDtypeStruct`s, with which a program can be lowered.
    """
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda x: _struct(x, shardings), tree)
    return jax.tree.map(_struct, tree, shardings)


def _struct(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    weak = getattr(x, "weak_type", False)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=weak)


def put(batch: Any, mesh: Mesh | None) -> Any:
    """Puts a batch that every process knows onto the mesh.

    Each process transfers to its own devices the examples that belong there, and
    nothing else. A validation batch that the devices do not divide lies whole on each.

    Args:
      batch: A pytree of NumPy arrays that share their leading dimension.
      mesh: The mesh, or None.

    Returns:
      The batch as global arrays; without a mesh, unchanged.
    """
    if mesh is None:
        return batch
    split = all(len(x) % mesh.size == 0 for x in jax.tree.leaves(batch))
    spec = PartitionSpec(mesh.axis_names) if split else PartitionSpec()
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(
            np.shape(x), sharding, lambda index: x[index]
        ),
        batch,
    )


def spread(batch: Any, count: int, sharding: NamedSharding | None) -> Any:
    """Takes examples from all over a batch, inside a program.

    On a mesh each device takes its share of its own part of the batch, and nothing
    moves. (The head of the batch would lie on a few of the devices.) Which examples
    these are does not depend on the mesh.

    Args:
      batch: A pytree of arrays that share their leading dimension.
      count: How many; on a mesh a divisor of the batch and a multiple of the devices.
      sharding: Of the result, from `batch_sharding`: where an axis is left out, the
        examples are gathered along it.

    Returns:
      The same pytree with fewer examples.
    """

    def take(x: jax.Array) -> jax.Array:
        stride = len(x) // count
        x = x[: stride * count : stride]
        if sharding is None:
            return x
        return jax.lax.with_sharding_constraint(x, sharding)

    return jax.tree.map(take, batch)
