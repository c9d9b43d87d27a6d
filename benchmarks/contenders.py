# SPDX-License-Identifier: Apache-2.0
"""Who races: every optimizer, each with the same budget of settings to be tuned over.

`make(rate, factor)` builds one from a rate and the schedule's factor, both traced, so
that one compilation serves all settings.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from workloads import Workload

import dho2_jax
from dho2_jax._numerics.schedules import is_due  # `should_refresh`, traced too

try:  # Here and not where it is used: it makes an array, which a trace would keep.
    import psgdax
except ImportError:  # the others race without it
    psgdax = None

Make = Callable[[Any, Any], Any]
PERIOD, EARLY = 100, (20, 50)  # steps between refreshes, and the early ones
SELDOM = 200, (20,)  # the same where no rate depends on the subspace
MUON_RANK = 4  # k on Muon, whose own geometry more eigenvectors do not help


class Contender(NamedTuple):
    """An optimizer and how a loop has to drive it."""

    name: str
    make: Make  # rate, factor -> transformation
    rates: tuple[float, ...]  # to tune over, each constant and with a cosine
    default: float | None = None  # of a hybrid: where it starts when nothing is tuned
    refreshes: Callable[[Any], Any] | None = None  # step, traced or not -> due
    needs_value: bool = False  # a line search over the training loss


def _matrices(params: Any) -> Any:
    """Returns which leaves are matrices, for Muon; layers may be stacked."""
    layers = {x.shape[0] for x in jax.tree.leaves(params) if x.ndim == 3}

    def visit(x: Any) -> Any:
        stacked_vectors = x.ndim == 2 and x.shape[0] in layers
        if x.ndim not in (2, 3) or stacked_vectors:
            return None
        return optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1)

    return jax.tree.map(visit, params)


BASES: dict[str, Make] = {
    "heavy ball": lambda rate, factor: optax.sgd(rate * factor, momentum=0.9),
    "Adam": lambda rate, factor: optax.adam(rate * factor),
    "Muon": lambda rate, factor: optax.contrib.muon(
        rate * factor, beta=0.95, muon_weight_dimension_numbers=_matrices
    ),
}
STARTS = {"heavy ball": 1e-2, "Adam": 1e-3, "Muon": 1e-2}
# Five rates around the best of each base on each workload.
RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "autoencoder": {
        "heavy ball": (2e-4, 5e-4, 1e-3, 1.5e-3, 2e-3),
        "Adam": (5e-4, 1e-3, 2e-3, 3e-3, 5e-3),
        "Muon": (5e-3, 1e-2, 2e-2, 3e-2, 5e-2),
        "Kron": (5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
    },
    "digits": {
        "heavy ball": (0.03, 0.1, 0.2, 0.3, 0.5),
        "Adam": (4e-3, 8e-3, 1.6e-2, 2.4e-2, 3.2e-2),
        "Muon": (2e-2, 4e-2, 6e-2, 8e-2, 1.2e-1),
        "Kron": (2e-3, 5e-3, 1e-2, 2e-2, 4e-2),
    },
    "transformer": {
        "heavy ball": (0.03, 0.06, 0.1, 0.15, 0.2),
        "Adam": (1e-3, 2e-3, 4e-3, 6e-3, 1e-2),
        "Muon": (1e-2, 2e-2, 3e-2, 4e-2, 6e-2),
        "Kron": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    },
    # Not swept: around what is usual for these networks.
    "resnet": {
        "heavy ball": (0.01, 0.03, 0.1, 0.2, 0.4),
        "Adam": (1e-4, 3e-4, 1e-3, 2e-3, 4e-3),
        "Muon": (5e-3, 1e-2, 2e-2, 4e-2, 8e-2),
        "Kron": (3e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    },
    "gpt2": {
        "heavy ball": (0.01, 0.03, 0.1, 0.2, 0.4),
        "Adam": (1e-4, 3e-4, 6e-4, 1e-3, 2e-3),
        "Muon": (5e-3, 1e-2, 2e-2, 4e-2, 8e-2),
        "Kron": (1e-4, 3e-4, 6e-4, 1e-3, 2e-3),
    },
}


def due(step: Any) -> Any:
    """Returns whether to refresh before a step, traced or not."""
    return is_due(dho2_jax.Schedule(PERIOD, early_refreshes=EARLY), step)


def seldom_due(step: Any) -> Any:
    """Returns the same beside a rate that is fixed."""
    period, early = SELDOM
    return is_due(dho2_jax.Schedule(period, early_refreshes=early), step)


def fosi_due(step: Any) -> Any:
    """Returns the same by FOSI's schedule: the first one after a whole period."""
    return is_due(dho2_jax.Schedule(PERIOD, PERIOD - 1, ()), step)


def rank_on(workload: Workload, base: str) -> int:
    """Returns k of DHO² on a base."""
    return MUON_RANK if base == "Muon" else workload.num_largest


@functools.cache
def contenders(workload: Workload) -> dict[str, Contender]:
    """Returns all contenders on a workload, by name."""
    rates = RATES[workload.name.split()[0]]
    found = [
        Contender(base, with_extras(make), rates[base]) for base, make in BASES.items()
    ]
    if psgdax is not None:
        found.append(Contender("Kron", with_extras(_kron), rates["Kron"]))
    found.append(
        Contender("L-BFGS", lambda rate, factor: optax.lbfgs(), (), needs_value=True)
    )
    for base in BASES:
        k = rank_on(workload, base)
        clip = 3.0 if base == "heavy ball" else 1.0
        found += [
            hybrid(f"DHO² on {base}", base, rates, num_largest=k),
            hybrid(f"DHO² on {base}, α = 0", base, rates, alpha=0.0, num_largest=k),
            # A Newton part beside the base at its own rate and schedule.
            hybrid(
                f"DHO² on {base}, fixed",
                base,
                rates,
                alpha=0.3,
                base_rate="fixed",
                max_base_scaling=1.0,
                num_largest=k,
            ),
            Contender(
                f"FOSI on {base}",
                functools.partial(_fosi, base, k, clip),
                rates[base],
                refreshes=fosi_due,
            ),
        ]
    return {one.name: one for one in found}


def chosen(workload: Workload, wanted: Sequence[str]) -> dict[str, Contender]:
    """Returns those contenders on a workload that are named; no name stands for all."""
    found = contenders(workload)
    for name in wanted:
        if name not in found:
            raise SystemExit(
                f"--contenders must name some of {'; '.join(found)}; got {name!r}."
            )
    return {name: found[name] for name in found if not wanted or name in wanted}


def hybrid(
    name: str, base: str, rates: dict[str, Any], *, alpha: float = 1.0, **options: Any
) -> Contender:
    """Returns DHO² on a base, refreshed by the loop."""
    inside = options.get("base_rate") == "fixed"

    def make(rate, factor):
        return dho2_jax.dho2(
            BASES[base](rate, factor if inside else 1.0),
            refresh="external",
            newton_learning_rate=alpha,
            rate_schedule=1.0 if inside else factor,
            linear_base=base == "heavy ball",
            **options,
        )

    default = None if inside else STARTS[base]
    return Contender(name, make, rates[base], default, seldom_due if inside else due)


def with_extras(make: Make) -> Make:
    """Returns a maker of transformations that take and ignore any keyword."""
    return lambda rate, factor: optax.with_extra_args_support(make(rate, factor))


def _fosi(base: str, k: int, clip: float, rate: Any, factor: Any) -> Any:
    """Returns FOSI's published setting: random restarts, m = 4k, a clip."""
    return dho2_jax.fosi(
        BASES[base](rate, factor),
        num_largest=k,
        refresh="external",
        subspace_momentum="ema" if base == "Adam" else "heavy_ball",
        max_base_scaling=clip,
    )


def _kron(rate: Any, factor: Any) -> Any:
    return psgdax.kron(rate * factor)


def names(text: str) -> tuple[str, ...]:
    """Returns the names in "A;B", as a command line has them; none stands for all."""
    return tuple(filter(None, text.split(";")))


def schedule_name(cosine: bool) -> str:
    """Returns a schedule's name."""
    return "cosine" if cosine else "constant"


def cosine(step: Any, steps: int, library: Any = np) -> Any:
    """Returns the factor of a cosine to zero, in NumPy or in `jax.numpy`."""
    return 0.5 * (1 + library.cos(library.pi * step / steps))


def step(
    workload: Workload, one: Contender, rate: Any, factor: Any, params, state, batch
) -> tuple[Any, Any]:
    """Returns parameters and state after one update."""
    loss_fn = workload.task.loss_fn
    value, grads = jax.value_and_grad(loss_fn)(params, batch)
    extra: dict[str, Any] = {}
    if one.refreshes is not None:
        extra["value_fn"] = curvature_loss(workload, batch)
    if one.needs_value:
        extra |= {"value": value, "grad": grads}
        extra["value_fn"] = lambda params: loss_fn(params, batch)
    tx = one.make(rate, factor)
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state


def refresh(workload: Workload, params, state, batch) -> Any:
    """Returns the state of a hybrid after a refresh on its part of a batch."""
    return dho2_jax.refresh(state, params, curvature_loss(workload, batch))


def curvature_loss(workload: Workload, batch: Any) -> Callable[[Any], jax.Array]:
    """Returns what a hybrid takes for `value_fn` in a step with this batch."""
    part = workload.part(batch)
    return lambda params: workload.curvature_loss(params, part)
