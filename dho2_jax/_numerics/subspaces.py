# SPDX-License-Identifier: Apache-2.0
"""The kept eigenpairs and what a step does with them."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from dho2_jax._numerics import linalg
from dho2_jax._types import Array, Inner, PyTree, Rows

_ORTHONORMAL = 1e-3


class Subspace(NamedTuple):
    """Extreme eigenpairs; slots `[smallest ascending, largest ascending]`.

    A slot that holds no pair is zero and not `valid`, and takes no part in anything.

    Attributes:
      eigenvalues: lambda, `(k + l,)`, float32.
      eigenvectors: V, leaves `(k + l, *param.shape)`, float32, orthonormal rows.
      valid: Which slots hold a pair, `(k + l,)`, bool.
      next_eigenvalue: lambda_+, the largest Ritz value not kept, `()`, float32.
      residuals: Bounds on |H v - lambda v|, `(k + l,)`, float32.
    """

    eigenvalues: Array
    eigenvectors: Any
    valid: Array
    next_eigenvalue: Array
    residuals: Array


def empty(eigenvectors: Any, size: int) -> Subspace:
    """Returns the subspace before any refresh: no slot is valid."""
    return Subspace(
        eigenvalues=jnp.zeros((size,), jnp.float32),
        eigenvectors=eigenvectors,
        valid=jnp.zeros((size,), bool),
        next_eigenvalue=jnp.zeros((), jnp.float32),
        residuals=jnp.zeros((size,), jnp.float32),
    )


def coefficients(
    rows: Rows, vector: PyTree, active: Array, inner: Inner = linalg.inner
) -> Array:
    """Returns V x, zero in the slots that are not active: `(k + l,)`."""
    return jnp.where(active, inner(rows, vector), 0.0)


def remove(vector: PyTree, coefs: Array, rows: Rows) -> PyTree:
    """Returns x - V^T c, in the dtypes of x."""
    return linalg.cast_like(
        linalg.add_scaled(vector, -1.0, linalg.combine(coefs, rows)), vector
    )


def project_out(
    vector: PyTree, rows: Rows, active: Array, inner: Inner = linalg.inner
) -> PyTree:
    """Returns x - V^T V x, in the dtypes of x."""
    return remove(vector, coefficients(rows, vector, active, inner), rows)


def change_of_basis(old: Subspace, new: Subspace, inner: Inner = linalg.inner) -> Array:
    """Returns V_new V_old^T, which takes coefficients along: `(k + l, k + l)`."""
    change = linalg.gram(new.eigenvectors, old.eigenvectors, inner)
    return jnp.where(new.valid[:, None] & old.valid[None, :], change, 0.0)


def is_acceptable(new: Subspace, scale: Array, inner: Inner = linalg.inner) -> Array:
    """Returns whether a refresh may be used: `()`, bool.

    Its numbers must be finite, its rows orthonormal to 1e-3, no residual above `scale`,
    the operator's own, and at least one pair found.
    """
    overlaps = linalg.gram(new.eigenvectors, new.eigenvectors, inner)
    defect = jnp.max(jnp.abs(overlaps - jnp.diag(new.valid.astype(jnp.float32))))
    finite = jnp.all(jnp.isfinite(new.eigenvalues)) & jnp.all(
        jnp.isfinite(new.residuals)
    )
    # Comparisons with NaN are false, so a NaN in any row rejects as well.
    return (
        finite
        & (defect < _ORTHONORMAL)
        & (jnp.max(new.residuals) <= 1.01 * scale)
        & jnp.any(new.valid)
    )


def newton_scale(eigenvalues: Array, active: Array, damping, floor: float) -> Array:
    """Returns 1 / (max(|lambda|, floor * max|lambda|) + damping), 0 where inactive."""
    size = jnp.where(active, jnp.abs(eigenvalues), 0.0)
    size = jnp.maximum(size, floor * jnp.max(size)) + damping
    return jnp.where(active, 1 / jnp.where(active, size, 1.0), 0.0)


def spread_of_largest(eigenvalues: Array, active: Array, num_smallest: int) -> Array:
    """Returns |lambda_max| over the smallest |lambda| of the largest pairs; or 1."""
    values, use = jnp.abs(eigenvalues[num_smallest:]), active[num_smallest:]
    if values.shape[0] == 0:
        return jnp.ones((), jnp.float32)
    low = values[jnp.argmax(use)]
    return jnp.where(jnp.any(use), values[-1] / jnp.where(low > 0, low, 1.0), 1.0)


def sharpness(subspace: Subspace) -> Array:
    """Returns the largest valid eigenvalue, 0 when there is none."""
    found = jnp.any(subspace.valid)
    top = jnp.max(jnp.where(subspace.valid, subspace.eigenvalues, -jnp.inf))
    return jnp.where(found, top, 0.0)
