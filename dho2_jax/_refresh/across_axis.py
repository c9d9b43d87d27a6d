# SPDX-License-Identifier: Apache-2.0
"""Staggered across a mesh axis: one group makes the product, the others the gradient.

The devices along one axis of the mesh form groups. In a step that needs a curvature
product the group whose turn it is makes that, on its own devices and at the same time
as the other groups differentiate the loss; the turn moves on with every step, so that
no group falls behind.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dho2_jax._checks import check_choice
from dho2_jax._numerics import losses, operators
from dho2_jax._refresh import staggered
from dho2_jax._state.states import CurvatureState, find, layout_of_state
from dho2_jax._types import Array, Params, PyTree
from dho2_jax._vectors import device_groups, layouts, slices


def staggered_value_and_grad(
    loss_fn: Any,
    *,
    mesh: Mesh,
    stagger_axis: str,
    batch_spec: PyTree = None,
    has_aux: bool = False,
    curvature: str = "hessian",
) -> Callable[..., tuple[Any, Params, staggered.CurvatureProduct]]:
    """Returns the loss, its gradient and a curvature product, made side by side.

    In each step that a staggered refresh needs a product for, one of the R groups of
    devices along `stagger_axis` makes it while the R - 1 others differentiate the loss;
    in all other steps all R do. The part of the batch that lies on the group whose turn
    it is goes unused in that step: value, auxiliary outputs and gradient are means over
    the rest. For

        svag = staggered_value_and_grad(loss_fn, mesh=mesh, stagger_axis="data")
        value, grads, product = svag(params, batch, curvature_batch, state, *args)
        updates, state = tx.update(grads, state, params, product=product)

    within one `jax.jit`, with `tx = dho2(..., refresh="staggered", mesh=mesh)`. No step
    is longer if the product takes as long as a gradient on a group's part of the batch.
    A product takes 2 to 2.5 gradients on the same examples, so give `curvature_batch`
    1/2 to 2/5 of the examples of a group. It must stay the same for a whole sweep (see
    `sweep_index`).

    Args:
      loss_fn: `(params, batch, *args) -> value`, the mean over the batch it gets, or
        `(value, aux)`; with curvature="ggn" the pair `(outputs_fn, output_loss)` of
        `(params, batch, *args) -> outputs` and `(outputs, batch, *args) -> value`, or
        `(value, aux)`. Each group calls it on its part of the batch; axes of the mesh
        other than `stagger_axis` are left to the compiler, as in a plain `jit`. It has
        no collective or sharding along `stagger_axis` itself: other groups do something
        else meanwhile. `args` are traced; close over Python values.
      mesh: That of dho2. Static.
      stagger_axis: The axis of the mesh, of size R >= 2, that divides the batch.
        Static.
      batch_spec: `PartitionSpec`s of the batch, a tree or a prefix of one, of which the
        places of `stagger_axis` count. None: it divides every first dimension.
      has_aux: Whether the loss is a pair. Static.
      curvature: As for `dho2`, whose own is not used. Static.

    Returns:
      `svag(params, batch, curvature_batch, state, *args) -> (value, grads, product)`,
      or `((value, aux), grads, product)`. `state` is any nest of Optax states that
      holds one DHO² state; it is only read. `aux` may hold numbers of any type, of
      which means over the groups are taken. Random keys among `args` (typed ones, or
      `(2,)` uint32) serve for the gradient as they are, the same in each group; in the
      product others take their place, fixed for a sweep, since all its products must be
      of one function.
      `product` is opaque: `update` takes it for the step it was made in, and ignores
      it in any other.

    Raises:
      ValueError: In one sentence, for an argument out of its range (here), or a state
        of another mesh or another kind of refresh (in `svag`).

    Deviates from the paper, where a device computes either for good: the turn rotates,
    and products are data-parallel within a group.
    """
    if curvature == "ggn":
        loss_fn = losses.as_loss(loss_fn)
    _check(loss_fn, mesh, stagger_axis, curvature)
    loss, halves = _two_forms(loss_fn, has_aux)
    number = mesh.shape[stagger_axis]

    def svag(
        params: Params, batch: PyTree, curvature_batch: PyTree, state: PyTree, *args
    ):
        ours = find(state)
        _check_state(ours, mesh)
        layout = layout_of_state(ours)
        leaves, _ = layouts.match(params, layout)
        leaves = [jnp.asarray(x) for x in leaves]
        kind = staggered.turn(ours)
        busy = kind != staggered.NOTHING
        whose = jnp.where(busy, ours.count % number, -1)
        keys = _fixed_keys(args, ours)

        def ask(ours: CurvatureState) -> tuple[list[Array], list[Array]]:
            point, vector = staggered.question(ours, leaves, kind)
            dtypes = [leaves[i].dtype for i in layout.inside]
            return point, slices.gather(vector, dtypes)

        nothing = [jnp.zeros_like(x) for x in leaves]
        along = [nothing[i] for i in layout.inside]
        point, vector = _if_busy(busy, ask, (nothing, along), ours)

        def local(whose, params, batch, curvature_batch, point, vector, args, keys):
            def gradient():
                found, grads = jax.value_and_grad(loss, has_aux=True)(
                    params, batch, *args
                )
                return found, grads, [jnp.zeros_like(x, jnp.float32) for x in vector]

            def product():
                _, rebuild = layouts.match(params, layout)
                part, merge = layouts.restrict(rebuild(point), layout)
                of_part = halves(merge, curvature_batch, keys)
                matvec = operators.curvature_matvec(curvature, of_part, tuple(part))
                shapes = jax.eval_shape(lambda: gradient()[0])
                found = jax.tree.map(_zeros, shapes)
                grads = jax.tree.map(jnp.zeros_like, params)
                return found, grads, list(matvec(tuple(vector)))

            mine = lax.axis_index(stagger_axis) == whose
            found, grads, hv = lax.cond(mine, product, gradient)
            counted = number - (whose >= 0)

            def mean(x: Array) -> Array:
                if not jnp.issubdtype(x.dtype, jnp.inexact):
                    x = x.astype(jnp.float32)
                return lax.psum(x, stagger_axis) / counted.astype(x.dtype)

            found, grads = jax.tree.map(mean, (found, grads))
            return found, grads, [x[None] for x in hv]

        own = device_groups.parts_of(batch, batch_spec, stagger_axis)
        parts = device_groups.split_along(batch, own, mesh)
        everywhere = (params, curvature_batch, point, vector, args, keys)
        params_, curvature_batch_, *rest = jax.tree.map(
            lambda x: device_groups.whole_along(x, mesh, stagger_axis), everywhere
        )
        found, grads, hv = jax.shard_map(
            local,
            mesh=mesh,
            axis_names={stagger_axis},
            in_specs=(P(), P(), own, *(P(),) * 5),
            out_specs=(P(), P(), P(stagger_axis)),
            # Derivatives are of each group's own loss: a checked one would be summed
            # over the groups, by a collective within the branch.
            check_vma=False,
        )(whose, params_, parts, curvature_batch_, *rest)
        vector = _if_busy(
            busy,
            lambda hv: device_groups.sum_in_slices(layout, hv, stagger_axis),
            slices.new_zeros(layout),
            hv,
        )
        value = found if has_aux else found[0]
        return value, grads, staggered.CurvatureProduct(vector, ours.count)

    return svag


def _two_forms(loss_fn: Any, has_aux: bool) -> tuple[Any, Any]:
    """Returns the loss with auxiliary outputs, and a maker of what products are of."""

    def loss(params, batch, *args):
        found = loss_fn(params, batch, *args)
        return found if has_aux else (found, ())

    def halves(merge, batch, args):
        found = losses.on_batch(losses.of_part(loss_fn, merge), batch, *args)
        return losses.without_aux(found) if has_aux else found

    return loss, halves


def _if_busy(busy: Array, make: Callable[..., Any], otherwise: Any, *args: Any) -> Any:
    """Returns `make(*args)`, or `otherwise` in a step without a product.

    A loop of one turn or none: an idle step then moves nothing. A conditional would do
    the same, but here conditionals are what groups decide differently, and no
    collective may be in one.
    """

    def once(turn: Array, _: Any) -> Any:
        # What does not depend on the turn the compiler would take out of the loop.
        return make(*lax.optimization_barrier((turn, args))[1])

    return lax.fori_loop(0, busy.astype(jnp.int32), once, otherwise)


def _fixed_keys(args: Any, ours: CurvatureState) -> Any:
    """Returns `args` with random keys replaced by ones that are fixed for a sweep."""
    assert ours.sweep is not None
    number = ours.sweep.start.count

    def fix(x: Any) -> Any:
        dtype = jnp.result_type(x)
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            key = jax.random.key(0, impl=jax.random.key_impl(x))
            return jax.random.split(jax.random.fold_in(key, number), x.shape)
        if dtype == jnp.uint32 and jnp.shape(x) == (2,):
            return jnp.stack([jnp.zeros((), jnp.uint32), number.astype(jnp.uint32)])
        return x

    return jax.tree.map(fix, args)


def _zeros(shape: jax.ShapeDtypeStruct) -> Array:
    explicit = shape.sharding is not None
    return jnp.zeros(
        shape.shape, shape.dtype, out_sharding=shape.sharding if explicit else None
    )


def _check(loss_fn: Any, mesh: Any, stagger_axis: Any, curvature: Any) -> None:
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"`mesh` must be a jax.sharding.Mesh, got {type(mesh).__name__}; pass that "
            "of dho2."
        )
    if stagger_axis not in mesh.axis_names or mesh.shape[stagger_axis] < 2:
        raise ValueError(
            "`stagger_axis` must be an axis of `mesh` with at least 2 groups of "
            f"devices, got {stagger_axis!r} on {dict(mesh.shape)}; one of them makes "
            "the product while the others go on."
        )
    check_choice("curvature", curvature, tuple(operators.OPERATORS))
    is_split = isinstance(loss_fn, losses.SplitLoss)
    if (curvature == "ggn") != is_split or not callable(loss_fn):
        raise ValueError(
            "`loss_fn` must be a function of (params, batch, *args), or with "
            "curvature='ggn' the pair (outputs_fn, output_loss), got "
            f"{type(loss_fn).__name__} with curvature='{curvature}'; split the loss at "
            "the network's outputs."
        )


def _check_state(ours: CurvatureState, mesh: Mesh) -> None:
    if ours.sweep is None or ours.config.mesh != mesh:
        raise ValueError(
            "`state` must come from dho2(refresh='staggered', mesh=mesh) with the mesh "
            f"of staggered_value_and_grad, got refresh='{ours.config.refresh}' and "
            f"mesh={ours.config.mesh}; make both with the same mesh."
        )
