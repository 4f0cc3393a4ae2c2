"""Writes data sets of records, shard by shard; `records` says in which format."""

import collections
import contextlib
import fcntl
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from array_record.python.array_record_module import (
    ArrayRecordWriter,  # pyright: ignore[reportAttributeAccessIssue]
)
from etils import epath
from tensorflow_datasets.core import example_serializer

from jvdit.data.manifest import (
    COPY_AGAIN,
    FORMAT,
    MadeOf,
    Manifest,
    Shard,
    dataset_directory,
    is_version,
)
from jvdit.data.record_features import SCALARS, index_schema, tfds_features
from jvdit.machine import files
from jvdit.machine.json_files import differences, read_json

_REMAKE = "remove the data set and make it again"
_OPTIONS = "group_size:1,uncompressed"  # larger groups make random reads slow
MAX_RECORD_BYTES = 2**31 - 2**20  # protobuf refuses a message of 2 GiB


def _tfds_name(folder: str) -> str:
    """A folder's name as TFDS takes it: letters, digits and _, a letter first."""
    name = re.sub(r"\W", "_", folder)
    return name if re.match("[a-zA-Z]", name) else f"data_{name}"


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
        named = {"dataset_name": self.name, "filetype_suffix": "array_record"}
        template = tfds.core.ShardedFileTemplate(epath.Path(self.path), **named)
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
