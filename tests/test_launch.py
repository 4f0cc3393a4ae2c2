"""What the launcher would run: scripts that a shell reads, and nothing left out."""

import importlib.util
import json
import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
found = importlib.util.spec_from_file_location("launch", ROOT / "tools/launch.py")
assert found is not None and found.loader is not None
launch = importlib.util.module_from_spec(found)
found.loader.exec_module(launch)

GKE = ["--on", "gke", "--slice", "v5p-128", "--image", "i"]
TRAIN = ["--config", "configs/wan_pod.py", "--workdir", "/mnt/b/it's here"]


def text(*args):
    parsed = launch.parse([*args, "--", *TRAIN])
    assert parsed.arguments == TRAIN
    return launch.TARGETS[parsed.on](parsed)


def test_a_slice_is_asked_for_again_until_the_training_has_ended():
    script = text("--on", "tpu-vm", "--slice", "v5e-64", "--zone", "z", "--spot")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "v5litepod-64" in script and "v2-alpha-tpuv5-lite --spot" in script
    # gcloud, replaced: the command ends badly once, then well.
    ran = run(script, "[ $(wc -l < ssh) -ge 2 ]")
    assert ran.returncode == 0
    assert ran.stdout.count("python -m jvdit.train --config configs/wan_pod.py") == 2


def run(script, ends_well):
    """Runs a script for TPU VMs where each ssh is told, and ends as a test says."""
    fake = f"""
    cd "$(mktemp -d)" && git init -q
    gcloud() {{
      case "$*" in
        *describe*) echo ${{STATE:-ACTIVE}} ;;
        *" ssh "*) echo "$5" >> ssh; echo "$@"; {ends_well} ;;
      esac
    }}
    sleep() {{ :; }}
    """
    return subprocess.run(
        ["bash"], input=fake + script, text=True, capture_output=True, timeout=60
    )


def test_slices_train_together_and_start_again_together():
    where = ("--on", "tpu-vm", "--slice", "3xv6e-64", "--zone", "z")
    script = text(*where)
    assert '--node-prefix "$name" --node-count 3' in script
    # The middle one of three fails the first time.
    ran = run(script, '[ "$5" != jvdit-1 ] || [ $(grep -c jvdit-1 ssh) -ge 2 ]')
    assert ran.returncode == 0
    for node in ("jvdit-0", "jvdit-1", "jvdit-2"):
        assert ran.stdout.count(f"ssh {node}") == 2


def test_what_ends_at_once_again_and_again_is_given_up():
    script = text("--on", "tpu-vm", "--slice", "v6e-64", "--zone", "z")
    ran = run(script, "false")
    assert ran.returncode == 1 and "giving the slices back" in ran.stderr
    assert ran.stdout.count(" ssh ") == 3
    # Four, but each after an hour's work: so spot slices go.
    hour = "wait() { SECONDS=$((SECONDS + 3600)); builtin wait $1; }"
    ran = run(f"{hour}\n{script}", "[ $(wc -l < ssh) -ge 5 ]")
    assert ran.returncode == 0 and ran.stdout.count(" ssh ") == 5


def test_a_slice_that_is_never_given_is_given_up():
    script = text("--on", "tpu-vm", "--slice", "v6e-64", "--zone", "z")
    ran = run(f"STATE=FAILED\n{script}", "false")
    assert ran.returncode == 1 and "giving the slices back" in ran.stderr


def test_a_bucket_is_mounted_once_and_remembers_nothing(tmp_path):
    made = launch.mount_command("b")
    # Without gcsfuse it is installed; with it and a mount there is nothing to do.
    for name in ("sudo", "curl", "lsb_release", "gcsfuse", "mountpoint", "tee"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/log\n')
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "USER": "u"}

    def commands():
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        subprocess.run(["bash", "-c", made], env=environment, check=True)
        return log.read_text().splitlines()

    assert commands() == ["mountpoint -q /mnt/b"]
    (tmp_path / "mountpoint").write_text("#!/bin/sh\nexit 1\n")
    mounting = "gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 "
    mounting += "--metadata-cache-negative-ttl-secs=0 b /mnt/b"
    assert commands() == ["sudo mkdir -p /mnt/b", "sudo chown u /mnt/b", mounting]


def test_a_pod_for_each_host():
    where = ("--on", "gke", "--slice", "2xv6e-256", "--image", "i")
    made = json.loads(text(*where, "--bucket", "b"))
    slices = made["spec"]["replicatedJobs"][0]
    job = slices["template"]["spec"]
    assert slices["replicas"] == 2 and job["parallelism"] == job["completions"] == 64
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "16x16"
    assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == "/mnt/b"
    assert "metadata-cache:ttl-secs:0" in json.dumps(pod["volumes"])
    command = pod["containers"][0]["command"]
    assert command[:2] == ["bash", "-c"] and "it" in command[2]
    printed = subprocess.run(
        ["bash", "-c", command[2].replace("python", "printf '%s\\n'", 1)],
        text=True,
        capture_output=True,
        check=True,
    )
    assert printed.stdout.splitlines()[-5:] == [*TRAIN, "--exit_stopped=75"]


@pytest.mark.parametrize(
    "code, seconds, restarts, given_up",
    [(1, 9, 2, True), (1, 9, 1, False), (1, 999, 9, False), (75, 9, 9, False)]
    + [(137, 9, 9, False), (0, 9, 9, False)],
)
def test_what_may_pass_is_tried_again_and_what_ends_at_once_is_not(
    code, seconds, restarts, given_up
):
    """On GKE by an exit code that ends the JobSet, on SLURM by not queueing again."""
    job = json.loads(text(*GKE))["spec"]
    assert job["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    slices = job["replicatedJobs"][0]["template"]["spec"]
    (rule,) = slices["podFailurePolicy"]["rules"]
    (container,) = slices["template"]["spec"]["containers"]
    assert container["env"][0]["name"] == "RESTARTS"
    env = {"RESTARTS": f"{restarts}", "SLURM_RESTART_COUNT": f"{restarts}"}

    def ends(script):
        fake = f"""
        python() {{ SECONDS={seconds}; return {code}; }}
        srun() {{ return {code}; }}
        wait() {{ builtin wait $1; local ended=$?; SECONDS={seconds}; return $ended; }}
        scontrol() {{ echo queued; }}
        """
        return subprocess.run(
            ["bash", "-c", fake + script],
            text=True,
            capture_output=True,
            env=os.environ | env,
        )

    pod = ends(container["command"][2]).returncode
    hopeless = rule["onExitCodes"]["values"]
    assert hopeless == [pod] if given_up else pod == code not in hopeless
    batch = ends(text("--on", "slurm"))
    queued = "queued" in batch.stdout
    assert batch.returncode == code and queued == (code != 0 and not given_up)


def test_names_are_taken_as_google_writes_them():
    where = ("--on", "gke", "--image", "i", "--bucket", "gs://b/")
    parsed = launch.parse([*where, "--slice", "2xv5litepod-16", "--", *TRAIN])
    assert parsed.slice == "2xv5e-16" and parsed.bucket == "b"


def test_a_config_that_is_not_here_is_refused(capsys):
    for wrong in ("configs/wan_pad.py", "wan_pad"):
        with pytest.raises(SystemExit):
            launch.parse([*GKE, "--", "--config", wrong, *TRAIN[2:]])
        assert f"--config {wrong}: there is no such file" in capsys.readouterr().err
    launch.parse([*GKE, "--", "--config=wan_pod", *TRAIN[2:]])
    launch.parse([*GKE, "--", "--config", "configs/wan_pod.py:5b-sound", *TRAIN[2:]])


def test_what_git_does_not_know_yet_travels_along():
    script = text("--on", "tpu-vm", "--slice", "v5e-64", "--zone", "z")
    new = "touch new.py; echo ignored > .gitignore; touch ignored\n"
    listed = "tar() { command tar -c --null -T - | command tar -t; }\n"
    ran = run(new + listed + script, "true")
    assert "new.py" in ran.stdout.split() and "ignored" not in ran.stdout.split()


def test_a_batch_file_goes_back_to_the_queue():
    script = text("--on", "slurm", "--nodes", "4", "--devices", "8")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "--ntasks-per-node=8" in script and "scontrol requeue" in script


@pytest.mark.parametrize(
    "args, message",
    [
        (["--on", "tpu-vm", "--slice", "v5p-128"], "needs --zone"),
        (["--on", "gke", "--slice", "v5p-129", "--image", "i"], "try 'v5p-128'"),
        (["--on", "nowhere"], "invalid choice"),
        ([*GKE, "--bucket", "c"], "--workdir /mnt/c/NAME"),
        ([*GKE, "--bucket", "gs://b/x"], "must be a name alone; try b"),
        (["--on", "slurm", "--bucket", "b"], "is for Google's hosts"),
    ],
)
def test_what_is_missing_is_named(args, message, capsys):
    with pytest.raises(SystemExit):
        launch.parse([*args, "--", *TRAIN])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("module, needed", launch.NEEDED.items())
def test_the_arguments_of_the_command_are_needed(capsys, module, needed):
    given = ["--on", "slurm", "--module", module]
    with pytest.raises(SystemExit):
        launch.parse([*given, "--", *(f"{name}=x" for name in needed[1:])])
    assert needed[0] in capsys.readouterr().err


def test_hosts_encode_together():
    encode = ["--source=data/clips", "--vae=v", "--out=/mnt/b/latents"]
    args = [*GKE, "--bucket", "b", "--module", "encode", "--", *encode]
    container = json.loads(launch.gke(launch.parse(args)))
    assert f"python -m jvdit.encode {' '.join(encode)}\\n" in json.dumps(container)
