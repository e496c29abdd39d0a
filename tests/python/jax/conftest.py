from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in (flags := os.environ.get("XLA_FLAGS", "")):
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

import jax
import pytest


@pytest.fixture
def x64():
    """float64 is there while the test runs."""
    with jax.enable_x64(True):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Held to instruction sets before F16C, XLA calls a conversion of float16 that jaxlib lacks; jax.nn fails there too."""
    try:
        return (yield)
    except jax.errors.JaxRuntimeError as error:
        if "xla_cpu_max_isa=SSE" in os.environ["XLA_FLAGS"] and "Failed to materialize symbols" in str(error):
            pytest.skip("XLA has no float16 for this instruction set")
        raise
