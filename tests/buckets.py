"""What the tests of buckets share: the fake, machines with working folders of their own, shorter waits."""

import asyncio
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_gcs import FakeGCS, shared_gcs

from dynamo_jax.run import bucket_folder


@pytest.fixture(name="gcs", scope="module")
def gcs_of_module() -> Iterator[FakeGCS]:
    with pytest.MonkeyPatch.context() as context:
        for name, value in shared_gcs().environment().items():
            context.setenv(name, value)
        yield shared_gcs()


@pytest.fixture(name="quick")
def quick_locks(gcs: FakeGCS, monkeypatch: pytest.MonkeyPatch) -> None:
    gcs.fail()  # no more
    for name, seconds in (("BEAT_SECONDS", 0.1), ("DEAD_SECONDS", 0.5), ("SETTLE_SECONDS", 0.15)):
        monkeypatch.setattr(bucket_folder, name, seconds)


def machine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """From here on this is a machine with nothing in its working folder."""
    monkeypatch.setenv("DYNAMO_JAX_WORK_DIR", str(folder))


def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """gcsfs makes its six tries at once, not in half a minute."""
    import gcsfs.retry

    monkeypatch.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=lambda _: asyncio.sleep(0)))


def in_bucket(gcs: FakeGCS, path: str) -> dict[str, bytes]:
    return {name.removeprefix(f"{path}/"): gcs.objects[name][0] for name in gcs.names(f"{path}/")}
