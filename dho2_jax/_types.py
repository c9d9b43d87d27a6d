# SPDX-License-Identifier: Apache-2.0
"""Names for the kinds of value that travel through the package; no logic.

Letters in shape comments, everywhere: n parameters in all, k + l eigenpairs kept,
m Lanczos steps.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import optax

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any

Params: TypeAlias = PyTree
"""The point x: any pytree of real floating-point arrays, n numbers in all."""

Rows: TypeAlias = PyTree
"""Several vectors stacked: a pytree whose leaves are `(rows, *param.shape)`."""

ValueFn: TypeAlias = Callable[[Params], Array]
"""The loss of the parameters alone, a real scalar; its batch is closed over."""

MatVec: TypeAlias = Callable[[PyTree], PyTree]
"""A symmetric linear map from vectors to vectors, both pytrees like the parameters."""

Inner: TypeAlias = Callable[..., Array]
"""`(rows, vector) -> (rows,)`: each row's inner product with the vector.

Of several vectors at once, `(rows, x, y, ...) -> (vectors, rows)`."""

ScalarOrSchedule: TypeAlias = optax.ScalarOrSchedule
"""A number, a traced number, or an Optax schedule of the step count."""
