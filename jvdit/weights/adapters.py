"""Reads LoRA adapters in other projects' formats, and writes diffusers' format.

A file names the layers as the network's own checkpoint does, with a prefix in front and
the factor behind: `lora_A`, `lora_B` (PEFT, diffusers) or `lora_down`, `lora_up`
(ComfyUI, kohya). The scale alpha / rank comes from `.alpha` tensors, from an
`adapter_config.json` beside the file (PEFT), or from the file's metadata (diffusers);
otherwise it is 1.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import einops
import msgspec
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jvdit.machine.json_files import fit_json, parse_json, read_json
from jvdit.models.layers import stack_of
from jvdit.models.lora import A, B
from jvdit.weights.rules import Rule, names_of, paths_of, places_of
from jvdit.weights.tensors import PathLike, TensorFiles, write_tensors

# Prefixes of layer names. `write_lora` writes the first.
PREFIXES = ("transformer.", "base_model.model.", "diffusion_model.", "model.", "")
_FACTORS = re.compile(
    r"(?P<layer>.+)\.(?:(?P<a>lora_A|lora_down)|lora_B|lora_up)(?:\.\w+)?\.weight"
)
# kohya's scripts (musubi-tuner) join the parts of the original names by underscores.
_JOINED = re.compile(
    r"lora_unet_((?:vace_)?blocks)_(\d+)_(self_attn|cross_attn|ffn)_(\w+)"
)
FILE = "pytorch_lora_weights.safetensors"


def read_lora(
    path: PathLike, tables: Sequence[Sequence[Rule]], params: Mapping[str, Any]
) -> dict[str, Any]:
    """Reads LoRA adapters from a file, and multiplies their scale into `lora_b`.

    Args:
        path: a safetensors file, or a folder with one.
        tables: rule tables of the network, one for each naming of its layers.
        params: parameters of the network, or their shapes: adapters are stacked over
            layers where these are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a tensor is no adapter of a layer of this network; lists which. Or
            the adapters are DoRA.
    """
    path = pathlib.Path(path)
    tensors = TensorFiles(path)
    alphas = _Alphas(path, tensors)
    found: dict[str, np.ndarray] = {}
    unknown = []
    for name in tensors:
        if name.endswith(".alpha"):
            continue
        match = _FACTORS.fullmatch(name)
        place = match and _place(match["layer"], tables)
        if not match or place is None or tensors[name].ndim < 2:
            unknown.append(name)
            continue
        layer, rule = place
        tensor = np.asarray(tensors[name], np.float32)
        if not match["a"]:
            strength = alphas.of(match["layer"], rank := tensor.shape[1]) / rank
            found[f"{layer}/{B}"] = tensor.reshape(tensor.shape[:2]).T * strength
            continue
        try:
            found[f"{layer}/{A}"] = rule.to_ours(tensor)
        except einops.EinopsError:
            unknown.append(name)
    if unknown or not found:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ValueError(
            f"{path} holds no adapters of this network: unknown are "
            f"{', '.join(unknown[:3]) or 'none, but it is empty'}{more}."
        )
    return _stacked(found, params)


def write_lora(
    folder: PathLike, adapters: Mapping[str, Any], rules: Sequence[Rule]
) -> pathlib.Path:
    """Writes adapters in diffusers' format (`load_lora_weights`); returns the file.

    Args:
        folder: where to write `pytorch_lora_weights.safetensors`.
        adapters: the adapters, with their scale multiplied in.
        rules: rule table of the network.
    """
    tensors = {}
    for path, leaf in flatten_dict(dict(adapters), sep="/").items():
        layer, _, factor = path.rpartition("/")
        value = np.asarray(leaf, np.float32)
        for name, rule, number in names_of(rules, f"{layer}/kernel", value.shape):
            own = value if number is None else value[number]
            if factor == A:
                turned = rule.to_theirs(own)
            else:
                ones = (1,) * (len(rule.layout.split("->")[0].split()) - 2)
                turned = own.T.reshape(*own.T.shape, *ones)
            ending = f"lora_{'A' if factor == A else 'B'}.weight"
            name = f"{PREFIXES[0]}{name.removesuffix('weight')}{ending}"
            tensors[name] = np.ascontiguousarray(turned)
    file = pathlib.Path(folder) / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, tensors)
    return file


def _place(name: str, tables: Sequence[Sequence[Rule]]) -> tuple[str, Rule] | None:
    """The path of a layer in our network, and its rule; None for unknown names."""
    name = _JOINED.sub(r"\1.\2.\3.\4", name)
    for prefix in PREFIXES:
        for rules in tables if name.startswith(prefix) else ():
            for path, rule in places_of(rules, f"{name[len(prefix) :]}.weight"):
                if path.endswith("/kernel") and rule.part[1] == 1:
                    return path.removesuffix("/kernel"), rule
    return None


class _Settings(msgspec.Struct, frozen=True):
    """The fields of PEFT's `adapter_config.json` that decide the scale."""

    lora_alpha: float | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None


class _Alphas:
    """The alpha of each layer, from the file's tensors, settings or metadata."""

    def __init__(self, path: pathlib.Path, tensors: TensorFiles):
        self.by_layer = {
            name.removesuffix(".alpha"): float(np.asarray(tensors[name], np.float32))
            for name in tensors
            if name.endswith(".alpha")
        }
        file = (path if path.is_dir() else path.parent) / "adapter_config.json"
        self.settings, again = _Settings(), "save the adapters again"
        if file.exists():
            self.settings = read_json(file, again, _Settings)
        elif text := tensors.metadata.get("lora_adapter_metadata"):
            # diffusers: {"transformer.r": 8, "transformer.lora_alpha": 16, …}
            where = f"lora_adapter_metadata of {path}"
            held = parse_json(text, where, dict[str, Any], again)
            held = {name.rpartition(".")[2]: x for name, x in held.items()}
            self.settings = fit_json(held, where, _Settings, again)
        if self.settings.use_dora:
            raise ValueError(f"{path} holds DoRA adapters; merge them where they are.")

    def of(self, layer: str, rank: int) -> float:
        """The alpha of a layer; its adapter is scaled by alpha / rank."""
        if layer in self.by_layer:
            return self.by_layer[layer]
        given = self.settings.lora_alpha
        alpha = float(rank) if given is None else given
        for pattern, special in (self.settings.alpha_pattern or {}).items():
            if re.search(rf"(^|\.)({pattern})$", layer):
                alpha = special
        return alpha * rank**0.5 if self.settings.use_rslora else alpha


def _stacked(flat: Mapping[str, np.ndarray], params: Mapping[str, Any]) -> dict:
    """Builds the parameter tree, with layers stacked where the network's are.

    Layers that the file leaves out get adapters of zeros.
    """
    shapes = {path: leaf.shape for path, leaf in paths_of(params).items()}
    stacks = {x: stack_of(x) for x in {path.partition("/")[0] for path in shapes}}
    joined: dict[str, Any] = {}
    layers: dict[tuple[str, int], dict[int, np.ndarray]] = {}
    for path, value in flat.items():
        match = re.fullmatch(r"(block|control)_(\d+)/((.+)/\w+)", path)
        named = match and [k for k, x in stacks.items() if x and x[0] == match[1]]
        if not match or not named:
            joined[path] = value
            continue
        for name in named:
            depth = shapes.get(f"{name}/{match[4]}/kernel", (0,))[0]
            number = int(match[2]) - (stack_of(name) or ("", 0))[1]
            if 0 <= number < depth:
                layers.setdefault((f"{name}/{match[3]}", depth), {})[number] = value
                break
        else:
            raise ValueError(f"there is no layer {path} in {', '.join(named)}.")
    for (path, depth), values in layers.items():
        # Layers may differ in rank: smaller ones are padded with zeros.
        shape = np.max([value.shape for value in values.values()], axis=0)
        joined[path] = np.zeros((depth, *shape), np.float32)
        for number, value in values.items():
            joined[path][number, : value.shape[0], : value.shape[1]] = value
    return unflatten_dict(joined, sep="/")
