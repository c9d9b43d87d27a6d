# SPDX-License-Identifier: Apache-2.0
"""Says before a restore why a saved state does not fit: the shapes alone tell."""

from collections.abc import Iterator, Mapping
from typing import Any

from dho2_jax._state.states import CurvatureState, find
from dho2_jax._types import PyTree
from dho2_jax._vectors.layouts import Packed

_MARKS = {"subspace", "counters", "anchor", "momentum"}
_REMEDY = "build dho2 with what it was saved with, or begin with a new state"


def check_restorable(saved: Any, state: PyTree) -> None:
    """Checks that a saved DHO² state has the shapes of the one to restore it into.

    The configuration is not saved: it comes with the state that is restored into. Where
    that differs in `num_largest`, say, checkpoint libraries stop at some array of the
    wrong shape, or pad it if they are told to. Call this first; it reads no array:

        manager = ocp.CheckpointManager(
            path, item_handlers={"state": ocp.StandardCheckpointHandler()}
        )
        dho2_jax.check_restorable(manager.item_metadata(step)["state"], target)

    Args:
      saved: What a checkpoint holds, or says that it holds: any nest of dicts and
        sequences with the fields of a DHO² state by name, and leaves with shapes.
        Orbax's metadata are such a nest, and so is what it restores without a target.
      state: Any nest of Optax states that holds one DHO² state, of arrays or
        `ShapeDtypeStruct`s.

    Raises:
      ValueError: In one sentence, if another `num_largest` + `num_smallest`,
        `base_rate`, `refresh`, `num_matvecs`, or other parameters were saved; or if
        `saved` holds no DHO² state, or several. (Whether pairs were the largest or the
        smallest, shapes do not tell.)
    """
    target = find(state)
    found = list(_search(saved))
    if len(found) != 1:
        raise ValueError(
            f"`saved` must hold exactly one DHO² state, got {len(found)}; pass the "
            "checkpoint's tree, or the part of it that has the optimizer's state."
        )
    there, here = _facts(found[0]), _facts(_named(target))
    for name, before in there.items():
        now = here[name]
        if before != now:
            raise ValueError(
                f"the saved state does not fit: {name} was {before}, and is {now} in "
                f"`state`; {_REMEDY}."
            )


def _search(node: Any) -> Iterator[Mapping[str, Any]]:
    """Yields whatever has the fields of a `CurvatureState`."""
    node = _plain(node)
    if isinstance(node, Mapping):
        if set(node) >= _MARKS:
            yield node
            return
        node = list(node.values())
    if isinstance(node, list | tuple):
        for one in node:
            yield from _search(one)


def _plain(node: Any) -> Any:
    """Returns named fields as a dict, and what metadata wrap."""
    if isinstance(node, Packed):
        return {"leaves": list(node.leaves)}
    if hasattr(node, "_asdict"):
        return node._asdict()
    if not isinstance(node, Mapping) and hasattr(node, "tree"):
        return node.tree
    return node


def _named(state: CurvatureState) -> dict[str, Any]:
    """Returns a state with names for the places of its arrays, as it is saved."""

    def visit(node: Any) -> Any:
        node = _plain(node)
        if isinstance(node, Mapping):
            return {name: visit(one) for name, one in node.items()}
        return node

    return visit(state)


def _facts(node: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the shapes in a saved state say of its configuration."""
    space, sweep = _plain(node["subspace"]), _plain(node.get("sweep"))
    (size,) = _shape(space["eigenvalues"])
    run = _plain(_plain(sweep).get("lanczos")) if sweep else None
    rows = [_shape(x) for x in _in_order(_plain(space["eigenvectors"])["leaves"])]
    return {
        "`num_largest` + `num_smallest`": size,
        "`base_rate`": "'curvature'" if node.get("rate") else "'fixed'",
        "`refresh`": "'staggered'" if sweep else "'periodic' or 'external'",
        "`num_matvecs`": _shape(run["betas"])[0] if run else "any",
        "the number of arrays that hold an eigenvector": len(rows),
        **{f"the shape of array {i} of them": s[1:] for i, s in enumerate(rows)},
    }


def _in_order(leaves: Any) -> list[Any]:
    """Returns the items of a tuple, which is saved as a dict of numbers in places."""
    if isinstance(leaves, Mapping):
        return [leaves[name] for name in sorted(leaves, key=int)]
    return list(leaves)


def _shape(leaf: Any) -> tuple[int, ...]:
    """Returns the shape of a leaf, boxed (as by Flax NNX) or not."""
    if isinstance(leaf, Mapping):
        (leaf,) = leaf.values()
    return tuple(leaf.shape)
