"""What the README shows is run, or at least known."""

import itertools
import pathlib
import re
import shlex

import pytest

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
    flags |= {"config"} if "DEFINE_config_file" in source else set()
    for word in itertools.takewhile(lambda word: word != "--", rest):
        if word.startswith("--"):
            assert word[2:].partition("=")[0] in flags, word
        if word.startswith("configs/"):
            assert (ROOT / word).exists(), word
