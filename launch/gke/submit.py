#!/usr/bin/env python3
"""Submit a training run to a TPU slice in Google Kubernetes Engine, as a JobSet.

python launch/gke/submit.py configs/qwen2.5_math_1.5b.yaml --topology v5e:4x4 --run first --spot \
    --context CONTEXT --namespace NAMESPACE --service-account ACCOUNT --bucket BUCKET --image IMAGE
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import submitting
from submitting import Mistake

HERE = Path(__file__).resolve().parent
RUN_LENGTH = 45  # a pod is named RUN-slice-0-HOST-xxxxx, in 63 characters
ACCELERATORS = {"v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # slices of the generations with a 2D network


def submit(argv: Sequence[str] | None = None) -> None:
    """Check, build if asked, and create one JobSet."""
    arguments = parse(argv)
    document = yaml.safe_dump(make_jobset(arguments), sort_keys=False, width=1000)
    where = ["--context", arguments.context, "--namespace", arguments.namespace]
    # Not `apply`: a run that exists is refused, so no second set of pods writes its folder.
    create = ["kubectl", *where, "create", "--filename", "-"]
    build = submitting.build_command(arguments, "tpu") if arguments.build else []
    if arguments.dry_run:
        if build:
            submitting.show(build)
        submitting.show(create, document)
        return
    if build:
        submitting.run(build)
    submitting.run(create, document)
    run, place = arguments.run, " ".join(where)
    folder = f"gs://{arguments.bucket}/runs/{run}"
    sys.stdout.write(
        f"run folder   {folder}\n"
        f"progress     gcloud storage cat {folder}/status.json\n"
        f"state        kubectl {place} get jobset {run}\n"
        f"logs         kubectl {place} logs --follow --prefix --selector jobset.sigs.k8s.io/jobset-name={run}\n"
        f"stop, save   kubectl {place} delete jobset {run}\n"
        f"go on        the same command, once the JobSet is deleted\n"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = submitting.parser(__doc__)
    parser.add_argument("--topology", help="the slice, as for dynamo-jax plan: v5e:4x4, v5p:2x2x2, v6e:4x4")
    parser.add_argument("--chips-per-host", type=int, choices=(1, 4, 8), help="needed for 2x4: one host of 8, or two")
    submitting.setting(parser, "context", "kubectl's context: which cluster pays")
    submitting.setting(parser, "namespace", "the namespace of the service account")
    submitting.setting(parser, "service-account", "Kubernetes service account that may write to the bucket")
    submitting.setting(parser, "project", "for --build: the project whose Cloud Build makes the image")
    parser.add_argument("--max-restarts", type=int, help="after crashes; the default stands in jobset.yaml")
    parser.add_argument("--max-hours", type=float, help="limit of one attempt; the default stands in jobset.yaml")
    arguments = parser.parse_intermixed_args(argv)
    needed = ["context", "namespace", "service-account", "bucket", "image"]
    submitting.check(arguments, needed + ["project"] * arguments.build, RUN_LENGTH)
    if arguments.topology is None:
        raise Mistake("missing --topology, such as v5e:4x4")
    if (arguments.max_restarts or 0) < 0 or (arguments.max_hours is not None and arguments.max_hours <= 0):
        raise Mistake("--max-restarts is at least 0, --max-hours more than 0")
    return arguments


def slice_of(topology: str, chips_per_host: int | None) -> tuple[str, str, int, int]:
    """Accelerator label, topology label, hosts and chips a host of `v5e:4x4`. Raises `Mistake` if there is none such.

    Hosts have 4 chips, with two exceptions: 1x1 is a host of its own, and 2x4 exists as one host of 8 chips, too.
    """
    generation, _, shape = topology.partition(":")
    if generation not in ACCELERATORS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        raise Mistake(f"--topology {topology}: GENERATION:SHAPE with one of {', '.join(ACCELERATORS)}, such as v5e:4x4")
    sides = [int(side) for side in shape.split("x")]
    chips = math.prod(sides)
    if generation in ("v5e", "v6e"):
        if shape not in FLAT:
            raise Mistake(f"--topology {topology}: {generation} comes as {', '.join(FLAT)}")
    elif shape != "2x2x1" and not (len(sides) == 3 and sides == sorted(sides) and all(map(_fits, sides))):
        raise Mistake(f"--topology {topology}: 2x2x1, or AxBxC, ascending, each 2 or a multiple of 4")
    if shape == "2x4":
        if chips_per_host not in (4, 8):
            raise Mistake("2x4 exists as one host of 8 chips and as two of 4: say --chips-per-host 8 or 4")
    elif chips_per_host not in (None, min(chips, 4)):
        raise Mistake(f"--chips-per-host {chips_per_host}: hosts of {topology} have {min(chips, 4)}")
    per_host = chips_per_host or min(chips, 4)
    return ACCELERATORS[generation], shape, chips // per_host, per_host


def _fits(side: int) -> bool:
    return side == 2 or side % 4 == 0


def make_jobset(arguments: argparse.Namespace) -> dict[str, Any]:
    """The manifest, filled in."""
    accelerator, shape, hosts, per_host = slice_of(arguments.topology, arguments.chips_per_host)
    submitting.check_recipe(arguments.config, arguments.overrides, "tpu", hosts * per_host)
    bucket, _, folder = (arguments.inputs or "").partition("/")
    values = {"CONFIG": arguments.config, "IMAGE": arguments.image, "BUCKET": arguments.bucket, "RUN": arguments.run}
    values |= {"SERVICE_ACCOUNT": arguments.service_account, "INPUTS_BUCKET": bucket, "INPUTS_FOLDER": folder}
    jobset = submitting.fill(yaml.safe_load((HERE / "jobset.yaml").read_text()), values)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]

    job["parallelism"] = job["completions"] = hosts
    for kind in ("requests", "limits"):
        container["resources"][kind]["google.com/tpu"] = per_host
    pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] = accelerator
    pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] = shape
    # Kubernetes expands $(NAME) in arguments; $$ keeps it as it was written.
    container["args"] += [word.replace("$(", "$$(") for word in arguments.overrides]
    if arguments.spot:
        pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
        toleration = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        pod["tolerations"] = [toleration]
    if not arguments.inputs:
        pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] != "inputs"]
        container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] != "inputs"]
        del job["template"]["metadata"]["annotations"]
    if arguments.max_restarts is not None:
        jobset["spec"]["failurePolicy"]["maxRestarts"] = arguments.max_restarts
    if arguments.max_hours is not None:
        job["activeDeadlineSeconds"] = round(arguments.max_hours * 3600)
    return jobset


if __name__ == "__main__":
    sys.exit(submitting.main(submit))
