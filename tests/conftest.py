"""Eight CPU devices, set once before jax starts; what test modules share."""

import os
from pathlib import Path

# benchmarks/gpu.py asks for cuda, for some of the tests. Whatever else is set does not count.
os.environ["JAX_PLATFORMS"] = os.environ.get("DYNAMO_JAX_TEST_PLATFORM", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Hundreds of tiny programs run a few times each: without this a third of the time goes into optimizing them.
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
        " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )

from collections.abc import Iterator

import pytest
from compiled import kept_in

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Third-party data next to the checkout. Tests that use it carry `@pytest.mark.shared`."""
    if not SHARED.is_dir():
        pytest.skip(f"third-party test data: {SHARED} is not there")
    return SHARED


@pytest.fixture(scope="session")
def xla_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all modules of a process: they compile many programs alike."""
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="module")
def compiled_once(xla_folder: Path) -> Iterator[None]:
    """XLA's cache spares compiling a program again."""
    yield from kept_in(xla_folder)
