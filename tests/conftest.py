"""Eight CPU devices, set once before jax starts; the folder of third-party test data, if it is there."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Third-party data next to the checkout. Tests that use it carry `@pytest.mark.shared`."""
    if not SHARED.is_dir():
        pytest.skip(f"third-party test data: {SHARED} is not there")
    return SHARED
