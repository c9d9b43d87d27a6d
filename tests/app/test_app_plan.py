"""`dho2 plan`: its figures are those of the programs that `dho2 train` runs."""

import importlib.util
import json
import pathlib
import re
import subprocess
import types

import jax
import pytest

import dho2_jax
from dho2_jax.app import cli
from dho2_jax.app.errors import UserError
from dho2_jax.app.plan import collectives, figures, forecast, measure, topology
from dho2_jax.app.run import experiment, placement
from dho2_jax.app.run.programs import compile_programs

DIGITS = str(pathlib.Path(__file__).parents[2] / "configs" / "digits_mlp.py")
SMALL = [
    "--config.task.widths=(32,)",
    "--config.batch_size=64",
    "--config.curvature_batch_size=32",
    "--config.optimizer.num_largest=3",
    "--config.optimizer.base_rate=fixed",
]
N = 64 * 32 + 32 + 32 * 10 + 10

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def build(devices, *overrides):
    config = experiment.read_config(DIGITS, [*SMALL, *overrides])
    return experiment.build("digits", config, devices)


def fails(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    output = capsys.readouterr()
    assert exit_info.value.code == 2 and output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("dho2: error: ")
    return line


@pytest.mark.parametrize(
    ("name", "chips", "half", "double"),
    [
        ("v5e:16x16", 256, "v5e:8x16", "v5e:16x32"),
        ("v5e:8x16", 128, "v5e:8x8", "v5e:16x16"),
        ("v6e:2x2", 4, "v6e:1x2", "v6e:2x4"),
        ("v4:2x2x4", 16, "v4:2x2x2", "v4:2x4x4"),
        ("v5p:4x4x4", 64, "v5p:2x4x4", "v5p:4x4x8"),
        ("cpu:8", 8, "cpu:4", "cpu:16"),
        ("cpu:1", 1, None, "cpu:2"),
        ("v5e:128x128", 2**14, "v5e:64x128", None),
    ],
)
def test_neighbours(name, chips, half, double):
    found = topology.parse(name)
    assert (found.name, found.chips) == (name, chips)
    beside = (topology.half(found), topology.double(found))
    assert tuple(one and one.name for one in beside) == (half, double)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5f:2x2", "must begin with a generation of chips, got 'v5f:2x2'; did you"),
        ("", "choose one of `cpu`, `v4`, `v5e`, `v5p`, `v6e`"),
        ("v5e", "2 sizes joined by `x` after `v5e:`, got 'v5e'; for example v5e:16"),
        ("v4:2x2", "3 sizes joined by `x` after `v4:`"),
        ("v5e:0x4", "2 sizes joined by `x`"),
        ("v5e:-1x4", "2 sizes joined by `x`"),
        ("cpu:two", "one size after `cpu:`, got 'cpu:two'; for example cpu:8."),
        ("v5e:999x999", "at most 16384 chips, got 998001"),
    ],
)
def test_unknown_topology(name, expected, capsys):
    assert expected in fails(["plan", DIGITS, "--topology", name], capsys)


def test_wrong_arguments(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "required: --topology" in fails(["plan", DIGITS], capsys)
    arguments = ["plan", DIGITS, "--topology=cpu:8"]
    assert "did you mean" in fails([*arguments, "--config.stepz=1"], capsys)
    message = fails([*arguments, f"--json={tmp_path}/no/file"], capsys)
    assert "`--json` must name a file in a directory that exists" in message
    assert "no config file" in fails(["plan", "no.py", "--topology=cpu:8"], capsys)
    assert "unrecognized arguments" in fails(["train", *arguments[1:]], capsys)
    assert not list(tmp_path.iterdir())


def test_libtpu_is_missing(capsys, monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    message = fails(["plan", DIGITS, "--topology=v5e:4x4"], capsys)
    assert "`--topology=v5e:4x4` needs libtpu" in message
    assert "pip install libtpu" in message


def test_environment_of_the_child():
    inherited = {"XLA_FLAGS": "--a --xla_force_host_platform_device_count=3", "B": "b"}
    found = topology.environment(topology.parse("cpu:16"), inherited)
    assert found == {
        "B": "b",
        "XLA_FLAGS": "--a",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "16",
    }
    found = topology.environment(topology.parse("v5e:2x2"), inherited)
    assert (
        found["JAX_PLATFORMS"] == "cpu"
        and found["XLA_FLAGS"] == (inherited["XLA_FLAGS"])
    )
    assert found["ALLOW_MULTIPLE_LIBTPU_LOAD"] == found["TPU_SKIP_MDS_QUERY"] == "1"


def sums(text):
    found = collectives.read(text)
    return {
        name: {
            kind: total._asdict()
            for kind, total in collectives.summary(
                one for one in found if one.in_conditional == branch
            ).items()
        }
        for name, branch in (("collectives", False), ("in_branches", True))
    }


def test_figures_are_those_of_training():
    chosen = build(jax.devices())
    stages = []
    found = measure.measure(chosen, jax.devices(), stages.append)
    assert stages == ["training step", "refresh", "product", "parts of the state"]
    size = placement.curvature_batch_size(chosen.config, chosen.mesh)
    programs = compile_programs(
        chosen.task, chosen.dho2, size, chosen.mesh, chosen.param_specs
    )
    text = ""
    for name in ("step", "refresh"):
        program = getattr(programs, name)
        memory, text = program.memory_analysis(), program.as_text()
        aliased = memory.output_size_in_bytes - memory.alias_size_in_bytes
        assert found[name] == {
            "arguments": memory.argument_size_in_bytes,
            "new_results": aliased,
            "temporaries": memory.temp_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
            "total": memory.argument_size_in_bytes
            + aliased
            + memory.temp_size_in_bytes
            + memory.generated_code_size_in_bytes,
            "flops": program.cost_analysis()["flops"],
            **sums(text),
        }
    # The product is the body of the loop that runs m + 1 times.
    inside = collectives.within_loop(collectives.read(text), 8)
    assert inside and found["product"]["collectives"] == {
        kind: total._asdict() for kind, total in collectives.summary(inside).items()
    }
    reduced = found["product"]["collectives"]["all-reduce"]["numbers"]
    assert N <= reduced < 3 * N
    assert found["product"]["flops"] > 0

    assert found["num_parameters"] == N
    assert (found["num_pairs"], found["num_matvecs"]) == (3, 7)
    assert found["mesh"] == {"data": 8} and found["devices"] == found["chips"] == 8
    groups = found["groups"]
    assert groups["parameters"] == 4 * N
    assert groups["base_state"] == 8 * N + 4  # Adam's moments and its count
    assert groups["batch"] == 64 // 8 * (64 + 1) * 4
    # Together the devices hold the basis once, here with the padding of its slab.
    ratio = 8 * groups["eigenbasis"] / (3 * N * 4)
    assert found["padding"] == {"3": ratio, "8": ratio} and 1 <= ratio < 1.7
    # A scalar that the step only hands on is no argument of what XLA compiles.
    unread = sum(groups.values()) - found["step"]["arguments"]
    assert 0 <= unread <= 8


def test_periodic_refresh_is_part_of_the_step():
    devices = jax.devices()[:2]
    chosen = build(devices, "--config.optimizer.refresh=periodic")
    found = measure.measure(chosen, devices)
    assert found["refresh"] is None
    # The product is found in a branch of the step.
    reduced = found["product"]["collectives"]["all-reduce"]
    in_branches = found["step"]["in_branches"]["all-reduce"]
    assert N <= reduced["numbers"] < 3 * N
    assert in_branches["numbers"] >= 8 * reduced["numbers"]
    every_step = found["step"]["collectives"]["all-reduce"]
    assert N <= every_step["numbers"] < 2 * N
    assert "temporaries of a refresh" not in figures.report({"cpu:2": found}, "cpu:2")


def test_one_device():
    chosen = build(jax.devices()[:1])
    assert chosen.mesh is None
    found = measure.measure(chosen, jax.devices()[:1])
    assert found["mesh"] == {} and found["devices"] == 1
    assert found["step"]["collectives"] == found["product"]["collectives"] == {}
    assert found["groups"]["eigenbasis"] >= 3 * N * 4
    assert found["padding"]["3"] == found["groups"]["eigenbasis"] / (3 * N * 4)


@pytest.fixture(scope="module")
def here():
    devices = jax.devices()[:2]
    return measure.measure(build(devices), devices)


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(topology, "half", lambda one: None)
    monkeypatch.setattr(topology, "double", lambda one: None)


def test_plan_in_a_process(here, alone, tmp_path, capsys, monkeypatch):
    file = tmp_path / "plan.json"
    arguments = ["plan", DIGITS, *SMALL, "--topology=cpu:2", f"--json={file}"]
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    output = capsys.readouterr()
    assert exit_info.value.code == 0, output.err
    assert "Compiling for cpu:2: training step ..." in output.err
    measured = json.loads(file.read_text())
    assert measured == {"cpu:2": json.loads(json.dumps(here))}
    assert output.out.splitlines()[2].split() == ["for", "each", "chip", "cpu:2"]

    def never(*arguments, **keywords):
        raise AssertionError("started a process for what is known")

    monkeypatch.setattr(subprocess, "Popen", never)
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert tuple(capsys.readouterr()) == (output.out, "")
    with pytest.raises(AssertionError, match="for what is known"):
        forecast.plan(DIGITS, [*SMALL, "--config.optimizer.num_largest=4"], "cpu:2")


def test_what_cannot_be_had_is_said(monkeypatch):
    asked = []

    def ask(path, overrides, one):
        asked.append((one.name, overrides))
        if one.name != "cpu:8":
            raise UserError(f"no {one.name}.")
        return {"chips": 8}

    monkeypatch.setattr(forecast, "_ask", ask)
    shape = ["--config.mesh_shape=(2,4)", "--config.mesh_axes=('a','b')"]
    found = forecast.plan(DIGITS, shape, "cpu:8")
    assert found == {
        "cpu:4": {"refused": "no cpu:4."},
        "cpu:8": {"chips": 8},
        "cpu:16": {"refused": "no cpu:16."},
    }
    assert asked[0] == ("cpu:8", shape)
    # The longest axis of a mesh of fixed shape takes what the others leave.
    fitted = ("cpu:4", [*shape, "--config.mesh_shape=(2,-1)"])
    assert asked[1] == fitted
    config = experiment.read_config(DIGITS, fitted[1])
    assert tuple(config.mesh_shape) == (2, -1)
    with pytest.raises(UserError, match=r"no cpu:4\."):
        forecast.plan(DIGITS, [], "cpu:4")


def test_child_that_dies(tmp_path, monkeypatch):
    monkeypatch.setattr(forecast.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"failed with exit status 1 \(nothing was"):
        forecast.plan(DIGITS, [], "cpu:4")


def test_real_error_of_a_child_is_said(alone, capsys):
    """It ends with JAX's notice that frames were removed; that is not what failed."""
    source = (
        "import json, sys, jax\n"
        "from dho2_jax.app.plan import measure\n"
        "def fail(*a): jax.jit(lambda x: x @ undefined)(jax.numpy.ones(3))\n"
        "measure.measure = fail\n"
        "measure.main()\n"
    )
    arguments = ["plan", DIGITS, *SMALL, "--topology=cpu:1"]

    def start(command, **keywords):
        return Popen([command[0], "-c", source], **keywords)

    Popen = subprocess.Popen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", start)
        said = fails(arguments, capsys)
    assert "compiling for `cpu:1` failed (NameError: name 'undefined' is not" in said
    assert "frames" not in said


OPERATORS = ("hessian", "ggn", "reverse_over_reverse", "central_difference")


@pytest.mark.parametrize("curvature", OPERATORS)
def test_every_operator(curvature):
    one = jax.devices()[:1]
    chosen = build(one, f"--config.optimizer.curvature={curvature}")
    found = measure.measure(chosen, one)
    assert found["product"]["flops"] > 0
    assert found["refresh"]["flops"] > found["product"]["flops"]
    gradient = found["step"]["flops"]
    assert 0.1 < found["product"]["flops"] / gradient < 10


def test_operators_are_all():
    with pytest.raises(ValueError, match="`curvature` must be one of ") as error:
        dho2_jax.curvature_matvec("none", None, {})
    assert re.findall(r"'(\w+)'", str(error.value))[:-1] == list(OPERATORS)


def test_table(here):
    large = here | {"refresh": {"too_large": "needs 24.00 GiB, 15.75 GiB are there"}}
    text = figures.report(
        {
            "v5e:1x2": here | {"chips": 4},
            "v5e:2x2": large,
            "v5e:2x4": {"refused": "No"},
        },
        "v5e:2x2",
    )
    lines = text.splitlines()
    assert f"{N:,} parameters, k + l = 3, m = 7, batch 64 (32 of it" in lines[0]
    rows = {line.split("  ")[0]: line for line in lines}
    assert rows["mesh"].split()[1:] == ["data", "2"] * 2
    assert rows["the chip's memory"].count("15.75 of 16 GiB") == 2
    assert rows["in all during a refresh"].endswith("too large")
    assert "%" in rows["in all during a step"]
    for label in figures.GROUPS.values():
        assert rows[label].count("B") >= 2
    assert rows["temporaries of a refresh"].count("iB") == 1
    assert "collectives of one Lanczos product" in rows
    assert "FLOPs of one product alone" in rows
    assert sum(line.startswith("  with k + l = ") for line in lines) == 2
    assert lines[-3:] == [
        "v5e:1x2: the mesh leaves 2 chips idle.",
        "v5e:2x2: a refresh does not fit: it needs 24.00 GiB, 15.75 GiB are there.",
        "v5e:2x4: No",
    ]


@needs_libtpu
def test_tpu(alone):
    found = forecast.plan(DIGITS, SMALL, "v5e:2x2")["v5e:2x2"]
    assert found["devices"] == 4
    groups = found["groups"]
    assert 4 * N <= groups["parameters"] < 16 * N
    unread = sum(groups.values()) - found["step"]["arguments"]
    assert 0 <= unread <= 2 * 512  # a scalar takes 512 bytes
    assert found["step"]["code"] > 0 and found["step"]["flops"] > 0
    product = found["product"]["collectives"]
    assert N <= product["all-reduce"]["numbers"] < 3 * N
    text = figures.report({"v5e:2x2": found}, "v5e:2x2")
    assert "15.75 of 16 GiB" in text


def test_bytes_of_what_no_chip_holds(monkeypatch):
    mesh = jax.make_mesh((8,), ("x",))

    def array(rows, *spec):
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return jax.ShapeDtypeStruct((rows, 10), "float32", sharding=where)

    tree = [array(8), {"a": array(16, "x")}]
    assert measure.argument_bytes(tree) == 320 + 80
    assert measure.argument_bytes({}) == 0

    def refuse(*arguments, **keywords):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too large")

    refusing = types.SimpleNamespace(lower=refuse)
    monkeypatch.setattr(measure.jax, "jit", lambda *a, **k: refusing)
    assert measure.argument_bytes(tree) == 320 + 80


def test_program_that_is_too_large():
    class Lowered:
        text = (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, "
            "the total memory required for HLO temporaries (24.00G) exceeds available "
            "HBM (15.75G). HLO module: jit_step.\nSee elsewhere."
        )

        def lower(self):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError(self.text)

    found, text = measure._measure_program(measure.Blueprint(Lowered(), ()))
    reason = "needs 24.00 GiB for temporaries, 15.75 GiB are there"
    assert (found, text) == ({"too_large": reason}, "")
    Lowered.text = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        measure._measure_program(measure.Blueprint(Lowered(), ()))


@needs_libtpu
def test_libtpu_refuses_a_shape(capsys):
    with pytest.raises(UserError) as error:
        forecast.plan(DIGITS, SMALL, "v5e:3x3")
    assert "libtpu does not know the topology `v5e:3x3`" in str(error.value)
    assert "the nearest that it may know is v5e:4x4." in str(error.value)
