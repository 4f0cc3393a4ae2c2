import importlib.util
import pathlib

import numpy as np
import pytest
from PIL import Image

FILE = pathlib.Path(__file__).parent.parent / "tools/show_clips.py"
found = importlib.util.spec_from_file_location("show_clips", FILE)
assert found is not None and found.loader is not None
show_clips = importlib.util.module_from_spec(found)
found.loader.exec_module(show_clips)


def test_a_sheet_shows_clips_from_all_of_a_source(tmp_path):
    one, more = tmp_path / "one.png", tmp_path / "more.png"
    for count, file in ((1, one), (3, more)):
        told = show_clips.show("world:single:5x32x32@8:40", count, file)
        assert told == [f"40 clips, {count} of them in {file}"]
    first, all_of_them = np.asarray(Image.open(one)), np.asarray(Image.open(more))
    assert len(all_of_them) > 2 * len(first)
    with pytest.raises(ValueError, match="must be one of"):
        show_clips.show("world:sngle:5x32x32@8:40", 1, one)
