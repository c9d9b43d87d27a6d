# SPDX-License-Identifier: Apache-2.0
"""Ritz pairs: the eigenpairs of the small tridiagonal matrix, chosen from both ends."""

from typing import NamedTuple

import jax.numpy as jnp

from dho2_jax._numerics import linalg
from dho2_jax._types import Array

_NOISE = 64 * float(jnp.finfo(jnp.float32).eps)


class RitzPairs(NamedTuple):
    """The k + l chosen pairs; slots that found nothing are zero and not valid."""

    eigenvalues: Array  # (k + l,), float32
    weights: Array  # (k + l, m), float32: each Ritz vector in the Lanczos basis
    valid: Array  # (k + l,), bool
    residuals: Array  # (k + l,), float32: |H v - lambda v| <= beta_m |last weight|
    next_eigenvalue: Array  # (), float32: the largest Ritz value that was not chosen


def ritz_pairs(
    alphas: Array, betas: Array, num_largest: int, num_smallest: int
) -> RitzPairs:
    """Returns the extreme eigenpairs of the tridiagonal matrix with their bounds.

    Values below rounding of the largest magnitude are no eigenpairs but what a
    recursion leaves after a breakdown, and are never chosen. When fewer pairs exist
    than asked for, the largest are served first.

    Args:
      alphas: `(m,)`, the diagonal.
      betas: `(m,)`, beside the diagonal; the last is the norm of the residual.
      num_largest: How many from the upper end. Static.
      num_smallest: How many from the lower end. Static.

    Returns:
      `RitzPairs`, slots `[smallest ascending, largest ascending]`.
    """
    m = alphas.shape[0]
    tridiagonal = linalg.tridiagonal(alphas, betas)
    tridiagonal = jnp.where(jnp.isfinite(tridiagonal), tridiagonal, 0.0)
    # Dense eigh: eigenvectors from eigh_tridiagonal do not exist on TPU.
    theta, vectors = jnp.linalg.eigh(tridiagonal)

    real = jnp.abs(theta) > _NOISE * jnp.max(jnp.abs(theta))
    found = jnp.sum(real)
    order = jnp.argsort(jnp.where(real, theta, jnp.inf), stable=True)

    large = jnp.minimum(num_largest, found)
    small = jnp.minimum(num_smallest, found - large)
    slots_small = jnp.arange(num_smallest)
    from_top = num_largest - jnp.arange(num_largest)  # k, k-1, ..., 1
    position = jnp.concatenate([slots_small, found - from_top])
    valid = jnp.concatenate([slots_small < small, from_top <= large])
    chosen = order[jnp.clip(position, 0, m - 1)]

    next_position = found - large - 1
    has_next = next_position >= small
    next_value = theta[order[jnp.clip(next_position, 0, m - 1)]]

    weights = jnp.where(valid[:, None], vectors[:, chosen].T, 0.0)
    return RitzPairs(
        eigenvalues=jnp.where(valid, theta[chosen], 0.0),
        weights=weights,
        valid=valid,
        residuals=jnp.abs(betas[-1] * weights[:, -1]),
        next_eigenvalue=jnp.where(has_next, next_value, 0.0),
    )
