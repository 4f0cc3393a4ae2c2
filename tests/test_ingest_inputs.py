"""Properties of what is taken: every layout of lists, buckets, windows."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jvdit.data.ingest.clip_file import Recipe, choose_size, window_starts
from jvdit.data.ingest.listing import list_items
from jvdit.data.ingest.shard_plan import plan_shards
from jvdit.data.media.media_error import MediaError
from jvdit.data.media.reader import MediaInfo


def taken(*inputs, **options):
    """The captions of the items that are tried, by key."""
    items = list_items(inputs, **options)
    return {item.key: item.caption for item in items if not item.reason}


def reasons(*inputs):
    """The reason of each item, and what was found."""
    return {i.key: (i.reason, i.detail) for i in list_items(inputs) if i.reason}


def test_items_are_listed_from_every_layout(tmp_path):
    root = tmp_path / "videos"
    for name in ("x.mp4", "sub/y.webm", "z.MOV", "notes.md"):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_text(name)
    (root / "x.txt").write_text("an x\n")
    (root / "z.json").write_text(json.dumps({"caption": "a z", "seed": 1}))
    assert taken(root) == {"x.mp4": "an x", "sub/y.webm": "", "z.MOV": "a z"}
    rows = [("x.mp4", 'an "x", yes'), ("sub/y.webm", "a y\nof two lines")]

    def check(source, **options):
        assert taken(source, **options) == dict(rows)
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
    (tmp_path / "e.mp4").touch()
    (tmp_path / "e.TXT").write_text("in capitals")
    assert taken(tmp_path / "e.mp4") == {"e.mp4": "in capitals"}
    ((_, (reason, detail)),) = reasons(tmp_path / "d.mp4", tmp_path / "e.mp4").items()
    assert reason == "bad_caption" and "d.json is damaged" in detail


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


def table(path, text, encoding="utf-8"):
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def test_quotes_that_end_early_cost_their_row(tmp_path):
    rows = 'path,text\na.mp4,"A" or B\nb.mp4,B\nc.mp4,say "C"\nd.mp4,"D"x,\ne.mp4,"E"'
    source = table(tmp_path / "t.csv", rows)
    assert taken(source) == {"b.mp4": "B", "c.mp4": 'say "C"', "e.mp4": "E"}
    told = [detail for _, detail in reasons(source).values()]
    assert [line for line in (2, 5) if f"t.csv line {line}: a quote" in str(told)] == [
        2,
        5,
    ]


def test_a_bad_row_of_a_table_is_left_out_by_its_line(tmp_path):
    rows = 'path, Text \na.mp4,A man, walking\n\nb.mp4, "A man, walking"\nc.mp4\nd.mp4,'
    rows += 'x\ne.mp4,"two\nlines"\nf.mp4,NaN\n'
    source = table(tmp_path / "t.csv", rows)
    told = {"b.mp4": "A man, walking", "d.mp4": "x", "e.mp4": "two\nlines", "f.mp4": ""}
    assert taken(source) == told
    first, second = reasons(source).values()
    assert first[0] == "bad_row" and "t.csv line 2 has 3 fields" in first[1]
    assert "t.csv line 5 has 1 fields and its header 2" in second[1]
    notes = {item.key: item.note for item in list_items([source])}
    assert notes["f.mp4"] == "columns of t.csv: path, text" and not notes["d.mp4"]
    lines = [
        ('{"path": "a.mp4", "text": NaN}', ""),
        ('{"path": "b.mp4", "text": [null, "two", "three"]}', "two"),
        ('{"path": "c.mp4", "text": 12}', "`caption` .=12. must be `str"),
        (r'{"path": "d.mp4", "text": "cut \ud83d"}', "line 4: the caption has U.D83D"),
        (r'{"path": "e.mp4", "text": "a\u0000"}', r"U\+0000 at character 2"),
        ('{"path": null, "text": "x"}', "line 6 names no file"),
        ('{"path": {"bytes": "x"}}', "`path` .=.* must be `str`"),
        ('["f.mp4"]', "must be `object`"),
        ("{" * 9, "is damaged"),
        ('{"text": "x" }', "names no file"),
        ("[" * 100_000, "is damaged"),
        ('{"path": "g.mp4", "text": {"a": 1}}', "must be `str"),
    ]
    for kind in (".jsonl", ".json"):
        text = "\n".join(line for line, _ in lines)
        if kind == ".json":
            lines = [line for line in lines if "is damaged" not in line[1]]
            text = f"[{','.join(line for line, _ in lines)}]".replace("\n", " ")
        source = table(tmp_path / f"t{kind}", text)
        assert taken(source) == {"a.mp4": "", "b.mp4": "two"}
        wanted = [told.replace("line ", "(line|row) ") for _, told in lines[2:]]
        found = [detail for _, (_, detail) in sorted(reasons(source).items())]
        for told in wanted:
            assert any(re.search(told, detail) for detail in found), (told, found)
        assert len(found) == len(wanted)


@pytest.mark.parametrize(
    "text, told",
    [
        ('path,text\na.mp4,"open\nb.mp4,B\n', "t.csv line 2: a quote isn't closed"),
        ('path,text\na.mp4,"A\nb.mp4,B\nc.mp4,C"\nd.mp4,D\n', "t.csv line 2: a quote"),
        ('path,text\na.mp4,A\nb.mp4,"B', "t.csv line 3: a quote"),
        ("path,text,text\na.mp4,A,B\n", "names a column twice"),
        ("video;text\na.mp4;A\n", "no column of paths; it has .'video;text'"),
        ("", "No video in"),
        ("path,text\n", "No video in"),
        ("path,text\na.mp4,one,two\n", "No video in .*line 2 has 3 fields"),
    ],
)
def test_a_table_that_cannot_be_cut_into_rows_is_refused(tmp_path, text, told):
    with pytest.raises(ValueError, match=told):
        list_items([table(tmp_path / "t.csv", text)])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_text_is_read_by_its_mark(tmp_path, encoding):
    def write(name, text):
        mark = "\ufeff" if encoding == "utf-16-be" else ""
        return table(tmp_path / name, mark + text.replace("\n", "\r\n"), encoding)

    told = "a ‘café’ \u2028 of\x85 one\x0cline"
    for name in ("x.mp4", "y.mp4"):
        (tmp_path / name).touch()
    both = {"x.mp4": told, "y.mp4": ""}
    write("x.txt", f" {told}\n")
    assert taken(tmp_path) == both
    (tmp_path / "x.txt").unlink()
    write("x.json", json.dumps({"Caption": told}, ensure_ascii=False))
    assert taken(tmp_path) == both
    assert taken(write("t.csv", f"path,text\nx.mp4,{told}\ny.mp4,\n")) == both
    assert taken(write("t.tsv", f'path\ttext\nx.mp4\t"{told}"\ny.mp4\t\n')) == both
    rows = [{"path": path, "text": text} for path, text in both.items()]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    assert taken(write("t.jsonl", "\n".join(lines))) == both
    assert taken(write("t.json", f"[{','.join(lines)}]")) == both
    write("videos.txt", "x.mp4\ny.mp4\n\n")
    write("prompts.txt", f"{told}\n\n\n")
    assert taken(tmp_path / "videos.txt") == taken(tmp_path) == both


def test_bytes_that_are_no_text_cost_only_their_row(tmp_path):
    for name in ("x.mp4", "y.mp4"):
        (tmp_path / name).touch()
    table(tmp_path / "x.txt", b"one\ntwo \xe9")
    (told,) = reasons(tmp_path).values()
    assert told[0] == "bad_caption" and "x.txt line 2: byte 0xe9 isn't UTF-8" in told[1]
    (tmp_path / "x.txt").unlink()
    source = table(tmp_path / "t.csv", b"path,text\nx.mp4,caf\xe9\ny.mp4,fine\n")
    assert (
        taken(source) == {"y.mp4": "fine"} and "line 2" in reasons(source)["x.mp4"][1]
    )
    source = table(
        tmp_path / "t.jsonl", b'{"path":"x.mp4","text":"\xe9"}\n{"path":"y.mp4"}'
    )
    assert taken(source) == {"y.mp4": ""} and [*reasons(source)] == ["x.mp4"]
    source = table(tmp_path / "t.csv", f"path,text\nx.mp4,{'long ' * 99_999}\n")
    assert len(taken(source)["x.mp4"]) > 400_000
    with pytest.raises(ValueError, match="prompt.txt has 1 lines and .*videos.txt 2"):
        table(tmp_path / "prompt.txt", "only one")
        list_items([table(tmp_path / "videos.txt", "x.mp4\ny.mp4")])


def test_file_names_that_are_not_unicode_are_taken_under_another(tmp_path):
    odd = os.fsdecode(b"a\xff.mp4")
    (tmp_path / odd).write_text("x")
    (item,) = list_items([tmp_path])
    assert item.key == r"a\udcff.mp4" and Path(item.path).read_text() == "x"
    rows = [{"path": odd}, {"path": "b\0.mp4"}, {"path": "c\ud83d.mp4"}]
    lines = "\n".join(map(json.dumps, rows))
    plan = plan_shards(
        list_items([table(tmp_path / "t.jsonl", lines)]), val_fraction=0, shard_size=9
    )
    assert [item.key for item in plan.shards["train", 0]] == [item.key]
    assert sorted(reason for _, reason, _ in plan.refused) == ["missing", "missing"]


def test_every_file_of_a_folder_is_accounted_for(tmp_path):
    names = "a.mp4 b.VOB c.f4v d.qt e.mxf f.png f.txt g.webp h.srt a.jpg notes"
    for name in names.split():
        (tmp_path / name).write_text(name)
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "gone.mp4").symlink_to("nowhere.mp4")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/z.mov").write_text("z")
    (tmp_path / "other/up").symlink_to(tmp_path)
    (tmp_path / "away").symlink_to(tmp_path / "other")
    (tmp_path / "self").symlink_to("self")
    done = tmp_path / "data/1.0.0"
    done.mkdir(parents=True)
    (done / "manifest.json").touch()
    captions = dict.fromkeys("a.mp4 b.VOB c.f4v d.qt e.mxf g.webp".split(), "")
    captions |= {"f.png": "f.txt", "other/z.mov": "", "gone.mp4": ""}
    assert taken(tmp_path) == captions
    found = {name: reason for name, (reason, _) in reasons(tmp_path).items()}
    other = dict.fromkeys("h.srt a.jpg notes pipe.mp4 self data/1.0.0".split(), "other")
    assert found == other | {"away": "duplicate", "other/up": "duplicate"}
    (tmp_path / "metadata.csv").write_text("file_name,text\n./a.mp4,x\n")
    assert taken(tmp_path) == {"./a.mp4": "x"}
    found = {name: reason for name, (reason, _) in reasons(tmp_path).items()}
    assert found["other/z.mov"] == "unlisted" and found["f.txt"] == "other"
    assert not {"a.mp4", "metadata.csv"} & found.keys()


@pytest.mark.parametrize(
    "fields",
    [
        {"frames": 0},
        {"fps": float("inf")},
        {"fps": float("nan")},
        {"crf": 99},
        {"audio_rate": -1},
        {"max_repeat": 2},
        {"preset": "fsat"},
    ],
)
def test_a_recipe_out_of_range_is_refused(fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=f"`{name}` .='?{value}'?. must be"):
        Recipe(**fields)
