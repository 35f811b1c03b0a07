"""GKE: the manifest against Kubernetes' and JobSet's schemas, slices and their hosts, and what is sent to kubectl."""

import re

import jsonschema
import kubernetes_validate
import pytest
import yaml
from recorder import ROOT, install, load, status_of, without

from dynamo_jax.config import load_config

FILE = ROOT / "launch" / "gke" / "jobset.yaml"
RECIPE = "configs/qwen2.5_math_1.5b.yaml"
IMAGE = "us-docker.pkg.dev/p/r/dynamo-jax:1"
SETTINGS = ["--context", "gke_p_r_c", "--namespace", "training", "--service-account", "trainer"]
SETTINGS += ["--bucket", "my-bucket", "--image", IMAGE]
ARGV = [RECIPE, "--topology", "v5e:4x4", "--run", "first", "--spot", *SETTINGS]
KUBERNETES = "1.31"


def closed(properties, *required):
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def one_of(*values):
    return {"enum": list(values)}


# The fields of JobSet v1alpha2 (JobSet 0.10.1) that a user sets. The job's template is checked by Kubernetes' schema.
TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, {"type": "boolean"}
TEXTS = {"type": "array", "items": TEXT, "uniqueItems": True}
ACTIONS = one_of("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
REASONS = one_of(
    "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"
)
RULE = closed(
    {
        "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
        "action": ACTIONS,
        "onJobFailureReasons": {"type": "array", "items": REASONS, "uniqueItems": True},
        "onJobFailureMessagePatterns": TEXTS,
        "targetReplicatedJobs": TEXTS,
    },
    "name",
    "action",
)
JOBSET = closed(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object"},
        "spec": closed(
            {
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "items": closed(
                        {
                            "name": TEXT,
                            "groupName": TEXT,
                            "replicas": COUNT,
                            "template": closed({"metadata": {"type": "object"}, "spec": {"type": "object"}}, "spec"),
                            "dependsOn": {"type": "array"},
                        },
                        "name",
                        "template",
                    ),
                },
                "network": closed({"enableDNSHostnames": FLAG, "subdomain": TEXT, "publishNotReadyAddresses": FLAG}),
                "successPolicy": closed({"operator": one_of("All", "Any"), "targetReplicatedJobs": TEXTS}, "operator"),
                "failurePolicy": closed(
                    {
                        "maxRestarts": COUNT,
                        "restartStrategy": one_of("Recreate", "BlockingRecreate", "InPlaceRestart"),
                        "rules": {"type": "array", "items": RULE},
                    }
                ),
                "startupPolicy": closed({"startupPolicyOrder": one_of("AnyOrder", "InOrder")}, "startupPolicyOrder"),
                "suspend": FLAG,
                "coordinator": closed({"replicatedJob": TEXT, "jobIndex": COUNT, "podIndex": COUNT}, "replicatedJob"),
                "managedBy": TEXT,
                "ttlSecondsAfterFinished": COUNT,
                "volumeClaimPolicies": {"type": "array"},
            },
            "replicatedJobs",
        ),
    },
    "apiVersion",
    "kind",
    "metadata",
    "spec",
)


@pytest.fixture(scope="module")
def script():
    return load("launch/gke/submit.py")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    return install(tmp_path, monkeypatch, "gcloud", "kubectl")


@pytest.fixture
def submit(script, cluster):
    """Submits, and gives back the checked manifest."""

    def do(argv):
        assert status_of(script, argv) == 0
        jobset = yaml.safe_load(cluster.calls()[-1][1])
        check(jobset)
        return jobset

    return do


def job_of(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod_of(jobset):
    return job_of(jobset)["template"]["spec"]


def check(jobset):
    jsonschema.validate(jobset, JOBSET)
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": jobset["metadata"], "spec": job_of(jobset)}
    kubernetes_validate.validate(job, KUBERNETES, strict=True)


def test_the_file_as_it_stands_is_a_jobset():
    check(yaml.safe_load(FILE.read_text()))


@pytest.mark.parametrize("name", ["terminationGracePeriodSeconds", "backoffLimit", "maxRestarts", "replicas"])
def test_a_wrong_name_is_seen(name):
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(yaml.safe_load(FILE.read_text().replace(f" {name}: ", f" {name}_: ")))


def outcome(jobset, status, disrupted):
    """What becomes of the JobSet when a pod fails: Kubernetes' rules for pods, then JobSet's for jobs."""
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job_of(jobset)["podFailurePolicy"]["rules"]):
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        matches = f"matching {rule['action']} rule at index {index}"
        if codes and codes["operator"] == "In" and status in codes["values"]:
            name = codes["containerName"]
            reason = "PodFailurePolicy"
            message = f"Container {name} for pod training/first-slice-0-1-x failed with exit code {status} {matches}"
        elif disrupted and {"type": "DisruptionTarget", "status": "True"} in conditions:
            reason, message = (
                "PodFailurePolicy",
                f"Pod training/first-slice-0-1-x has condition DisruptionTarget {matches}",
            )
        else:
            continue
        break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize(
    ("status", "disrupted", "action"),
    [
        (2, False, "FailJobSet"),  # a mistake
        (75, False, "RestartJobSet"),  # counted, so that storage which stays away ends the run
        (1, False, "RestartJobSet"),
        (139, False, "RestartJobSet"),
        (143, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (143, True, "RestartJobSetAndIgnoreMaxRestarts"),  # preempted, saved
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),  # preempted, killed before it had saved
        (75, True, "RestartJobSetAndIgnoreMaxRestarts"),
    ],
)
def test_which_failures_are_restarted_and_counted(status, disrupted, action):
    jobset = yaml.safe_load(FILE.read_text())
    assert outcome(jobset, status, disrupted) == action
    assert job_of(jobset)["backoffLimit"] == 0  # no pod of a slice is restarted alone
    assert jobset["spec"]["failurePolicy"]["restartStrategy"] == "BlockingRecreate"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_a_time_limit_ends_the_jobset():
    jobset = yaml.safe_load(FILE.read_text())
    assert job_of(jobset)["activeDeadlineSeconds"] > 0
    rules = jobset["spec"]["failurePolicy"]["rules"]
    (rule,) = (rule for rule in rules if "DeadlineExceeded" in rule["onJobFailureReasons"])
    assert rule["action"] == "FailJobSet"
    assert "onJobFailureMessagePatterns" not in rule


def test_pods(submit):
    jobset = submit([*ARGV, "trainer.steps=7"])
    pod = pod_of(jobset)
    assert pod["terminationGracePeriodSeconds"] >= 120
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert pod["serviceAccountName"] == "trainer"
    (container,) = pod["containers"]
    assert container["image"] == IMAGE
    assert "command" not in container  # the image's own entrypoint, without a shell
    named = job_of(jobset)["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"]
    assert container["name"] == named
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert {"name": "shared-memory", "emptyDir": {"medium": "Memory"}} in pod["volumes"]
    command, config, *overrides = container["args"]
    assert command == "train"
    read = load_config(ROOT / config, overrides)
    assert (read.run_dir, read.device, read.trainer.steps) == ("gs://my-bucket/runs/first", "tpu", 7)
    assert "${" not in str(jobset)
    network = jobset["spec"]["network"]
    assert network["enableDNSHostnames"]
    assert network["publishNotReadyAddresses"]
    assert job_of(jobset)["completionMode"] == "Indexed"


@pytest.mark.parametrize(
    ("topology", "chips_per_host", "expected"),
    [
        ("v5e:1x1", None, ("tpu-v5-lite-podslice", "1x1", 1, 1)),
        ("v5e:2x2", None, ("tpu-v5-lite-podslice", "2x2", 1, 4)),
        ("v5e:2x4", 8, ("tpu-v5-lite-podslice", "2x4", 1, 8)),
        ("v5e:2x4", 4, ("tpu-v5-lite-podslice", "2x4", 2, 4)),
        ("v5e:4x4", None, ("tpu-v5-lite-podslice", "4x4", 4, 4)),
        ("v5e:8x8", 4, ("tpu-v5-lite-podslice", "8x8", 16, 4)),
        ("v6e:16x16", None, ("tpu-v6e-slice", "16x16", 64, 4)),
        ("v5p:2x2x1", None, ("tpu-v5p-slice", "2x2x1", 1, 4)),
        ("v5p:2x2x2", None, ("tpu-v5p-slice", "2x2x2", 2, 4)),
        ("v4:4x4x8", None, ("tpu-v4-podslice", "4x4x8", 32, 4)),
    ],
)
def test_slices(script, topology, chips_per_host, expected):
    assert script.slice_of(topology, chips_per_host) == expected


@pytest.mark.parametrize(
    ("topology", "chips_per_host", "says"),
    [
        ("v5e:4x2", None, "v5e comes as"),
        ("v5e:2x2x2", None, "v5e comes as"),
        ("v5p:4x4", None, "AxBxC"),
        ("v5p:4x2x2", None, "ascending"),
        ("v5p:2x2x3", None, "multiple of 4"),
        ("v5e:2x4", None, "--chips-per-host 8 or 4"),
        ("v5e:4x4", 8, "hosts of v5e:4x4 have 4"),
        ("v3:4x4", None, "one of v4, v5e, v5p, v6e"),
        ("v5e-16", None, "GENERATION:SHAPE"),
        ("v5e:0x4", None, "GENERATION:SHAPE"),
    ],
)
def test_slices_that_do_not_exist(script, topology, chips_per_host, says):
    with pytest.raises(script.Mistake, match=re.escape(says)):
        script.slice_of(topology, chips_per_host)


def test_a_pod_for_every_host(submit):
    argv = ["configs/qwen2.5_math_7b.yaml", *without(ARGV, "--topology")[1:], "--topology", "v5e:8x8"]
    jobset = submit(argv)
    job, pod = job_of(jobset), pod_of(jobset)
    assert (job["parallelism"], job["completions"]) == (16, 16)
    resources = pod["containers"][0]["resources"]
    assert resources["limits"] == resources["requests"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "8x8"
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"


def test_the_user_chooses_what_may_be_preempted(submit):
    spot = pod_of(submit(ARGV))
    assert spot["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert spot["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    kept = pod_of(submit([*without(ARGV, "--spot", 0), "--on-demand"]))
    assert "cloud.google.com/gke-spot" not in kept["nodeSelector"]
    assert "tolerations" not in kept


def test_inputs(submit):
    jobset = submit([*ARGV, "--inputs", "my-data/math/v1"])
    template = job_of(jobset)["template"]
    assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    attributes = {"bucketName": "my-data", "mountOptions": "implicit-dirs,only-dir=math/v1"}
    csi = {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": True, "volumeAttributes": attributes}
    assert {"name": "inputs", "csi": csi} in template["spec"]["volumes"]
    plain = job_of(submit(ARGV))["template"]  # no sidecar, no mount of a bucket that nobody named
    assert "gcsfuse" not in str(plain)
    assert "inputs" not in str(plain["spec"]["containers"])


def test_limits_can_be_set(submit):
    jobset = submit([*ARGV, "--max-restarts", "0", "--max-hours", "2"])
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 0
    assert job_of(jobset)["activeDeadlineSeconds"] == 7200


@pytest.mark.parametrize(
    ("override", "written"),
    [
        ("task.train=[data/a b.jsonl, 'c.jsonl']", None),
        ('task.system_prompt="x: {y} # z"', None),
        ("task.instruction=$HOME $(id) ${RUN}", "task.instruction=$HOME $$(id) ${RUN}"),  # Kubernetes expands $(...)
    ],
)
def test_overrides_reach_the_pod_as_they_were_typed(submit, override, written):
    assert pod_of(submit([*ARGV, override]))["containers"][0]["args"][-1] == (written or override)


@pytest.mark.parametrize(
    "flag",
    ["--context", "--namespace", "--service-account", "--bucket", "--image", "--run", "--spot", "--topology"],
)
def test_a_missing_setting_costs_nothing(script, cluster, capsys, flag):
    assert status_of(script, without(ARGV, flag, 0 if flag == "--spot" else 1)) == 2
    error = capsys.readouterr().err
    assert flag in error
    assert flag in ("--run", "--spot", "--topology") or "DYNAMO_JAX_" + flag[2:].upper().replace("-", "_") in error
    assert cluster.calls() == []


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([*ARGV, "mesh.fsdp=8"], "the job rents 16"),
        ([*ARGV, "run_dir=x"], "the job sets run_dir"),
        ([*ARGV, "--build"], "--project (or DYNAMO_JAX_PROJECT)"),
        ([*without(ARGV, "--run"), "--run", "a" * 46], "at most 45"),
        ([*ARGV, "--max-restarts", "-1"], "--max-restarts"),
    ],
)
def test_what_the_cluster_would_refuse_is_refused_here(script, cluster, capsys, argv, says):
    assert status_of(script, argv) == 2
    assert says in capsys.readouterr().err
    assert cluster.calls() == []


def test_commands(script, cluster, capsys):
    assert status_of(script, [*ARGV, "--build", "--project", "my-project"]) == 0
    build, create = (words for words, _ in cluster.calls())
    assert f"_IMAGE={IMAGE},_EXTRA=tpu" in build
    assert create == ["kubectl", "--context", "gke_p_r_c", "--namespace", "training", "create", "--filename", "-"]
    printed = capsys.readouterr().out
    assert "gs://my-bucket/runs/first" in printed
    assert "logs --follow --prefix --selector jobset.sigs.k8s.io/jobset-name=first" in printed


def test_a_run_that_exists_is_an_error(script, cluster):
    cluster.answer("--context", status=1)  # AlreadyExists
    assert status_of(script, ARGV) == 1


def test_dry_run_starts_nothing(script, cluster, capsys):
    assert status_of(script, [*ARGV, "--dry-run"]) == 0
    assert cluster.calls() == []
    first, _, document = capsys.readouterr().out.partition("\n")
    assert first.startswith("+ kubectl ")
    check(yaml.safe_load(document))
