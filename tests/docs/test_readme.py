# SPDX-License-Identifier: Apache-2.0
"""The README is true: its code runs, its tables are complete."""

import inspect
import pathlib
import re

import jax.numpy as jnp
import optax
import pytest

import dho2_jax

README = pathlib.Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def text():
    return README.read_text(encoding="utf-8")


def test_code_blocks_run_in_order(text):
    one_device, several = text.split("## On several devices")
    names: dict = {}
    for part, least in ((one_device, 4), (several, 1)):
        blocks = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
        assert len(blocks) >= 3
        for block in blocks:
            exec(compile(block, "README.md", "exec"), names)
        start = float(
            names["loss"](
                {"w": names["params"]["w"], "v": jnp.zeros(32)}, names["batch"]
            )
        )
        assert float(names["loss"](names["params"], names["batch"])) < 0.7 * start
        assert int(dho2_jax.metrics(names["state"])["refreshes"]) >= least


def test_the_example_is_short(text):
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    code = [line for line in block.splitlines() if line.strip()]
    assert len(code) <= 17


def test_every_argument_and_metric_is_in_a_table(text):
    rows = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    for name in inspect.signature(dho2_jax.dho2).parameters:
        assert f"`{name}`" in rows, name
    state = dho2_jax.dho2(optax.sgd(0.1), num_largest=1).init(jnp.ones(3))
    for name in dho2_jax.metrics(state):
        assert f"`{name}`" in rows, name


def test_defaults_in_the_table_are_the_real_ones(text):
    defaults = {
        name: p.default
        for name, p in inspect.signature(dho2_jax.dho2).parameters.items()
    }
    for name, shown in re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text, re.MULTILINE):
        real = defaults.get(name)
        if isinstance(real, int | float | str):
            assert shown.strip('` "') == str(real), name


def test_the_test_command_is_marked(text):
    match = re.search(r"<!-- test-command -->\n```bash\n(.*?)\n```", text, re.DOTALL)
    assert match and "pytest" in match.group(1)
