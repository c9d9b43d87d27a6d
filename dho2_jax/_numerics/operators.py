# SPDX-License-Identifier: Apache-2.0
"""Curvature products: `(value_fn, params) -> matvec`, one function an operator.

All take the product with the tangent in each parameter's own dtype and return it in
float32, so that bfloat16 parameters work.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from dho2_jax._numerics import linalg
from dho2_jax._types import Array, MatVec, Params, PyTree, ValueFn

_TWICE = (
    "`value_fn` cannot be differentiated in forward mode, which curvature='{mode}' "
    "needs (it holds a custom_vjp rule); use curvature='reverse_over_reverse', or "
    "'central_difference' when the rule's backward pass has no derivative either."
)
_NO_DERIVATIVE = (
    "the gradient of `value_fn` cannot be differentiated again, which "
    "curvature='{mode}' needs; use curvature='central_difference'."
)
_DIFFERENTIATION_ERRORS = (TypeError, ValueError, NotImplementedError)


def hvp(value_fn: ValueFn, params: Params, *, linearize: bool = True) -> MatVec:
    r"""Returns the Hessian-vector product of a loss, forward over reverse.

    $v \mapsto \nabla^2 f(x) v$ as the derivative of the gradient along v. `v` may have
    any real dtype; the result is float32.

    Args:
      value_fn: `params -> ()`, the loss.
      params: Where; a pytree of real floating-point arrays.
      linearize: Keep the gradient's intermediate values for all products (5 to 20 %
        less time on a CPU), or recompute them in each (less memory). Static.

    Returns:
      `matvec`, a pytree like `params` to a float32 pytree like `params`.

    Raises:
      ValueError: If the loss is not a real scalar, `params` is empty, or the loss
        cannot be differentiated in forward mode; the sentence names what to use.
    """
    check_value_fn(value_fn, params)
    gradient, custom = jax.grad(value_fn), _has_custom_vjp(value_fn, params)
    with _explained("hessian"):
        if linearize:
            product = jax.linearize(gradient, params)[1]
        else:

            def product(v):
                return jax.jvp(gradient, (params,), (v,))[1]

        return _product(product, params, "hessian", custom)


def hvp_reverse_over_reverse(value_fn: ValueFn, params: Params) -> MatVec:
    r"""Returns the Hessian-vector product by differentiating $\nabla f(x) \cdot v$.

    For losses whose `custom_vjp` rules block forward mode. Arguments, result and errors
    as for `hvp`.
    """
    check_value_fn(value_fn, params)

    def product(v):
        return jax.grad(lambda x: linalg.vdot(jax.grad(value_fn)(x), v))(params)

    return _product(product, params, "reverse_over_reverse")


def hvp_central_difference(
    value_fn: ValueFn, params: Params, *, relative_step: float | None = None
) -> MatVec:
    r"""Returns the product from two gradients, $(\nabla f(x+hv) - \nabla f(x-hv))/2h$.

    For losses that cannot be differentiated twice at all. With rounding $\epsilon$ the
    error is least near $h |v| = \epsilon^{1/3} (1 + |x|)$: four digits in float32.

    Args:
      value_fn: `params -> ()`, the loss.
      params: Where; float32 is strongly advised.
      relative_step: h |v| / (1 + |x|); None: the cube root of the coarsest parameter
        dtype's rounding.

    Returns:
      `matvec`, as for `hvp`.
    """
    check_value_fn(value_fn, params)
    eps = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(params))
    relative = eps ** (1 / 3) if relative_step is None else relative_step

    def product(v):
        length = linalg.norm(v)
        h = relative * (1 + linalg.norm(params)) / jnp.where(length > 0, length, 1.0)
        ahead = linalg.cast_like(linalg.add_scaled(params, h, v), params)
        behind = linalg.cast_like(linalg.add_scaled(params, -h, v), params)
        rise = linalg.add_scaled(
            jax.grad(value_fn)(ahead), -1.0, jax.grad(value_fn)(behind)
        )
        return jax.tree.map(lambda x: x / (2 * h), rise)

    return _product(product, params, "central_difference")


def ggn_vp(
    outputs_fn: Callable[[Params], PyTree],
    loss_fn: Callable[[PyTree], Array],
    params: Params,
    *,
    linearize: bool = True,
) -> MatVec:
    r"""Returns the generalised Gauss-Newton product $J^\top (\nabla^2 \ell) J v$.

    J is the Jacobian of the network's outputs and $\ell$ the loss of the outputs; the
    product is positive semi-definite when $\ell$ is convex.

    Args:
      outputs_fn: `params -> outputs`, the network on its batch, any pytree.
      loss_fn: `outputs -> ()`, the loss of the outputs.
      params: Where; a pytree of real floating-point arrays.
      linearize: As for `hvp`. Static.

    Returns:
      `matvec`, as for `hvp`.

    Raises:
      ValueError: As for `hvp`.
    """

    def value_fn(x):
        return loss_fn(outputs_fn(x))

    check_value_fn(value_fn, params)
    with _explained("ggn"):
        if linearize:
            outputs, forward = jax.linearize(outputs_fn, params)
            transpose = jax.linear_transpose(forward, params)
        else:
            outputs = outputs_fn(params)
            _, transpose = jax.vjp(outputs_fn, params)

            def forward(v):
                return jax.jvp(outputs_fn, (params,), (v,))[1]

        def product(v):
            tangent = forward(v)
            bent = jax.jvp(jax.grad(loss_fn), (outputs,), (tangent,))[1]
            return transpose(bent)[0]

        return _product(product, params, "ggn", _has_custom_vjp(value_fn, params))


def build_matvec(curvature: str, value_fn, params: Params) -> MatVec:
    """Returns the product for a name of `OPERATORS`.

    Args:
      curvature: One of `OPERATORS`.
      value_fn: The loss of the parameters; for "ggn" the pair `(outputs_fn, loss_fn)`.
      params: Where.
    """
    if curvature == "ggn":
        return ggn_vp(*_ggn_pair(value_fn), params)
    return OPERATORS[curvature](value_fn, params)


def curvature_matvec(curvature: str, value_fn: Any, params: Params) -> MatVec:
    """Returns the curvature product that `dho2(curvature=...)` measures with.

    Args:
      curvature: "hessian", "ggn", "reverse_over_reverse" or "central_difference".
      value_fn: `params -> ()`, the loss; for "ggn" the pair `(outputs_fn, loss_fn)`.
      params: Where; a pytree of real floating-point arrays.

    Returns:
      `matvec`, as for `hvp`.

    Raises:
      ValueError: If there is no such operator, or as for `hvp`.
    """
    if curvature not in OPERATORS:
        known = ", ".join(map(repr, OPERATORS))
        raise ValueError(f"`curvature` must be one of {known}, got {curvature!r}.")
    return build_matvec(curvature, value_fn, params)


def directional_curvature(
    curvature: str, value_fn, params: Params, direction: PyTree
) -> Array:
    """Returns d . H d, `()` float32, at about the cost of two gradients.

    Where forward mode serves, the second derivative of the loss along the line is taken
    without any reverse pass; elsewhere from one product. Of a network's matrix products
    that takes five for each, against three in a gradient, if XLA sees that two tangents
    are equal: through a softmax it does not (7.1 in a transformer; a product 8.2).
    """
    along = linalg.cast_like(direction, params)

    def line(fn, at, tangent):
        def slope(x):
            return jax.jvp(fn, (x,), (tangent,))[1]

        return jax.jvp(slope, (at,), (tangent,))[1].astype(jnp.float32)

    if curvature == "hessian":
        check_value_fn(value_fn, params)
        if not _has_custom_vjp(value_fn, params):
            return line(value_fn, params, along)
    if curvature == "ggn":
        outputs_fn, loss_fn = _ggn_pair(value_fn)
        check_value_fn(lambda x: loss_fn(outputs_fn(x)), params)
        if not _has_custom_vjp(lambda x: loss_fn(outputs_fn(x)), params):
            outputs, tangent = jax.jvp(outputs_fn, (params,), (along,))
            return line(loss_fn, outputs, tangent)
    return linalg.vdot(along, build_matvec(curvature, value_fn, params)(along))


OPERATORS: dict[str, Callable] = {
    "hessian": hvp,
    "ggn": ggn_vp,
    "reverse_over_reverse": hvp_reverse_over_reverse,
    "central_difference": hvp_central_difference,
}
"""What `curvature=` may be."""


def check_not_empty(params: Params, where: str, name: str = "params") -> None:
    """Raises when `params` has no leaves."""
    if not jax.tree.leaves(params):
        raise ValueError(
            f"`{name}` must have at least one array, got an empty pytree in {where}; "
            "there is nothing to compute the curvature of."
        )


def check_params(params: Params, where: str, name: str = "params") -> None:
    """Raises unless `params` is a non-empty pytree of real floating-point arrays."""
    check_not_empty(params, where, name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", type(leaf).__name__)
        is_number = isinstance(leaf, float) or hasattr(leaf, "dtype")
        if not (is_number and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)):
            raise ValueError(
                f"`{name}` must be real floating-point arrays, got {dtype} at "
                f"'{jax.tree_util.keystr(path)}' in {where}; keep other leaves out "
                "with optax.masked or optax.partition."
            )


def check_value_fn(value_fn, params: Params) -> None:
    """Raises unless `value_fn` maps `params` to one real floating-point number."""
    check_params(params, "a curvature product")
    if not callable(value_fn):
        raise ValueError(
            "`value_fn` must be a function of the parameters alone, got "
            f"{type(value_fn).__name__}; pass lambda p: loss(p, batch)."
        )
    check_takes_params(value_fn, params)
    value = jax.eval_shape(value_fn, params)
    leaves = jax.tree.leaves(value)
    if len(leaves) != 1 or not hasattr(value, "shape"):
        raise ValueError(
            f"`value_fn` must return one scalar, got {jax.tree.structure(value)}; "
            "drop auxiliary outputs, as in lambda p: loss(p, batch)[0]."
        )
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            "`value_fn` must return a real scalar, got shape "
            f"{value.shape} and dtype {value.dtype}; reduce it, for example by a mean."
        )


def is_pair(fn: object) -> bool:
    """Returns whether `fn` is a loss in two parts, as curvature="ggn" needs."""
    return isinstance(fn, tuple) and len(fn) == 2 and all(map(callable, fn))


def check_takes_params(value_fn: Callable, params: Params) -> None:
    """Raises unless `value_fn` can be called with the parameters alone."""
    try:
        inspect.signature(value_fn).bind(params)
    except TypeError as error:
        raise ValueError(
            "`value_fn` must take the parameters alone, got a function that does not "
            f"({error}); close over the rest, as in lambda p: loss(p, batch)."
        ) from error
    except ValueError:  # some callables have no signature to look at
        return


def _ggn_pair(value_fn: Any) -> tuple[Any, Any]:
    if not is_pair(value_fn):
        raise ValueError(
            "`value_fn` must be the pair (outputs_fn, loss_fn) for curvature='ggn', "
            f"got {type(value_fn).__name__}; outputs_fn maps parameters to the "
            "network's outputs and loss_fn maps those to the loss."
        )
    return value_fn


@contextlib.contextmanager
def _explained(mode: str) -> Iterator[None]:
    """Turns JAX's complaint about a missing derivative rule into a remedy."""
    try:
        yield
    except _DIFFERENTIATION_ERRORS as error:
        text = str(error).lower()
        if mode in ("hessian", "ggn") and "custom_vjp" in text:
            raise ValueError(_TWICE.format(mode=mode)) from error
        if any(word in text for word in ("differentia", "jvp", "vjp", "transpos")):
            raise ValueError(_NO_DERIVATIVE.format(mode=mode)) from error
        raise


def _product(
    product: MatVec, params: Params, mode: str, custom_vjp: bool = False
) -> MatVec:
    """Gives a product its dtypes, its checks and its sentences.

    Under tracing JAX says only while it compiles that forward mode met a custom_vjp
    rule; by then there is no one to explain it, so such a loss is looked at here.
    """
    shapes = [jnp.shape(x) for x in jax.tree.leaves(params)]
    if custom_vjp and "custom_lin" in str(jax.make_jaxpr(product)(params)):
        raise ValueError(_TWICE.format(mode=mode))

    def matvec(v: PyTree) -> PyTree:
        leaves = jax.tree.leaves(v)
        if [jnp.shape(x) for x in leaves] != shapes:
            raise ValueError(
                f"the vector must have the structure of `params`, shapes {shapes}, got "
                f"{[jnp.shape(x) for x in leaves]}; pass a pytree like the parameters."
            )
        # By leaves: boxes around them, such as Flax's, may differ.
        v = jax.tree.unflatten(jax.tree.structure(params), leaves)
        with _explained(mode):
            out = product(linalg.cast_like(v, params))
        return linalg.as_float32(out)

    return matvec


def _has_custom_vjp(fn: Callable, params: Params) -> bool:
    return "custom_vjp" in str(jax.make_jaxpr(fn)(params))
