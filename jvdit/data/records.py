"""Data sets of records: ArrayRecord shards that TFDS can read, an index, a manifest.

A data set is one directory, `<name>/<version>/`:

    <name>-<split>.array_record-00000-of-00004   tf.Example records, uncompressed
    features.json, dataset_info.json             what TFDS needs to read them
    index.parquet                                the scalars of every record
    manifest.json                                features, settings, shards, digests

A tf.Example can only be read whole, so everything that a plan needs (sizes, lengths,
rates) is repeated in the index and no video byte is touched before training. The
manifest is written last: a directory without one is unfinished and will not open.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python import array_record_data_source

from jvdit.data.clips import SIZE
from jvdit.data.manifest import COPY_AGAIN, dataset_directory, read_manifest
from jvdit.data.parquet import parquet_errors
from jvdit.data.record_features import index_schema, tfds_features


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


def check_features(records: RecordDataset, *more: str) -> None:
    """Raises ValueError if a data set lacks what every source of clips needs."""
    for name in ("caption", *SIZE, "fps", "has_audio", *more):
        if name not in records.features:
            raise ValueError(
                f"the records of {records.path} have no `{name}`; they have: "
                f"{', '.join(sorted(records.features))}."
            )
