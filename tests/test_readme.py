"""What the README shows is run, or at least known."""

import itertools
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from absl.flags import FLAGS
from doors import flags_of

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
_DEFINED = r'DEFINE_(?:\w+),?\(?\s*"(\w+)"|"--([\w-]+)"'


def test_the_example_of_the_library_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict = {}
    monkeypatch.chdir(tmp_path)
    exec(code, names)  # noqa: S102
    assert names["clip"].video.shape == (9, 32, 32, 3)
    assert (tmp_path / "clip.mp4").exists()
    assert names["mean"].shape == (1, 5, 8, 8, 12)


def commands():
    for block in re.findall(r"```sh\n(.*?)```", README, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                words = shlex.split(part, comments=True)
                if words[:1] == ["python"]:
                    yield words[2 if words[1] == "-m" else 1 :]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_name_what_is_there(words):
    """Their file, their flags and their config."""
    name, *rest = words
    if name in ("pytest", "jvdit"):
        return
    file = ROOT / (name.replace(".", "/") + ".py" if "/" not in name else name)
    source = file.read_text() + (ROOT / "jvdit/machine/cluster.py").read_text()
    flags = {x for pair in re.findall(_DEFINED, source) for x in pair if x}
    if name.startswith("jvdit."):
        with flags_of(name):
            flags |= {*FLAGS}
    flags |= {"config"} if "DEFINE_config_file" in source else set()
    for word in itertools.takewhile(lambda word: word != "--", rest):
        if word.startswith("--"):
            assert word[2:].partition("=")[0] in flags, word
        if word.startswith("configs/"):
            assert (ROOT / word).exists(), word


# So few clips and steps that it takes a minute.
_SHORT = """--config.stages.latents.source=world:falling:9x32x32@8:64
--config.stages.latents.validation=world:falling:9x32x32@8:8:1
--config.stages.dit.steps=2 --config.stages.dit.data.rows=4
--config.stages.dit.data.validation_clips=4 --config.stages.dit.sample.steps=2"""


def test_the_quickstart_runs_as_it_is_shown(tmp_path):
    """In a process of its own, and then the model that it made is sampled."""
    (train,) = (x for x in commands() if "configs/quickstart.py" in x)
    train = [x.replace("configs/quickstart.py", "quickstart") for x in train]
    for words in (
        [*train, *_SHORT.split()],
        ["jvdit.sample", "one object: …", "--workdir", "runs/quickstart/dit"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    samples = tmp_path / "runs/quickstart/dit/samples"
    assert {"step_0000000.png", "step_0000002.png"} <= {
        x.name for x in samples.iterdir()
    }
    assert len([*(tmp_path / "samples").glob("*.mp4")]) == 1
