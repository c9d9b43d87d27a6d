# SPDX-License-Identifier: Apache-2.0
"""How vectors lie in the state: leaves in flattened order, with the way back.

A stored vector is matched with gradients by its leaves and never by its tree
structure, since wrappers change that between `init` and `update` (Flax NNX boxes
parameters in one and not in the other).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dho2_jax._types import PyTree


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layout:
    """The static facts about the parameters: their tree and their shapes."""

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """n, the number of parameters."""
        return sum(map(math.prod, self.shapes))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A vector, or rows of vectors, as a tuple of leaves with its layout."""

    leaves: tuple[jax.Array, ...]
    layout: Layout = dataclasses.field(metadata={"static": True})


def layout_of(params: PyTree) -> Layout:
    """Returns the layout of a pytree of arrays or `ShapeDtypeStruct`s."""
    leaves, treedef = jax.tree.flatten(params)
    return Layout(treedef, tuple(tuple(jnp.shape(x)) for x in leaves))


def zeros(layout: Layout, rows: tuple[int, ...] = ()) -> Packed:
    """Returns a vector of zeros, or `(rows,)` of them, float32."""
    return Packed(
        tuple(jnp.zeros((*rows, *shape), jnp.float32) for shape in layout.shapes),
        layout,
    )


def unpack(packed: Packed) -> PyTree:
    """Returns the stored leaves under the tree that the parameters had at `init`."""
    return jax.tree.unflatten(packed.layout.treedef, packed.leaves)


def check_shapes(leaves: list, layout: Layout, name: str) -> None:
    """Raises unless the leaves are as many, and of the shapes, that `init` saw."""
    shapes = tuple(tuple(jnp.shape(x)) for x in leaves)
    if shapes == layout.shapes:
        return
    if len(shapes) != len(layout.shapes):
        raise ValueError(
            f"{name} must have the {len(layout.shapes)} arrays that init saw, got "
            f"{len(shapes)}; pass the same pytree everywhere."
        )
    i = next(
        i for i, (a, b) in enumerate(zip(shapes, layout.shapes, strict=True)) if a != b
    )
    raise ValueError(
        f"{name} must have the shapes that init saw, got {shapes[i]} for "
        f"{layout.shapes[i]} at leaf {i}; pass the same pytree everywhere."
    )


def has_holes(tree: PyTree) -> bool:
    """Returns whether `optax.masked` has left something out of `tree`."""
    return any(map(_is_hole, jax.tree.leaves(tree, is_leaf=_is_hole)))


def restrict(params: PyTree, layout: Layout, name: str = "`params`"):
    """Finds the leaves of `layout` in `params`, which may hold others besides.

    Inside `optax.masked` and `optax.partition` the state is made from a tree in which
    `MaskedNode` stands for what is left out; `refresh` gets the whole tree.

    Returns:
      `(part, merge)`: the list of leaves that belong to the state, and a function from
      such a list to a pytree like `params`.
    """
    leaves, treedef = jax.tree.flatten(params)
    template = jax.tree.unflatten(layout.treedef, range(len(layout.shapes)))
    if not has_holes(template) or len(leaves) == len(layout.shapes):
        check_shapes(leaves, layout, name)
        return leaves, lambda part: jax.tree.unflatten(treedef, part)

    slots, prefix = jax.tree.flatten(template, is_leaf=_is_hole)
    try:
        subtrees = prefix.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(
            f"{name} must have the structure that init saw, apart from what a mask "
            f"leaves out, got {treedef}; pass the whole parameter tree."
        ) from error
    part = [s for slot, s in zip(slots, subtrees, strict=True) if not _is_hole(slot)]
    check_shapes(part, layout, name)

    def merge(new):
        new = iter(new)
        filled = [
            s if _is_hole(slot) else next(new)
            for slot, s in zip(slots, subtrees, strict=True)
        ]
        return jax.tree.unflatten(prefix, filled)

    return part, merge


def _is_hole(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
