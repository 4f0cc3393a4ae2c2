"""The record format: ArrayRecord shards that TFDS can read, an index, a manifest.

A data set is one directory, `<name>/<version>/`:

    <name>-<split>.array_record-00000-of-00004   tf.Example records, uncompressed
    features.json, dataset_info.json             what TFDS needs to read them
    index.parquet                                the scalars of every record
    manifest.json                                features, settings, shards, digests

A tf.Example can only be read whole, so everything that a plan needs (sizes, lengths,
rates) is repeated in the index and no video byte is touched before training. The
manifest is written last: a directory without one is unfinished and will not open.
"""

import collections
import contextlib
import fcntl
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source
from array_record.python.array_record_module import (
    ArrayRecordWriter,  # pyright: ignore[reportAttributeAccessIssue]
)
from etils import epath
from tensorflow_datasets.core import example_serializer

from jvdit.data.conditions.beside import PRESENCE, VIEWS
from jvdit.data.parquet import parquet_errors
from jvdit.machine import files
from jvdit.machine.json_files import differences, read_json

FORMAT = "jvdit-records-1"
COPY_AGAIN = "copy the data set again"
SCALARS = {"int64": np.int64, "float32": np.float32, "bool": np.bool_}


_REMAKE = "remove the data set and make it again"
_OPTIONS = "group_size:1,uncompressed"  # larger groups make random reads slow
MAX_RECORD_BYTES = 2**31 - 2**20  # protobuf refuses a message of 2 GiB


def _features(first: dict[str, str], *counts: str) -> dict[str, str]:
    """Adds what every data set has to its first features, and further counts."""
    described = {"caption": "text", "meta": "text"}  # meta: JSON, how it was made
    described |= dict.fromkeys(("frames", "height", "width", *counts), "int64")
    return {"key": "text"} | first | described | {"fps": "float32", "has_audio": "bool"}


# `video` is an mp4 file: H.264, and AAC if has_audio; height and width are pixels.
CLIP_FEATURES = _features({"video": "bytes"})


def clip_features(beside: Sequence[str] = ()) -> dict[str, str]:
    """Returns the features of a data set of clips.

    Args:
        beside: what some of the clips have besides: "guide", an mp4 file, and "camera",
            the text of a camera path; each with a flag that says whether.
    """
    kinds = {"guide": "bytes", "camera": "text"}
    more = {name: kinds[name] for name in beside}
    return CLIP_FEATURES | more | {f"has_{name}": "bool" for name in beside}


def latent_features(
    dtype: str = "bfloat16",
    *,
    logvar: bool = True,
    text: bool = True,
    sound: bool = False,
    views: Sequence[str] = (),
) -> dict[str, str]:
    """Returns the features of a data set of latents.

    Args:
        dtype: how the tensors are stored: "bfloat16", "float16" or "float32".
        logvar: whether the posterior's log variance is kept beside its mean.
        text: whether text encoder states, trimmed to their length, are stored.
        sound: whether latents of the sound are stored.
        views: names of `VIEWS`, of which the means are stored, or what is measured.

    Returns:
        Features of `mean` (and `logvar`) and of views [f h w c], `text_embeds` [s e],
        `sound_mean` (and `sound_logvar`) [n c], the caption and the scalars; `frames`,
        `height` and `width` count latents, `text_length` the text tokens (0 without
        `text_embeds`), `sounds` the latents of the sound (0 for a silent clip). Of
        views that some clips may lack, `has_guide` and the like say which have them.
    """
    names: list[str] = ["mean", "logvar"] if logvar else ["mean"]
    tensors = dict.fromkeys([*names, *views], f"{dtype}[f h w c]")
    for name in views:  # numbers that a network is to read exactly
        if VIEWS[name].measured:
            tensors[name] = "float32[f h w c]"
    tensors |= {PRESENCE[name]: "bool" for name in views if name in PRESENCE}
    if text:
        tensors["text_embeds"] = f"{dtype}[s e]"
    if sound:
        tensors |= {f"sound_{name}": f"{dtype}[n c]" for name in names}
    return _features(tensors, "text_length", *["sounds"] * sound)


def tensor_spec(kind: str) -> tuple[np.dtype, int]:
    """Returns the (dtype, rank) of a feature such as "bfloat16[f h w c]"."""
    match = re.fullmatch(r"(\w+)\[([\w ]*)\]", kind)
    if match is None:
        known = ["text", "bytes", *SCALARS, "<dtype>[axes], e.g. bfloat16[f h w c]"]
        raise ValueError(f"Unknown feature kind {kind!r}; known: {', '.join(known)}.")
    try:
        dtype = np.dtype(getattr(ml_dtypes, match[1], match[1]))
    except TypeError as error:
        raise ValueError(f"Unknown feature kind {kind!r}: {error}.") from None
    return dtype, len(match[2].split())


def tfds_features(features: Mapping[str, str]) -> tfds.features.FeaturesDict:
    """Translates a table of features into what TFDS calls by that name."""

    def feature(kind: str) -> Any:
        if kind == "text":
            return tfds.features.Text()
        if kind == "bytes":
            return tfds.features.Tensor(shape=(), dtype=np.object_)
        if kind in SCALARS:
            return tfds.features.Scalar(SCALARS[kind])
        dtype, rank = tensor_spec(kind)
        shape = (None,) * rank
        return tfds.features.Tensor(shape=shape, dtype=dtype.type, encoding="bytes")

    return tfds.features.FeaturesDict(
        {n: feature(kind) for n, kind in features.items()}
    )


def is_version(name: str) -> bool:
    """Whether a directory name is a TFDS version, e.g. 1.0.0."""
    return re.fullmatch(r"\d+\.\d+\.\d+", name) is not None


def _tfds_name(folder: str) -> str:
    """A folder's name as TFDS takes it: letters, digits and _, a letter first."""
    name = re.sub(r"\W", "_", folder)
    return name if re.match("[a-zA-Z]", name) else f"data_{name}"


def index_schema(features: Mapping[str, str]) -> pa.Schema:
    """The columns of the index of a data set, see `RecordDataset.index`."""
    first = [("split", pa.string()), ("shard", pa.int64()), ("record", pa.int64())]
    scalars = [
        (name, pa.from_numpy_dtype(SCALARS[kind]))
        for name, kind in features.items()
        if kind in SCALARS
    ]
    last = [("caption_length", pa.int64()), ("caption", pa.string())]
    last *= "caption" in features
    return pa.schema([*first, ("key", pa.string()), *scalars, *last])


def dataset_directory(path: str | Path) -> Path:
    """Returns the directory that holds the shards of the data set at `path`.

    `path` names either `<name>/<version>` or `<name>`: then the newest version in
    it, or 1.0.0 if there is none yet.
    """
    root = files.local_path(path)
    if is_version(root.name) or (root / "manifest.json").exists():
        return root
    versions = [d.name for d in root.glob("*.*.*") if is_version(d.name)]
    return root / max(
        versions, key=lambda v: [int(x) for x in v.split(".")], default="1.0.0"
    )


class Shard(msgspec.Struct, omit_defaults=True):
    """A shard of records that is complete.

    Attributes:
        file: its name.
        file_bytes, bytes: length of the file, and of all of its records.
        records: number of records.
        digest: hash of the records.
        rows: their rows of the index; only until the data set is finished.
    """

    file: str
    file_bytes: int
    records: int
    bytes: int
    digest: str
    rows: list[dict[str, Any]] = []


class MadeOf(msgspec.Struct):
    """What a data set was begun with; see `RecordWriter`."""

    features: dict[str, str]
    shards: dict[str, int]
    settings: dict[str, Any]


class Manifest(msgspec.Struct):
    """What a finished data set holds: its shards by split."""

    format: str
    name: str
    plan: MadeOf
    splits: dict[str, list[Shard]]


def read_manifest(path: Path) -> Manifest:
    """Returns a data set's manifest, or says why there is none."""
    file = path / "manifest.json"
    if file.exists():
        manifest = read_json(file, COPY_AGAIN, Manifest)
        if manifest.format == FORMAT:
            return manifest
        raise ValueError(
            f"{file} is of format {manifest.format!r}; this reads {FORMAT!r}."
        )
    if (path / "_work").exists():
        done = len(list(path.glob("[!.]*.array_record-*")))
        raise ValueError(
            f"{path} is an unfinished data set ({done} shards done); run the "
            "command that began it again to finish it."
        )
    what = "no data set" if path.exists() else "no such directory"
    raise FileNotFoundError(f"{path}: {what} (manifest.json is missing).")


class RecordWriter:
    """Writes one data set directory, a shard at a time, in any order and process.

    A shard is the unit of work: it appears whole or not at all, `is_done` says
    whether it is there, and writing the same examples again gives the same bytes.
    So a killed job is resumed by building the same writer and skipping what is done,
    and shards may be written by many processes.

    Args:
        path: the data set directory, `<name>` or `<name>/<version>`.
        features: feature kind by name: "text", "bytes", "int64", "float32", "bool" or a
            tensor such as "bfloat16[f h w c]" (the letters only count the axes). There
            must be a text feature `key` that is unique in the data set.
        shards: number of shards by split, e.g. {"train": 8, "val": 1}.
        settings: what made the data; kept in the manifest. A data set begun with other
            settings is not continued.
        overwrite: whether a data set that is already there is removed first.

    Raises:
        ValueError: the directory holds something else than this data set, finished or
            unfinished; or it is to be removed while another process works on it.
    """

    def __init__(
        self,
        path: str | Path,
        features: Mapping[str, str],
        *,
        shards: Mapping[str, int],
        settings: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ):
        if features.get("key") != "text":
            raise ValueError("`features` must have a text feature named 'key'.")
        self.path = dataset_directory(path)
        named = self.path.parent if is_version(self.path.name) else self.path
        self.name = _tfds_name(named.resolve().name)
        self.features = dict(features)
        self.shards = {split: int(count) for split, count in shards.items()}
        self.work = self.path / "_work"
        kinds = self.features.items()
        self._scalars = {name: SCALARS[kind] for name, kind in kinds if kind in SCALARS}
        self._tfds = tfds_features(self.features)
        specs: Any = self._tfds.get_serialized_info()
        self._serializer = example_serializer.ExampleSerializer(specs)
        as_read_back = json.loads(json.dumps(dict(settings or {})))
        self.plan = MadeOf(self.features, self.shards, as_read_back)
        self._begin(overwrite)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other processes from writing the same data set, until this one ends.

        Raises:
            ValueError: another process writes it.
        """
        with open(self.work / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"Another process is working on {self.path}; wait for it or end it."
                ) from None
            yield

    def _begin(self, overwrite: bool) -> None:
        """Starts the data set, or checks that the one that is there is this one."""
        manifest, plan = self.path / "manifest.json", self.work / "plan.json"
        if overwrite and (self.finished or self.work.exists()):
            with self.alone() if self.work.exists() else contextlib.nullcontext():
                shutil.rmtree(self.path)
        if manifest.exists():
            found = read_json(manifest, COPY_AGAIN, Manifest).plan
        elif plan.exists():
            found = read_json(plan, _REMAKE, MadeOf)
        elif self.path.exists() and any(
            x != self.work and not x.name.startswith(".") for x in self.path.iterdir()
        ):
            raise ValueError(
                f"{self.path} is not empty and holds no data set; name another one."
            )
        else:
            files.write_atomically(plan, _json(self.plan, indent=1))
            return
        if found != self.plan:
            both = map(msgspec.to_builtins, (found, self.plan))
            raise ValueError(
                f"{self.path} holds a data set made differently: "
                f"{'; '.join(differences(*both)[:4])}. Name another directory, or "
                "allow overwriting it."
            )
        if manifest.exists():  # finished, and perhaps killed while tidying up
            shutil.rmtree(self.work, ignore_errors=True)
        files.sweep_temporary(self.path)

    @property
    def finished(self) -> bool:
        """Whether the whole data set is there."""
        return (self.path / "manifest.json").exists()

    def _files(self, split: str, shard: int) -> tuple[Path, Path]:
        """Returns a shard's record file and the state that marks it as done."""
        count = self.shards[split]
        if not 0 <= shard < count:
            raise ValueError(f"`shard` (={shard}) must be below `shards` (={count}).")
        name = f"{self.name}-{split}.array_record-{shard:05d}-of-{count:05d}"
        return self.path / name, self.work / f"{split}-{shard:05d}.json"

    def is_done(self, split: str, shard: int) -> bool:
        """Whether a shard is complete."""
        return self.finished or self._files(split, shard)[1].exists()

    def write_shard(
        self, split: str, shard: int, examples: Iterable[Mapping[str, Any]]
    ) -> int:
        """Writes one shard and returns its number of records.

        Examples are taken one at a time, so they may be produced lazily; they end
        before the shard is marked as done. A shard that is done is left alone.

        Raises:
            OSError: it can't be written, because the disk is full for example.
        """
        file, state = self._files(split, shard)
        if self.is_done(split, shard):
            return 0 if self.finished else read_json(state, _REMAKE, Shard).records
        rows, size, digest = [], 0, hashlib.blake2b(digest_size=16)
        with (
            files.replacing(file) as temporary,
            contextlib.closing(ArrayRecordWriter(str(temporary), _OPTIONS)) as out,
        ):
            for example in examples:
                record = self.serialize(example)
                out.write(record)
                digest.update(len(record).to_bytes(8, "little") + record)
                size += len(record)
                row = {n: kind(example[n]).item() for n, kind in self._scalars.items()}
                if "caption" in self.features:
                    row["caption_length"] = len(example["caption"])
                    row["caption"] = example["caption"]
                rows.append({"key": example["key"], **row})
        length, hashed = file.stat().st_size, digest.hexdigest()
        done = Shard(file.name, length, len(rows), size, hashed, rows)
        files.write_atomically(state, _json(done))
        return len(rows)

    def serialize(self, example: Mapping[str, Any]) -> bytes:
        """Returns the tf.Example bytes of one example; the same in every process."""
        # TFDS writes empty arrays, and fails to read them.
        if empty := [name for name, value in example.items() if not np.size(value)]:
            raise ValueError(f"{empty[0]} of {example.get('key')!r} is empty.")
        try:
            encoded = self._tfds.encode_example(example)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"Example {example.get('key')!r} isn't as the features say: {error}."
            ) from error
        proto = self._serializer.get_tf_example(encoded)
        record = proto.SerializeToString(deterministic=True)
        if len(record) > MAX_RECORD_BYTES:
            raise ValueError(
                f"Example {example['key']!r} has {len(record)} bytes; a record holds "
                f"at most {MAX_RECORD_BYTES}. Cut it into shorter clips."
            )
        return record

    def finish(self) -> Path:
        """Writes index, TFDS metadata and, last, the manifest; returns the directory.

        Raises:
            ValueError: a shard is missing, or two records have the same key.
        """
        if self.finished:
            return self.path
        states = {
            split: [self._files(split, shard)[1] for shard in range(count)]
            for split, count in self.shards.items()
        }
        every = itertools.chain(*states.values())
        if missing := [file.stem for file in every if not file.exists()]:
            raise ValueError(f"Unfinished shards of {self.path}: {missing[:8]}.")
        splits = {
            split: [read_json(file, _REMAKE, Shard) for file in found]
            for split, found in states.items()
        }
        self._write_index(splits)
        for shard in itertools.chain(*splits.values()):
            shard.rows = []
        self._write_tfds(splits)
        for stale in self.path.glob(".tmp@*"):
            stale.unlink(missing_ok=True)
        manifest = Manifest(FORMAT, self.name, self.plan, splits)
        files.write_atomically(self.path / "manifest.json", _json(manifest, indent=1))
        shutil.rmtree(self.work)
        return self.path

    def _write_index(self, splits: Mapping[str, list[Shard]]) -> None:
        rows = [
            {"split": split, "shard": shard, "record": record} | row
            for split, shards in splits.items()
            for shard, state in enumerate(shards)
            for record, row in enumerate(state.rows)
        ]
        counts = collections.Counter(row["key"] for row in rows).most_common(1)
        if counts and counts[0][1] > 1:
            raise ValueError(f"Keys must be unique; {counts[0][0]!r} is not.")
        table = pa.Table.from_pylist(rows, schema=index_schema(self.features))
        with files.replacing(self.path / "index.parquet") as temporary:
            pq.write_table(table, temporary)

    def _write_tfds(self, splits: Mapping[str, list[Shard]]) -> None:
        template = tfds.core.ShardedFileTemplate(
            epath.Path(self.path),
            dataset_name=self.name,
            filetype_suffix="array_record",
        )
        infos = [
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[shard.records for shard in shards],
                num_bytes=sum(shard.bytes for shard in shards),
                filename_template=template,
            )
            for split, shards in splits.items()
        ]
        tfds.folder_dataset.write_metadata(
            data_dir=str(self.path),
            features=self._tfds,
            split_infos=infos,
            filename_template=template,
            description="Written by jvdit; see manifest.json.",
            check_data=False,
        )


def _json(value: msgspec.Struct, indent: int | None = None) -> bytes:
    return json.dumps(msgspec.to_builtins(value), indent=indent).encode()


class RecordDataset:
    """Random access to a finished data set.

    Args:
        path: the data set directory, `<name>` or `<name>/<version>`.
        split: which split.

    Attributes:
        index: column by name, one entry per record: `key` (str), every scalar feature
            and `caption_length` (characters).
        fingerprint: hash of the features and of every record's bytes in order: equal
            for equal data wherever it lies.
        features: feature kind by name.
        settings: what made the data.

    Raises:
        FileNotFoundError: there is no data set, or a shard is missing.
        ValueError: it is unfinished, damaged, empty, or has no such split.
    """

    def __init__(self, path: str | Path, split: str = "train"):
        self.path = dataset_directory(path)
        self.split = split
        manifest = read_manifest(self.path)
        if (shards := manifest.splits.get(split)) is None:
            known = ", ".join(manifest.splits)
            raise ValueError(f"{self.path} has no split {split!r}; it has: {known}.")
        for shard in shards:
            file = self.path / shard.file
            if not file.exists():
                raise FileNotFoundError(f"{file} is missing; {COPY_AGAIN}.")
            if (size := file.stat().st_size) != shard.file_bytes:
                raise ValueError(
                    f"{file} has {size} bytes, not {shard.file_bytes}; copy it again."
                )
        self.features, self.settings = manifest.plan.features, manifest.plan.settings
        try:
            self._tfds = tfds_features(self.features)
        except ValueError as error:
            raise ValueError(
                f"{self.path / 'manifest.json'}: {error} {COPY_AGAIN}."
            ) from None
        identity = [sorted(self.features.items()), [s.digest for s in shards]]
        identity = json.dumps(identity).encode()
        self.fingerprint = hashlib.blake2b(identity, digest_size=16).hexdigest()
        self.index = self._read_index(sum(s.records for s in shards))
        held = [str(self.path / shard.file) for shard in shards if shard.records]
        self._records = _opened(held, self.path)

    def _read_index(self, count: int) -> dict[str, np.ndarray]:
        if count == 0:
            raise ValueError(f"Split {self.split!r} of {self.path} holds no record.")
        file = self.path / "index.parquet"
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing; {COPY_AGAIN}.")
        # Captions would fill the memory of a host; `captions` reads them.
        columns = index_schema(self.features)
        wanted = pa.schema([x for x in columns if x.name != "caption"])
        with parquet_errors(file, COPY_AGAIN):
            table = self._indexed(wanted.names).cast(wanted)
            if incomplete := [x for x in wanted.names if table[x].null_count]:
                raise ValueError(f"`{incomplete[0]}` is missing in some rows")
            columns = {name: table[name].to_numpy() for name in wanted.names[3:]}
            for name in {"frames", "height", "width", "fps"} & columns.keys():
                if not (found := columns[name].min(initial=1)) > 0:
                    raise ValueError(f"`{name}` (={found}) must be positive")
        if table.num_rows != count:
            raise ValueError(
                f"{file} has {table.num_rows} rows of {self.split!r} and the shards "
                f"{count} records; {COPY_AGAIN}."
            )
        return columns

    def _indexed(self, names: Sequence[str]) -> pa.Table:
        """Columns of the index, of the records of the split."""
        mine = [("split", "==", self.split)]
        file = self.path / "index.parquet"
        return pq.read_table(file, columns=list(names), filters=mine)

    def captions(self, ids: Sequence[int]) -> list[str]:
        """Returns the captions of records, from the index alone if it holds them.

        Raises:
            ValueError: it doesn't, as those written before it did, and a record is
                damaged.
        """
        file = self.path / "index.parquet"
        with parquet_errors(file, COPY_AGAIN):
            if "caption" in pq.read_schema(file).names:
                return self._indexed(["caption"])["caption"].take(list(ids)).to_pylist()
        return [self[i]["caption"] for i in ids]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, record: int) -> dict[str, Any]:
        """Returns one example: str, bytes, numbers, arrays by feature name.

        Raises:
            IndexError: there are fewer records, so that iteration ends.
            ValueError: the record is damaged.
        """
        if not 0 <= record < len(self):
            raise IndexError(f"Record {record} of a data set of {len(self)}.")
        try:
            data = self._records[int(record)]
            example: Any = self._tfds.deserialize_example_np(data)
            return {
                name: value.decode() if self.features[name] == "text" else value
                for name, value in example.items()
            }
        except Exception as error:  # anything, of anything
            told = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(
                f"record {record} of {self.path}, split {self.split!r}, is damaged "
                f"({told}); {COPY_AGAIN}."
            ) from error


def _opened(shards: list[str], path: Path) -> Any:
    """Opens shards, naming the first that is damaged."""
    opened: Any = array_record_data_source.ArrayRecordDataSource
    try:
        return opened(shards)
    except Exception as error:
        told = " ".join(str(error).split())[:200]
        for shard in shards if len(shards) > 1 else ():
            _opened([shard], Path(shard))
        raise ValueError(
            f"{path}: a shard is damaged ({told}); {COPY_AGAIN}."
        ) from error
