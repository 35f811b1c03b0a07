#!/usr/bin/env python3
"""Submit a training run to Google Cloud Batch, on GPU machines. The same command again goes on with the run.

python launch/gcloud_batch/submit.py l4x1 configs/arithmetic_cpu.yaml trainer.steps=100 --run first --spot \
    --project PROJECT --region us-central1 --bucket BUCKET \
    --image us-central1-docker.pkg.dev/PROJECT/REPOSITORY/dynamo-jax:1 --build
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import submitting
from submitting import Mistake

HOSTS_FILE = "/etc/cloudbatch-taskgroup-hosts"  # where BATCH_HOSTS_FILE points, on the machine
HERE = Path(__file__).resolve().parent
RUN_LENGTH = 47  # Batch's names have 63 characters, and -YYYYMMDD-HHMMSS follows


def submit(argv: Sequence[str] | None = None) -> None:
    """Check, build if asked, and submit one job."""
    arguments = parse(argv)
    job = make_job(arguments)
    document = json.dumps(job, indent=2) + "\n"
    name = f"{arguments.run}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    where = ["--project", arguments.project, "--location", arguments.region]
    build = submitting.build_command(arguments, "cuda")
    alive = f"labels.dynamo_jax_run={arguments.run} AND status.state=(QUEUED, SCHEDULED, RUNNING)"
    find = ["gcloud", "batch", "jobs", "list", *where, "--filter", alive, "--format", "value(name)"]
    send = ["gcloud", "batch", "jobs", "submit", name, *where, "--config", "-", "--format", "value(uid)"]
    if arguments.dry_run:
        for command in ([build] if arguments.build else []) + [find]:
            submitting.show(command)
        submitting.show(send, document)
        return
    running = submitting.run(find, capture=True)
    if running:  # a second job would pay twice and write the same run folder
        raise Mistake(f"run {arguments.run} is already under way: {running}")
    if arguments.build:
        submitting.run(build)
    uid = submitting.run(send, document, capture=True)
    folder = f"gs://{arguments.bucket}/runs/{arguments.run}"
    log = f'logName="projects/{arguments.project}/logs/batch_task_logs" AND labels.job_uid="{uid}"'
    sys.stdout.write(
        f"job          {name}\n"
        f"run folder   {folder}\n"
        f"progress     gcloud storage cat {folder}/status.json\n"
        f"state        gcloud batch jobs describe {name} {' '.join(where)}\n"
        f"logs         gcloud logging read '{log}' --project {arguments.project} --freshness 30d\n"
        f"stop, save   gcloud batch jobs cancel {name} {' '.join(where)}\n"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = submitting.parser(__doc__, sorted(path.stem for path in HERE.glob("*.json")))
    submitting.setting(parser, "project", "the project that pays")
    submitting.setting(parser, "region", "such as us-central1; it must offer the machine")
    submitting.setting(parser, "service-account", "e-mail of the machines' account; default: Compute Engine's")
    parser.add_argument("--max-hours", type=float, help="limit of one attempt; the default stands in the job's file")
    parser.add_argument("--max-retries", type=int, choices=range(11), help="after any failure but a mistake")
    parser.add_argument("--nodes", type=int, default=1, help="machines that train together (default 1)")
    parser.add_argument("--driver", help="NVIDIA driver to install, such as 580.95.05 (default: Batch's choice)")
    arguments = parser.parse_intermixed_args(argv)
    submitting.check(arguments, ("project", "region", "bucket", "image"), RUN_LENGTH)
    if arguments.nodes < 1 or (arguments.max_hours is not None and not 0 < arguments.max_hours <= 14 * 24):
        raise Mistake("--nodes is at least 1, --max-hours more than 0 and at most 336, Batch's own limit")
    return arguments


def make_job(arguments: argparse.Namespace) -> dict[str, Any]:
    """The job's file, filled in."""
    job = json.loads((HERE / f"{arguments.machine}.json").read_text())
    values = {"CONFIG": arguments.config, "IMAGE": arguments.image, "BUCKET": arguments.bucket}
    job = submitting.fill(job, values | {"RUN": arguments.run, "REGION": arguments.region})
    group = job["taskGroups"][0]
    task = group["taskSpec"]
    container = task["runnables"][0]["container"]
    machine = job["allocationPolicy"]["instances"][0]["policy"]

    gpus = int(machine["accelerators"][0]["count"]) * arguments.nodes
    submitting.check_recipe(arguments.config, arguments.overrides, "gpu", gpus)
    container["commands"] += arguments.overrides
    machine["provisioningModel"] = "SPOT" if arguments.spot else "STANDARD"
    if arguments.max_hours is not None:
        task["maxRunDuration"] = f"{round(arguments.max_hours * 3600)}s"
    if arguments.max_retries is not None:
        task["maxRetryCount"] = arguments.max_retries
    if arguments.driver:
        machine["accelerators"][0]["driverVersion"] = arguments.driver
    if arguments.service_account:
        job["allocationPolicy"]["serviceAccount"] = {"email": arguments.service_account}
    if arguments.inputs:
        # The mount belongs to root and the image's user is another: allow_other lets it read.
        options = ["--implicit-dirs", "-o allow_other", "-o ro"]
        volume = {"gcs": {"remotePath": arguments.inputs}, "mountPath": submitting.INPUTS, "mountOptions": options}
        task["volumes"] = [volume]
    if arguments.nodes > 1:
        _several_nodes(group, arguments.nodes)
    return job


def _several_nodes(group: dict[str, Any], nodes: int) -> None:
    """One task a machine, all at once; each finds the others through BATCH_* variables."""
    task = group["taskSpec"]
    group |= {"taskCount": str(nodes), "parallelism": str(nodes), "requireHostsFile": True}
    container = task["runnables"][0]["container"]
    container["options"] += " --network=host"  # the others connect to the machine's own ports
    # Where a container names volumes of its own, Batch no longer adds the task's.
    paths = [HOSTS_FILE, *(volume["mountPath"] for volume in task.get("volumes", []))]
    container["volumes"] = [f"{path}:{path}:ro" for path in paths]
    # The machine's own firewall, where it has one, lets nothing in; the network's rules still stand.
    firewall = {"script": {"text": "/sbin/iptables -A INPUT -j ACCEPT"}, "ignoreExitStatus": True}
    task["runnables"][:0] = [firewall, {"barrier": {"name": "all-machines-are-up"}}]
    # A task that Batch retries alone may get a machine that the others do not know of: the job ends, and you submit it
    # again.
    task["maxRetryCount"] = 0


if __name__ == "__main__":
    sys.exit(submitting.main(submit))
