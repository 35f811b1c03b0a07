"""Which processes make up a run, read from environments as their launchers set them."""

import glob

import pytest

from dynamo_jax.hosts.cluster import PORT, Cluster, cluster_of, host_name, tpu_is_here

PLAIN = {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SRUN = {
    "SLURM_JOB_ID": "70001", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "node[007-010],other", "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
}  # fmt: skip


def test_a_single_machine_has_no_others():
    assert cluster_of({}) is None
    assert cluster_of({"HOME": "/root", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}) is None  # a shell in an allocation


def test_plain_variables():
    assert cluster_of(PLAIN) == Cluster("JAX_COORDINATOR_ADDRESS", "10.0.0.2:1234", 4, 3)
    assert cluster_of(PLAIN | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None
    assert cluster_of(PLAIN | SRUN).source == "JAX_COORDINATOR_ADDRESS"  # what the user says goes first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"JAX_NUM_PROCESSES": ""}, "JAX_NUM_PROCESSES = '': should be a whole number. Set it"),
        ({"JAX_PROCESS_ID": "two"}, "JAX_PROCESS_ID = 'two'"),
        ({"JAX_PROCESS_ID": "4"}, r"process 4 of 4: the index must be in 0 \.\. 3"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.2"}, "is not host:port"),
    ],
)
def test_what_makes_no_sense_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        cluster_of(PLAIN | change)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node7", "node7"),
        ("node7,other", "node7"),
        ("node[7-9,12],other", "node7"),
        ("node[007,012]", "node007"),
        ("gpu-a-[3]", "gpu-a-3"),
    ],
)
def test_slurm_names_the_first_host(nodes, host):
    cluster = cluster_of(SRUN | {"SLURM_STEP_NODELIST": nodes})
    assert cluster.coordinator.rpartition(":")[0] == host
    assert (cluster.processes, cluster.process) == (8, 5)


def test_slurm_jobs_on_one_machine_use_different_ports():
    ports = {
        cluster_of(SRUN | {"SLURM_JOB_ID": str(job)}).coordinator.rpartition(":")[2] for job in range(70001, 70051)
    }
    assert len(ports) == 50
    assert all(1024 < int(port) < 65536 for port in ports)


@pytest.mark.parametrize(
    ("change", "devices"),
    [
        ({}, (1,)),  # two tasks on the machine, each takes one accelerator
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, None),  # one task a machine takes them all
        ({"SLURM_STEP_TASKS_PER_NODE": "1,2"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "12"}, (1,)),
        ({"CUDA_VISIBLE_DEVICES": "3"}, None),  # SLURM shows it one already, whose number within the process is 0
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, (1,)),
    ],
)
def test_slurm_tasks_share_a_machines_accelerators(change, devices):
    assert cluster_of(SRUN | change).local_devices == devices


def test_batch_names_its_main_node():
    node = {
        "BATCH_TASK_INDEX": "1",
        "BATCH_NODE_COUNT": "2",
        "BATCH_NODE_INDEX": "1",
        "BATCH_MAIN_NODE_HOSTNAME": "m-0",
    }
    assert cluster_of(node) == Cluster("BATCH_NODE_INDEX", f"m-0:{PORT}", 2, 1)
    assert cluster_of(node | {"BATCH_NODE_COUNT": "1", "BATCH_NODE_INDEX": "0"}) is None
    assert cluster_of({"BATCH_TASK_INDEX": "0"}) is None


def test_batch_reads_its_hosts_file(tmp_path):
    (tmp_path / "hosts").write_text("10.1.0.5\n10.1.0.6\n")
    task = {"BATCH_TASK_INDEX": "1", "BATCH_TASK_COUNT": "2", "BATCH_HOSTS_FILE": str(tmp_path / "hosts")}
    assert cluster_of(task) == Cluster("BATCH_TASK_INDEX", f"10.1.0.5:{PORT}", 2, 1)
    assert cluster_of({"BATCH_TASK_INDEX": "0", "BATCH_TASK_COUNT": "1"}) is None
    for file in ("", str(tmp_path / "missing")):
        with pytest.raises(ValueError, match="requireHostsFile: true"):
            cluster_of(task | {"BATCH_HOSTS_FILE": file})


def test_tpu_hosts_are_known_by_their_environment_or_their_devices(monkeypatch):
    monkeypatch.setattr(glob, "glob", lambda _: [])
    assert not tpu_is_here({})
    assert not tpu_is_here({"TPU_WORKER_HOSTNAMES": "localhost"})  # compiling for a TPU that is not there
    assert tpu_is_here({"TPU_WORKER_HOSTNAMES": "t1v-0,t1v-1"})
    found = {"/dev/vfio/[0-9]*": ["/dev/vfio/0"]}
    monkeypatch.setattr(glob, "glob", lambda pattern: found.get(pattern, []))
    assert not tpu_is_here({})  # another device that is passed through
    monkeypatch.setattr("dynamo_jax.hosts.cluster._has_tpu_on_pci", lambda: True)
    assert tpu_is_here({})


def test_a_host_can_be_named():
    assert host_name({"DYNAMO_JAX_HOST_NAME": "rack 7"}) == "rack 7"
    assert host_name({})
