"""`dho2 spectrum`: the curvature in any checkpoint, without config or model."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import quadratic, refreshed
from matplotlib.image import imread

import dho2_jax
from dho2_jax.app import cli
from dho2_jax.app.show import saved, spectrum, writers

ocp = pytest.importorskip("orbax.checkpoint")

pytestmark = pytest.mark.usefixtures("quick_compilation")

EIGENVALUES = [40.0, 9.0, 3.0, 0.5, 0.1, -2.0]


@pytest.fixture(scope="module")
def state():
    """A state that has found all but one of known eigenvalues."""
    tx = dho2_jax.dho2(
        optax.adam(1e-2),
        num_largest=4,
        num_smallest=1,
        num_matvecs=6,
        refresh="external",
    )
    return refreshed(tx, {"w": jnp.ones(6)}, quadratic(np.diag(EIGENVALUES)))


@pytest.fixture(scope="module")
def later(state):
    """As if curvature had doubled by another refresh."""
    space = state.curvature.subspace
    space = space._replace(
        eigenvalues=2 * space.eigenvalues, next_eigenvalue=2 * space.next_eigenvalue
    )
    return state._replace(curvature=state.curvature._replace(subspace=space))


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["spectrum", *map(str, arguments)])
    output = capsys.readouterr()
    return exit_info.value.code, output.out, output.err


def fails(capsys, *arguments):
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == ""
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("dho2: error: "), err
    return lines[0]


def save(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def manage(path, states, name="train"):
    """As in a loop of one's own: a nest, beside other things."""
    with ocp.CheckpointManager(path) as manager:
        for step, state in states.items():
            nest = {"model": {"w": jnp.ones(6)}, "opt": (optax.EmptyState(), [state])}
            arguments = {name: ocp.args.StandardSave(nest), "x": ocp.args.JsonSave({})}
            manager.save(step, args=ocp.args.Composite(**arguments))


def test_a_checkpoint_of_ones_own_loop(state, later, tmp_path, capsys):
    manage(tmp_path / "mine", {5: state, 20: later})
    picture = tmp_path / "seen.png"
    status, out, err = run(capsys, tmp_path / "mine", "--picture", picture)
    assert status == 0 and err == "", err
    lines = [line.split() for line in out.splitlines() if line]
    values = {line[0]: float(line[1]) for line in lines if line[0] in "12345"}
    expected = 2 * np.array([40.0, 9.0, 3.0, 0.5, -2.0])
    np.testing.assert_allclose(list(values.values()), expected, rtol=1e-3)
    numbers = {line[0]: line[1] for line in lines}
    assert float(numbers["next"]) == pytest.approx(0.2, rel=1e-2)
    assert numbers["refreshes"] == "1" and numbers["age"] == "0"
    assert imread(picture).shape[1] > 1500


def test_what_it_says_is_what_metrics_say(state, tmp_path):
    save(tmp_path / "state", {"a": [state]})
    found, rows = spectrum.load(str(tmp_path / "state"))
    metrics = jax.device_get(dho2_jax.metrics(state))
    for name, value in found.metrics.items():
        assert value == pytest.approx(float(metrics[name]), rel=1e-6), name
    space = dho2_jax.subspace(state)
    np.testing.assert_array_equal(found.eigenvalues, space.eigenvalues[::-1])
    np.testing.assert_array_equal(found.residuals, space.residuals[::-1])
    assert found.next_eigenvalue == float(space.next_eigenvalue)
    (row,) = rows
    assert row["eigenvalues"] == space.eigenvalues.tolist()


def test_one_step_and_those_before_it(state, later, tmp_path):
    first = state._replace(
        curvature=state.curvature._replace(count=jnp.asarray(5, jnp.int32))
    )
    counters = later.curvature.counters._replace(refreshes=jnp.asarray(2, jnp.int32))
    curvature = later.curvature._replace(
        counters=counters, count=jnp.asarray(20, jnp.int32)
    )
    manage(tmp_path, {5: first, 20: later._replace(curvature=curvature)})
    for where, steps in (("", [5, 20]), ("20", [5, 20]), ("5/train", [5])):
        found, rows = spectrum.load(str(tmp_path / where))
        assert found.metrics["count"] == steps[-1]
        assert [row["step"] for row in rows] == steps
        assert max(rows[-1]["eigenvalues"]) == pytest.approx(found.eigenvalues[0])


def test_the_history_is_that_of_the_metrics(state, tmp_path):
    manage(tmp_path / "dho2" / "checkpoints", {7: state})
    old = {"step": 0, "eigenvalues": [1.0], "next_eigenvalue": 0.1, "age": 0}
    with writers.open_log(tmp_path / "dho2") as write:
        write(old)
        write({"step": 0, "loss": 3.0})
        write(old | {"step": 9})  # after the checkpoint, whose count is 0
    _, rows = spectrum.load(str(tmp_path))
    assert rows == [old]


def test_metrics_of_another_loop_are_no_history(state, tmp_path):
    manage(tmp_path / "checkpoints", {7: state})
    lines = '{"eigenvalues": [1.0]}\n{"step": 0, "eigenvalues": [2.0]}\n'
    (tmp_path / "metrics.jsonl").write_text(lines)
    found, rows = spectrum.load(str(tmp_path))
    assert [row["eigenvalues"][-1] for row in rows] == [found.eigenvalues[0]]


def test_states_in_other_nests(state, tmp_path):
    """Boxed by NNX; behind Optax wrappers; by Orbax's newer interface; fixed rate."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = dho2_jax.dho2(optax.adam(1e-3), num_largest=2, base_rate="fixed")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    save(tmp_path / "nnx", nnx.state((model, optimizer)))
    found, rows = spectrum.load(str(tmp_path / "nnx"))
    assert len(found.eigenvalues) == 0 and rows == []
    assert "No eigenpairs yet" in spectrum.report(found)

    from orbax.checkpoint import v1

    v1.save(tmp_path / "new" / "step_3", {"opt": (optax.EmptyState(), state)})
    found, _ = spectrum.load(str(tmp_path / "new"))
    assert found.eigenvalues[0] == pytest.approx(40.0, rel=1e-3)


def test_what_is_being_written_is_left_out(state, later, tmp_path):
    manage(tmp_path, {5: state})
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "whole", {"a": later})
    (tmp_path / "whole").rename(tmp_path / "20.orbax-checkpoint-tmp-1")
    assert saved.steps_in(tmp_path) == [5] and saved.steps_in(tmp_path / "no") == []
    assert [*saved.trees_in(tmp_path, 3)] == [tmp_path / "5" / "train"]
    assert spectrum.load(str(tmp_path))[0].path == tmp_path / "5" / "train"


def test_no_eigenvector_is_read(state, tmp_path, monkeypatch):
    save(tmp_path / "state", {"a": state, "params": jnp.ones(6)})
    read, restore = [], ocp.PyTreeCheckpointer.restore

    def recorded(self, *args, **kwargs):
        found = restore(self, *args, **kwargs)
        leaves = jax.tree.leaves(found)
        read.extend(x for x in leaves if isinstance(x, np.ndarray))
        return found

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", recorded)
    spectrum.load(str(tmp_path / "state"))
    assert read and max(x.size for x in read) == 5


def test_wrong_paths(state, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "there is no directory `nowhere`" in fails(capsys, "nowhere")
    pathlib.Path("empty").mkdir()
    assert "holds no complete Orbax checkpoint" in fails(capsys, "empty")
    save(tmp_path / "plain", {"params": jnp.ones(3)})
    assert "no DHO² state in them" in fails(capsys, "plain")
    save(tmp_path / "runs" / "a", state)
    save(tmp_path / "runs" / "b", state)
    assert "of 2 runs; name one of them, such as `runs/a`" in fails(capsys, "runs")
    save(tmp_path / "two", {"g": state, "d": state})
    assert "2 DHO² states (d.curvature, g.curvature)" in fails(capsys, "two")
    assert "--picture" in fails(capsys, "runs/a", "--picture", "no/such.png")
    assert "takes no fields" in fails(capsys, "runs/a", "--config.steps=3")
    (tmp_path / "runs" / "a" / "_METADATA").write_text("{")
    assert "cannot be read" in fails(capsys, "runs/a")
    assert not list(tmp_path.glob("*.png"))
