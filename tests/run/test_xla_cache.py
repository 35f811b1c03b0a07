"""Compiled programs in the run's folder: found again, and never a torn one."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dynamo_jax.run.xla_cache import WHOLE_NAME, XlaCache


@pytest.fixture(autouse=True)
def no_other_cache(monkeypatch):
    assert jax.config.jax_compilation_cache_dir is None


def compiled(factor):
    """Compile a program that the process has not seen."""
    return float(jax.jit(lambda x: jnp.sum(jnp.sin(x) * factor))(jnp.arange(7.0)))


def entries(cache: XlaCache) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(cache.path).iterdir() if path.name != WHOLE_NAME}


def test_a_program_is_compiled_once_for_all_starts(tmp_path, monkeypatch):
    found = []
    jax.monitoring.register_event_listener(lambda name, **_: found.append(name.rpartition("/")[2]))
    first = XlaCache(str(tmp_path))
    with first.enabled():
        value = compiled(3.25)
    before = entries(first)
    assert before
    assert jax.config.jax_compilation_cache_dir is None  # nothing stays behind
    jax.clear_caches()
    found.clear()
    again = XlaCache(str(tmp_path))
    with again.enabled():
        assert compiled(3.25) == value
    assert "cache_hits" in found
    assert "cache_misses" not in found
    assert entries(again) == before


def test_torn_entries_are_removed_and_made_again(tmp_path):
    cache = XlaCache(str(tmp_path))
    with cache.enabled():
        value = compiled(4.25)
    before = entries(cache)
    victim = Path(cache.path) / max(before, key=lambda name: len(before[name]))
    victim.write_bytes(before[victim.name][:100])
    (Path(cache.path) / "jit_unknown-cache").write_bytes(b"a run was killed while it wrote this")
    jax.clear_caches()
    with XlaCache(str(tmp_path)).enabled():
        assert compiled(4.25) == value
    assert before.keys() <= entries(cache).keys()
    assert "jit_unknown-cache" not in entries(cache)
    assert len(victim.read_bytes()) > 100


def test_settle_notes_what_is_whole(tmp_path):
    cache = XlaCache(str(tmp_path))
    with cache.enabled():
        compiled(5.25)
        assert not (Path(cache.path) / WHOLE_NAME).exists()
        cache.settle()
        listed = json.loads((Path(cache.path) / WHOLE_NAME).read_text())
        assert listed == {name: len(content) for name, content in entries(cache).items()}
    (Path(cache.path) / WHOLE_NAME).write_text("{torn")
    with XlaCache(str(tmp_path)).enabled():
        assert entries(cache) == {}


def test_a_cache_of_the_users_own_stays(tmp_path):
    mine = str(tmp_path / "mine")
    jax.config.update("jax_compilation_cache_dir", mine)
    try:
        with XlaCache(str(tmp_path / "run")).enabled():
            assert jax.config.jax_compilation_cache_dir == mine
        assert not (tmp_path / "run").exists()
    finally:
        jax.config.update("jax_compilation_cache_dir", None)


def test_another_kind_of_processor_has_a_folder_of_its_own(tmp_path, monkeypatch):
    here = XlaCache(str(tmp_path)).path
    assert here == XlaCache(str(tmp_path)).path
    monkeypatch.setattr(Path, "read_text", lambda _: "processor : 0\nflags : fpu sse2\n")
    assert XlaCache(str(tmp_path)).path != here
