"""The notebooks run from top to bottom, and their committed outputs are small."""

import base64
import importlib.util
import json
import pathlib
import re
import sys

import pytest

NOTEBOOKS = pathlib.Path(__file__).parents[2] / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
NAMES = {"quickstart", "flax_nnx_sharded", "staggered_refresh", "checkpoint_8_to_4"}
MOST_BYTES, MOST_BYTES_OF_A_PICTURE = 300_000, 60_000

each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def load(path):
    """The module of a script that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs_of(cells):
    return [output for cell in cells for output in cell.get("outputs", [])]


def said(cells):
    """What the cells print, streams only."""
    return "".join("".join(one.get("text", "")) for one in outputs_of(cells))


# --- they run ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def executed():
    """Runs a notebook once, with small sizes."""
    pytest.importorskip("ipykernel")
    execute = load(NOTEBOOKS / "execute.py")
    return lambda name: execute.execute(NOTEBOOKS / f"{name}.ipynb", is_fast=True)


def test_none_is_missing():
    assert {path.stem for path in PATHS} == NAMES


def test_quickstart(executed):
    text = said(executed("quickstart").cells)
    assert re.search(r"DHO²: validation loss \d", text)
    assert re.search(r"refreshes +[1-9]", text) and re.search(r"rejected +0 ", text)


def test_flax_nnx_sharded(executed):
    text = said(executed("flax_nnx_sharded").cells)
    assert "8 devices" in text and "replication: 1.0" in text
    table = re.findall(r"^ +([1248]) +[\d.]+ +([\d.]+) +[\d.]+$", text, re.MULTILINE)
    shares = {int(devices): float(share) for devices, share in table[-4:]}
    assert set(shares) == {1, 2, 4, 8}
    for devices, share in shares.items():
        assert 1 <= share * devices < 1.1
    before, after = re.search(r"loss ([\d.]+) -> ([\d.]+)", text).groups()
    assert float(after) < float(before)


def test_staggered_refresh(executed):
    cells = executed("staggered_refresh").cells
    text = said(cells)
    for kind in ("Adam alone", "periodic", "staggered"):
        assert re.search(rf"{kind} +\d", text)
    assert re.search(r"batch kept +refreshes [2-9], rejected 0", text)
    assert re.search(r"batch changed +refreshes 1, rejected [1-9]", text)


def test_checkpoint_8_to_4(executed):
    text = said(executed("checkpoint_8_to_4").cells)
    difference = re.search(r"relative difference of a loss: (\S+)", text).group(1)
    assert float(difference) < 1e-3
    eight, four = re.findall(r"devices +([\d. ]+) kB", text)
    eight, four = ([float(x) for x in one.split()] for one in (eight, four))
    assert min(eight) > 0 and four[4:] == [0.0] * 4
    assert four[0] == pytest.approx(2 * eight[0], rel=0.2)


def test_a_cell_that_fails_fails_the_notebook(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    execute = load(NOTEBOOKS / "execute.py")
    notebook = json.loads(PATHS[0].read_text(encoding="utf-8"))
    notebook["cells"] = notebook["cells"][1:2]
    notebook["cells"][0] |= {"source": "assert 1 == 2, 'on purpose'", "outputs": []}
    path = tmp_path / "failing.ipynb"
    path.write_text(json.dumps(notebook), encoding="utf-8")
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="on purpose"):
        execute.execute(path, is_fast=True)


# --- what is committed ---------------------------------------------------------------


@each_notebook
def test_committed_outputs(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < MOST_BYTES
    notebook = json.loads(text)
    assert notebook["nbformat"] == 4
    assert notebook["metadata"]["kernelspec"] == {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    # Run once, from top to bottom.
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    pictures = 0
    for output in outputs_of(code):
        assert output["output_type"] in ("stream", "display_data")
        assert output.get("name") != "stderr", output
        for kind, data in output.get("data", {}).items():
            assert kind in ("text/plain", "image/png")
            if kind == "image/png":
                pictures += 1
                assert len(base64.b64decode(data)) < MOST_BYTES_OF_A_PICTURE
    assert pictures >= 2
    # An encoded picture may spell anything.
    for output in outputs_of(code):
        output.get("data", {}).pop("image/png", None)
    for line in json.dumps(notebook, ensure_ascii=False, indent=0).splitlines():
        assert not re.search(r"Traceback|Warning:|WARNING", line), line
        assert not re.search(r"(?<![\w.*:/])/(root|home|Users|tmp|work)\b", line), line


@each_notebook
def test_the_first_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    title, install = ("".join(cell["source"]) for cell in cells[:2])
    assert title.startswith("# ")
    repository = re.search(r'^REPOSITORY = "(\S+/\S+)"', install, re.MULTILINE).group(1)
    base = "https://colab.research.google.com"
    badge = f"{base}/github/{repository}/blob/main/notebooks/{path.name}"
    assert f"({base}/assets/colab-badge.svg)]({badge})" in title
    assert 'if "google.colab" in sys.modules:' in install
    assert '"jax[tpu]"' in install and "git+https://github.com/" in install
    assert "Restart session" in install and "< (0, 10)" in install


def test_they_all_install_in_the_same_way():
    cells = [json.loads(path.read_text(encoding="utf-8"))["cells"][1] for path in PATHS]
    assert len({"".join(cell["source"]) for cell in cells}) == 1


@pytest.mark.parametrize(
    ("loaded", "installed", "expected"),
    [
        ("0.10.2", "0.10.2", None),
        (None, "1.0.0", None),
        ("0.5.2", "0.10.2", "Restart session"),
        ("0.9.1", "0.9.1", "needs JAX 0.10 or newer, and this is 0.9.1"),
    ],
)
def test_the_install_cell_looks_at_versions(loaded, installed, expected, monkeypatch):
    cells = json.loads(PATHS[0].read_text(encoding="utf-8"))["cells"]
    source = "".join(cells[1]["source"])
    # The line that only IPython knows, and that runs on Colab only.
    source, number = re.subn(r"%pip install .*", "raise AssertionError", source)
    assert number == 1
    monkeypatch.setattr("importlib.metadata.version", lambda name: installed)
    if loaded is None:
        monkeypatch.delitem(sys.modules, "jax")
    else:
        fake = type("FakeJax", (), {"__version__": loaded})
        monkeypatch.setitem(sys.modules, "jax", fake)
    if expected is None:
        exec(source, {})
    else:
        with pytest.raises(RuntimeError, match=expected):
            exec(source, {})
