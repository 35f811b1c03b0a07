"""Batch: the job files in the service's own types, and what the submit script sends, refuses and prints."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from google.cloud.batch_v1.types import AllocationPolicy, Job, LifecyclePolicy
from google.protobuf.json_format import ParseError
from recorder import ROOT, install, load, status_of, without

from dynamo_jax.config import load_config

FILES = sorted((ROOT / "launch" / "gcloud_batch").glob("*.json"))
RECIPE = "configs/arithmetic_cpu.yaml"
IMAGE = "us-docker.pkg.dev/p/r/dynamo-jax:1"
SETTINGS = ["--project", "my-project", "--region", "us-central1", "--bucket", "my-bucket", "--image", IMAGE]
ARGV = ["l4x1", RECIPE, "--run", "first", "--spot", *SETTINGS]
RECIPE_1_5B = ["configs/qwen2.5_math_1.5b.yaml", "mesh.fsdp=8"]


@pytest.fixture(scope="module")
def script():
    return load("launch/gcloud_batch/submit.py")


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    recorder = install(tmp_path, monkeypatch, "gcloud")
    recorder.answer("batch jobs submit", "first-abc-uid\n")
    return recorder


def parse(text):
    return Job.from_json(text, ignore_unknown_fields=False)


@pytest.fixture
def submit(script, cloud):
    """Submits, and gives back the job as Batch reads it."""

    def do(argv):
        assert status_of(script, argv) == 0
        return parse(cloud.calls()[-1][1])

    return do


def policy(job):
    return job.allocation_policy.instances[0].policy


def task(job):
    return job.task_groups[0].task_spec


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_as_they_stand_are_jobs(path):
    job = parse(path.read_text())
    assert policy(job).machine_type
    assert policy(job).provisioning_model == AllocationPolicy.ProvisioningModel.PROVISIONING_MODEL_UNSPECIFIED
    assert job.allocation_policy.instances[0].install_gpu_drivers
    with pytest.raises(ParseError):  # the check above does see a wrong name
        parse(path.read_text().replace('"maxRetryCount"', '"maxRetries"'))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_which_failures_are_retried(path):
    spec = task(parse(path.read_text()))
    assert 1 <= spec.max_retry_count <= 10  # what Batch takes
    assert 0 < spec.max_run_duration.total_seconds() <= 14 * 24 * 3600
    # Batch supports one policy. With FAIL_TASK whatever is not listed is retried: preemption (50001), a lost, rebooted
    # or recreated machine, 75, 143 and crashes. A time limit that were retried would be none.
    (only,) = spec.lifecycle_policies
    assert only.action == LifecyclePolicy.Action.FAIL_TASK
    assert set(only.action_condition.exit_codes) == {2, 50005}


def test_first_look(submit):
    job = submit([*ARGV, "trainer.steps=7"])
    assert policy(job).machine_type == "g2-standard-8"
    assert [(a.type_, a.count) for a in policy(job).accelerators] == [("nvidia-l4", 1)]
    container = task(job).runnables[0].container
    assert container.image_uri == IMAGE
    assert not container.entrypoint  # the image's own, without a shell
    command, config, *overrides = container.commands
    assert command == "train"
    read = load_config(ROOT / config, overrides)
    assert (read.run_dir, read.device, read.trainer.steps) == ("gs://my-bucket/runs/first", "gpu", 7)
    assert list(job.allocation_policy.location.allowed_locations) == ["regions/us-central1"]
    assert "${" not in Job.to_json(job)


def test_a_real_recipe_on_eight_gpus(submit):
    argv = ["h100x8", *RECIPE_1_5B, "--run", "math", "--on-demand", *SETTINGS, "--inputs", "my-bucket/inputs"]
    job = submit(
        [*argv, "--max-hours", "1.5", "--driver", "580.95.05", "--service-account", "me@p.iam", "--max-retries=3"]
    )
    assert policy(job).machine_type == "a3-highgpu-8g"
    accelerator = policy(job).accelerators[0]
    assert (accelerator.type_, accelerator.count, accelerator.driver_version) == ("nvidia-h100-80gb", 8, "580.95.05")
    (volume,) = task(job).volumes
    assert (volume.gcs.remote_path, volume.mount_path) == ("my-bucket/inputs", "/mnt/disks/inputs")
    assert "-o ro" in volume.mount_options
    assert "-o allow_other" in volume.mount_options
    assert task(job).max_run_duration.total_seconds() == 5400
    assert task(job).max_retry_count == 3
    assert job.allocation_policy.service_account.email == "me@p.iam"


@pytest.mark.parametrize(("flag", "model"), [("--spot", "SPOT"), ("--on-demand", "STANDARD")])
def test_the_user_chooses_what_may_be_preempted(submit, flag, model):
    job = submit([*without(ARGV, "--spot", 0), flag])
    assert policy(job).provisioning_model == AllocationPolicy.ProvisioningModel[model]


def test_several_machines(submit):
    argv = ["h100x8", *RECIPE_1_5B, "mesh.data=2", "--run", "math", "--spot", *SETTINGS, "--nodes", "2"]
    job = submit([*argv, "--inputs", "my-bucket/inputs"])
    group = job.task_groups[0]
    assert (group.task_count, group.parallelism, group.task_count_per_node) == (2, 2, 1)
    assert group.require_hosts_file
    firewall, barrier, train = group.task_spec.runnables
    assert firewall.ignore_exit_status
    assert barrier.barrier.name
    assert "--network=host" in train.container.options.split()
    hosts_file = "/etc/cloudbatch-taskgroup-hosts"
    inputs = "/mnt/disks/inputs"
    assert list(train.container.volumes) == [f"{hosts_file}:{hosts_file}:ro", f"{inputs}:{inputs}:ro"]
    assert group.task_spec.max_retry_count == 0


@pytest.mark.parametrize(
    "override",
    [
        "task.train=[data/a b.jsonl, 'c.jsonl']",
        'task.system_prompt="Think, then answer \\boxed{}."',
        "task.instruction=$HOME `id` $(id) ${RUN} * ; exit",
    ],
)
def test_overrides_reach_the_job_as_they_were_typed(submit, override):
    argv = ["h100x8", *RECIPE_1_5B, *ARGV[2:], override]
    assert task(submit(argv)).runnables[0].container.commands[-1] == override


@pytest.mark.parametrize(
    ("flag", "values", "named"),
    [
        ("--project", 1, "--project (or DYNAMO_JAX_PROJECT)"),
        ("--region", 1, "--region (or DYNAMO_JAX_REGION)"),
        ("--bucket", 1, "--bucket (or DYNAMO_JAX_BUCKET)"),
        ("--image", 1, "--image (or DYNAMO_JAX_IMAGE)"),
        ("--run", 1, "--run"),
        ("--spot", 0, "--spot or --on-demand"),
    ],
)
def test_a_missing_setting_costs_nothing(script, cloud, capsys, flag, values, named):
    assert status_of(script, without(ARGV, flag, values)) == 2
    assert named in capsys.readouterr().err
    assert cloud.calls() == []


def test_all_that_is_missing_is_one_error(script, cloud, capsys):
    assert status_of(script, ["l4x1", RECIPE]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(name in error for name in ("--project", "--region", "--bucket", "--image", "--run", "--on-demand"))
    assert cloud.calls() == []


def test_settings_come_from_the_environment_too(submit, monkeypatch):
    for flag, value in zip(SETTINGS[::2], SETTINGS[1::2], strict=True):
        monkeypatch.setenv("DYNAMO_JAX_" + flag.removeprefix("--").upper(), value)
    job = submit(["l4x1", RECIPE, "--run", "first", "--spot"])
    assert task(job).runnables[0].container.image_uri == IMAGE


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([*ARGV, "run_dir=gs://other/x"], "the job sets run_dir"),
        ([*ARGV, "device=cpu"], "device"),
        ([*ARGV, "trainer.stepz=7"], "stepz"),
        ([*ARGV, "trainer.steps"], "not an override"),
        (["l4x1", "configs/none.yaml", *ARGV[2:]], "configs/none.yaml"),
        (["l4x1", str(ROOT / RECIPE), *ARGV[2:]], "name a file as configs/"),
        (["l4x1", "configs/../configs/arithmetic_cpu.yaml", *ARGV[2:]], "name a file as configs/"),
        (["h100x8", *ARGV[1:]], "the job rents 8"),  # seven GPUs would be idle
        (["h100x8", RECIPE_1_5B[0], *ARGV[2:]], "uses 16 devices"),
        ([*without(ARGV, "--image"), "--image", "us-docker.pkg.dev/p/r/dynamo-jax"], "tag or digest"),
        ([*without(ARGV, "--bucket"), "--bucket", "gs://my-bucket"], "without gs://"),
        ([*without(ARGV, "--run"), "--run", "First"], "--run First"),
        ([*without(ARGV, "--run"), "--run", "a" * 48], "at most 47"),
        ([*ARGV, "--on-demand"], "not allowed with"),
        ([*ARGV, "--max-hours", "0"], "--max-hours"),
        ([*ARGV, "--inputs", "gs://my-bucket/inputs"], "--inputs"),
        (["tpu", *ARGV[1:]], "h100x8"),
    ],
)
def test_what_the_machine_would_refuse_is_refused_before_it_is_rented(script, cloud, capsys, argv, says):
    assert status_of(script, argv) == 2
    assert says in capsys.readouterr().err
    assert cloud.calls() == []


def test_names_fit_what_batch_takes(script, cloud):
    assert status_of(script, [*without(ARGV, "--run"), "--run", "a" * 47]) == 0
    name = cloud.calls()[-1][0][4]
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", name)


def test_commands_in_order(script, cloud, capsys):
    assert status_of(script, [*ARGV, "--build"]) == 0
    find, build, send = (words for words, _ in cloud.calls())
    assert find[:4] == ["gcloud", "batch", "jobs", "list"]
    assert "labels.dynamo_jax_run=first" in find[find.index("--filter") + 1]
    assert build[:3] == ["gcloud", "builds", "submit"]
    assert f"_IMAGE={IMAGE},_EXTRA=cuda" in build
    assert build[-1] == str(ROOT)
    assert send[:4] == ["gcloud", "batch", "jobs", "submit"]
    assert send[send.index("--location") + 1] == "us-central1"
    for words in (find, build, send):
        assert words[words.index("--project") + 1] == "my-project"
    printed = capsys.readouterr().out
    assert "gs://my-bucket/runs/first" in printed
    assert 'labels.job_uid="first-abc-uid"' in printed
    assert f"gcloud batch jobs cancel {send[4]} " in printed


def test_a_run_that_is_under_way_is_not_started_twice(script, cloud, capsys):
    cloud.answer("batch jobs list", "projects/p/locations/r/jobs/first-1\n")
    assert status_of(script, [*ARGV, "--build"]) == 2
    assert "already under way: projects/p/locations/r/jobs/first-1" in capsys.readouterr().err
    assert len(cloud.calls()) == 1


@pytest.mark.parametrize("words", ["batch jobs list", "builds submit"])
def test_a_failed_command_is_the_last(script, cloud, words):
    cloud.answer(words, status=3)
    assert status_of(script, [*ARGV, "--build"]) == 3
    assert not any("jobs submit" in " ".join(call) for call, _ in cloud.calls())


def test_dry_run_starts_nothing_and_prints_all(script, cloud, capsys):
    assert status_of(script, [*ARGV, "task.instruction=a b", "--build", "--dry-run"]) == 0
    assert cloud.calls() == []
    printed = capsys.readouterr().out
    commands = [shlex.split(line)[1:4] for line in printed.splitlines() if line.startswith("+ ")]
    assert commands == [["gcloud", "builds", "submit"], ["gcloud", "batch", "jobs"], ["gcloud", "batch", "jobs"]]
    job = parse(json.dumps(json.loads(printed[printed.index("\n{") :])))
    assert task(job).runnables[0].container.commands[-1] == "task.instruction=a b"


def test_from_a_shell_and_from_another_folder(tmp_path):
    path = ROOT / "launch" / "gcloud_batch" / "submit.py"
    command = [sys.executable, str(path), *ARGV, "--dry-run", "trainer.stepz=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "stepz" in done.stderr
