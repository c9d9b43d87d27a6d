"""What the optimised program must not do: copy the basis when nothing is refreshed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dho2_jax

ROWS, SHAPE = 3, (256, 7)
BASIS = f"f32[{ROWS},1,{SHAPE[0]},{SHAPE[1]}]"  # no other array has this shape


def loss(params):
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.standard_normal((5, SHAPE[0])), jnp.float32)
    return jnp.sum(jnp.tanh(inputs @ params["w"] + params["b"] - 1) ** 2)


def compiled_step(donate, **kwargs):
    """`(compiled, arguments)` of one training step with a periodic refresh."""
    kwargs = {"num_largest": ROWS, "num_matvecs": 5} | kwargs
    tx = dho2_jax.dho2(optax.sgd(0.1), **kwargs)
    params = {"w": jnp.full(SHAPE, 0.1), "b": jnp.zeros(SHAPE[1])}

    def step(params, state):
        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params, value_fn=loss)
        return optax.apply_updates(params, updates), state

    arguments = params, tx.init(params)
    jitted = jax.jit(step, donate_argnums=(0, 1) if donate else ())
    return jitted.lower(*arguments).compile(), arguments


def computations(text):
    """Name to lines, for every computation of an HLO module; the entry is `ENTRY`."""
    found, name = {}, None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            name = "ENTRY" if header[1] else header[2]
            found[name] = []
        elif name:
            found[name].append(line.strip())
    return found


def called_from(found, name):
    """Names of all computations that running `name` may run, itself included."""
    seen, todo = set(), [name]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            words = set(re.findall(r"%([\w.\-]+)", " ".join(found[name])))
            todo += [word for word in words if word in found]
    return seen


def refresh_branches(found):
    """`(untaken, taken)`: the branches of the conditional that returns the basis."""
    lines = [
        line
        for lines in found.values()
        for line in lines
        if " conditional(" in line and BASIS in line.split(" conditional(")[0]
    ]
    assert len(lines) == 1
    branches = re.search(r"branch_computations=\{%([\w.\-]+), %([\w.\-]+)\}", lines[0])
    return branches[1], branches[2]


def copies_of_basis(found, names):
    return [
        line
        for name in sorted(names)
        for line in found[name]
        if re.search(rf"= {re.escape(BASIS)}\S* copy\(", line)
    ]


@pytest.fixture(scope="module")
def donated():
    return compiled_step(donate=True)


@pytest.mark.slow
def test_the_refresh_is_the_second_branch(donated):
    """XLA elides the copies of branch 0 only."""
    found = computations(donated[0].as_text())
    untaken, taken = refresh_branches(found)
    assert len(called_from(found, untaken)) < 3
    assert len(called_from(found, taken)) > 20
    assert any("while(" in line for n in called_from(found, taken) for line in found[n])


@pytest.mark.slow
@pytest.mark.parametrize(
    "base_rate, donate", [("curvature", True), ("curvature", False), ("fixed", True)]
)
def test_an_untaken_refresh_copies_no_basis(base_rate, donate, donated):
    compiled = donated[0]
    if (base_rate, donate) != ("curvature", True):
        compiled, _ = compiled_step(donate, base_rate=base_rate)
    found = computations(compiled.as_text())
    untaken, taken = refresh_branches(found)
    assert copies_of_basis(found, called_from(found, untaken)) == []
    copies = copies_of_basis(found, set(found) - called_from(found, taken))
    assert len(copies) == (0 if donate else 1)  # without donation, the result itself


@pytest.mark.slow
def test_donated_state_aliases(donated):
    compiled, arguments = donated
    size = sum(x.nbytes for x in jax.tree.leaves(arguments))
    # Two scalars that are always equal (the scaling, in the rule and for the logger)
    # are one result.
    assert compiled.memory_analysis().alias_size_in_bytes >= size - 4
    basis = arguments[1].curvature.subspace.eigenvectors.leaves
    header = compiled.as_text().split("entry_computation_layout")[0]
    leaves = jax.tree.leaves(arguments)
    for leaf in basis:
        position = next(i for i, x in enumerate(leaves) if x is leaf)
        assert f"{{{position}}}: ({position}, {{}}, may-alias)" in header


def test_an_external_step_has_no_lanczos_in_it():
    compiled, _ = compiled_step(donate=True, refresh="external")
    text = compiled.as_text()
    assert copies_of_basis(computations(text), computations(text)) == []
    assert not re.search(r"\bwhile\(|[^w]eigh", text)
