"""Properties of the record format: whole or absent, deterministic, readable by TFDS."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from jvdit.data import record_writer
from jvdit.data.manifest import dataset_directory
from jvdit.data.record_features import CLIP_FEATURES, latent_features
from jvdit.data.record_writer import RecordWriter
from jvdit.data.records import RecordDataset
from jvdit.machine.files import local_path, sweep_temporary, temporary_path


def clip(i):
    return {
        "key": f"clip{i}",
        "video": bytes([i]) * (1000 + i),
        "caption": "é" * i,
        "meta": json.dumps({"i": i}),
        "frames": 17 + i,
        "height": 32,
        "width": 48,
        "fps": 8.0,
        "has_audio": i % 2 == 0,
    }


def latent(i, dtype=ml_dtypes.bfloat16):
    values = np.random.default_rng(i).normal(size=(2 + i % 2, 3, 4, 8)).astype(dtype)
    return {
        "key": f"clip{i}",
        "mean": values,
        "logvar": -values,
        "text_embeds": np.full((i + 1, 5), i, dtype),
        "caption": "",
        "meta": "{}",
        **dict(frames=2 + i % 2, height=3, width=4, text_length=i + 1, fps=8.0),
        "has_audio": False,
    }


SHARDS = {"train": 3, "val": 1}


def write(path, *, make=clip, features=CLIP_FEATURES, order=None, **options):
    writer = RecordWriter(path, features, shards=SHARDS, **options)
    # The second shard is empty, as when all of its files were refused.
    content = {("train", 0): [0, 1], ("train", 1): [], ("train", 2): [2, 3, 4]}
    content[("val", 0)] = [5]
    for place in order or list(content):
        writer.write_shard(*place, map(make, content[place]))
    return writer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "clips"
    return write(path, settings={"fps": 8}).finish()


def test_what_is_written_is_read(dataset):
    data = RecordDataset(dataset)
    assert len(data) == 5 and [data[i] for i in range(5)] == [clip(i) for i in range(5)]
    assert [e["key"] for e in data] == [f"clip{i}" for i in range(5)]
    assert data.settings == {"fps": 8}
    assert RecordDataset(dataset, "val")[0] == clip(5)
    with pytest.raises(IndexError):
        data[5]


def test_index_repeats_the_scalars(dataset):
    index = RecordDataset(dataset).index
    for name in ("key", "frames", "height", "width", "fps", "has_audio"):
        assert index[name].tolist() == [clip(i)[name] for i in range(5)]
    assert index["caption_length"].tolist() == list(range(5))
    assert "caption" not in index, "a host has no room for all of them"
    assert index["frames"].dtype == np.int64 and index["has_audio"].dtype == bool


def test_captions_are_read_from_the_index_alone(tmp_path, monkeypatch):
    file = write(tmp_path / "clips").finish() / "index.parquet"
    data, wanted = RecordDataset(file.parent), [clip(i)["caption"] for i in (3, 0)]
    with monkeypatch.context() as patch:
        patch.setattr(RecordDataset, "__getitem__", None)
        assert data.captions([3, 0]) == wanted
        assert RecordDataset(file.parent, "val").captions([0]) == [clip(5)["caption"]]
    # One that was written before they were there.
    pq.write_table(pq.read_table(file).drop_columns("caption"), file)
    assert RecordDataset(file.parent).captions([3, 0]) == wanted


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_latents_survive_to_the_bit(tmp_path, dtype):
    features = latent_features(dtype)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))

    def make(i):
        return latent(i, kind)

    data = RecordDataset(
        write(tmp_path / "latents", make=make, features=features).finish()
    )
    for i in range(5):
        for name in ("mean", "logvar", "text_embeds"):
            assert data[i][name].dtype == kind
            np.testing.assert_array_equal(data[i][name], make(i)[name])
    assert data.index["text_length"].tolist() == [1, 2, 3, 4, 5]


def test_tfds_reads_it_without_tensorflow(dataset):
    source = tfds.data_source("clips", split="train", data_dir=dataset.parents[1])
    assert [e["key"].decode() for e in source] == [f"clip{i}" for i in range(5)]
    assert source[3]["video"] == clip(3)["video"]
    built = tfds.builder_from_directory(dataset).as_data_source(split="val")
    assert built[0]["frames"] == 22
    assert "tensorflow" not in sys.modules


def test_it_pickles_and_reads_after(dataset):
    data = RecordDataset(dataset)
    assert data[2] == clip(2)
    assert pickle.loads(pickle.dumps(data))[3] == clip(3)


def files_of(path):
    return {f.name: f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def test_the_same_data_gives_the_same_bytes_in_any_order_and_process(dataset, tmp_path):
    again = tmp_path / "clips"
    order = [("val", 0), ("train", 2), ("train", 1), ("train", 0)]
    write(again, settings={"fps": 8}, order=order[:2])  # and the process ends
    script = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "import test_records as t\n"
        "w = t.write(sys.argv[1], settings={'fps': 8})\n"
        "w.finish()"
    )
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", script, again, here], check=True)
    assert files_of(again) == files_of(dataset.parent)
    assert RecordDataset(again).fingerprint == RecordDataset(dataset).fingerprint


def test_fingerprint_follows_the_data(dataset, tmp_path):
    def other(i):
        return clip(i) | {"caption": "x" if i == 3 else clip(i)["caption"]}

    path = write(tmp_path / "clips", make=other, settings={"fps": 8}).finish()
    mine, theirs = RecordDataset(path), RecordDataset(dataset)
    assert mine.fingerprint != theirs.fingerprint
    same = RecordDataset(path, "val").fingerprint
    assert same == RecordDataset(dataset, "val").fingerprint


def test_a_shard_is_whole_or_absent(tmp_path):
    writer = RecordWriter(tmp_path / "clips", CLIP_FEATURES, shards={"train": 1})

    def failing():
        yield clip(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.write_shard("train", 0, failing())
    assert not writer.is_done("train", 0)
    assert [f.name for f in writer.path.iterdir()] == ["_work"]
    assert writer.write_shard("train", 0, [clip(0), clip(1)]) == 2
    # Done is done: what is offered again is not even looked at.
    assert writer.write_shard("train", 0, failing()) == 2


def test_a_full_disk_is_said_and_leaves_nothing_half(tmp_path, monkeypatch):
    class Full:
        def __init__(self, *_):
            pass

        def write(self, _):
            raise RuntimeError("write() failed: No space left on device; at byte 9")

        def close(self):
            raise RuntimeError("write() failed: No space left on device; at byte 9")

    writer = RecordWriter(tmp_path / "set", {"key": "text"}, shards={"train": 1})
    with monkeypatch.context() as patch:
        patch.setattr(record_writer, "ArrayRecordWriter", Full)
        with pytest.raises(OSError, match="disk is full at .*set-train.*No space"):
            writer.write_shard("train", 0, [{"key": "a"}])
    assert not writer.is_done("train", 0)
    assert writer.write_shard("train", 0, [{"key": "a"}]) == 1


def test_dead_writers_are_swept_and_live_ones_are_not(tmp_path):
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, os, pathlib\n"
            "from jvdit.machine.files import temporary_path\n"
            "t = temporary_path(pathlib.Path(sys.argv[1]))\n"
            "t.write_text('half'); print(t.name)",
            tmp_path / "a",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    alive = temporary_path(tmp_path / "a")
    alive.write_text("half")
    assert sweep_temporary(tmp_path) == [child.stdout.strip()]
    assert list(tmp_path.iterdir()) == [alive]


def test_missing_unfinished_and_damaged_data_sets_say_so(dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        RecordDataset(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no data set"):
        (tmp_path / "empty" / "1.0.0").mkdir(parents=True)
        RecordDataset(tmp_path / "empty")
    writer = RecordWriter(tmp_path / "half", CLIP_FEATURES, shards=SHARDS)
    writer.write_shard("train", 0, [clip(0)])
    (writer.work / "report-train-00000.json").touch()  # as an ingest leaves them
    with pytest.raises(ValueError, match="unfinished.*1 shards done"):
        RecordDataset(tmp_path / "half")
    with pytest.raises(ValueError, match="train-00001"):
        writer.finish()
    with pytest.raises(ValueError, match="no split 'test'.*train, val"):
        RecordDataset(dataset, "test")
    bad = tmp_path / "bad" / "1.0.0"
    shutil.copytree(dataset, bad)
    shard = next(bad.glob("*train*00002-of*"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match="copy it again"):
        RecordDataset(bad)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="00002-of"):
        RecordDataset(bad)
    manifest = json.loads((bad / "manifest.json").read_text())
    manifest["splits"]["train"][0]["records"] = "2"
    for text in (json.dumps(manifest), json.dumps(manifest)[:-9]):
        (bad / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="manifest.json.*copy the data set again"):
            RecordDataset(bad)


def test_an_empty_split_says_so(tmp_path):
    writer = RecordWriter(tmp_path / "clips", CLIP_FEATURES, shards={"train": 1})
    writer.write_shard("train", 0, [])
    with pytest.raises(ValueError, match="no record"):
        RecordDataset(writer.finish())


def test_a_damaged_record_costs_only_itself(dataset, tmp_path):
    path = tmp_path / "clips" / "1.0.0"
    shutil.copytree(dataset, path)
    shard = next(path.glob("*train*00002-of*"))
    data = bytearray(shard.read_bytes())
    at = data.index(clip(3)["video"]) + 100
    data[at] ^= 0xFF
    shard.write_bytes(data)
    records = RecordDataset(path)
    assert records[2] == clip(2) and records[4] == clip(4)
    with pytest.raises(Exception, match=".+"):
        records[3]


def test_another_data_set_is_not_continued(dataset, tmp_path):
    path = tmp_path / "clips"
    write(path, settings={"fps": 8})
    with pytest.raises(ValueError, match="`settings.fps` is 8 there but 9 here"):
        write(path, settings={"fps": 9})
    fresh = write(path, settings={"fps": 9}, overwrite=True)
    assert RecordDataset(fresh.finish()).settings == {"fps": 9}
    (tmp_path / "precious" / "1.0.0").mkdir(parents=True)
    (tmp_path / "precious" / "1.0.0" / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds no data set"):
            write(tmp_path / "precious", overwrite=overwrite)


def test_what_another_process_writes_is_not_removed(tmp_path):
    writer = RecordWriter(tmp_path / "a", latent_features(), shards={"train": 1})
    with writer.alone(), pytest.raises(ValueError, match="Another process"):
        RecordWriter(
            tmp_path / "a", latent_features(), shards={"train": 1}, overwrite=True
        )
    assert writer.work.exists()


def test_examples_must_be_what_the_features_say(tmp_path):
    writer = RecordWriter(tmp_path / "a", latent_features(), shards={"train": 1})
    with pytest.raises(ValueError, match="caption"):
        writer.serialize({k: v for k, v in latent(0).items() if k != "caption"})
    with pytest.raises(ValueError, match="(?s)clip0.*mean.*float32.*bfloat16"):
        writer.serialize(latent(0) | {"mean": np.zeros((1, 1, 1, 1), np.float32)})
    with pytest.raises(ValueError, match="(?s)clip0.*mean.*rank"):
        writer.serialize(latent(0) | {"mean": latent(0)["mean"][0]})
    with pytest.raises(ValueError, match="empty"):
        writer.serialize(latent(0) | {"text_embeds": latent(0)["text_embeds"][:0]})
    with pytest.raises(ValueError, match="key"):
        RecordWriter(tmp_path / "b", {"caption": "text"}, shards={"train": 1})
    with pytest.raises(ValueError, match="Unknown feature kind 'float'"):
        RecordWriter(tmp_path / "c", {"key": "text", "x": "float"}, shards={"train": 1})
    twice = RecordWriter(tmp_path / "d", CLIP_FEATURES, shards={"train": 1})
    twice.write_shard("train", 0, [clip(1), clip(1)])
    with pytest.raises(ValueError, match="clip1.*is not"):
        twice.finish()


def test_urls_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match="gcsfuse.*bucket /mnt/bucket.*/mnt/bucket/a"):
        local_path("gs://bucket/a")
    with pytest.raises(ValueError, match="mount it"):
        RecordDataset("gs://bucket/clips")


def test_the_newest_version_is_meant(tmp_path):
    assert dataset_directory(tmp_path) == tmp_path / "1.0.0"
    for version in ("2.0.0", "10.0.0", "9.9.9"):
        (tmp_path / version).mkdir()
    assert dataset_directory(tmp_path).name == "10.0.0"
    assert dataset_directory(tmp_path / "2.0.0").name == "2.0.0"
