# SPDX-License-Identifier: Apache-2.0
"""Reads from compiled HLO text which collectives a program runs, and what they move.

Text in, numbers out. The kinds are the compiler's choice: libtpu
scatters a sum by an all-reduce and a slice, and at 256 chips gathers by an all-reduce
too. Count numbers.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dho2_jax.app.plan import hlo

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)


class Loop(NamedTuple):
    """A while loop around a collective."""

    body: str  # the computation that repeats
    trips: int | None  # None: not known before the program runs


class Collective(NamedTuple):
    """One collective, as one device executes it once."""

    kind: str  # one of KINDS
    numbers: int  # of the result for an all-gather, of the operands for all others
    bytes: int  # the same, without the padding of tiles
    dtypes: tuple[str, ...]  # as HLO spells them, such as "bf16"
    computation: str  # where the text has it
    loops: tuple[Loop, ...]  # outermost first
    trips: int | None  # executions in one run of the program; None: not known
    in_conditional: bool
    replica_groups: str  # of a collective-permute: its pairs of source and target
    channel: str  # what the text calls `channel_id`; empty without one
    name: str  # `op_name`, which tells the place in the user's program


class Total(NamedTuple):
    """What several collectives come to."""

    count: int
    numbers: int
    bytes: int


_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d\w*)\[([\d,<= ]*)\]")
_GROUPS = re.compile(
    r"\b(?:replica_groups|source_target_pairs)="
    r"(\{\{.*?\}\}|\{[^}]*\}|\[[^\]]*\]<=\[[^\]]*\](?:T\([^)]*\))?"
    r"|mesh\[[^\]]*\](?:,\s*device_ids=\([^{]*\))?\s*\{[^}]*\})"
)


def read(text: str) -> list[Collective]:
    """Finds every collective that a compiled program executes.

    One that the text spells out several times, as libtpu does when it spreads it over
    asynchronous fusions, is one; what is called from two places counts twice.

    Args:
      text: `compiled.as_text()`.

    Returns:
      The collectives, from the entry computation down.

    Raises:
      ValueError: If the text is no HLO module.
    """
    module = hlo.parse(text)
    return list(_walk(module, hlo.Frame(module.entry, None, None), (), False, {}))


def summary(
    collectives: Iterable[Collective], *, loops: bool = True
) -> dict[str, Total]:
    """Adds collectives up by kind.

    Args:
      collectives: From `read`.
      loops: Count what stands in a loop as often as the loop runs (once where that is
        not known); else once.

    Returns:
      Totals by kind; a kind that does not occur has no entry.
    """
    totals: dict[str, Total] = {}
    for one in collectives:
        times = one.trips if loops and one.trips is not None else 1
        count, numbers, size = totals.get(one.kind, Total(0, 0, 0))
        totals[one.kind] = Total(
            count + times, numbers + times * one.numbers, size + times * one.bytes
        )
    return totals


def within_loop(collectives: Iterable[Collective], trips: int) -> list[Collective]:
    """Returns what one turn of an outermost loop executes.

    Args:
      collectives: From `read`.
      trips: How often the loop runs, which is how it is recognised.

    Returns:
      The collectives in it, with those loops only that lie inside of it.
    """
    return [
        one._replace(loops=one.loops[1:], trips=_product(one.loops[1:]))
        for one in collectives
        if one.loops and one.loops[0].trips == trips
    ]


def _product(loops: tuple[Loop, ...]) -> int | None:
    """Multiplies trip counts; None if one is not known."""
    trips = 1
    for loop in loops:
        if loop.trips is None:
            return None
        trips *= loop.trips
    return trips


def _kind(instruction: hlo.Instruction) -> str | None:
    """Returns the kind of collective that an instruction starts, if it does."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _is_relevant(module: hlo.Module, computation: str, known: dict[str, bool]) -> bool:
    """Returns whether a computation leads to a collective; notes it in `known`."""
    if computation not in known:
        known[computation] = any(
            _kind(one) or any(_is_relevant(module, c, known) for c in hlo.called(one))
            for one in module.computations.get(computation, {}).values()
        )
    return known[computation]


def _walk(
    module: hlo.Module,
    frame: hlo.Frame,
    loops: tuple[Loop, ...],
    in_conditional: bool,
    known: dict[str, bool],
) -> Iterator[Collective]:
    """Yields what one execution of a computation executes."""
    spelt: set[tuple[str, str]] = set()  # kinds and channels seen inside of fusions
    for name, one in module.computations[frame.computation].items():
        if name == "ROOT":
            continue
        if kind := _kind(one):
            yield _collective(module, frame, one, kind, loops, in_conditional)
        callees = [c for c in hlo.called(one) if _is_relevant(module, c, known)]
        if not callees:
            continue
        inner = loops
        if one.opcode == "while":
            body = hlo.attribute(one, "body")
            inner = (*loops, Loop(body, hlo.trip_count(module, frame, one)))
        branch = in_conditional or one.opcode == "conditional"
        for callee in callees:
            callee_frame = hlo.Frame(callee, one, frame)
            for found in _walk(module, callee_frame, inner, branch, known):
                key = (found.kind, found.channel)
                if one.opcode != "fusion" or not found.channel:
                    yield found
                elif key not in spelt:
                    spelt.add(key)
                    yield found


def _collective(
    module: hlo.Module,
    frame: hlo.Frame,
    one: hlo.Instruction,
    kind: str,
    loops: tuple[Loop, ...],
    in_conditional: bool,
) -> Collective:
    """Measures one instruction."""
    defined = module.computations[frame.computation]
    arrays = [
        array
        for argument in hlo.names(one.arguments)
        for array in _ARRAY.findall(defined[argument].type)
    ]
    if kind == "all-gather":
        results = _ARRAY.findall(one.type)
        # The tuple of an all-gather-start holds the operands first.
        skip = len(arrays) if one.opcode.endswith("-start") else 0
        arrays = results[skip : skip + len(arrays)]
    # A TPU's fused all-reduce and slice is a reduce-scatter of the same operand.
    if kind == "all-reduce" and frame.computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    groups = _GROUPS.search(one.attributes)
    channel = re.search(r"\bchannel_id=(\d+)", one.attributes)
    origin = re.search(r'op_name="([^"]*)"', one.attributes)
    return Collective(
        kind=kind,
        numbers=sum(_numbers(dims) for _, dims in arrays),
        bytes=sum(_numbers(dims) * _bits(dtype) // 8 for dtype, dims in arrays),
        dtypes=tuple(dict.fromkeys(dtype for dtype, _ in arrays)),
        computation=frame.computation,
        loops=loops,
        trips=_product(loops),
        in_conditional=in_conditional,
        replica_groups=groups[1] if groups else "",
        channel=channel[1] if channel else "",
        name=origin[1] if origin else "",
    )


def _numbers(dims: str) -> int:
    """Returns the size of an array whose dimensions read like `8,<=128`."""
    return math.prod(int(one.strip(" <=")) for one in dims.split(",") if one.strip())


def _bits(dtype: str) -> int:
    """Returns the width of an HLO element type: `pred`, `bf16`, `f8e4m3fn`, `c64`."""
    width = re.match(r"[a-z]+(\d+)", dtype)
    return int(width[1]) if width else 8
