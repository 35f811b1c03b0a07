"""Eight CPU devices, set once before jax starts; what test modules share."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Hundreds of tiny programs run a few times each: without this a third of the time goes into optimizing them.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Third-party data next to the checkout. Tests that use it carry `@pytest.mark.shared`."""
    if not SHARED.is_dir():
        pytest.skip(f"third-party test data: {SHARED} is not there")
    return SHARED


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every run in a module has its own trainer, which traces anew; XLA's cache spares compiling a program again."""
    values = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in values}
    for settings in (values, before):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if settings is values:
            yield
