"""Tensors of safetensors files, mapped into memory: nothing is read before it is used.

A safetensors file is 8 bytes of header length (little endian), a JSON header that says
of each tensor its type, shape and byte range, and the bytes
(github.com/huggingface/safetensors).
"""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from safetensors.numpy import save_file

from jvdit.machine.files import replacing

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
_LONGEST_HEADER = 100_000_000  # bytes, as the reference implementation has it
_PICKLED = (".pth", ".pt", ".bin", ".ckpt")


class TensorFiles(Mapping[str, np.ndarray]):
    """The tensors of one or more safetensors files, by name.

    Args:
        path: a file, or a folder of files: those of its index if it has one
            (`*.safetensors.index.json`), else all.

    Attributes:
        path: as given.
        metadata: texts that the headers hold beside the tensors.

    Raises:
        FileNotFoundError: there is no such file or folder, or a file that the index
            names is missing.
        ValueError: a file is cut off or no safetensors file, or the folder holds
            pickled weights alone.
    """

    def __init__(self, path: PathLike):
        self.path = pathlib.Path(path)
        self.metadata: dict[str, str] = {}
        self._tensors: dict[str, np.ndarray] = {}
        for file in _files(self.path):
            for name, tensor in self._open(file):
                if name in self._tensors:
                    raise ValueError(f"{self.path} holds tensor {name} twice.")
                self._tensors[name] = tensor

    def __getitem__(self, name: str) -> Shaped[np.ndarray, "..."]:
        """A read-only view of the file."""
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        """Names, in the order of the files."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self._tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each tensor."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def _open(self, file: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(
                    f"{file} is no whole safetensors file; download it again."
                )
            try:
                header = json.loads(opened.read(length))
            except ValueError as error:
                raise ValueError(
                    f"{file} is no safetensors file: {error}; download it again."
                ) from None
        if not isinstance(header, dict):
            raise ValueError(f"{file} is no safetensors file; download it again.")
        self.metadata |= header.pop("__metadata__", None) or {}
        end = (
            8 + length + max((x["data_offsets"][1] for x in header.values()), default=0)
        )
        if end != size:
            raise ValueError(
                f"{file} has {size} bytes and should have {end}: it is cut off or "
                "damaged; download it again."
            )
        data = np.memmap(file, np.uint8, "r") if header else np.zeros(0, np.uint8)
        for name, entry in header.items():
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            if entry["dtype"] not in DTYPES:
                raise ValueError(
                    f"{file}: tensor {name} has the unknown type {entry['dtype']}."
                )
            flat = np.asarray(data[start:stop]).view(DTYPES[entry["dtype"]])
            yield name, flat.reshape(entry["shape"])


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    if path.is_file():
        if path.suffix in _PICKLED:
            raise ValueError(_unpickle(path))
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} doesn't exist; give a folder of weights.")
    indexes = sorted(path.glob("*.safetensors.index.json"))
    if indexes:
        listed = json.loads(indexes[0].read_text())["weight_map"].values()
        files = [path / name for name in dict.fromkeys(listed)]
        missing = [file.name for file in files if not file.exists()]
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
    """Why a pickle is refused, and how to convert it where torch is installed."""
    new = path.with_suffix(".safetensors").name
    return (
        f"{path} is a pickle, which may run any code when it is read. Convert it where "
        'you trust it: python -c "import torch, safetensors.torch as s; '
        f"s.save_file({{k: v.contiguous() for k, v in torch.load('{path}', "
        f"map_location='cpu', weights_only=True).items()}}, '{path.parent / new}')\""
    )


def write_tensors(file: PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file, as PyTorch's are marked, whole or not at all."""
    with replacing(pathlib.Path(file)) as scratch:
        save_file(dict(tensors), scratch, metadata={"format": "pt"})
