"""What the README shows is run."""

import pathlib
import re

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_example_of_the_library_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    names: dict = {}
    monkeypatch.chdir(tmp_path)
    exec(code, names)  # noqa: S102
    assert names["clip"].video.shape == (9, 32, 32, 3)
    assert (tmp_path / "clip.mp4").exists()
    assert names["mean"].shape == (1, 5, 8, 8, 12)
