"""What `tpu_vm.sh create` asks gcloud for is a request that the TPU API has: built with its client's types."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from google.cloud.tpu_v2alpha1.types import QueuedResource

SCRIPT = Path(__file__).parents[2] / "launch" / "tpu_vm.sh"
SETTINGS = {
    "name": "slice", "zone": "us-west4-a", "project": "mine", "bucket": "bucket",
    "accelerator-type": "v5litepod-16", "runtime-version": "v2-alpha-tpuv5-lite",
}  # fmt: skip


def flags(*more: str) -> dict[str, str]:
    """The flags of the `create` call, `True` for those without a value."""
    words = ["bash", str(SCRIPT), "create", "--dry-run", *(f"--{k}={v}" for k, v in SETTINGS.items()), *more]
    environ = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environ)
    (line,) = [line for line in done.stdout.splitlines() if " queued-resources create " in line]
    pairs = [word[2:].partition("=") for word in shlex.split(line) if word.startswith("--")]
    return {name: value if equals else "True" for name, equals, value in pairs}


@pytest.mark.parametrize(("kind", "field"), [("--spot", "spot"), ("--reserved", "guaranteed"), ("--on-demand", None)])
def test_create_is_a_queued_resource(kind: str, field: str | None) -> None:
    asked = flags(kind)
    parent = f"projects/{asked['project']}/locations/{asked['zone']}"
    node = {"accelerator_type": asked["accelerator-type"], "runtime_version": asked["runtime-version"]}
    request = {"tpu": {"node_spec": [{"parent": parent, "node_id": asked["node-id"], "node": node}]}}
    # gcloud's flags for the tier, as its API has them: `--spot`, `--reserved`, and neither for on demand.
    if "spot" in asked:
        request["spot"] = {}
    if "reserved" in asked:
        request["guaranteed"] = {"reserved": True}
    message = QueuedResource(request, ignore_unknown_fields=False)
    (spec,) = message.tpu.node_spec
    assert (spec.node_id, spec.node.accelerator_type) == ("slice", "v5litepod-16")
    assert spec.node.runtime_version == "v2-alpha-tpuv5-lite"
    assert QueuedResource.pb(message).WhichOneof("tier") == field
    tiers = {"spot", "reserved", "best-effort", "guaranteed"} & asked.keys()
    assert tiers == ({kind[2:]} if field else set())
