"""Sources return what their index promises, or say why not."""

import io
import pickle
import shutil

import numpy as np
import pytest

from jvdit.data.clips import BadClip, Source, make_index
from jvdit.data.latent_source import LatentSource
from jvdit.data.media.writer import encode_clip
from jvdit.data.record_features import CLIP_FEATURES, latent_features
from jvdit.data.record_writer import RecordWriter
from jvdit.data.sources import (
    ArraySource,
    WorldSource,
    open_source,
    origin,
    source_folder,
    world_of,
)
from jvdit.data.tfds_source import TfdsSource
from jvdit.data.video_sources import RecordSource
from jvdit.data.world import World


def assert_keeps_its_word(source, kind, last=None):
    """Checks a source against the protocol: sizes, order, repetition, pickling."""
    assert isinstance(source, Source) and len(source.fingerprint) == 32
    assert {len(column) for column in source.index.values()} == {len(source)}
    last = len(source) - 1 if last is None else last
    ids = [last, 0, last]
    clips = source.read(ids)
    for i, clip in zip(ids, clips, strict=True):
        size = tuple(source.index[k][i] for k in ("frames", "height", "width"))
        assert clip[kind].shape[:3] == size
        assert clip["fps"] == pytest.approx(source.index["fps"][i])
        assert isinstance(clip["caption"], str)
    np.testing.assert_array_equal(clips[0][kind], clips[2][kind])
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.read(ids)[1][kind], clips[1][kind])
    assert copy.fingerprint == source.fingerprint
    return clips


def encode(i, frames, fps=8.0):
    """Returns an mp4 whose frame k is a grey of 40 + 10 k + i."""
    grey = (40 + 10 * np.arange(frames) + i).astype(np.uint8)
    video = np.broadcast_to(grey[:, None, None, None], (frames, 32, 48, 3))
    file = io.BytesIO()
    encode_clip(file, np.ascontiguousarray(video), fps)
    return file.getvalue()


def make_example(i, frames, video=None):
    example = {"key": f"clip-{i}", "video": video or encode(i, frames)}
    example |= {"caption": f"grey {i}", "meta": "{}", "has_audio": False}
    return example | {"frames": frames, "height": 32, "width": 48, "fps": 8.0}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Six videos of 4 to 14 frames; the last is no video at all."""
    path = tmp_path_factory.mktemp("data") / "clips"
    writer = RecordWriter(path, CLIP_FEATURES, shards={"train": 1})
    examples = [make_example(i, 4 + 2 * i) for i in range(5)]
    examples.append(make_example(5, 14, video=b"this is not a video" * 9))
    writer.write_shard("train", 0, examples)
    return writer.finish()


def test_the_world_renders_what_is_asked_for():
    world = World(frames=3, height=16, width=32)
    source = WorldSource(world, 20)
    first, *_ = assert_keeps_its_word(source, "video")
    expected = world.clips(np.array([19]))
    np.testing.assert_array_equal(first["video"], expected["video"][0])
    np.testing.assert_array_equal(first["audio"], expected["audio"][0])
    assert first["caption"] == expected["caption"][0]
    assert WorldSource(world, 20, audio=False).read([3])[0]["audio"] is None
    assert WorldSource(world, 21).fingerprint != source.fingerprint
    for wrong in (0, 2 * 10**10):
        with pytest.raises(ValueError, match=f"num_clips. .={wrong}. .*from 1 to"):
            WorldSource(world, wrong)


def test_arrays_are_a_source():
    rng = np.random.default_rng(0)
    clips = [
        {"mean": rng.normal(size=(i + 1, 4, 2, 3)), "fps": 8.0, "caption": "x" * i}
        for i in range(3)
    ]
    source = ArraySource(clips)
    assert_keeps_its_word(source, "mean")
    assert list(source.index["text_length"]) == [2, 3, 4]
    assert list(ArraySource(clips, text_length=7).index["text_length"]) == [7] * 3
    with pytest.raises(ValueError, match="text_len"):
        make_index(2, frames=1, height=1, width=1, fps=1, text_len=3)


def test_recorded_videos_are_decoded(records):
    source = RecordSource(records)
    assert len(source) == 6 and list(source.index["frames"]) == [4, 6, 8, 10, 12, 14]
    assert_keeps_its_word(source, "video", last=4)
    *_, bad = source.read(range(6))
    assert isinstance(bad, BadClip) and "unreadable" in bad.reason
    for i, clip in enumerate(source.read(range(5))):
        assert clip["video"].shape == (4 + 2 * i, 32, 48, 3)
        assert clip["caption"] == f"grey {i}" and clip["audio"] is None
        grey = clip["video"].mean(axis=(1, 2, 3))
        np.testing.assert_allclose(grey, 40 + 10 * np.arange(4 + 2 * i) + i, atol=3)


def test_windows_cover_a_video_once(records):
    source = RecordSource(records, frames=4, height=16, width=16, windows="all")
    # 4, 6, 8, 10, 12 and 14 frames hold 1, 1, 2, 2, 3 and 3 windows of 4.
    assert len(source) == 12 and source.left_out == 0
    assert {clip["video"].shape for clip in source.read(range(9))} == {(4, 16, 16, 3)}
    third = source.read(range(6, 9))  # the windows of video 4
    grey = np.concatenate([clip["video"].mean(axis=(1, 2, 3)) for clip in third])
    np.testing.assert_allclose(grey, 44 + 10 * np.arange(12), atol=3)
    assert [type(clip) for clip in source.read(range(9, 12))] == [BadClip] * 3
    first = RecordSource(records, frames=8)
    assert len(first) == 4 and first.left_out == 2
    assert len(RecordSource(records, frames=7)) == 4  # and 6 frames are not 7
    # Half the frames a second: 4 of them last as long as 8 did.
    slow = RecordSource(records, frames=4, fps=4.0)
    assert len(slow) == 4 and set(slow.index["fps"]) == {4.0}
    grey = slow.read([0])[0]["video"].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(grey, 42 + 20 * np.arange(4), atol=3)
    assert first.fingerprint != slow.fingerprint != source.fingerprint
    with pytest.raises(ValueError, match=r"`frames` \(=99\).*14 frames"):
        RecordSource(records, frames=99)
    with pytest.raises(ValueError, match="'some'"):
        RecordSource(records, windows="some")


def test_sources_have_names(records):
    def size(source, i=0):
        return [int(source.index[k][i]) for k in ("frames", "height", "width")]

    world = open_source("world:val:3x16x32@4:20:7")
    assert len(world) == 20 and size(world) == [3, 16, 32]
    assert world.fingerprint != open_source("world:val:3x16x32@4:20").fingerprint
    whole, windows = (
        open_source(str(records)),
        open_source(f"{records}#train:4x16x16@8"),
    )
    assert len(whole) == 6 and size(whole, 3) == [10, 32, 48]
    assert len(windows) == 12 and size(windows) == [4, 16, 16]
    assert windows.read([2])[0]["video"].shape == (4, 16, 16, 3)
    for name, message in {
        "": "a source is empty",
        "world:val:3x16@4:20": "world:SPLIT:FRAMES",
        f"{records}#test": "no split 'test'",
        f"{records}#train:4x16": "FOLDER#SPLIT:FRAMESxHEIGHTxWIDTH@FPS",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_source(name)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        open_source(f"{records}-elsewhere")


def test_tfds_data_sets_are_scanned(records, tmp_path):
    writer = RecordWriter(tmp_path / "x", CLIP_FEATURES, shards={"train": 1})
    examples = [make_example(i, 4, video=b"bad" if i == 0 else None) for i in range(3)]
    writer.write_shard("train", 0, examples)
    found = TfdsSource(writer.finish())
    assert [clip["caption"] for clip in found.read([0, 1])] == ["grey 1", "grey 2"]
    source = TfdsSource(records)
    assert [i for i, _ in source.rejects] == [5] and "unreadable" in source.rejects[0][
        1
    ]
    clips = assert_keeps_its_word(source, "video")
    assert clips[1]["caption"] == "grey 0"
    assert list(source.index["frames"]) == [4, 6, 8, 10, 12]
    nameless = TfdsSource(records, caption=None, frames=8, height=16, width=16)
    assert len(nameless) == 3 and nameless.read([0])[0]["caption"] == ""
    with pytest.raises(ValueError, match="no feature 'film'.*video"):
        TfdsSource(records, video="film")


def test_what_was_probed_is_kept_for_the_next_start(records, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = TfdsSource(records)
    (kept,) = (tmp_path / "jvdit" / "probes").glob("*.json")
    with monkeypatch.context() as patch:
        patch.setattr("jvdit.data.tfds_source.probe", None)
        again = TfdsSource(records)
    assert again.fingerprint == first.fingerprint and again.rejects == first.rejects
    for name, column in first.index.items():
        np.testing.assert_array_equal(again.index[name], column)
    kept.write_text("[]")  # damaged
    assert TfdsSource(records).fingerprint == first.fingerprint


_SETTINGS = {"vae": {"fields": {"temporal_downsample": [True, True]}}}


@pytest.mark.parametrize("text", [True, False])
def test_latents_are_read_as_stored(tmp_path, text):
    rng = np.random.default_rng(0)
    features = latent_features("float16", text=text)
    examples = []
    for i in range(3):
        size = (1 + i, 4, 6)
        example = {name: rng.normal(size=(*size, 5)) for name in ("mean", "logvar")}
        example = {k: v.astype(np.float16) for k, v in example.items()}
        example |= dict(zip(("frames", "height", "width"), size, strict=True))
        example |= {"key": str(i), "caption": "x" * (10 * i), "meta": "{}", "fps": 8.0}
        example |= {"has_audio": False, "text_length": 0}
        if text:
            example["text_embeds"] = rng.normal(size=(i + 2, 7)).astype(np.float16)
            example["text_length"] = i + 2
        examples.append(example)
    writer = RecordWriter(
        tmp_path / "x", features, shards={"train": 1}, settings=_SETTINGS
    )
    writer.write_shard("train", 0, examples)
    source = LatentSource(writer.finish(), max_text=16)
    assert_keeps_its_word(source, "mean")
    assert source.settings == _SETTINGS
    assert source.captions([1, 0]) == ["x" * 10, ""]
    for example, clip in zip(examples, source.read(range(3)), strict=True):
        for name in ("mean", "logvar", "text_embeds")[: 2 + text]:
            assert clip[name].dtype == np.float32
            np.testing.assert_array_equal(clip[name], example[name])
    lengths = [2, 3, 4] if text else [2, 12, 16]
    assert list(source.index["text_length"]) == lengths
    with pytest.raises(ValueError, match="LatentSource"):
        RecordSource(tmp_path / "x")
    # The first frames alone: 5 of pixels are 2 of latents, and one clip has fewer.
    short = open_source(f"{tmp_path}/x#train:5", max_text=16)
    assert_keeps_its_word(short, "mean")
    assert list(short.index["frames"]) == [1, 2, 2]
    assert short.fingerprint != source.fingerprint
    for example, clip in zip(examples, short.read(range(3)), strict=True):
        np.testing.assert_array_equal(clip["mean"], example["mean"][:2])
        assert clip["logvar"].shape == clip["mean"].shape
    with pytest.raises(ValueError, match="frames.*7.*try 5 or 9"):
        open_source(f"{tmp_path}/x#train:7")
    with pytest.raises(ValueError, match=r"first frames.*#train:5\."):
        open_source(f"{tmp_path}/x#train:5x4x6@8")


def test_videos_are_no_latents(records):
    with pytest.raises(ValueError, match="encode it first"):
        LatentSource(records)


def test_a_damaged_record_is_one_bad_clip(tmp_path):
    features = latent_features("float32", text=False)
    writer = RecordWriter(tmp_path / "x", features, shards={"train": 1})
    example = {"caption": "", "meta": "", "fps": 8.0, "has_audio": False}
    example |= {"frames": 8, "height": 32, "width": 32, "text_length": 0}
    latents = np.random.default_rng(0).normal(size=(8, 32, 32, 4)).astype(np.float32)
    example |= {"mean": latents, "logvar": latents}
    writer.write_shard("train", 0, [example | {"key": str(i)} for i in range(3)])
    path = writer.finish()
    (file,) = path.glob("*array_record*")
    data = bytearray(file.read_bytes())
    middle = len(data) // 2  # within the second of three equal records
    data[middle : middle + 64] = bytes(64)
    file.write_bytes(data)
    kinds = [type(clip) for clip in LatentSource(path).read(range(3))]
    assert kinds == [dict, BadClip, dict]


@pytest.mark.parametrize(
    "name", ["2024_holidays", "été", "a#b", "_x", "worldcup_clips"]
)
def test_a_data_set_may_have_any_name(tmp_path, name):
    writer = RecordWriter(tmp_path / name, CLIP_FEATURES, shards={"train": 1, "val": 1})
    for shard, split in enumerate(writer.shards):
        writer.write_shard(split, 0, [make_example(shard, 4)])
    path = writer.finish()
    for source in (tmp_path / name, f"{tmp_path / name}#val", f"{path}#train:2x8x8@8"):
        assert open_source(str(source)).read([0])[0]["caption"].startswith("grey")
        assert origin(str(source)) == str(source) and world_of(str(source)) is None
        folder = str(source_folder(str(source)))
        assert folder in (str(tmp_path / name), str(path))


def test_names_near_the_world_are_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="worldcup_clips"):
        open_source("worldcup_clips")
    with pytest.raises(ValueError, match="must read world:SPLIT"):
        open_source("world")


def test_a_folder_of_videos_is_to_be_prepared(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.MOV").touch()
    for source in (tmp_path, tmp_path / "deep/a.MOV", f"{tmp_path}#val"):
        with pytest.raises(
            ValueError, match=r"holds videos.*prepare_clips.py .* --out"
        ):
            open_source(str(source))


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
def test_a_damaged_tfds_data_set_is_told_in_a_line(records, tmp_path, file):
    path = tmp_path / "clips/1.0.0"
    shutil.copytree(records, path)
    assert len(open_source(f"tfds:{path}"))
    text = (path / file).read_text()
    for damage in (text[:50], "[]", "{}", text.replace("4", "x"), ""):
        (path / file).write_text(damage)
        with pytest.raises(ValueError, match=f"TFDS can't open {path}.*; give") as told:
            open_source(f"tfds:{path}")
        assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match="TFDS can't open nowhere.*; give") as told:
        open_source("tfds:nowhere")
    assert "\n" not in str(told.value)
