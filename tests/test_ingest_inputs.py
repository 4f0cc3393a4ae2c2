"""Properties of what is taken: every layout of lists, buckets, windows."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jvdit.data.ingest.clip_file import Recipe, choose_size, window_starts
from jvdit.data.ingest.listing import list_items
from jvdit.data.media.reader import MediaError, MediaInfo


def test_items_are_listed_from_every_layout(tmp_path):
    root = tmp_path / "videos"
    for name in ("x.mp4", "sub/y.webm", "z.MOV", "notes.md"):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_text(name)
    (root / "x.txt").write_text("an x\n")
    (root / "z.json").write_text(json.dumps({"caption": "a z", "seed": 1}))
    listed = {i.key: i.caption for i in list_items([root])}
    assert listed == {"x.mp4": "an x", "sub/y.webm": "", "z.MOV": "a z"}
    rows = [("x.mp4", 'an "x", yes'), ("sub/y.webm", "a y\nof two lines")]

    def check(source, **options):
        found = [(i.key, i.caption) for i in list_items([source], **options)]
        assert found == sorted(rows)
        assert all(Path(i.path).exists() for i in list_items([source], **options))

    (root / "a.csv").write_text(
        'video,text\nx.mp4,"an ""x"", yes"\nsub/y.webm,"a y\nof two lines"\n'
    )
    check(root / "a.csv")
    lines = [json.dumps({"Path": p, "Prompt": c}) for p, c in rows]
    (root / "b.jsonl").write_text("\n".join([*lines, lines[0]]) + "\n")
    check(root / "b.jsonl")
    (tmp_path / "c.json").write_text(json.dumps(dict(rows)))
    check(tmp_path / "c.json", root=root)
    table = pa.table(
        {"media_path": [r[0] for r in rows], "caption": [r[1] for r in rows]}
    )
    pq.write_table(table, root / "d.parquet")
    check(root / "d.parquet")
    hugging = [json.dumps({"file_name": p, "text": c}) for p, c in rows]
    (root / "metadata.jsonl").write_text("\n".join(hugging))
    check(root)
    (tmp_path / "videos.txt").write_text("videos/x.mp4\nvideos/z.MOV\n")
    (tmp_path / "prompt.txt").write_text("one\ntwo\n")
    items = list_items([tmp_path / "videos.txt"])
    assert [i.caption for i in items] == ["one", "two"]


def test_tables_are_split_at_line_feeds_and_known_in_capitals(tmp_path):
    rows = [("a.mp4", "one\u2028two\x85three"), ("b.mp4", "four")]
    lines = [json.dumps({"path": p, "text": t}, ensure_ascii=False) for p, t in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "B.CSV").write_text(
        "path,text\r\n" + "".join(f"{p},{t}\r\n" for p, t in rows)
    )
    (tmp_path / "c.txt").write_text("a.mp4\nb.mp4\n")
    (tmp_path / "prompts.txt").write_text("".join(f"{t}\n" for _, t in rows))
    for name in ("a.jsonl", "B.CSV", "c.txt"):
        assert [(i.key, i.caption) for i in list_items([tmp_path / name])] == rows
    (tmp_path / "d.mp4").touch()
    (tmp_path / "d.json").write_text("{")
    with pytest.raises(ValueError, match="d.json is damaged"):
        list_items([tmp_path / "d.mp4"])


def test_inputs_that_are_none_say_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        list_items([tmp_path / "none"])
    with pytest.raises(ValueError, match="No video in"):
        list_items([tmp_path])
    (tmp_path / "a.csv").write_text("name,caption\na,b\n")
    with pytest.raises(ValueError, match="no column of paths.*caption.*name"):
        list_items([tmp_path / "a.csv"])
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="a.json is damaged"):
        list_items([tmp_path / "a.json"])
    (tmp_path / "a.json").write_text('["a.mp4"]')
    with pytest.raises(ValueError, match="a.json.*'a.mp4'.*object"):
        list_items([tmp_path / "a.json"])
    (tmp_path / "readme.md").write_text("hello")
    with pytest.raises(ValueError, match="neither"):
        list_items([tmp_path / "readme.md"])


def info(height, width, duration=10.0, fps=24.0):
    return MediaInfo(duration, fps, 0, height, width, False)


def test_buckets_follow_the_shape_and_never_enlarge_too_much():
    recipe = Recipe(sizes=((240, 416), (480, 832), (832, 480), (512, 512)))
    assert choose_size(info(1080, 1920), recipe) == (480, 832)
    assert choose_size(info(1920, 1080), recipe) == (832, 480)
    assert choose_size(info(600, 640), recipe) == (512, 512)
    assert choose_size(info(360, 640), recipe) == (240, 416)  # 480p would enlarge it
    assert choose_size(info(180, 320), recipe) == (240, 416)
    with pytest.raises(MediaError, match="too_small"):
        choose_size(info(90, 160), recipe)


@pytest.mark.parametrize("duration", [0.3, 1.0, 2.0, 5.03, 59.9])
@pytest.mark.parametrize("windows", ["first", "all", "3"])
def test_windows_lie_in_the_video(duration, windows):
    recipe = Recipe(frames=17, fps=16, windows=windows)
    starts = window_starts(info(480, 832, duration), recipe)
    assert starts[0] == 0 and starts == sorted(set(starts))
    if len(starts) > 1:
        assert starts[-1] + 16 / 16 <= duration + 0.5 / 16
    if windows == "all":
        assert np.allclose(np.diff(starts), 17 / 16)
        assert starts[-1] + 33 / 16 > duration - 1 / 16
    if windows == "3" and duration > 5:
        assert len(starts) == 3 and starts[-1] > duration - 1.3
