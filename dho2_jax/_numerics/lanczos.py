# SPDX-License-Identifier: Apache-2.0
"""Lanczos tridiagonalisation of a symmetric linear map on pytrees.

Knows neither Hessians nor meshes: it is given a `matvec` and an `inner` product. The
recursion is also available one product at a time (`start`, `step`), so that the
products may come from anywhere and at any pace.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dho2_jax._numerics import linalg
from dho2_jax._types import Array, Inner, MatVec, PyTree, Rows

_EPS = float(jnp.finfo(jnp.float32).eps)
_LEAST_NEW = 0.1  # share of a row that is new, over what symmetry says is not there


class LanczosState(NamedTuple):
    """A recursion under way; `index` products have been taken in."""

    basis: Rows  # leaves (m, *shape), float32; rows beyond `index` are zero
    vector: PyTree  # float32: the next to multiply, row `index`; at the end that of r
    projected: Array  # (m + 1, m), float32: column j is what V H v_j measured
    betas: Array  # (m,), float32: the norm that was left after step j
    index: Array  # (), int32; -1 before the product that makes the first row


class LanczosResult(NamedTuple):
    r"""$A V^\top = V^\top T + r e_m^\top$, with T tridiagonal.

    Attributes:
      alphas: The diagonal of T, `(m,)`, float32.
      betas: Beside the diagonal, `(m - 1,)`, float32; 0 where the recursion ended.
      basis: V, leaves `(m, *shape)`, float32: orthonormal rows, 0 after a breakdown.
      residual: r, a vector like `v0`, orthogonal to the basis.
    """

    alphas: Array
    betas: Array
    basis: Rows
    residual: PyTree


def start(
    v0: PyTree, num_matvecs: int, inner: Inner = linalg.inner, *, in_range: bool = False
) -> LanczosState:
    """Returns the recursion before its first product.

    Its first row is v0 / |v0|; or, `in_range`, what one more product makes of it, so
    that every row lies in the range of the operator.
    """
    v0 = linalg.as_float32(v0)
    norm = linalg.norm(v0, inner)
    scale = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1.0), 0.0)
    vector = jax.tree.map(lambda x: scale * x, v0)
    first = 0.0 if in_range else 1.0

    def rows(x: Array) -> Array:
        return jnp.zeros((num_matvecs, *x.shape), jnp.float32).at[0].set(first * x)

    return LanczosState(
        basis=jax.tree.map(rows, vector),
        vector=vector,
        projected=jnp.zeros((num_matvecs + 1, num_matvecs), jnp.float32),
        betas=jnp.zeros((num_matvecs,), jnp.float32),
        index=jnp.full((), -1 if in_range else 0, jnp.int32),
    )


def step(
    state: LanczosState, product: PyTree, inner: Inner = linalg.inner
) -> LanczosState:
    """Takes in the product H v_j and appends the next row.

    What is left of it by the recurrence of three terms goes through one pass of
    classical Gram-Schmidt against all rows. In exact arithmetic the recurrence is a
    first pass, so that this is the second ("twice is enough"). What the two take off is
    the measured column of V H V^T. When what is left is rounding, the next row is zero:
    then all later products and coefficients are zero too, and the recursion has ended
    without a branch.

    The norm comes with the coefficients: a product is reduced to one number and then to
    m + 1.
    """
    basis, vector, projected, betas, j = state
    product = linalg.as_float32(product)

    # At j = -1 nothing is in the basis yet.
    alpha = jnp.where(j < 0, 0.0, linalg.vdot(vector, product, inner))
    last = jnp.where(j < 1, 0.0, betas[j - 1])

    def recurrence(w: Array, v: Array, rows: Array) -> Array:
        before = jax.lax.dynamic_index_in_dim(
            rows, jnp.maximum(j - 1, 0), keepdims=False
        )
        return w - alpha * v - last * before

    left = jax.tree.map(recurrence, product, vector, basis)
    rest, square = inner(basis, left), linalg.vdot(left, left, inner)
    left = linalg.add_scaled(left, -1.0, linalg.combine(rest, basis))
    # Pythagoras, twice. Where the second difference cancels, all of `left` is rounding
    # and the recursion ends.
    before = jnp.sqrt(alpha**2 + last**2 + square)
    beta = jnp.sqrt(jnp.maximum(square - jnp.sum(rest**2), 0.0))

    # Rounding relative to this product, or far below the operator's own scale; the
    # second alone would end the recursion on spectra that merely decay fast.
    scale = jnp.maximum(jnp.max(jnp.abs(projected)), before)
    ended = (beta <= 4 * _EPS * before) | (beta <= 0.01 * _EPS * scale)
    # `rest` is zero but for rounding. A row of which most was rounding would not be
    # orthogonal to those before it, and the next product would amplify that.
    ended |= beta <= _LEAST_NEW * jnp.sqrt(jnp.sum(rest**2))
    beta = jnp.where(ended, 0.0, beta)
    inverse = jnp.where(ended, 0.0, 1 / jnp.where(ended, 1.0, beta))

    vector = jax.tree.map(lambda w: inverse * w, left)
    # The last step finds r, for which there is no row.
    m = betas.shape[0]
    row = jnp.minimum(j + 1, m - 1)

    def write(b: Array, w: Array) -> Array:
        old = jax.lax.dynamic_index_in_dim(b, row, keepdims=False)
        new = jnp.where(j + 1 < m, w, old)
        return jax.lax.dynamic_update_index_in_dim(b, new, row, 0)

    # Column -1, the last, is overwritten later.
    column = jnp.append(rest, 0.0).at[j].add(alpha).at[j - 1].add(last)
    projected = jax.lax.dynamic_update_index_in_dim(projected, column, j, 1)
    coupling = jnp.where(j < 0, 0.0, beta)
    projected = projected.at[j + 1, j].set(coupling)
    return LanczosState(
        jax.tree.map(write, basis, vector),
        vector,
        projected,
        betas.at[j].set(coupling),
        j + 1,
    )


def run(
    matvec: MatVec,
    v0: PyTree,
    num_matvecs: int,
    apply: Callable[..., Any] = lambda fn, *args: fn(linalg.inner, *args),
    *,
    in_range: bool = False,
) -> LanczosState:
    """Returns the finished recursion, its products in one loop.

    `num_matvecs` of them, and one more when it has to start in the operator's range; as
    part of the same loop, since a second copy of the product would be compiled twice.
    `apply(fn, *args)` says where all but the products runs: it calls `fn(inner, *args)`
    with its inner product.
    """

    def body(_, state):
        product = matvec(state.vector)
        return apply(lambda inner, s, w: step(s, w, inner), state, product)

    def begin(inner, v0):
        return start(v0, num_matvecs, inner, in_range=in_range)

    return jax.lax.fori_loop(0, num_matvecs + in_range, body, apply(begin, v0))


def tridiagonal(state: LanczosState) -> tuple[Array, Array]:
    """Returns the diagonal `(m,)` of T and all norms `(m,)`, the last that of r."""
    return jnp.diagonal(state.projected), state.betas


def recurrence_defect(state: LanczosState) -> Array:
    """Returns how far V H V^T is from symmetric tridiagonal, relative to its scale.

    With one fixed symmetric operator this is rounding. It is large when the operator
    changed between products: another batch, another dropout key.
    """
    alphas, betas = tridiagonal(state)
    expected = linalg.tridiagonal(alphas, betas)
    scale = jnp.max(jnp.abs(expected))
    defect = jnp.max(jnp.abs(state.projected[:-1] - expected))
    return defect / jnp.where(scale > 0, scale, 1.0)


def lanczos_tridiag(
    matvec: MatVec, v0: PyTree, num_matvecs: int, *, inner: Inner = linalg.inner
) -> LanczosResult:
    r"""Tridiagonalises a symmetric operator by `num_matvecs` Lanczos steps.

    Computes $A V^\top = V^\top T + r e_m^\top$ with orthonormal rows in $V$ (Algorithm
    1 of FOSI, arXiv 2302.08484). Costs `num_matvecs` products, `num_matvecs + 1` rows
    of memory and two passes over the rows a step.

    Args:
      matvec: Symmetric linear map from pytrees like `v0` to pytrees like `v0`. Traced
        once.
      v0: Start vector, a pytree of real floating-point arrays of any non-zero norm.
      num_matvecs: Krylov depth m >= 1. Static.
      inner: Inner product `(rows, vector) -> (rows,)`; pass one that ends in a `psum`
        when vectors are sharded.

    Returns:
      A `LanczosResult`. After a breakdown (an invariant subspace was found) all later
      entries and rows are zero.

    Raises:
      ValueError: If `num_matvecs` < 1, `v0` is empty or not real floating point, or
        `matvec` returns another structure or other shapes.

    Numerics: float32, full reorthogonalisation: the recurrence of three terms, then one
    pass of classical Gram-Schmidt.
    Deviates from FOSI: it reorthogonalises in float64.
    """
    is_integer = hasattr(num_matvecs, "__index__")
    if not is_integer or isinstance(num_matvecs, bool) or num_matvecs < 1:
        raise ValueError(
            f"`num_matvecs` must be a static integer >= 1, got {num_matvecs}; "
            "each step of Lanczos takes one product."
        )
    leaves = jax.tree.leaves(v0)
    if not leaves:
        raise ValueError(
            "`v0` must have at least one array, got an empty pytree; "
            "there is no space to search."
        )
    for leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"`v0` must be real floating point, got a leaf of dtype "
                f"{jnp.result_type(leaf)}; cast it first."
            )
    v0 = linalg.as_float32(jax.tree.map(jnp.asarray, v0))
    out = jax.eval_shape(matvec, v0)
    if jax.tree.structure(out) != jax.tree.structure(v0) or any(
        a.shape != b.shape
        for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(v0), strict=True)
    ):
        raise ValueError(
            "`matvec` must return a pytree with the structure and shapes of `v0`, got "
            f"{jax.tree.map(lambda x: x.shape, out)}; it must be a square linear map."
        )
    state = run(matvec, v0, num_matvecs, lambda fn, *args: fn(inner, *args))
    alphas, betas = tridiagonal(state)
    return LanczosResult(
        alphas=alphas,
        betas=betas[:-1],
        basis=state.basis,
        residual=jax.tree.map(lambda x: betas[-1] * x, state.vector),
    )
