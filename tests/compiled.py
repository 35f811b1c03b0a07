"""Compiled programs that test modules share: every run has a trainer of its own, which traces anew."""

from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


def kept_in(folder: Path) -> Iterator[None]:
    """For a fixture: what is compiled meanwhile comes from XLA's cache in `folder`, or goes into it."""
    values = {
        "jax_compilation_cache_dir": str(folder),
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
