# SPDX-License-Identifier: Apache-2.0
"""DHO² as an Optax gradient transformation: what it is made of."""

import functools
from typing import Any

import jax
import optax

from dho2_jax._checks import check_choice, check_number
from dho2_jax._numerics import schedules
from dho2_jax._numerics.schedules import Schedule
from dho2_jax._refresh.ways import WAYS
from dho2_jax._state.config import make_config
from dho2_jax._types import ScalarOrSchedule
from dho2_jax._update import Settings, init_fn, update_fn


def dho2(
    base_optimizer: optax.GradientTransformation,
    *,
    num_largest: int = 24,
    num_smallest: int = 0,
    num_matvecs: int | None = None,
    refresh: str = "periodic",
    schedule: Schedule | None = None,
    refresh_period: int = schedules.PERIOD,
    warmup_steps: int = 0,
    early_refreshes: tuple[int, ...] | None = None,
    max_drift: float | None = None,
    newton_learning_rate: ScalarOrSchedule = 1.0,
    subspace_decay: ScalarOrSchedule = 0.9,
    subspace_momentum: str = "ema",
    damping: ScalarOrSchedule = 0.0,
    max_base_scaling: ScalarOrSchedule | None = None,
    base_rate: str = "curvature",
    rate_schedule: ScalarOrSchedule = 1.0,
    curvature: str = "hessian",
    negative_curvature: str | None = None,
    seed: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    param_specs: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
    curvature_mask: Any = None,
    shard_base_state: bool | None = None,
    linear_base: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""A Newton step in the sharpest subspace, any first-order optimizer elsewhere.

    The k + l extreme eigenvectors V of the Hessian are found by Lanczos every T steps.
    Each step moves by $s\,d - \alpha V^\top (u / (|\lambda| + \delta))$: the base
    optimizer's update d of the gradient's complement, kept orthogonal to V and scaled
    by s, and the damped Newton step on the subspace momentum u. Before the first
    refresh, and whenever no pair is valid, the update is the base optimizer's (times
    `rate_schedule`).

    The loop must hand the loss to `update` (refresh="periodic" or "staggered"), as
    `tx.update(grads, state, params, value_fn=lambda p: loss(p, batch))`, or the product
    of `staggered_value_and_grad` (refresh="staggered"), as `product=`; or call
    `dho2_jax.refresh` itself now and then (refresh="external").

    Args:
      base_optimizer: Any Optax transformation, its learning rate included.
      num_largest: k, eigenpairs from the upper end. Static.
      num_smallest: l, eigenpairs from the lower end; k + l >= 1. Static.
      num_matvecs: m >= k + l, Lanczos steps of a refresh, at most n; None: k + l + 4.
        One product each, and one more that makes the first row. Static.
      refresh: "periodic": inside `update`, every `refresh_period` steps, all products
        in one step. "staggered": the same products, one a step, from every
        `refresh_period` steps on, at the parameters of that step, while training goes
        on with the previous subspace. All products of a sweep must be of one function:
        the loop keeps its curvature batch while `sweep_index` stays the same.
        "external": only by `dho2_jax.refresh`. Static.
      schedule: When to refresh: a `Schedule`, in place of the next four. Static.
      refresh_period: T, in updates; at least m with "staggered", and where
        it is shorter than m + 3 + ceil((m + 1) / 9) starts within a sweep are passed
        over. Static.
      warmup_steps: Updates before the first periodic refresh or sweep. Static.
      early_refreshes: More updates to refresh, or to begin a sweep, at, counted from
        the first: curvature changes fastest at the start of training. With "staggered"
        those that would meet another sweep are passed over. None: (20, 50) where T is
        at least 100, else none. Static.
      max_drift: Refresh, or begin a sweep, also in between when the parameters have
        gone farther than this times their own norm since the subspace in use was
        measured (`metrics`: "drift"). None: by the step count alone. Static.
      newton_learning_rate: alpha; 0 removes the subspace without a Newton step.
      subspace_decay: beta, in [0, 1).
      subspace_momentum: "ema": u <- beta u + (1 - beta) c0. "heavy_ball": u <- beta u +
        c0. "nesterov": u <- beta^2 u + (1 + beta) c0, as FOSI has it. Static.
      damping: delta >= 0, in units of curvature.
      max_base_scaling: c, the cap on s; None: 3 with base_rate="fixed", none otherwise.
      base_rate: How s is set. "fixed": FOSI's s = clip(lambda_max / lambda_min kept of
        the largest, 1, c). "curvature": by the directional curvature along the base's
        own step (after 40 steps 1.5 times the best of it), guarded; it starts at s <= 1
        with the first valid subspace (after a step of no length with
        refresh="staggered", which only measures), and then |lambda| has a floor of 0.01
        lambda_max and the Newton part is no longer than the base would have gone on the
        same gradient. No part of a step is longer than 1.2 times what recent steps, or
        a probe, proved safe; where `value_fn` is given, one that would be, and the
        first after a refresh, is tried on it, and may be four times as long; uphill,
        momentum is braked. "fixed" has none of these. "curvature" wins over the rate
        and any schedule inside the base (it measures the step and compensates): put
        schedules into `rate_schedule`. Static.
      rate_schedule: Multiplies the whole update; a cosine here is not fought by the
        curvature-set rate.
      curvature: "hessian", "ggn" (then `value_fn` is a pair, see `ggn_vp`),
        "reverse_over_reverse" or "central_difference". Static.
      negative_curvature: What to do along lambda < 0. "abs": a Newton step with
        |lambda|, as FOSI. "base": leave the direction to the base optimizer, since the
        length of a Newton step means nothing there. None: "abs" with
        base_rate="fixed", else "base". Static.
      seed: Of the start vectors of Lanczos. Static.
      mesh: Keep the curvature in slices over all axes of this mesh, of any axis types;
        the caller jits over global arrays. Each device then holds 1 / D of V, and the
        curvature products run data-parallel, as the loss itself does. Static.
      param_specs: `PartitionSpec`s of the parameters, a tree or a prefix of one, with
        `mesh`. None: read from Explicit axis types, or from the concrete arrays that an
        un-jitted `init` is given; inside jit under Auto axes nothing can be read, and
        replicated is assumed: correct, with more communication. Static.
      axis_name: Instead of `mesh`, inside the caller's own `shard_map` or `pmap`: the
        data axis or axes. `value_fn` is then the mean loss of this device's share of
        the batch, without collectives; `updates` are averaged already; parameters are
        equal on all devices; the state is this device's slice. Static.
      curvature_mask: Which parameters take part in the curvature: bools in a tree like
        the parameters or a prefix of one, or a function that makes such a tree of them.
        What is False costs no curvature work and, but for a copy of itself with
        refresh="staggered", no curvature memory; its update is the base optimizer's,
        times `rate_schedule`. The base optimizer sees all parameters, and so do
        `value_fn` and `refresh`. None: all take part. Static.
      shard_base_state: Keep the base's own state in slices too (ZeRO-1). With
        `axis_name` the base then sees slices of large matrices: for elementwise bases
        only. None: True with `mesh`, else False. Static.
      linear_base: Whether the base's update is a linear function of the gradients it
        has seen, as that of `optax.sgd` is with any momentum. The base is then given
        the whole gradient, which makes the same step while V stays, and V is read twice
        a step (on a CPU three times) instead of four times. Static.

    Returns:
      An `optax.GradientTransformationExtraArgs`. `update` takes `value_fn` (`params ->
      ()`), or `matvec_fn` (`params -> matvec`), as a keyword: required for a periodic
      or a staggered refresh, used with an external one to probe the curvature-set rate
      and to try bold steps. It need not be the training loss: a quarter of the batch
      serves. A staggered one takes `product` instead, from `staggered_value_and_grad`
      on the state before. Inside `optax.masked` and `optax.partition`, where `value_fn`
      is a function of all parameters, `update` also takes these, as `whole_params`.

    Raises:
      ValueError: In one sentence, for an argument out of its range (here), parameters
        that are not real or fewer than k + l (in `init`), missing `params` or
        `value_fn` (in `update`).

    Numerics: the subspace is float32 whatever the parameters are.
    Deviates from FOSI: the base sees pytrees; the momentum is k + l numbers; Lanczos
    runs in float32 and starts in the range of the curvature; the rate.
    """
    if not (hasattr(base_optimizer, "init") and hasattr(base_optimizer, "update")):
        raise ValueError(
            "`base_optimizer` must be an optax.GradientTransformation, got "
            f"{type(base_optimizer).__name__}; pass for example optax.adam(1e-3)."
        )
    check_choice("refresh", refresh, tuple(WAYS))
    config = make_config(
        num_largest=num_largest,
        num_smallest=num_smallest,
        num_matvecs=num_matvecs,
        refresh=refresh,
        schedule=schedule,
        refresh_period=refresh_period,
        warmup_steps=warmup_steps,
        early_refreshes=early_refreshes,
        max_drift=max_drift,
        subspace_momentum=subspace_momentum,
        base_rate=base_rate,
        curvature=curvature,
        negative_curvature=negative_curvature,
        seed=seed,
        mesh=mesh,
        param_specs=param_specs,
        axis_name=axis_name,
        shard_base_state=shard_base_state,
    )
    if not isinstance(linear_base, bool):
        raise ValueError(
            f"`linear_base` must be True or False, got {linear_base!r}; True for "
            "gradient descent with or without momentum only."
        )
    check_number("newton_learning_rate", newton_learning_rate, 0.0)
    check_number("subspace_decay", subspace_decay, 0.0, 1.0)
    check_number("damping", damping, 0.0)
    if max_base_scaling is None:
        max_base_scaling = config.rule.cap
    check_number("max_base_scaling", max_base_scaling, 0.0)
    check_number("rate_schedule", rate_schedule, 0.0)
    made_of = Settings(
        base=optax.with_extra_args_support(base_optimizer),
        config=config,
        newton_learning_rate=newton_learning_rate,
        subspace_decay=subspace_decay,
        damping=damping,
        max_base_scaling=max_base_scaling,
        rate_schedule=rate_schedule,
        curvature_mask=curvature_mask,
        linear_base=linear_base,
    )
    return optax.GradientTransformationExtraArgs(
        functools.partial(init_fn, made_of), functools.partial(update_fn, made_of)
    )
