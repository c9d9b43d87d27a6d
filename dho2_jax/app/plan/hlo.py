# SPDX-License-Identifier: Apache-2.0
"""The text of a compiled HLO module as computations, instructions and trip counts.

`collectives` reads on from here.
"""

import re
from typing import NamedTuple


class Instruction(NamedTuple):
    """The right-hand side of one line of HLO."""

    type: str
    opcode: str
    arguments: str
    attributes: str


Computation = dict[str, Instruction]  # by name; the root a second time under "ROOT"


class Module(NamedTuple):
    """A parsed module."""

    computations: dict[str, Computation]
    entry: str


class Frame(NamedTuple):
    """A computation with the instruction that calls it, which binds its parameters."""

    computation: str
    call: Instruction | None
    caller: "Frame | None"


class _Affine(NamedTuple):
    """A scalar: something that a while loop carries, or zero, plus an offset."""

    carried: int | None  # its place in the tuple
    offset: int


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(
    r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ?\b([a-z][a-z\d\-]*)"
    r"\(([^()]*(?:\([^()]*\)[^()]*)*)\)(.*)$"
)
_CALLED = re.compile(
    r"\b(?:calls|to_apply|condition|body|branch_computations|true_computation"
    r"|false_computation|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_INDEX = re.compile(r"/\*index=\d+\*/")
_TRANSPARENT = frozenset(("bitcast", "convert", "copy", "copy-start", "copy-done"))
_INLINE = frozenset(("call", "fusion"))


def parse(text: str) -> Module:
    """Splits the text of a module into computations and instructions.

    Args:
      text: `compiled.as_text()`.

    Returns:
      The module.

    Raises:
      ValueError: If the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith("}"):
            current = None
        elif current is None and (header := _HEADER.match(line)):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _LINE.match(_INDEX.sub("", line))):
            current[found[1]] = Instruction(*found.groups()[1:])
            if line.lstrip().startswith("ROOT "):
                current["ROOT"] = current[found[1]]
    if not entry:
        raise ValueError(
            "`text` must be an HLO module with an ENTRY computation, got none; pass "
            "compiled.as_text()."
        )
    return Module(computations, entry)


def names(arguments: str) -> list[str]:
    """Returns the names among an instruction's arguments, printed with types or not."""
    if "%" in arguments:
        return re.findall(r"%([\w.\-]+)", arguments)
    return [one.split()[-1] for one in arguments.split(",") if one.strip()]


def called(instruction: Instruction) -> list[str]:
    """Returns the computations that an instruction runs."""
    if instruction.opcode in ("async-update", "async-done"):
        return []  # they repeat what their async-start names
    return [
        name.strip(" %")
        for group in _CALLED.findall(instruction.attributes)
        for name in group.strip("{}").split(",")
    ]


def attribute(instruction: Instruction, name: str) -> str:
    """Returns an attribute's value if it is a name or a number, or an empty string."""
    found = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.attributes)
    return found[1] if found else ""


def trip_count(module: Module, frame: Frame, loop: Instruction) -> int | None:
    """Tells how often a while loop runs: as XLA noted, or from its condition.

    Args:
      module: The module.
      frame: The computation that the loop stands in.
      loop: The `while` instruction.

    Returns:
      The number of turns, None if it is not known before the program runs.
    """
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if noted:
        return int(noted[1])
    test = Frame(attribute(loop, "condition"), loop, frame)
    while (root := _find(module, test, "ROOT")) and root.opcode in _INLINE:
        test = Frame(called(root)[0], root, test)
    if not root or root.opcode != "compare" or attribute(root, "direction") != "LT":
        return None  # JAX counts upwards
    low, high = (_affine(module, test, name) for name in names(root.arguments))
    if low is None or high is None or low.carried is None:
        return None
    body = Frame(attribute(loop, "body"), loop, frame)
    first, last = _begin(module, body, low), _constant(module, body, high)
    step = _step(module, body, low.carried)
    if first is None or last is None or step is None or step < 1:
        return None
    return max(0, -((first - last) // step))


def _find(module: Module, frame: Frame, name: str) -> Instruction | None:
    return module.computations.get(frame.computation, {}).get(name)


def _affine(module: Module, frame: Frame, name: str) -> _Affine | None:
    """Expresses a scalar by what the nearest while loop carries."""
    one = _find(module, frame, name)
    if one is None:
        return None
    arguments = names(one.arguments)
    if one.opcode == "constant":
        found = re.fullmatch(r"-?\d+", one.arguments)
        return _Affine(None, int(one.arguments)) if found else None
    if one.opcode in _TRANSPARENT:
        return _affine(module, frame, arguments[0])
    if one.opcode == "add":
        a, b = (_affine(module, frame, name) for name in arguments)
        if a is None or b is None or None not in (a.carried, b.carried):
            return None
        carried = a.carried if b.carried is None else b.carried
        return _Affine(carried, a.offset + b.offset)
    if one.opcode in _INLINE:
        return _affine(module, Frame(called(one)[0], one, frame), "ROOT")
    if one.opcode == "parameter" and frame.call and frame.call.opcode in _INLINE:
        given = names(frame.call.arguments)[int(one.arguments)]
        return _affine(module, frame.caller, given) if frame.caller else None
    if one.opcode == "get-tuple-element":
        index = int(attribute(one, "index"))
        source = _find(module, frame, arguments[0])
        if source is None:
            return None
        if source.opcode == "parameter" and frame.call and frame.call.opcode == "while":
            return _Affine(index, 0)
        if source.opcode in _INLINE:
            inner = Frame(called(source)[0], source, frame)
            return _element(module, inner, "ROOT", index)
    return None


def _element(module: Module, frame: Frame, name: str, index: int) -> _Affine | None:
    """Expresses one element of a tuple."""
    made = _find(module, frame, name)
    if made is None or made.opcode != "tuple":
        return None
    return _affine(module, frame, names(made.arguments)[index])


def _step(module: Module, body: Frame, index: int) -> int | None:
    """Returns what each turn of a loop adds to something that it carries."""
    after = _element(module, body, "ROOT", index)
    return after.offset if after and after.carried == index else None


def _begin(module: Module, body: Frame, value: _Affine) -> int | None:
    """Returns a value in the first turn of a loop, if it is a constant."""
    if value.carried is None:
        return value.offset
    if body.call is None or body.caller is None:
        return None
    given = names(body.call.arguments)[0]
    start = _element(module, body.caller, given, value.carried)
    first = start and _constant(module, body.caller, start)
    return None if first is None else first + value.offset


def _constant(module: Module, frame: Frame, value: _Affine) -> int | None:
    """Returns a value that is the same in every turn of the loops around it."""
    if value.carried is None:
        return value.offset
    body: Frame | None = frame
    while body and not (body.call and body.call.opcode == "while"):
        body = body.caller
    if body is None or _step(module, body, value.carried) != 0:
        return None
    return _begin(module, body, value)
