# SPDX-License-Identifier: Apache-2.0
"""Ready-made combinations: `dho2` on the common bases, and FOSI as published.

The aliases take the base's arguments and all keywords of `dho2`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from dho2_jax._transform import dho2
from dho2_jax._types import ScalarOrSchedule


def _over_base(**defaults):
    """Makes a function that returns a base into one that returns `dho2` on it.

    The result takes the base's arguments and, by keyword, those of `dho2`, with
    `defaults` for some. It has a real signature, since `optax.inject_hyperparams` reads
    one.
    """

    def decorate(make_base: Callable[..., optax.GradientTransformation]):
        own = inspect.signature(make_base).parameters
        hybrid = {
            name: p.replace(default=defaults.get(name, p.default))
            for name, p in inspect.signature(dho2).parameters.items()
            if name != "base_optimizer"
        }

        signature = inspect.Signature([*own.values(), *hybrid.values()])

        @functools.wraps(make_base)
        def alias(*args, **kwargs) -> optax.GradientTransformationExtraArgs:
            signature.bind(*args, **kwargs)  # names what is unknown or missing
            chosen = defaults | {k: v for k, v in kwargs.items() if k not in own}
            base = {k: v for k, v in kwargs.items() if k in own}
            return dho2(make_base(*args, **base), **chosen)

        setattr(alias, "__signature__", signature)  # noqa: B010 (unknown to type checkers)
        return alias

    return decorate


@_over_base(linear_base=True)
def dho2_sgd(learning_rate: ScalarOrSchedule):
    """DHO² on gradient descent.

    Args:
      learning_rate: Of the base. All keywords of `dho2` follow.

    Returns:
      An `optax.GradientTransformationExtraArgs`.
    """
    return optax.sgd(learning_rate)


@_over_base(linear_base=True)
def dho2_heavy_ball(learning_rate: ScalarOrSchedule = 1e-2, *, momentum: float = 0.9):
    """DHO² on heavy ball.

    Args:
      learning_rate: Of the base; with the curvature-set rate only where it starts.
      momentum: Decay of the base's trace. All keywords of `dho2` follow.

    Returns:
      An `optax.GradientTransformationExtraArgs`.
    """
    return optax.sgd(learning_rate, momentum=momentum)


@_over_base(linear_base=True)
def dho2_nesterov(learning_rate: ScalarOrSchedule = 1e-2, *, momentum: float = 0.9):
    """DHO² on Nesterov's momentum.

    Args:
      learning_rate: Of the base; with the curvature-set rate only where it starts.
      momentum: Decay of the base's trace. All keywords of `dho2` follow.

    Returns:
      An `optax.GradientTransformationExtraArgs`.
    """
    return optax.sgd(learning_rate, momentum=momentum, nesterov=True)


@_over_base()
def dho2_adam(
    learning_rate: ScalarOrSchedule = 1e-3,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
):
    """DHO² on Adam.

    Args:
      learning_rate: Of the base; with the curvature-set rate only where it starts.
      b1: Decay of Adam's first moment.
      b2: Decay of Adam's second moment.
      eps: Adam's epsilon. All keywords of `dho2` follow.

    Returns:
      An `optax.GradientTransformationExtraArgs`.
    """
    return optax.adam(learning_rate, b1=b1, b2=b2, eps=eps)


@_over_base()
def dho2_adamw(
    learning_rate: ScalarOrSchedule = 1e-3,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
):
    """DHO² on AdamW; the decay acts on the complement of the subspace only.

    Args:
      learning_rate: Of the base; with the curvature-set rate only where it starts.
      b1: Decay of Adam's first moment.
      b2: Decay of Adam's second moment.
      eps: Adam's epsilon.
      weight_decay: Decoupled decay, part of the base's update and scaled with it. All
        keywords of `dho2` follow.

    Returns:
      An `optax.GradientTransformationExtraArgs`.
    """
    return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)


@_over_base(shard_base_state=False)
def dho2_muon(learning_rate: ScalarOrSchedule = 1e-2, *, beta: float = 0.95):
    """DHO² on Muon, which the base can be since it sees the parameters' own pytree.

    Its matrix products need whole matrices: on a mesh `shard_base_state` is False here.
    In slices a step gathers 4 n numbers and reduces 3 n, else it gathers 2 n.

    Args:
      learning_rate: Of the base; with the curvature-set rate only where it starts.
      beta: Decay of Muon's momentum. All keywords of `dho2` follow.

    Returns:
      An `optax.GradientTransformationExtraArgs`.
    """
    return optax.contrib.muon(learning_rate, beta=beta)


def fosi(
    base_optimizer: optax.GradientTransformation,
    *,
    num_largest: int = 5,
    num_smallest: int = 0,
    refresh: str = "periodic",
    refresh_period: int = 100,
    warmup_steps: int | None = None,
    newton_learning_rate: ScalarOrSchedule = 0.1,
    subspace_decay: ScalarOrSchedule = 0.9,
    subspace_momentum: str = "heavy_ball",
    max_base_scaling: ScalarOrSchedule = 3.0,
    mesh: jax.sharding.Mesh | None = None,
    param_specs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """FOSI as published (arXiv 2302.08484, ICLR 2024), for comparison.

    m = 4 (k + l) products from a fresh random start each time, the rate of the base
    scaled by clip(lambda_max / lambda_min kept, 1, c), an undamped Newton step on
    |lambda|, and the first refresh after a whole period.

    Args:
      base_optimizer: Any Optax transformation.
      num_largest: k. Static.
      num_smallest: l. Static.
      refresh: As for `dho2`. Static.
      refresh_period: T. Static.
      warmup_steps: Steps before the first refresh; None: T - 1, FOSI's. Static.
      newton_learning_rate: alpha.
      subspace_decay: beta; 0 for a base without momentum.
      subspace_momentum: That of the base: "heavy_ball", "nesterov", or "ema" for Adam.
      max_base_scaling: c; FOSI takes 3, and 1 for Adam.
      mesh: As for `dho2`. Static.
      param_specs: As for `dho2`. Static.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Deviates from FOSI: what of the momentum lies outside a new subspace is dropped (it
    keeps the n-vector); float32; the start vector is multiplied once by the Hessian.
    """
    return dho2(
        base_optimizer,
        num_largest=num_largest,
        num_smallest=num_smallest,
        num_matvecs=4 * (num_largest + num_smallest),
        refresh=refresh,
        refresh_period=refresh_period,
        warmup_steps=refresh_period - 1 if warmup_steps is None else warmup_steps,
        early_refreshes=(),
        newton_learning_rate=newton_learning_rate,
        subspace_decay=subspace_decay,
        subspace_momentum=subspace_momentum,
        max_base_scaling=max_base_scaling,
        base_rate="fixed",
        mesh=mesh,
        param_specs=param_specs,
    )
