# SPDX-License-Identifier: Apache-2.0
"""README and the pages that go on from it are true: their code runs, names are real."""

import inspect
import pathlib
import re

import jax.numpy as jnp
import optax
import pytest

import dho2_jax

ROOT = pathlib.Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
SNIPPET = re.compile(r'^--8<-- "README.md:(\w+)"$', re.MULTILINE)
PAGES = {
    "README.md": 4,
    "docs/index.md": 5,
    "docs/devices.md": 1,
    "docs/refreshes.md": 3,
}
"""Pages whose blocks run in order, and the least number of refreshes in the end."""
BLOCKS = {
    "README.md": 2,
    "docs/index.md": 3,
    "docs/devices.md": 4,
    "docs/refreshes.md": 3,
}


def section(name):
    """What README has between the marks of a section."""
    start, end = (f"<!-- --8<-- [{which}:{name}] -->" for which in ("start", "end"))
    return README.read_text(encoding="utf-8").split(start)[1].split(end)[0]


def read(page):
    """A page as the site shows it, with the sections of README that it takes over."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return SNIPPET.sub(lambda match: section(match[1]), text)


def blocks_of(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def text():
    return README.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run_in_order(page):
    names: dict = {}
    blocks = blocks_of(read(page))
    assert len(blocks) == BLOCKS[page]
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    start = float(
        names["loss"]({"w": names["params"]["w"], "v": jnp.zeros(32)}, names["batch"])
    )
    assert float(names["loss"](names["params"], names["batch"])) < 0.7 * start
    assert int(dho2_jax.metrics(names["state"])["refreshes"]) >= PAGES[page]


def test_every_page_with_code_is_run():
    """Those of the recipes are run by test_guide.py."""
    found = {p.relative_to(ROOT).as_posix() for p in DOCS.rglob("*.md")}
    with_code = {p for p in found if blocks_of(read(p))}
    recipes = {p for p in with_code if p.startswith("docs/recipes/")}
    assert with_code - recipes == set(PAGES) - {"README.md"}


def test_readme_is_short(text):
    assert len(text.splitlines()) <= 180


def test_the_examples_are_short(text):
    hello, loop = blocks_of(text)

    def lines(block):
        return len([line for line in block.splitlines() if line.strip()])

    assert lines(hello) <= 5
    assert lines(loop) <= 15


def test_every_public_name_is_in_the_reference():
    pages = "".join(
        p.read_text(encoding="utf-8")
        for p in [*DOCS.glob("reference/*.md"), DOCS / "metrics.md"]
    )
    shown = re.findall(r"^::: dho2_jax\.([\w.]+)$", pages, re.MULTILINE)
    public = {
        name
        for name, value in vars(dho2_jax).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert len(shown) == len(set(shown))
    assert set(shown) == public | {"nnx.value_fn", "nnx.refresh"}


def test_every_argument_is_documented_and_every_metric_is_in_a_table():
    """The reference shows docstrings; the advice on metrics is a table."""
    arguments = inspect.getdoc(dho2_jax.dho2).split("\nArgs:\n")[1].split("\n\n")[0]
    for name in inspect.signature(dho2_jax.dho2).parameters:
        assert re.search(rf"^  {name}: ", arguments, re.MULTILINE), name
    metrics = (DOCS / "metrics.md").read_text(encoding="utf-8")
    rows = "\n".join(line for line in metrics.splitlines() if line.startswith("|"))
    state = dho2_jax.dho2(optax.sgd(0.1), num_largest=1).init(jnp.ones(3))
    for name in dho2_jax.metrics(state):
        assert f"`{name}`" in rows, name


def test_arguments_that_the_pages_name_are_real():
    known = {"of", "where", "schedule", "wrt", "static_args"}  # the last two: of others
    functions = [v for v in vars(dho2_jax).values() if inspect.isfunction(v)]
    functions.append(dho2_jax.dho2(optax.sgd(0.1)).update)
    for function in functions:
        known |= set(inspect.signature(function).parameters)
    for page in [README, *DOCS.rglob("*.md")]:
        named = re.findall(r"`(\w+)=[^`]*`", page.read_text(encoding="utf-8"))
        ours = {name for name in named if name.islower()}
        assert ours <= known, (page.name, ours - known)


def test_defaults_that_the_pages_name_are_the_real_ones():
    """Those of the aliases, which are those of `dho2`."""
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    (stated,) = re.findall(r"^- The defaults are (.*?), the$", index, re.M | re.S)
    shown = re.findall(r"`(\w+)=([^`]+)`", stated)
    assert len(shown) == 3
    for alias in (dho2_jax.dho2_adam, dho2_jax.dho2_heavy_ball, dho2_jax.dho2_muon):
        parameters = inspect.signature(alias).parameters
        for name, value in shown:
            default = parameters[name].default
            default = getattr(dho2_jax.Schedule(), name) if default is None else default
            assert str(default) == value, name


def test_the_pages_name_every_file_of_the_core():
    architecture = (DOCS / "architecture.md").read_text(encoding="utf-8")
    package = pathlib.Path(dho2_jax.__file__).parent
    rows = {
        row.split("|")[1].strip(" `/"): set(re.findall(r"`(\w+)`", row.split("|")[3]))
        for row in architecture.splitlines()
        if re.match(r"\| (`_\w+/`|the root) ", row)
    }
    for wing in sorted(p.parent for p in package.glob("_*/__init__.py")):
        files = {p.stem for p in wing.glob("*.py")} - {"__init__"}
        assert files <= rows[wing.name], wing.name
    root = {p.stem for p in package.glob("*.py")} - {"__init__"}
    assert root <= rows["the root"]


def test_the_test_command_is_marked(text):
    match = re.search(r"<!-- test-command -->\n```bash\n(.*?)\n```", text, re.DOTALL)
    assert match and "pytest" in match.group(1)
