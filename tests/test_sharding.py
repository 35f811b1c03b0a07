"""Meshes, the table of rules, and the ways of arrays between host and mesh."""

import importlib.metadata
import importlib.util
import logging
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dynamo_jax.config import MeshConfig
from dynamo_jax.hosts.cluster import tpu_is_here
from dynamo_jax.sharding import agreed, make_mesh, own_share, sharding, start_devices, to_host, to_mesh, total


@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 4, 2), (3, 1, 1)])
def test_mesh(sizes):
    mesh = make_mesh(MeshConfig(*sizes))
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == sizes
    assert mesh.devices.ravel().tolist() == jax.devices()[: np.prod(sizes)]


def test_a_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(ValueError, match=r"data 2 x fsdp 4 x tensor 2 needs 16 devices, but there are 8 .*mesh\.data"):
        make_mesh(MeshConfig(2, 4, 2))
    with pytest.raises(ValueError, match="needs 2 devices, but there are 1"):
        make_mesh(MeshConfig(2, 1, 1), jax.devices()[:1])


def test_idle_devices_are_said(caplog):
    with caplog.at_level(logging.WARNING, "dynamo_jax"):
        make_mesh(MeshConfig(2, 2, 2))
        assert not caplog.messages
        make_mesh(MeshConfig(2, 1, 1))
    assert caplog.messages == ["The mesh uses 2 of 8 devices; the others stay idle."]


def test_chosen_devices_make_the_mesh():
    chosen = jax.devices()[4:6]
    assert make_mesh(MeshConfig(1, 2, 1), chosen).devices.ravel().tolist() == chosen


def test_rules():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    assert sharding(mesh, "batch").spec == PartitionSpec(("data", "fsdp"))
    assert sharding(mesh, None, "embed", "heads", None).spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert sharding(mesh).is_fully_replicated
    with pytest.raises(KeyError, match="btach"):
        sharding(mesh, "btach")


@pytest.mark.parametrize("axes", [(), ("batch",), ("embed", "vocab"), ("batch", None, "mlp"), (None, "kv_heads")])
@pytest.mark.parametrize("dtype", [np.float32, np.int32, bool, jnp.bfloat16])
def test_round_trip(axes, dtype):
    mesh = make_mesh(MeshConfig(2, 2, 2))
    host = np.arange(8 * 4 * 6).reshape(8, 4, 6).astype(dtype)
    where = sharding(mesh, *axes)
    there = to_mesh(host, where)
    assert there.sharding == where
    assert len(there.addressable_shards) == 8
    for shard in there.addressable_shards:  # each device holds its own part and no other
        np.testing.assert_array_equal(np.asarray(shard.data), host[shard.index])
    back = to_host(there)
    assert isinstance(back, np.ndarray)
    assert back.dtype == host.dtype
    np.testing.assert_array_equal(back, host)


def test_a_batch_is_cut_over_data_and_fsdp_only():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    there = to_mesh(np.arange(8), sharding(mesh, "batch"))
    assert [shard.data.shape for shard in there.addressable_shards] == [(2,)] * 8
    assert {tuple(np.asarray(shard.data)) for shard in there.addressable_shards} == {(0, 1), (2, 3), (4, 5), (6, 7)}


def test_trees_take_one_sharding_or_one_for_each_leaf():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    rows, one = sharding(mesh, "batch"), sharding(mesh)
    tree = {"a": np.arange(8), "b": (np.ones((4, 2)), 3)}  # plain numbers go, too
    alike = to_mesh(tree, one)
    assert all(leaf.sharding == one for leaf in jax.tree.leaves(alike))
    each = to_mesh(tree, {"a": rows, "b": (rows, one)})
    assert (each["a"].sharding, each["b"][0].sharding, each["b"][1].sharding) == (rows, rows, one)
    back = to_host(each)
    np.testing.assert_array_equal(back["a"], tree["a"])
    np.testing.assert_array_equal(back["b"][0], tree["b"][0])
    assert back["b"][1] == 3


def test_what_the_mesh_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="divi"):
        to_mesh(np.arange(6), sharding(make_mesh(MeshConfig(2, 2, 2)), "batch"))


def test_a_single_process_agrees_with_itself():
    assert agreed(0) == 0
    assert agreed(15) == 15


def test_several_processes_take_the_largest_flag(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    gathered = []

    def gather(flag):
        gathered.append(int(flag))
        return np.array([0, int(flag), 15])

    monkeypatch.setattr("dynamo_jax.sharding.multihost_utils.process_allgather", gather)
    assert agreed(2) == 15
    assert gathered == [2]
    assert total(np.int32(2)) == 17


# --- start_devices; the devices of this process are long started, so what it would do is recorded


@pytest.fixture
def updates(monkeypatch):
    made = {}
    monkeypatch.setattr(jax.config, "update", made.__setitem__)
    for name in ("XLA_FLAGS", "JAX_COORDINATOR_ADDRESS", "SLURM_JOB_ID", "BATCH_TASK_INDEX"):
        monkeypatch.delenv(name, raising=False)
    return made


def test_a_cpu_gets_as_many_devices_as_the_mesh_has(updates):
    start_devices("cpu", MeshConfig(2, 2, 2))
    assert updates == {"jax_platforms": "cpu", "jax_num_cpu_devices": 8}


def test_auto_leaves_the_platform_to_jax(updates):
    start_devices("auto", MeshConfig())
    assert "jax_platforms" not in updates


class Plugin:
    def __init__(self, name):
        self.name = name


@pytest.mark.parametrize(
    ("libtpu", "here", "chosen", "plugins", "expected"),
    [
        (True, False, None, [], "cpu"),
        (True, False, "", [], "cpu"),
        (True, False, None, ["xla_cuda13"], "cuda,cpu"),
        (True, False, None, ["xla_cuda13", "xla_rocm7"], None),
        (True, True, None, [], None),
        (True, False, "tpu,cpu", [], None),  # by jax itself, which has found a TPU
        (True, False, "cuda", [], None),  # by the user
        (False, False, None, [], None),
    ],
)
def test_libtpu_is_not_asked_where_there_is_no_tpu(updates, monkeypatch, libtpu, here, chosen, plugins, expected):
    monkeypatch.setattr("dynamo_jax.sharding.tpu_is_here", lambda _: here)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "libtpu" and libtpu else None)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Plugin(name) for name in plugins])
    monkeypatch.setattr(jax, "devices", list)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(type(jax.config), "values", {"jax_platforms": chosen})
    start_devices("auto", MeshConfig())
    assert updates.get("jax_platforms") == expected
    start_devices("tpu", MeshConfig())
    assert updates["jax_platforms"] == "tpu"


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None or tpu_is_here(os.environ), reason="needs libtpu and no TPU"
)
def test_an_installed_libtpu_is_silent_where_there_is_no_tpu():
    code = "from dynamo_jax import config, sharding; sharding.start_devices('{}', config.MeshConfig())"
    alone = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    said = {}
    for device in ("auto", "tpu"):
        command = [sys.executable, "-c", code.format(device)]
        said[device] = subprocess.run(command, capture_output=True, text=True, env=alone, timeout=300).stderr
    assert said["auto"] == ""
    assert "ValueError: device = tpu: jax finds no such device here" in said["tpu"]  # it was looked for


def test_gpu_means_cuda(updates):
    start_devices("gpu", MeshConfig())
    assert updates["jax_platforms"] == "cuda"


def test_a_number_of_devices_set_by_the_user_stays(updates, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    start_devices("auto", MeshConfig(2, 1, 1))
    assert updates == {}


def test_several_processes_join_before_any_device_is_touched(updates, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *words, **settings: calls.append((*words, settings)))
    monkeypatch.setattr(jax, "devices", lambda: calls.append("devices"))
    for name, value in (("COORDINATOR_ADDRESS", "host:1"), ("NUM_PROCESSES", "4"), ("PROCESS_ID", "3")):
        monkeypatch.setenv(f"JAX_{name}", value)
    monkeypatch.setattr(signal, "signal", lambda number, handler: calls.append((number, handler)))
    start_devices("cpu", MeshConfig(2, 2, 2))
    joined, handler, devices = calls
    assert joined[:3] == ("host:1", 4, 3)
    assert joined[3]["heartbeat_timeout_seconds"] <= 60  # jax's own word, in case ours is not heard
    assert joined[3]["local_device_ids"] is None
    assert handler == (signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # jax has taken it over: ours again
    assert devices == "devices"
    assert updates["jax_num_cpu_devices"] == 2  # the mesh's eight, shared by four


@pytest.mark.parametrize(
    ("device", "here", "joins"), [("tpu", True, 1), ("auto", True, 1), ("tpu", False, 0), ("cpu", True, 0)]
)
def test_a_tpu_slice_is_joined_through_its_metadata(updates, monkeypatch, device, here, joins):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *words, **settings: calls.append((words, settings)))
    monkeypatch.setattr(jax, "devices", list)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("dynamo_jax.sharding.tpu_is_here", lambda _: here)
    start_devices(device, MeshConfig())
    assert len(calls) == joins
    assert all(words == () and "coordinator_address" not in settings for words, settings in calls)


def test_processes_that_are_joined_stay_so(updates, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("joined twice"))
    start_devices("auto", MeshConfig())


def test_no_process_may_be_without_a_device(monkeypatch):
    class Device:
        def __init__(self, process_index):
            self.process_index, self.device_kind = process_index, "cpu"

    with pytest.raises(ValueError, match=r"takes 2 of the 4 devices and leaves process 1 with none.*Set a mesh of 4"):
        make_mesh(MeshConfig(2, 1, 1), [Device(0), Device(0), Device(1), Device(1)])


@pytest.mark.parametrize(("count", "size"), [(1, 7), (2, 8), (3, 8), (4, 2)])
def test_shares_are_all_rows_once_and_in_order(monkeypatch, count, size):
    monkeypatch.setattr(jax, "process_count", lambda: count)
    rows = []
    for index in range(count):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        rows += range(size)[own_share(size)]
    assert rows == list(range(size))


@pytest.mark.parametrize(
    ("error", "reason"),
    [(RuntimeError("Unknown backend cuda\nmore"), "Unknown backend cuda"), (AssertionError(), "not installed")],
)
def test_a_missing_device_is_one_paragraph(updates, monkeypatch, error, reason):
    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(ValueError, match=r"device = gpu: jax finds no such device here .*device=cpu") as raised:
        start_devices("gpu", MeshConfig())
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)
