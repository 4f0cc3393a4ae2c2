"""Files from outside, damaged in every way: each is read, or refused in one line."""

import csv
import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import save_file

from jvdit.data.ingest.listing import list_items
from jvdit.data.record_features import latent_features
from jvdit.data.record_writer import RecordWriter
from jvdit.data.sources import open_source
from jvdit.data.tokenizer import Tokenizer, train_tokenizer
from jvdit.generation.prompt_lines import read_prompts, read_request
from jvdit.generation.request import Request
from jvdit.weights.tensors import TensorFiles

TIMES = 50  # damages of each file; 1000 were tried once
ROWS = [{"path": f"v{i}.mp4", "text": f"a cat, number {i} «é»"} for i in range(6)]
SWAPS = [b"null", b"NaN", b"1e999", b"\\ud800", b"\0", b"\xff\xfe", b"[[[[", b"{}"]
SWAPS += [b"18446744073709551616", b"-1", b'"', b"[]", b'"../x"', b"true", b'["x"]']


def listed(name):
    def make(folder):
        file, suffix = folder / name, name[name.index(".") :]
        for row in ROWS:
            (folder / row["path"]).write_text(row["text"])
        text = io.StringIO()
        delimiter = "\t" if suffix == ".tsv" else ","
        writer = csv.DictWriter(text, ["path", "text"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
        texts = {
            ".csv": text.getvalue(),
            ".tsv": text.getvalue(),
            ".json": json.dumps(ROWS),
            ".jsonl": "\n".join(map(json.dumps, ROWS)),
            ".txt": "\n".join(row["path"] for row in ROWS),
        }
        if suffix in texts:
            file.write_text(texts[suffix])
        else:
            pq.write_table(pa.Table.from_pylist(ROWS), file)
        (folder / "prompt.txt").write_text("\n".join(row["text"] for row in ROWS))
        return file, lambda: list_items([file])

    return make


def sidecar(folder):
    (folder / "a.mp4").touch()
    (folder / "b.mp4").touch()
    file = folder / "a.json"
    file.write_text(json.dumps({"caption": "a «é»", "more": {"x": [1, None]}}))

    def read():
        items = list_items([folder])
        assert [item.key for item in items] == ["a.mp4", "b.mp4"]

    return file, read


def prompts(folder):
    file = folder / "prompts.jsonl"
    line = {"prompt": "a cat «é»", "seed": 3, "references": ["a.png"], "fps": 8}
    file.write_text(json.dumps(line) + "\nplain\n" + json.dumps(line))

    def read():
        for where, text in read_prompts(str(file)):
            read_request(text, where, {"seed": 0})

    return file, read


def records(pattern):
    def make(folder):
        features = latent_features("float32", logvar=False, text=False)
        writer = RecordWriter(folder / "x", features, shards={"train": 1})
        mean = np.zeros((2, 2, 2, 4), np.float32)
        example = {"mean": mean, "caption": "x", "meta": "{}", "text_length": 0}
        example |= {"frames": 2, "height": 2, "width": 2, "fps": 8.0}
        example |= {"has_audio": False}
        examples = [example | {"key": str(i)} for i in range(40)]
        writer.write_shard("train", 0, examples)
        (file,) = (path := writer.finish()).glob(pattern)
        return file, lambda: open_source(str(path)).read([0, 7])

    return make


def picture(suffix):
    def make(folder):
        file = folder / f"a.{suffix}"
        noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3))
        Image.fromarray(noise.astype(np.uint8)).save(file)
        return file, lambda: Request("x", image=str(file)).pictures

    return make


def tokenizer(folder):
    file = folder / "tokenizer.json"
    vocab = [["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["▁a", -1.5], ["b", -2]]
    model = {"type": "Unigram", "vocab": vocab, "byte_fallback": False}
    file.write_text(json.dumps({"model": model, "added_tokens": [{"id": 0}]}))
    return file, lambda: Tokenizer(file).encode("a b")


def pieces(folder):
    file = folder / "spiece.model"
    train_tokenizer(["a red cat", "a blue dog"] * 5, 300, file)
    return file, lambda: Tokenizer(file).encode("a cat")


def tensors(folder):
    file = folder / "x.safetensors"
    save_file({"a": np.zeros(3, np.float32), "b": np.ones((2, 2))}, file)
    return file, lambda: [np.abs(x).sum() for x in TensorFiles(file).values()]


def tensor_index(folder):
    file = folder / "x.safetensors.index.json"
    save_file({"a": np.zeros(3, np.float32)}, folder / "x-1.safetensors")
    held = {"metadata": {"total_size": 12}, "weight_map": {"a": "x-1.safetensors"}}
    file.write_text(json.dumps(held))
    return file, lambda: TensorFiles(folder)


TABLES = "t.csv t.tsv t.json t.jsonl t.parquet videos.txt".split()
KINDS = {name: listed(name) for name in TABLES}
KINDS |= {x: picture(x) for x in ("png", "webp", "jpg", "gif", "tif", "bmp")}
KINDS |= {x: records(x) for x in ("index.parquet", "manifest.json", "*array_record*")}
KINDS |= {"sidecar": sidecar, "prompts": prompts, "tokenizer": tokenizer}
KINDS |= {"pieces": pieces, "tensors": tensors, "tensor index": tensor_index}


def damaged(rng, data):
    """Bytes with one of many kinds of damage."""
    at = int(rng.integers(len(data)))
    to = at + int(rng.integers(1, 20))
    swap = SWAPS[rng.integers(len(SWAPS))]
    values = [*re.finditer(rb'"[^"]*"(?=[,}\]\n])', data)] or [re.search(rb"..", data)]
    value = values[int(rng.integers(len(values)))]
    return rng.choice(
        np.array(
            [
                data[:at],
                data[:at] + bytes([data[at] ^ 1 << rng.integers(8)]) + data[at + 1 :],
                data[:at] + b"\xff\x80" + data[at:],
                data[:at] + data[to:],
                data[:to] + data[at:],
                data[:at] + swap + data[to:],
                data[: value.start()] + swap + data[value.end() :],
                data[:at] + b"[" * 100_000 + data[at:],
            ],
            object,
        )
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, kind):
    file, read = KINDS[kind](tmp_path)
    data, rng, refused = file.read_bytes(), np.random.default_rng(len(kind)), 0
    read()
    for _ in range(TIMES):
        file.write_bytes(damage := damaged(rng, data))
        try:
            read()
        except (ValueError, OSError) as error:
            told, refused = str(error), refused + 1
            assert "\n" not in told and str(tmp_path) in told, (damage[:300], told)
        except Exception as error:
            raise AssertionError(f"{damage[:300]!r}: {error!r}") from error
    one_bad_row_is_no_refusal = {"t.jsonl", "sidecar"}
    assert kind in one_bad_row_is_no_refusal or refused > TIMES / 20


@pytest.mark.parametrize("value", ["../x", "/etc/hosts", "", "a/b", "a\0", "."])
def test_an_index_names_files_alone(tmp_path, value):
    file, read = tensor_index(tmp_path)
    file.write_text(json.dumps({"weight_map": {"a": value}}))
    with pytest.raises((ValueError, FileNotFoundError), match=file.name):
        read()


@pytest.mark.parametrize("change", ["missing", "type", "null", "zero", "nan"])
def test_the_columns_of_an_index_are_checked(tmp_path, change):
    file, read = KINDS["index.parquet"](tmp_path)
    table = pq.read_table(file)
    at = table.column_names.index("fps" if change == "nan" else "width")
    column = {
        "type": pa.array(["x"] * 40),
        "null": pa.array([None] * 40, pa.int64()),
        "zero": pa.array([0] * 40, pa.int64()),
        "nan": pa.array([float("nan")] * 40, pa.float32()),
    }.get(change)
    name = table.column_names[at]
    table = table.remove_column(at)
    if column is not None:
        table = table.append_column(name, column)
    pq.write_table(table, file)
    with pytest.raises(ValueError, match="index.parquet can't be read .*; copy"):
        read()
