"""Eight virtual CPU devices for every test, asked for before JAX starts."""

import os

# Where libtpu or a GPU is there too: the tests are for eight CPU devices.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    assert len(jax.devices()) == 8, "JAX started before tests/conftest.py"
