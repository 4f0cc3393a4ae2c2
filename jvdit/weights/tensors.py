"""Memory-maps the tensors of safetensors files: nothing is read before it is used.

A safetensors file is 8 bytes of header length (little endian), a JSON header with the
dtype, shape and byte range of each tensor, and the bytes
(github.com/huggingface/safetensors). That library reads and checks the header.
"""

import math
import os
import pathlib
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
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
# Files of a network's weights, or their index, with the variant if it is one:
# model.fp16-00001-of-00002.safetensors, model.safetensors.index.fp16.json.
_NETWORK = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)(?:\.(\w+))?(?:-\d+-of-\d+)?"
    r"\.safetensors(?:\.index(?:\.(\w+))?\.json)?"
)
# Tensors beside a weight of fp8 in ComfyUI's files, and what bitsandbytes writes.
_OF_WEIGHTS = ("scale_weight", "weight_scale")
_SCALES = re.compile(
    r"(^|\.)(scaled_fp8|(scale_weight|weight_scale|scale_input|input_scale|comfy_quant))$"
)
_BITS = re.compile(r"\.(absmax|quant_map|SCB)$|bitsandbytes")
_PICKLED = (".pth", ".pt", ".bin", ".ckpt")


class _Index(msgspec.Struct, frozen=True):
    """A `*.safetensors.index.json`: the file that holds each tensor."""

    weight_map: dict[str, str]


class TensorFiles(dict[str, np.ndarray]):
    """The tensors of one or more safetensors files, by name: read-only views of them.

    Args:
        path: a file, or a folder: the files in its index
            (`*.safetensors.index.json`); without one, those that are named as the
            weights of a network (`diffusion_pytorch_model.safetensors`), or all.
        variant: which of several versions of the weights to take, such as "fp16"; the
            plain ones where it is "" or there is none.

    Attributes:
        path: the path as given.
        metadata: metadata of the file headers.

    Raises:
        FileNotFoundError: there is no such file or folder, or a file in the index is
            missing.
        ValueError: a file is truncated or no safetensors file, the folder holds only
            pickled weights, or they are quantised in a way that isn't read.
    """

    def __init__(self, path: PathLike, variant: str = ""):
        super().__init__()
        self.path = pathlib.Path(path)
        self.metadata: dict[str, str] = {}
        self._scales: dict[str, np.ndarray] = {}
        for file in _files(self.path, variant):
            for name, tensor in self._open(file):
                if name in self:
                    raise ValueError(f"{self.path} holds tensor {name} twice.")
                self[name] = tensor
        self._take_scales()

    def __getitem__(self, name: str) -> np.ndarray:
        """A tensor; of scaled ones (fp8) the scale times the value, in float32."""
        value, scale = super().__getitem__(name), self._scales.get(name)
        return value if scale is None else value.astype(np.float32) * scale

    def within(self, prefix: str) -> None:
        """Keeps the tensors whose names begin so, under the rest; or all if none do."""
        raw = dict(self.items())
        if names := [name for name in raw if name.startswith(prefix)]:
            own = {name[len(prefix) :]: raw[name] for name in names}
            scales = {k[len(prefix) :]: x for k, x in self._scales.items()}
            self.clear()
            self.update(own)
            self._scales = scales

    def _take_scales(self) -> None:
        """Takes out what only says how others are quantised."""
        if told := [x for x in self if _BITS.search(x)]:
            raise ValueError(
                f"{self.path} is quantised by bitsandbytes ({told[0]}), whose own code "
                "alone reads it; take weights in bf16, fp16, or fp8 with scales."
            )
        for name in [x for x in self if _SCALES.search(x)]:
            scale, (stem, _, end) = self.pop(name), name.rpartition(".")
            weight = self.get(f"{stem}.weight")
            if end not in _OF_WEIGHTS or weight is None:
                continue
            if scale.size not in (1, *weight.shape[:1]) or scale.dtype.itemsize == 1:
                raise ValueError(
                    f"{self.path}: {name} {scale.shape} scales blocks of the weight "
                    f"{weight.shape}, which isn't read; take a file with one scale for "
                    "each tensor or row, or weights in bf16."
                )
            ones = (1,) * (weight.ndim - 1)
            self._scales[f"{stem}.weight"] = scale.astype(np.float32).reshape(-1, *ones)

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


def _files(path: pathlib.Path, variant: str = "") -> list[pathlib.Path]:
    if path.is_file():
        if path.suffix in _PICKLED:
            raise ValueError(_unpickle(path))
        if path.suffix == ".gguf":
            raise ValueError(
                f"{path} is GGUF, which isn't read; take safetensors in bf16, fp16, or "
                "fp8 with scales."
            )
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} doesn't exist; give a file or a folder.")
    found = sorted(path.glob("*.safetensors"))
    several = sorted(path.glob("*.safetensors.index*.json"), reverse=True)
    indexes = {variant_of(x) or "": x for x in several}
    kinds = {x: variant_of(x) for x in found}
    # Beside the weights of a network, a folder may hold other networks' files.
    variants = {x: None for x in (*indexes, *kinds.values()) if x is not None}
    if not variants:
        variants, kinds = {"": None}, dict.fromkeys(found, "")
    chosen = chosen_variant(variants, variant)
    if chosen in indexes:
        index = read_json(indexes[chosen], "download it again", _Index)
        for tensor, name in index.weight_map.items():
            if name != pathlib.PurePath(name).name or "\0" in name:
                raise ValueError(
                    f"{indexes[chosen]}: `weight_map.{tensor}` (={name!r}) is no file "
                    "name; download it again."
                )
        files = [path / name for name in dict.fromkeys(index.weight_map.values())]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{path} lacks {len(missing)} of {len(files)} files that "
                f"{indexes[chosen].name} names, the first {missing[0]}; download them."
            )
        return files
    files = [x for x in found if kinds[x] == chosen]
    if not files:
        pickled = [f for f in sorted(path.iterdir()) if f.suffix in _PICKLED]
        if pickled:
            raise ValueError(_unpickle(pickled[0]))
        raise FileNotFoundError(f"{path} holds no *.safetensors; give another folder.")
    return files


def variant_of(path: pathlib.Path) -> str | None:
    """The variant of a network's weights that a file holds, such as "fp16".

    "": the plain ones. None: the file isn't named as diffusers and transformers do.
    """
    match = _NETWORK.fullmatch(path.name)
    return match and (match[1] or match[2] or "")


def chosen_variant(variants: Iterable[str], wanted: str) -> str:
    """The variant to take: the one that is wanted, the plain one, or the first."""
    there = [*variants]
    return next((x for x in (wanted, "", *there) if x in there), "")


def has_variant(path: PathLike, variant: str) -> bool:
    """Whether a folder holds this variant of a network's weights."""
    folder = pathlib.Path(path)
    return folder.is_dir() and any(variant_of(x) == variant for x in folder.iterdir())


def _unpickle(path: pathlib.Path) -> str:
    """The message that refuses a pickle and says how to convert it with torch."""
    paths = (shlex.quote(str(x)) for x in (path, path.with_suffix(".safetensors")))
    return (
        f"{path} is a pickle, which may run any code when it is read. Convert it where "
        'you trust it: python -c "import sys, torch, safetensors.torch as s; '
        "s.save_file({k: v.contiguous() for k, v in torch.load(sys.argv[1], "
        "map_location='cpu', weights_only=True).items()}, sys.argv[2])\" "
        + " ".join(paths)
    )


def write_tensors(file: PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file atomically, marked as PyTorch's (`format: pt`)."""
    with replacing(pathlib.Path(file)) as scratch:
        save_file(dict(tensors), scratch, metadata={"format": "pt"})
