"""The shape of the package: data flows one way, and everything public is documented."""

import ast
import inspect
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

import dho2_jax

ROOT = pathlib.Path(dho2_jax.__file__).parent
CORE = sorted(
    path
    for path in [*ROOT.glob("_*.py"), *ROOT.glob("_*/*.py")]
    if path.stem != "__init__"
)
EVERYTHING = sorted(ROOT.rglob("*.py"))

WINGS = ("_numerics", "_vectors", "_state", "_refresh", "_step")
"""Bottom up; after them come the root's own modules."""

LAYERS = (
    {"_types"},
    {"_checks"},
    {"_numerics.linalg", "_numerics.losses", "_numerics.reaches"},
    {"_numerics.operators", "_numerics.lanczos", "_numerics.ritz"},
    {"_numerics.subspaces", "_numerics.rates", "_numerics.fixed_rate"},
    {"_numerics.rules", "_numerics.schedules", "_numerics.chunks"},
    {"_vectors.sharding", "_vectors.axes"},
    {"_vectors.layouts", "_vectors.transfer"},
    {"_vectors.slices", "_vectors.device_groups"},
    {"_vectors.second_mesh"},
    {"_state.config"},
    {"_state.states"},
    {"_state.bases", "_state.restore", "_state.timetable", "_state.views"},
    {"_state.specs"},
    {"_refresh.products"},
    {"_refresh.at_once"},
    {"_refresh.overlapped", "_refresh.staggered"},
    {"_refresh.across_axis", "_refresh.ways"},
    {"_step.proposals"},
    {"_step.algebra", "_step.trials"},
    {"_update"},
    {"_transform"},
    {"_alias"},
)
"""Bottom up; a module imports from lower layers only."""

APP = ROOT / "app"
APP_ROOMS = (
    {"errors", "record", "fields", "config_files"},
    {"data"},
    {"tasks"},
    {"show"},
    {"run"},
    {"plan"},
    {"cli"},
)
"""The application's folders, and the files at its root; bottom up, as above."""

RATES = {
    "newton_learning_rate",
    "subspace_decay",
    "damping",
    "max_base_scaling",
    "rate_schedule",
}
PUBLIC = sorted(
    name
    for name, value in vars(dho2_jax).items()
    if not name.startswith("_") and not inspect.ismodule(value)
)


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """Dotted names that a file imports, wherever in it: `from a import b` is `a.b`."""
    names = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def core_imports(path):
    """Names of the core modules that a file imports, such as `_numerics.linalg`."""
    known = {name for names in LAYERS for name in names}
    found = [re.match(r"dho2_jax\.(_\w+(\.\w+)?)", name) for name in imports(path)]
    named = {match[1] for match in found if match}
    return {name if name in known else name.split(".")[0] for name in named}


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def layer(module):
    return next(i for i, names in enumerate(LAYERS) if module in names)


# --- imports -----------------------------------------------------------------------


def test_every_core_module_has_a_layer():
    modules = {name_of(path) for path in CORE}
    assert modules == {name for names in LAYERS for name in names}


def test_wings_lie_one_above_the_other():
    wings = [name.split(".")[0] for names in LAYERS for name in sorted(names)]
    inside = [wing for wing in wings if wing in WINGS]
    assert inside == sorted(inside, key=WINGS.index)
    assert {path.parent.name for path in CORE} - {ROOT.name} == set(WINGS)


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.stem)
def test_data_flows_one_way(path):
    own = layer(name_of(path))
    above = {name for name in core_imports(path) if layer(name) >= own}
    assert not above, f"{path.name} imports from its own layer or above"


def test_numerics_know_nothing_of_the_state():
    for path in (ROOT / "_numerics").glob("*.py"):
        wings = {name.split(".")[0] for name in core_imports(path)}
        assert wings <= {"_types", "_checks", "_numerics"}


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.stem)
def test_the_core_imports_jax_optax_and_the_standard_library_alone(path):
    allowed = {"jax", "optax", "numpy", "dho2_jax"} | sys.stdlib_module_names
    names = imports(path)
    assert {name.split(".")[0] for name in names} <= allowed
    assert not any(name.startswith(("dho2_jax.app", "dho2_jax.nnx")) for name in names)


def attributes(path):
    """Dotted names used in a file, such as `jax.config.update`."""
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda p: f"{p.parent.stem}-{p.stem}")
def test_only_public_apis_and_no_global_configuration(path):
    names = set(imports(path)) | attributes(path)
    private = re.compile(r"(jax|optax|flax|orbax)(\.\w+)*\._\w+|jax\.core\b")
    assert not [name for name in names if private.match(name)]
    assert not [name for name in names if re.match(r"jax\.config\b", name)]
    assert "enable_x64" not in path.read_text(encoding="utf-8")
    assert not [name for name in names if name.endswith("float64")]


def test_the_application_and_the_flax_helpers_use_public_names_alone():
    for path in [*sorted((ROOT / "app").rglob("*.py")), ROOT / "nnx.py"]:
        assert not core_imports(path), f"{path.name} reaches into the core"


APP_FILES = sorted(path for path in APP.rglob("*.py") if path.stem != "__init__")


def app_name(path):
    return ".".join(path.relative_to(APP).with_suffix("").parts)


def app_imports(path):
    """Names below `dho2_jax.app` of the application's files that a file imports."""
    known = set(map(app_name, APP_FILES))
    found = [name.removeprefix("dho2_jax.app.") for name in imports(path)]
    found = [name if name in known else name.rpartition(".")[0] for name in found]
    return known.intersection(found)


def floor(name):
    room = name.partition(".")[0]
    return next(i for i, names in enumerate(APP_ROOMS) if room in names)


def test_every_room_of_the_application_has_a_floor():
    rooms = {app_name(path).partition(".")[0] for path in APP_FILES}
    assert rooms == set().union(*APP_ROOMS)


@pytest.mark.parametrize("path", APP_FILES, ids=app_name)
def test_the_application_flows_one_way(path):
    above = {one for one in app_imports(path) if floor(one) > floor(app_name(path))}
    assert not above, f"{path.name} imports from a room above its own"


def test_no_circle_within_a_room():
    waiting = {app_name(path): app_imports(path) for path in APP_FILES}
    while free := [one for one, needs in waiting.items() if not needs & waiting.keys()]:
        for one in free:
            del waiting[one]
    assert not waiting


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda p: f"{p.parent.stem}-{p.stem}")
def test_files_are_short_and_say_what_they_are(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 350
    if lines:
        assert ast.get_docstring(parse(path))
        assert lines[0] == "# SPDX-License-Identifier: Apache-2.0"


def test_contractions_are_made_in_linalg():
    """Everywhere else a contraction names its precision, the m x m ones included."""
    for path in CORE:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.BinOp):
                assert not isinstance(node.op, ast.MatMult), path.name
            if isinstance(node, ast.Call) and re.search(
                r"\.(matmul|tensordot|einsum|dot|vdot|dot_general)$",
                ast.unparse(node.func),
            ):
                if ast.unparse(node.func).startswith("linalg."):
                    continue
                given = {keyword.arg for keyword in node.keywords}
                assert "precision" in given, f"{path.name}:{node.lineno}"


# --- documentation -----------------------------------------------------------------


def documented_arguments(text):
    """Names in the `Args:` section of a docstring."""
    section = re.search(r"^Args:\n((?:  .*\n?|\n)+)", inspect.cleandoc(text), re.M)
    return re.findall(r"^  (\w+):", section[1], re.M) if section else []


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    value = getattr(dho2_jax, name)
    if isinstance(value, tuple):  # a constant: its sentence stands below it
        return
    text = inspect.getdoc(value)
    assert text and text.splitlines()[0].endswith(".")
    if inspect.isclass(value):
        return
    refers = re.search(r"as for `\w+`", text)
    returns_nothing = inspect.signature(value).return_annotation is None
    assert "Returns:" in text or refers or returns_nothing
    assert "Args:" in text or refers
    own = [
        parameter
        for parameter, p in inspect.signature(value).parameters.items()
        if p.kind is not p.VAR_KEYWORD
    ]
    if "Args:" in text and "keywords of `dho2` follow" not in " ".join(text.split()):
        assert documented_arguments(text) == own


def test_every_keyword_of_dho2_is_documented_with_its_choices():
    text = inspect.getdoc(dho2_jax.dho2)
    parameters = inspect.signature(dho2_jax.dho2).parameters
    assert documented_arguments(text) == list(parameters)
    for choice in ("periodic", "external", "ema", "heavy_ball", "nesterov", "fixed"):
        assert f'"{choice}"' in text
    for choice in ("ggn", "reverse_over_reverse", "central_difference", "abs", "base"):
        assert f'"{choice}"' in text
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in text


def test_static_args_are_all_but_the_rates_and_the_base():
    parameters = list(inspect.signature(dho2_jax.dho2).parameters)
    static = [p for p in parameters if p not in RATES | {"base_optimizer"}]
    assert list(dho2_jax.STATIC_ARGS) == static
    for alias in (name for name in PUBLIC if name.startswith("dho2_")):
        own = inspect.signature(getattr(dho2_jax, alias)).parameters
        assert set(dho2_jax.STATIC_ARGS) <= set(own)


def test_documented_static_arguments_are_the_static_ones():
    text = inspect.getdoc(dho2_jax.dho2)
    section = re.search(r"^Args:\n((?:  .*\n?|\n)+)", text, re.M)[1]
    entries = re.split(r"^  (?=\w+:)", section, flags=re.M)[1:]
    static = [e.split(":")[0] for e in entries if e.strip().endswith("Static.")]
    assert tuple(static) == dho2_jax.STATIC_ARGS


@pytest.mark.parametrize("base_rate", ["curvature", "fixed"])
def test_documented_metrics_are_the_returned_ones(base_rate):
    tx = dho2_jax.dho2(optax.sgd(0.1), num_largest=1, base_rate=base_rate)
    found = dho2_jax.metrics(tx.init({"a": jnp.ones(2)}))
    text = inspect.getdoc(dho2_jax.metrics)
    entries = re.findall(r"^\s*- ((?:\"\w+\"(?:, )?)+):", text, re.M)
    documented = [key for entry in entries for key in re.findall(r"\w+", entry)]
    assert documented == list(found)
    assert all(isinstance(x, jax.Array) and x.shape == () for x in found.values())
