"""Memory-maps the tensors of safetensors files: nothing is read before it is used.

A safetensors file is 8 bytes of header length (little endian), a JSON header with the
dtype, shape and byte range of each tensor, and the bytes
(github.com/huggingface/safetensors). That library reads and checks the header.
"""

import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jvdit.machine.files import replacing
from jvdit.machine.json_files import read_json

PathLike = str | os.PathLike[str]

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_PICKLED = (".pth", ".pt", ".bin", ".ckpt")


class _Index(msgspec.Struct, frozen=True):
    """A `*.safetensors.index.json`: the file that holds each tensor."""

    weight_map: dict[str, str]


class TensorFiles(dict[str, np.ndarray]):
    """The tensors of one or more safetensors files, by name: read-only views of them.

    Args:
        path: a file, or a folder: the files in its index
            (`*.safetensors.index.json`), or all if it has none.

    Attributes:
        path: the path as given.
        metadata: metadata of the file headers.

    Raises:
        FileNotFoundError: there is no such file or folder, or a file in the index is
            missing.
        ValueError: a file is truncated or no safetensors file, or the folder holds
            only pickled weights.
    """

    def __init__(self, path: PathLike):
        super().__init__()
        self.path = pathlib.Path(path)
        self.metadata: dict[str, str] = {}
        for file in _files(self.path):
            for name, tensor in self._open(file):
                if name in self:
                    raise ValueError(f"{self.path} holds tensor {name} twice.")
                self[name] = tensor

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by name."""
        return {name: tensor.shape for name, tensor in self.items()}

    def _open(self, file: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
        try:
            with safe_open(file, "numpy") as opened:
                self.metadata |= opened.metadata() or {}
                names = opened.offset_keys()
                entries = [opened.get_slice(name) for name in names]
                forms = [(entry.get_dtype(), entry.get_shape()) for entry in entries]
        except SafetensorError as error:
            raise ValueError(
                f"{file} is no whole safetensors file ({error}); download it again."
            ) from None
        data = np.asarray(np.memmap(file, np.uint8, "r"))
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        # Tensors follow one another without gaps.
        for name, (kind, shape) in zip(names, forms, strict=True):
            if kind not in DTYPES:
                raise ValueError(f"{file}: tensor {name} has the unknown type {kind}.")
            stop = start + math.prod(shape) * np.dtype(DTYPES[kind]).itemsize
            yield name, data[start:stop].view(DTYPES[kind]).reshape(shape)
            start = stop


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    if path.is_file():
        if path.suffix in _PICKLED:
            raise ValueError(_unpickle(path))
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} doesn't exist; give a folder of weights.")
    indexes = sorted(path.glob("*.safetensors.index.json"))
    if indexes:
        index = read_json(indexes[0], "download it again", _Index)
        for tensor, name in index.weight_map.items():
            if name != pathlib.PurePath(name).name or "\0" in name:
                raise ValueError(
                    f"{indexes[0]}: `weight_map.{tensor}` (={name!r}) is no file name; "
                    "download it again."
                )
        files = [path / name for name in dict.fromkeys(index.weight_map.values())]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{path} lacks {len(missing)} of {len(files)} files that "
                f"{indexes[0].name} names, the first {missing[0]}; download them."
            )
        return files
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickled = [f for f in sorted(path.iterdir()) if f.suffix in _PICKLED]
        if pickled:
            raise ValueError(_unpickle(pickled[0]))
        raise FileNotFoundError(f"{path} holds no *.safetensors; give another folder.")
    return files


def _unpickle(path: pathlib.Path) -> str:
    """The message that refuses a pickle and says how to convert it with torch."""
    new = path.with_suffix(".safetensors").name
    return (
        f"{path} is a pickle, which may run any code when it is read. Convert it where "
        'you trust it: python -c "import torch, safetensors.torch as s; '
        f"s.save_file({{k: v.contiguous() for k, v in torch.load('{path}', "
        f"map_location='cpu', weights_only=True).items()}}, '{path.parent / new}')\""
    )


def write_tensors(file: PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file atomically, marked as PyTorch's (`format: pt`)."""
    with replacing(pathlib.Path(file)) as scratch:
        save_file(dict(tensors), scratch, metadata={"format": "pt"})
