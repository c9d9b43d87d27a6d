"""Eight virtual CPU devices for every test, asked for before JAX starts."""

import os

# Where libtpu or a GPU is there too: the tests are for eight CPU devices.
os.environ["JAX_PLATFORMS"] = "cpu"
# Threads of XLA's pool: with fewer than the devices of all programs in flight, a
# collective waits for devices that have no thread, and aborts the process in the end.
os.environ.setdefault("NPROC", "32")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


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
