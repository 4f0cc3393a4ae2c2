"""What the launcher would run: scripts that a shell reads, and nothing left out."""

import importlib.util
import pathlib
import subprocess

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
found = importlib.util.spec_from_file_location("launch", ROOT / "tools/launch.py")
assert found is not None and found.loader is not None
launch = importlib.util.module_from_spec(found)
found.loader.exec_module(launch)

TRAIN = ["--config", "configs/wan_pod.py", "--workdir", "/mnt/b/it's here"]


def text(*args):
    parsed = launch.parse([*args, "--", *TRAIN])
    assert parsed.train == TRAIN
    return launch.TARGETS[parsed.on](parsed)


def test_a_slice_is_asked_for_again_until_the_training_has_ended():
    script = text("--on", "tpu-vm", "--slice", "v5e-64", "--zone", "z", "--spot")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "v5litepod-64" in script and "v2-alpha-tpuv5-lite --spot" in script
    # gcloud, replaced: the command ends badly once, then well.
    fake = """
    tries=0
    gcloud() {
      case "$*" in
        *describe*) echo ACTIVE ;;
        *" ssh "*) tries=$((tries + 1)); echo "$*"; [ $tries -ge 2 ] ;;
      esac
    }
    sleep() { :; }
    """
    ran = subprocess.run(
        ["bash"], input=fake + script, text=True, capture_output=True, timeout=60
    )
    assert ran.returncode == 0
    assert ran.stdout.count("python -m jvdit.train --config configs/wan_pod.py") == 2


def test_a_pod_for_each_host():
    made = yaml.safe_load(text("--on", "gke", "--slice", "v6e-256", "--image", "i"))
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 64
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "16x16"
    command = pod["containers"][0]["command"]
    assert command[:2] == ["bash", "-c"] and "it" in command[2]
    printed = subprocess.run(
        ["bash", "-c", command[2].replace("python", "printf '%s\\n'", 1)],
        text=True,
        capture_output=True,
        check=True,
    )
    assert printed.stdout.splitlines()[-4:] == TRAIN


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
    ],
)
def test_what_is_missing_is_named(args, message, capsys):
    with pytest.raises(SystemExit):
        launch.parse([*args, "--", *TRAIN])
    assert message in capsys.readouterr().err


def test_the_arguments_of_the_training_are_needed(capsys):
    with pytest.raises(SystemExit):
        launch.parse(["--on", "slurm"])
    assert "--workdir" in capsys.readouterr().err
