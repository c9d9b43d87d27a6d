"""Eight virtual CPU devices for every test, asked for before JAX starts."""

import os
import pathlib

# Where libtpu or a GPU is there too: the tests are for eight CPU devices.
os.environ["JAX_PLATFORMS"] = "cpu"
# Threads of XLA's pool: with fewer than the devices of all programs in flight, a
# collective waits for devices that have no thread, and aborts the process in the end.
os.environ.setdefault("NPROC", "32")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

TESTS = pathlib.Path(__file__).parent
MARKERS = dict.fromkeys(
    ("numerics", "vectors", "state", "refresh", "step", "contract"), "core"
) | {"app": "app", "benchmarks": "app", "docs": "docs"}
"""Of the tests in a folder; those marked `slow` are not `core`."""

PACKAGES = {
    "app": (
        *("flax", "datasets", "grain", "matplotlib", "ml_collections"),
        *("orbax.checkpoint", "PIL", "sklearn", "tensorboardX", "tqdm"),
    ),
    "docs": ("flax", "grain", "orbax.checkpoint"),
}
"""What the tests with a marker import beyond the extra `test-core`."""


def pytest_collection_modifyitems(items):
    for item in items:
        marker = MARKERS.get(_folder(item.path))
        if marker and not (marker == "core" and item.get_closest_marker("slow")):
            item.add_marker(marker)


def pytest_pycollect_makemodule(module_path, parent):
    if MARKERS.get(_folder(module_path)) in PACKAGES:
        return _WithPackages.from_parent(parent, path=module_path)
    return None


class _WithPackages(pytest.Module):
    """Skipped where a package is missing."""

    def collect(self):
        for package in PACKAGES[MARKERS[_folder(self.path)]]:
            pytest.importorskip(package)
        return super().collect()


def pytest_ignore_collect(collection_path, config):
    """For `-m core` the other folders, and what they import, need not be read."""
    if config.option.markexpr == "core" and collection_path.parent == TESTS:
        if MARKERS.get(collection_path.name, "core") != "core":
            return True
    return None


def _folder(path):
    """The folder of `tests` that a test is in; none outside of it."""
    return path.relative_to(TESTS).parts[0] if path.is_relative_to(TESTS) else None


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    assert len(jax.devices()) == 8, "JAX started before tests/conftest.py"


@pytest.fixture(scope="module")
def quick_compilation():
    """For short runs: compiling takes far longer than running."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def started():
    """A list of processes, which are killed at the end."""
    processes = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()
