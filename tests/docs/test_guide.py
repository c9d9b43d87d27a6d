"""Every recipe runs alone, trains, and refreshes without a rejection."""

import collections
import functools
import math
import pathlib
import re
import types

import jax
import pytest

import dho2_jax

nnx = pytest.importorskip("flax.nnx")

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
SOURCES = [p.read_text(encoding="utf-8") for p in sorted(DOCS.glob("recipes/*.md"))]
SECTIONS = {
    section.split("\n")[0]: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for source in SOURCES
    for section in re.split(r"^## ", source, flags=re.MULTILINE)[1:]
}
WITHOUT_CODE = "Which wrapper goes where"
RECIPES = {name: code for name, code in SECTIONS.items() if name != WITHOUT_CODE}

pytestmark = pytest.mark.usefixtures("quick_compilation")


def state_of(names):
    """The optimizer's state, in whatever the block keeps it."""
    holder = names.get("optimizer") or names.get("ts")
    return names["state"] if holder is None else holder.opt_state


@pytest.fixture
def traces(monkeypatch):
    """How often each function that a block jits is traced, by name."""
    counts: collections.Counter = collections.Counter()

    def counting(jit):
        def jitted(function, **kwargs):
            if not isinstance(function, types.FunctionType):  # Flax's, of its own jit
                return jit(function, **kwargs)

            @functools.wraps(function)
            def counted(*args):
                counts[function.__name__] += 1
                return function(*args)

            return jit(counted, **kwargs)

        return jitted

    for module in (jax, nnx):
        monkeypatch.setattr(module, "jit", counting(module.jit))
    return counts


@pytest.mark.parametrize("heading", RECIPES)
def test_a_recipe_runs_alone(heading, traces, capsys):
    (block,) = RECIPES[heading]
    assert len([line for line in block.splitlines() if line.strip()]) <= 45
    names: dict = {}
    exec(compile(block, heading, "exec"), names)
    first, last = float(names["values"][0]), float(names["values"][-1])
    assert math.isfinite(last) and last < 0.7 * first
    seen = dho2_jax.metrics(state_of(names))
    assert int(seen["refreshes"]) >= 2 and int(seen["rejected"]) == 0
    assert int(seen["num_active"]) > 0
    assert traces["step"] == 1 and traces["refresh"] <= 1
    assert capsys.readouterr().out.count("\n") >= 1


def test_every_block_is_a_recipe():
    blocks = sum(source.count("```python") for source in SOURCES)
    assert blocks == len(RECIPES) >= 19


def written(page):
    """A page without its code, where brackets mean other things."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", written(page), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]


PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(DOCS.rglob("*.md")),
    *sorted(ROOT.glob("benchmarks/*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", written(page)):
        if re.match(r"\w+:", target):
            continue
        place, _, anchor = target.partition("#")
        path = (page.parent / place).resolve() if place else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


def test_what_the_pages_say_of_metrics_is_of_real_ones():
    section = (DOCS / "metrics.md").read_text(encoding="utf-8")
    keys = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", section, re.MULTILINE)
    named = {name for key in keys for name in re.findall(r"\w+", key)}
    tx = dho2_jax.dho2_sgd(0.1, num_largest=1)
    assert named and named <= set(dho2_jax.metrics(tx.init({})))
