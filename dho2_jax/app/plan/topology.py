# SPDX-License-Identifier: Apache-2.0
"""Names of machines that need not be there: `v5e:16x16`, `v4:2x2x4`, `cpu:8`.

A TPU is known to its compiler, libtpu, which comes from the package registry and needs
no TPU. Its devices are made in a process of their own (`environment`): libtpu may be
loaded once on a machine, and the number of CPU devices is fixed when JAX starts.
"""

import importlib.util
import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from dho2_jax.app.errors import UserError, nearest

MAX_CHIPS = 2**14  # a compilation for more would not end


class Topology(NamedTuple):
    """Chips of one generation, wired as a grid."""

    name: str
    generation: str  # a key of GENERATIONS
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.shape)


class Generation(NamedTuple):
    """What is the same for all machines of one kind."""

    dimensions: int
    memory: int | None  # bytes a chip; None: nothing to compare with
    usable: int | None  # what the compiler lets a program have of it
    example: str


_GIB = 2**30
# Sizes as https://cloud.google.com/tpu/docs states them. The usable part is what libtpu
# 0.0.52 names when it refuses a program that is too large (for v5p, 95.73 GiB).
GENERATIONS = {
    "v4": Generation(3, 32 * _GIB, int(30.75 * _GIB), "v4:2x2x4"),
    "v5e": Generation(2, 16 * _GIB, int(15.75 * _GIB), "v5e:16x16"),
    "v5p": Generation(3, 95 * _GIB, 95 * _GIB, "v5p:2x2x4"),
    "v6e": Generation(2, 32 * _GIB, int(31.24 * _GIB), "v6e:16x16"),
    "cpu": Generation(1, None, None, "cpu:8"),
}


def parse(name: str) -> Topology:
    """Reads the name of a topology.

    Args:
      name: Such as "v5e:16x16", "v4:2x2x4" or "cpu:8".

    Returns:
      The topology; whether its compiler accepts it shows only when it is used.

    Raises:
      UserError: If there is no such generation, or the shape is none of its shapes.
    """
    generation, _, text = name.partition(":")
    if generation not in GENERATIONS:
        raise UserError(
            "`--topology` must begin with a generation of chips, got "
            f"{name!r}; {nearest(generation, GENERATIONS)}"
        )
    dimensions, *_, example = GENERATIONS[generation]
    sizes = text.split("x")
    if len(sizes) != dimensions or not all(
        re.fullmatch(r"[1-9]\d{0,5}", one) for one in sizes
    ):
        what = "one size" if dimensions == 1 else f"{dimensions} sizes joined by `x`"
        raise UserError(
            f"`--topology` must give {what} after `{generation}:`, got {name!r}; for "
            f"example {example}."
        )
    found = Topology(name, generation, tuple(map(int, sizes)))
    if found.chips > MAX_CHIPS:
        raise UserError(
            f"`--topology` must have at most {MAX_CHIPS} chips, got {found.chips} in "
            f"{name!r}; choose a smaller one."
        )
    return found


def _named(generation: str, shape: tuple[int, ...]) -> Topology:
    return Topology(f"{generation}:{'x'.join(map(str, shape))}", generation, shape)


def half(topology: Topology) -> Topology | None:
    """Returns one with half the chips: its longest side halved; None where it is odd.

    Args:
      topology: Any.
    """
    longest = max(topology.shape)
    if longest % 2:
        return None
    side = topology.shape.index(longest)
    return _named(topology.generation, _scaled(topology.shape, side, longest // 2))


def double(topology: Topology) -> Topology | None:
    """Returns one with twice the chips: its shortest side doubled; None if too many.

    Args:
      topology: Any.
    """
    if 2 * topology.chips > MAX_CHIPS:
        return None
    shortest = min(topology.shape)
    side = max(i for i, size in enumerate(topology.shape) if size == shortest)
    return _named(topology.generation, _scaled(topology.shape, side, 2 * shortest))


def _scaled(shape: tuple[int, ...], side: int, size: int) -> tuple[int, ...]:
    return (*shape[:side], size, *shape[side + 1 :])


def check_compiler(topology: Topology) -> None:
    """Checks that there is a compiler for a topology.

    Args:
      topology: Any.

    Raises:
      UserError: If libtpu is needed and not installed.
    """
    if topology.generation == "cpu" or "TPU_LIBRARY_PATH" in os.environ:
        return
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"`--topology={topology.name}` needs libtpu, the compiler of TPUs, which "
            "is not installed; run: pip install libtpu (no TPU is needed)."
        )


def environment(
    topology: Topology, inherited: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Returns the environment of a process that may call `devices`.

    Args:
      topology: The topology.
      inherited: Variables to start from.

    Returns:
      All of its variables.
    """
    changed = {"JAX_PLATFORMS": "cpu"}
    if topology.generation == "cpu":
        changed["JAX_NUM_CPU_DEVICES"] = str(topology.chips)
        # The older way to say so, which JAX does not accept beside the newer.
        kept = [
            flag
            for flag in inherited.get("XLA_FLAGS", "").split()
            if not flag.startswith("--xla_force_host_platform_device_count")
        ]
        changed["XLA_FLAGS"] = " ".join(kept)
    else:
        # A second process with libtpu aborts, and one outside Google's cloud waits for
        # an answer about its TPU, unless told otherwise.
        changed |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    return dict(inherited) | changed


def devices(topology: Topology) -> list[Any]:
    """Makes devices to compile for; only in a process started with `environment`.

    Args:
      topology: The topology.

    Returns:
      One device a chip.

    Raises:
      UserError: If libtpu refuses the shape.
    """
    import jax
    from jax.experimental import topologies

    if topology.generation == "cpu":
        return jax.devices()
    # Without this word a v4 chip is two devices; the others are one by themselves.
    options = {"chip_config_name": "megacore"} if topology.generation == "v4" else {}
    try:
        found = topologies.get_topology_desc(topology.name, "tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].partition(": ")[2]
        near = _named(
            topology.generation,
            tuple(max(2, 2 ** round(math.log2(size))) for size in topology.shape),
        )
        remedy = near.name
        if near == topology:
            remedy = GENERATIONS[topology.generation].example
        raise UserError(
            f"libtpu does not know the topology `{topology.name}` ({reason}); the "
            f"nearest that it may know is {remedy}."
        ) from error
    return list(found.devices)
