# SPDX-License-Identifier: Apache-2.0
"""Two meshes for one state: what its vectors and the caller's arrays are on another."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dho2_jax._types import Array, PyTree
from dho2_jax._vectors import layouts, sharding, slices
from dho2_jax._vectors.layouts import Layout


def abstract(tree: PyTree, layout: Layout) -> PyTree:
    """Returns shapes with shardings: slices of vectors, all else replicated."""
    place = layout.placement
    assert place is not None and place.mesh is not None
    mesh = place.mesh

    def shape(x: Array, spec: P) -> jax.ShapeDtypeStruct:
        where = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(shape, tree, slices.specs_of(tree))


def laid_out(tree: PyTree, mesh: Mesh, specs: Any, name: str) -> PyTree:
    """Returns the shapes of a tree, with the shardings that `specs` gives them."""

    def shape(x: Any, spec: P) -> jax.ShapeDtypeStruct:
        where = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=where)

    shapes = jax.tree.map(lambda x: shape(x, P()), tree)
    found = sharding.read_specs(shapes, mesh, sharding.frozen_specs(specs), name)
    leaves = map(shape, jax.tree.leaves(tree), found)
    return jax.tree.unflatten(jax.tree.structure(tree), list(leaves))


def layout_on(mesh: Mesh, layout: Layout, params: PyTree) -> Layout:
    """Returns the layout on another mesh, where the parameters lie as they say."""
    leaves, _ = layouts.match(params, layout)
    return layouts.on_mesh(layout, mesh, [x.sharding.spec for x in leaves])
