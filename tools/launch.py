r"""Launches a run on TPU slices, GKE or SLURM, and restarts it if it ends early.

    python tools/launch.py --on tpu-vm --slice v5p-128 --zone us-east5-a --bucket B \
        -- --config configs/wan_pod.py --workdir /mnt/B/wan --config.mesh.fsdp=8
    python tools/launch.py --on gke --slice 2xv6e-256 --image IMAGE -- --config …
    python tools/launch.py --on slurm --nodes 4 --devices 8 -- --config …

Arguments after `--` go to `jvdit.train`, or with `--module encode` to `jvdit.encode`.
The tool prints what it would run (a script, a JobSet or a batch file), and runs it with
`--go`. Processes that end before the run is finished are started again with the same
command, which resumes from what is saved; a slice that was preempted is requested
again. The workdir must be a path that all hosts see: `--bucket B` mounts the Cloud
Storage bucket B at /mnt/B. Checkpoints rename folders in it, which needs a bucket with
a hierarchical namespace:

    gcloud storage buckets create gs://B --location us-east5 \
        --uniform-bucket-level-access --enable-hierarchical-namespace

It has not been tested on any of the three, since none was available.
"""

import argparse
import itertools
import json
import math
import pathlib
import re
import shlex
import subprocess
import sys
from typing import Any

from jvdit.machine.chips import several, topology

# Names of each chip's slices in Google's interfaces, and the chips of a host.
ACCELERATORS = {"v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}
RUNTIMES = {"v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5"}
RUNTIMES |= {"v6e": "v2-alpha-tpuv6e"}
NODES = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice"}
NODES |= {"v6e": "tpu-v6e-slice"}
CHIPS_OF_HOST = 4
INSTALL = "pip install -q -e '.[tpu]'"
# A run that ends within so many seconds has failed at once; it is tried so often.
AT_ONCE, TRIES = 300, 3
# Required arguments of each command; the last names its output folder.
NEEDED = {"train": ("--config", "--workdir"), "encode": ("--source", "--vae", "--out")}
STOPPED = 75  # "try again later", as sysexits.h has it
# What a process exits with on GKE if it is not to be started again, and where it reads
# how often it was.
HOPELESS = 64
RESTARTS = "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"
PACKAGES = "https://packages.cloud.google.com/apt"
# Hosts write into one folder together, so none may cache its contents. On TPU hosts
# gcsfuse would by default, for ever.
UNCACHED = {"metadata-cache-ttl-secs": 0, "metadata-cache-negative-ttl-secs": 0}


def command(args: argparse.Namespace) -> str:
    """The command that every process runs; it exits with `STOPPED` if interrupted."""
    stopped = [f"--exit_stopped={STOPPED}"] if args.module == "train" else []
    module = f"jvdit.{args.module}"
    return shlex.join(["python", "-m", module, *args.arguments, *stopped])


def hopeless(restarts: str) -> str:
    """A shell's test of `code`: whether a run should not be started again.

    It was neither interrupted nor killed, but ended by itself, at once, and not for the
    first time.

    Args:
        restarts: name of the variable that says how often it was started again.
    """
    return (
        f"[ $code -ne 0 ] && [ $code -ne {STOPPED} ] && [ $code -lt 128 ] && "
        f'[ $SECONDS -lt {AT_ONCE} ] && [ "${{{restarts}:-0}}" -ge {TRIES - 1} ]'
    )


def mount_command(bucket: str) -> str:
    """Shell commands that mount a bucket with gcsfuse, installing it if needed."""
    folder, key = f"/mnt/{bucket}", "/usr/share/keyrings/cloud.google.asc"
    options = " ".join(f"--{name}={value}" for name, value in UNCACHED.items())
    return f"""set -e
if ! command -v gcsfuse >/dev/null; then
  curl -fsSL {PACKAGES}/doc/apt-key.gpg | sudo tee {key} >/dev/null
  echo "deb [signed-by={key}] {PACKAGES} gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse
fi
if ! mountpoint -q {folder}; then
  sudo mkdir -p {folder} && sudo chown "$USER" {folder}
  gcsfuse --implicit-dirs {options} {bucket} {folder}
fi
"""


def tpu_vm(args: argparse.Namespace) -> str:
    """A script that requests TPU slices, runs, and requests them again if preempted."""
    slices, kind = several(args.slice)
    chip = kind.partition("-")[0]
    accelerator = kind.replace(chip, ACCELERATORS[chip])
    place = f"--zone {shlex.quote(args.zone)}"
    if args.project:
        place += f" --project {shlex.quote(args.project)}"
    spot = " --spot" if args.spot else ""
    code, name = shlex.quote(args.code), shlex.quote(args.name)
    nodes, ask = name, '--node-id "$name"'
    if slices > 1:
        nodes = " ".join(f"{name}-{i}" for i in range(slices))
        ask = f'--node-prefix "$name" --node-count {slices}'
    work = mount_command(args.bucket) if args.bucket else ""
    work += f"mkdir -p {code} && tar -xzf jvdit.tar.gz -C {code} && cd {code}"
    work += f" && {INSTALL} && {command(args)}"
    return f"""#!/usr/bin/env bash
set -uo pipefail
name={name}
tpus="gcloud compute tpus"
packed=$(mktemp -d)
state() {{
  $tpus queued-resources describe "$name" {place} --format='value(state.state)'
}}
train() {{ # on the hosts of one slice
  $tpus tpu-vm scp "$packed/jvdit.tar.gz" "$1:" {place} --worker=all &&
  $tpus tpu-vm ssh "$1" {place} --worker=all --command={shlex.quote(work)}
}}
train_all() {{
  local running=() failed=0
  for node in {nodes}; do train "$node" & running+=($!); done
  for one in "${{running[@]}}"; do wait "$one" || failed=1; done
  return $failed
}}
early=0
until
  case "$(state 2>/dev/null)" in
    ACTIVE|ACCEPTED|PROVISIONING|WAITING_FOR_RESOURCES|CREATING) ;;
    *) # never asked for, or taken away
      $tpus queued-resources delete "$name" {place} --force --quiet
      $tpus queued-resources create "$name" {ask} {place} \
        --accelerator-type {accelerator} \
        --runtime-version {RUNTIMES[chip]}{spot} || exit 1 ;;
  esac
  until now=$(state); [ "$now" = ACTIVE ]; do
    case "$now" in FAILED|SUSPENDED) break ;; esac
    sleep 30
  done
  begun=$SECONDS
  # What git doesn't know yet, such as a new config, goes along.
  git ls-files -z -co --exclude-standard |
    tar --null -T - -czf "$packed/jvdit.tar.gz" && train_all
do
  if [ $((SECONDS - begun)) -lt {AT_ONCE} ]; then early=$((early + 1)); else early=0; fi
  if [ $early -ge {TRIES} ]; then
    echo "ended at once {TRIES} times; giving the slices back" >&2
    break
  fi
  echo "ended early; starting again" >&2
  sleep 30
done
$tpus queued-resources delete "$name" {place} --force --quiet
[ $early -lt {TRIES} ]
"""


def gke(args: argparse.Namespace) -> str:
    """A Kubernetes JobSet with a pod for each host; if one fails, all restart."""
    number, kind = several(args.slice)
    chip, _, shape = topology(kind).partition(":")
    hosts = math.prod(map(int, shape.split("x"))) // CHIPS_OF_HOST
    chips = {"google.com/tpu": CHIPS_OF_HOST}
    container = {
        "name": "train",
        "image": args.image,
        "command": [
            "bash",
            "-c",
            f"{command(args)}\ncode=$?\n"
            f"if {hopeless('RESTARTS')}; then code={HOPELESS}; fi\nexit $code",
        ],
        "env": [
            {"name": "RESTARTS", "valueFrom": {"fieldRef": {"fieldPath": RESTARTS}}}
        ],
        "ports": [{"containerPort": 8471}],
        "resources": {"requests": chips, "limits": chips},
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 120,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": NODES[chip],
            "cloud.google.com/gke-tpu-topology": shape,
        },
        "containers": [container],
    }
    template: dict[str, Any] = {"spec": pod}
    if args.bucket:
        template["metadata"] = {"annotations": {"gke-gcsfuse/volumes": "true"}}
        pod["volumes"] = [{"name": "bucket", "csi": _csi(args.bucket)}]
        mount = {"name": "bucket", "mountPath": f"/mnt/{args.bucket}"}
        container["volumeMounts"] = [mount]
    job = {"parallelism": hosts, "completions": hosts, "backoffLimit": 0}
    job["template"] = template
    codes = {"containerName": "train", "operator": "In", "values": [HOPELESS]}
    job["podFailurePolicy"] = {"rules": [{"action": "FailJob", "onExitCodes": codes}]}
    slices = {"name": "slice", "replicas": number, "template": {"spec": job}}
    # The hosts of a slice have to be neighbours: those of one pool of nodes.
    pool = "cloud.google.com/gke-nodepool"
    notes = {"alpha.jobset.sigs.k8s.io/exclusive-topology": pool}
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": args.name, "annotations": notes},
        "spec": {
            "failurePolicy": {
                "maxRestarts": 1000,
                "rules": [
                    {
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [slices],
        },
    }
    return json.dumps(jobset, indent=2) + "\n"


def _csi(bucket: str) -> dict[str, Any]:
    """A Kubernetes volume that mounts a bucket with gcsfuse."""
    options = (f"{k}:{v}".replace("cache-", "cache:", 1) for k, v in UNCACHED.items())
    mount = {"mountOptions": ",".join(["implicit-dirs", *options])}
    driver = "gcsfuse.csi.storage.gke.io"
    return {"driver": driver, "volumeAttributes": {"bucketName": bucket} | mount}


def slurm(args: argparse.Namespace) -> str:
    """A SLURM batch file that requeues itself when its time is over or it crashed."""
    return f"""#!/usr/bin/env bash
#SBATCH --job-name={args.name}
#SBATCH --nodes={args.nodes}
#SBATCH --ntasks-per-node={args.devices}
#SBATCH --gpus-per-node={args.devices}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@180
# SIGTERM three minutes before the end: the processes save together, and go on later.
stop() {{
  kill -TERM "$running"
  timeout 150 tail --pid="$running" -f /dev/null
  scontrol requeue "$SLURM_JOB_ID"
}}
trap stop TERM
srun {command(args)} &
running=$!
wait "$running"
code=$?
if {hopeless("SLURM_RESTART_COUNT")}; then
  echo "ended at once {TRIES} times; giving up" >&2
elif [ $code -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


TARGETS = {"tpu-vm": tpu_vm, "gke": gke, "slurm": slurm}
RUNNERS = {"tpu-vm": ["bash"], "gke": ["kubectl", "apply", "-f", "-"]}
RUNNERS |= {"slurm": ["sbatch"]}


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the command line; exits with an error message if it is wrong."""
    ours, _, theirs = " ".join(map(shlex.quote, argv)).partition(" -- ")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--on", choices=TARGETS, required=True, help="where to launch the run"
    )
    parser.add_argument(
        "--module",
        choices=NEEDED,
        default="train",
        help="jvdit command to run (default: train)",
    )
    parser.add_argument(
        "--name",
        default="jvdit",
        help="name of the slice, JobSet or SLURM job (default: jvdit)",
    )
    parser.add_argument(
        "--slice",
        help="TPU slice, such as v5p-128; 2xv5p-128 is two of them "
        "(for --on tpu-vm and gke)",
    )
    parser.add_argument(
        "--bucket",
        default="",
        help="Cloud Storage bucket to mount at /mnt/BUCKET for the workdir",
    )
    parser.add_argument("--zone", help="Google Cloud zone (for --on tpu-vm)")
    parser.add_argument("--project", help="Google Cloud project (default: gcloud's)")
    parser.add_argument(
        "--spot", action="store_true", help="request preemptible TPUs (tpu-vm)"
    )
    parser.add_argument(
        "--code",
        default="jvdit",
        help="folder on the hosts to copy the code to (default: jvdit)",
    )
    parser.add_argument(
        "--image", help="container image with jvdit[tpu] installed (for --on gke)"
    )
    parser.add_argument(
        "--nodes", type=int, default=1, help="nodes (for --on slurm, default: 1)"
    )
    parser.add_argument(
        "--devices",
        type=int,
        default=8,
        help="GPUs of a node (for --on slurm, default: 8)",
    )
    parser.add_argument(
        "--go", action="store_true", help="run it, instead of printing what would run"
    )
    args = parser.parse_args(shlex.split(ours))
    args.arguments = shlex.split(theirs)
    needed = {"tpu-vm": ("slice", "zone"), "gke": ("slice", "image"), "slurm": ()}
    for name in needed[args.on]:
        if not getattr(args, name):
            parser.error(f"--on {args.on} needs --{name}")
    given = {word.partition("=")[0] for word in args.arguments}
    if not given.issuperset(NEEDED[args.module]):
        parser.error(
            f"give the arguments of jvdit.{args.module} after --, "
            f"{' and '.join(NEEDED[args.module])} among them"
        )
    check_config(args, parser)
    if args.bucket:
        args.bucket = args.bucket.removeprefix("gs://").rstrip("/")
        check_bucket(args, parser)
    if args.slice:
        for ours, googles in ACCELERATORS.items():
            args.slice = args.slice.replace(googles, ours)
        try:
            topology(args.slice)
        except ValueError as error:
            parser.error(str(error))
    return args


def pairs(words: list[str]) -> set[tuple[str, ...]]:
    """Flags and their values, however they are joined."""
    return {word.partition("=")[::2] for word in words} | {*itertools.pairwise(words)}


def check_config(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Exits with an error message if the config isn't here, from where code is sent."""
    for flag, value in pairs(args.arguments):
        file = pathlib.Path(value.partition(":")[0])
        if flag == "--config" and value and not file.exists():
            named = f"configs/{file.name.removesuffix('.py')}.py"
            known = pathlib.Path(named).exists() and "/" not in value
            if not known:
                parser.error(f"--config {value}: there is no such file here")


def check_bucket(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Exits with an error message if a bucket can't be mounted, or isn't written to."""
    if args.on == "slurm":
        parser.error("--bucket is for Google's hosts; those of SLURM share folders")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", args.bucket):
        name = args.bucket.partition("/")[0]
        parser.error(f"--bucket {args.bucket} must be a name alone; try {name}")
    folder, where = f"/mnt/{args.bucket}/", NEEDED[args.module][-1]
    if not any(k == where and v.startswith(folder) for k, v in pairs(args.arguments)):
        parser.error(f"--bucket {args.bucket} is mounted there: {where} {folder}NAME")


def main() -> None:
    """Prints what would be run, or with --go runs it."""
    args = parse(sys.argv[1:])
    text = TARGETS[args.on](args)
    if not args.go:
        print(text, end="")
        return
    sys.exit(subprocess.run(RUNNERS[args.on], input=text, text=True).returncode)


if __name__ == "__main__":
    main()
