"""Reads adapters in other projects' formats, and writes diffusers' format.

A file names the layers as the network's own checkpoint does, with prefixes in front,
and behind it what changes: the two factors of LoRA, called `lora_A` and `lora_B` (PEFT,
diffusers) or `lora_down` and `lora_up` (ComfyUI, kohya); the magnitude of DoRA
(arXiv:2402.09353); or a difference that is added to a whole parameter (`.diff`,
`.diff_b`, `.diff_m`). What scales it is found by `adapter_scales`.
"""

import contextlib
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jvdit.models.lora import MAGNITUDE, A, B
from jvdit.weights.adapter_scales import Alphas
from jvdit.weights.rules import Rule, Shape, listed, names_of, paths_of
from jvdit.weights.tensors import PathLike, TensorFiles, write_tensors

FILE = "pytorch_lora_weights.safetensors"
_PREFIX = "transformer."  # what `write_lora` puts before the names
# Words that projects put before the names of layers, in any order and number. Names are
# compared with underscores in the place of dots, as kohya's scripts join them.
_WORDS = (
    "base_model|diffusion_model|high_noise_model|low_noise_model|lora_unet|"
    "lora_transformer|transformer_2|transformer|model|pipe|dit2|dit|unet|net|module|"
    "lycoris|orig_mod"
)
_BEFORE = re.compile(rf"(?:_?(?:{_WORDS})_)*")
_EXPERTS = {"transformer_2": "dit_low", "dit2": "dit_low", "low_noise_model": "dit_low"}
_EXPERTS |= {"high_noise_model": "dit"}
ANY = ""  # in the place of an expert, where the names tell none

# What stands behind the name of a layer, and what it is.
_PARTS = {
    "a": r"lora_A(\.\w+)?\.weight|lora[_.]down(\.\w+)?\.weight",
    "b": r"lora_B(\.\w+)?\.weight|lora[_.]up(\.\w+)?\.weight",
    "magnitude": r"lora_magnitude_vector(\.\w+)?|dora_scale",
    "alpha": r"alpha",
    "scaled_bias": r"lora_B(\.\w+)?\.bias|lora[_.]up\.bias",
    "weight": r"diff|w_norm",
    "bias": r"diff_b|b_norm",
    "modulation": r"diff_m",
}
_PART = re.compile(
    "(?P<layer>.+)\\.(?:"
    + "|".join(f"(?P<{name}>{pattern})" for name, pattern in _PARTS.items())
    + ")"
)
# Differences, and the ends of the names of the tensors that they are added to.
_DIFFERENCES = {
    "weight": ("_weight", ""),
    "bias": ("_bias",),
    "scaled_bias": ("_bias",),
    "modulation": ("_modulation", "_scale_shift_table", ""),
}
_ENDS = {".weight": ".diff", ".bias": ".diff_b"}  # what `write_lora` calls them


class Adapters(NamedTuple):
    """What a file of adapters holds for a network.

    Attributes:
        trees: the adapters, in the form of `models.lora`, by the expert that the file
            names: "dit", "dit_low", or `ANY` if it names none.
        left: why a tensor was left out, by its name.
    """

    trees: dict[str, dict[str, Any]]
    left: dict[str, str]


def read_lora(
    path: PathLike, tables: Sequence[Sequence[Rule]], params: Mapping[str, Any]
) -> Adapters:
    """Reads adapters from a file, and multiplies their scale into `lora_b`.

    Args:
        path: a safetensors file, or a folder with one.
        tables: rule tables of the network, one for each naming of its layers.
        params: parameters of the network, or their shapes: adapters are stacked over
            layers where these are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: nothing in the file fits this network, and the message lists why; a
            layer is adapted twice; or a value isn't finite.
    """
    path = pathlib.Path(path)
    tensors = TensorFiles(path)
    reader = _Reader(path, tensors, _slots(tables, params))
    layers: dict[str, dict[str, str]] = {}
    for name in tensors:
        if (part := part_of(name)) is None:
            reader.left[name] = "this kind of change isn't known"
            continue
        layer = _PART.fullmatch(name)["layer"]  # type: ignore[index]
        if layers.setdefault(layer, {}).setdefault(part, name) != name:
            raise ValueError(f"{path} changes {layer} twice, under two names.")
    for layer, names in layers.items():
        reader.read(layer, names)
    if not reader.found:
        why = left_out(reader.left) or "it is empty"
        raise ValueError(f"{path} holds no adapters of this network: {why}.")
    trees = {expert: _stacked(held) for expert, held in reader.found.items()}
    return Adapters(trees, reader.left)


def part_of(name: str) -> str | None:
    """Which part of a change a tensor is, by its name: a key of `_PARTS`, or None."""
    match = _PART.fullmatch(name)
    return match and next(part for part in _PARTS if match[part])


def strengths(texts: Sequence[str]) -> list[tuple[str, float]]:
    """Reads adapter files as command lines name them: FILE or FILE:FACTOR.

    Args:
        texts: files, in each text perhaps several with commas between. A comma or colon
            in the name of a file that exists is part of the name.

    Raises:
        ValueError: a factor isn't a finite number.
    """
    found: list[tuple[str, float]] = []
    for text in texts:
        pieces = text.split(",")
        while pieces:
            joined = [",".join(pieces[:n]) for n in range(len(pieces), 0, -1)]
            there = [x for x in joined if pathlib.Path(_strength(x)[0]).exists()]
            chosen = (there or joined[-1:])[0]
            if chosen:
                found.append(_strength(chosen))
            pieces = pieces[chosen.count(",") + 1 :]
    return found


def _strength(text: str) -> tuple[str, float]:
    file, colon, factor = text.rpartition(":")
    if not colon or pathlib.Path(text).exists():
        return text, 1.0
    try:
        value = float(factor)
    except ValueError:
        return text, 1.0
    if not math.isfinite(value):
        raise ValueError(f"the strength of {text} must be a finite number, as 0.8 is.")
    return file, value


def left_out(left: Mapping[str, str]) -> str:
    """What was left out of a file, and why, for a message: `Adapters.left`."""
    reasons: dict[str, list[str]] = {}
    for name, why in left.items():
        reasons.setdefault(why, []).append(name)
    return "; ".join(f"{why} ({listed(names)})" for why, names in reasons.items())


class _Slot(NamedTuple):
    """A parameter that a released tensor fills, or one layer of a stacked one.

    Attributes:
        path: path of the parameter.
        layer, depth: which layer of how many; None and 0: it isn't stacked.
        rule: the rule that converts the tensor.
        shape: of the parameter, or of the layer.
    """

    path: str
    layer: int | None
    depth: int
    rule: Rule
    shape: Shape


# The values of a parameter by the number of the layer, for each path and `_Slot.depth`.
_Held = dict[tuple[str, int], dict[int | None, np.ndarray]]


def _slots(
    tables: Sequence[Sequence[Rule]], params: Mapping[str, Any]
) -> dict[str, list[_Slot]]:
    """The places of a network's tensors, by their names with underscores."""
    found: dict[str, dict[Any, _Slot]] = {}
    for rules in tables:
        for path, leaf in paths_of(params).items():
            pieces = []
            # A network of our own may have parameters that no release has.
            with contextlib.suppress(ValueError):
                pieces = names_of(rules, path, leaf.shape)
            for name, rule, layer in pieces:
                shape, depth = tuple(leaf.shape), 0
                if layer is not None:
                    depth, *shape = shape
                slot = _Slot(path, layer, depth, rule, tuple(shape))
                found.setdefault(_joined(name), {})[path, layer] = slot
    return {name: [*several.values()] for name, several in found.items()}


def _joined(name: str) -> str:
    return re.sub(r"[._]+", "_", name)


class _Reader:
    """Collects what the layers of a file hold for the places of a network."""

    def __init__(
        self, path: pathlib.Path, tensors: TensorFiles, slots: dict[str, list[_Slot]]
    ):
        self.path, self.tensors, self.slots = path, tensors, slots
        self.alphas = Alphas(path, tensors)
        self.found: dict[str, _Held] = {}
        self.left: dict[str, str] = {}

    def read(self, layer: str, names: Mapping[str, str]) -> None:
        """Reads what the file holds of a layer.

        Args:
            layer: the layer's name in the file.
            names: its tensors, by the part of the change that they are.
        """
        joined = _joined(layer)
        before = joined[: _BEFORE.match(joined).end()]  # type: ignore[union-attr]
        told = [x for word, x in _EXPERTS.items() if f"{word}_" in before]
        expert, plain = (told or [ANY])[0], joined[len(before) :]
        values = {part: self._value(name) for part, name in names.items()}
        rank = values["b"].shape[1] if "b" in values and values["b"].ndim > 1 else 0
        strength = self.alphas.of(layer, rank) / rank if rank else 1.0
        factors = [x for x in ("a", "b", "magnitude") if x in names]
        if factors and (why := self._factors(expert, plain, values, strength)):
            self.left |= {names[x]: why for x in factors}
        for part in [x for x in _DIFFERENCES if x in values]:
            value = values[part] * (strength if part == "scaled_bias" else 1)
            if why := self._difference(expert, plain, _DIFFERENCES[part], value):
                self.left[names[part]] = why

    def _value(self, name: str) -> np.ndarray:
        value = np.asarray(self.tensors[name], np.float32)
        if not np.isfinite(value).all():
            raise ValueError(
                f"{self.path}: tensor {name} holds values that aren't finite; download "
                "the file again, or take another one."
            )
        return value

    def _factors(
        self, expert: str, plain: str, values: Mapping[str, np.ndarray], strength: float
    ) -> str:
        """Takes the factors of a layer, or tells why not."""
        if "a" not in values or "b" not in values:
            return "another part of this change is missing"
        a, b, magnitude = values["a"], values["b"], values.get("magnitude")
        rank = len(a) if a.ndim else 0
        slots = self.slots.get(f"{plain}_weight", [])
        slots = [slot for slot in slots if slot.path.endswith("/kernel")]
        if not slots:
            return _ABSENT
        for slot in slots:
            low = slot.rule.shape_of(a.shape) or (0,)
            if b.size != rank * slot.shape[-1] or (low[0], len(b)) != slot.shape:
                return f"{a.shape} and {b.shape} don't fit a layer of {slot.shape}"
        if magnitude is not None:
            magnitude = _along(magnitude, slots[0].shape)
            if magnitude is None or len(slots) > 1:
                return "this form of DoRA isn't known"
        for slot in slots:
            layer = slot.path.removesuffix("kernel")
            self._put(expert, slot, layer + A, slot.rule.to_ours(a))
            self._put(expert, slot, layer + B, strength * b.reshape(len(b), -1).T)
            if magnitude is not None:
                self._put(expert, slot, layer + MAGNITUDE, magnitude)
        return ""

    def _difference(
        self, expert: str, plain: str, ends: Sequence[str], value: np.ndarray
    ) -> str:
        """Takes the difference of a parameter, or tells why not."""
        several = (self.slots.get(plain + end) for end in ends)
        slots = next((x for x in several if x), [])
        for slot in slots:
            if slot.rule.shape_of(value.shape) != slot.shape:
                return f"{value.shape} doesn't fit a parameter of {slot.shape}"
        for slot in slots:
            self._put(expert, slot, slot.path, slot.rule.to_ours(value))
        return "" if slots else _ABSENT

    def _put(self, expert: str, slot: _Slot, path: str, value: np.ndarray) -> None:
        held = self.found.setdefault(expert, {}).setdefault((path, slot.depth), {})
        if slot.layer in held:
            raise ValueError(f"{self.path} changes {path} twice, under two names.")
        held[slot.layer] = value


_ABSENT = "this network has no such layer"


def _along(magnitude: np.ndarray, shape: Shape) -> np.ndarray | None:
    """The magnitude of each output `[1 o]`, or of each input `[i 1]`, of a kernel."""
    if magnitude.size == shape[1] and magnitude.shape[:2] != (1, shape[0]):
        return magnitude.reshape(1, -1)
    return magnitude.reshape(-1, 1) if magnitude.size == shape[0] else None


def _stacked(held: _Held) -> dict[str, Any]:
    """Builds the tree of adapters, with layers stacked where the network's are.

    What is left out of a stack is zero; smaller ranks are padded with zeros.
    """
    joined: dict[str, Any] = {}
    for (path, depth), layers in held.items():
        if None in layers:  # it isn't stacked
            joined[path] = layers[None]
            continue
        shape = np.max([value.shape for value in layers.values()], axis=0)
        joined[path] = np.zeros((depth, *shape), np.float32)
        for number, value in layers.items():
            joined[path][number, *map(slice, value.shape)] = value
    return unflatten_dict(joined, sep="/")


def write_lora(
    folder: PathLike, adapters: Mapping[str, Any], rules: Sequence[Rule]
) -> pathlib.Path:
    """Writes adapters in diffusers' format (`load_lora_weights`); returns the file.

    Args:
        folder: where to write `pytorch_lora_weights.safetensors`.
        adapters: the adapters, with their scale multiplied in; see `models.lora`.
        rules: rule table of the network.
    """
    flat = flatten_dict(dict(adapters), sep="/")
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in flat.items()}
    tensors: dict[str, np.ndarray] = {}
    for path in [x for x in flat if not x.endswith(f"/{B}")]:
        layer, _, leaf = path.rpartition("/")
        pair = [flat[x] for x in (path, f"{layer}/{B}")[: 1 + (leaf == A)]]
        whole = f"{layer}/kernel" if leaf in (A, MAGNITUDE) else path
        for name, rule, number in names_of(rules, whole, flat[path].shape):
            own = pair if number is None else [x[number] for x in pair]
            end = "".join(x for x in _ENDS if name.endswith(x))
            stem = _PREFIX + name.removesuffix(end)
            if leaf == A:
                _write_pair(tensors, stem, rule, *own)
            elif leaf != MAGNITUDE:
                value = _padded(rule, rule.to_theirs(own[0]))
                stem += _ENDS.get(end, ".diff")
                tensors[stem] = tensors.get(stem, 0) + value
            elif own[0].any():
                turned = own[0].T
                outputs = turned.shape[1] == 1
                stem += ".lora_magnitude_vector" if outputs else ".dora_scale"
                tensors[stem] = turned.reshape(-1) if outputs else turned
    file = pathlib.Path(folder) / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, {k: np.ascontiguousarray(v) for k, v in tensors.items()})
    return file


def _write_pair(
    tensors: dict[str, np.ndarray], stem: str, rule: Rule, a: np.ndarray, b: np.ndarray
) -> None:
    """Adds the factors of a layer; those of the parts of one tensor are joined."""
    names = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
    ones = (1,) * (len(rule.layout.split("->")[0].split()) - 2)
    a, b = _padded(rule, rule.to_theirs(a)), b.T.reshape(*b.T.shape, *ones)
    if names[0] in tensors:
        other_a, other_b = (tensors[name] for name in names)
        if np.array_equal(b, other_b):
            a = a + other_a
        else:
            a, b = np.concatenate([other_a, a]), np.concatenate([other_b, b], 1)
    tensors |= zip(names, (a, b), strict=True)


def _padded(rule: Rule, value: np.ndarray) -> np.ndarray:
    """A part of a tensor as the whole, with zeros in the place of the other parts."""
    index, parts = rule.part
    sizes = parts if isinstance(parts, tuple) else (value.shape[rule.axis],) * parts
    widths = [(0, 0)] * value.ndim
    widths[rule.axis] = sum(sizes[:index]), sum(sizes[index + 1 :])
    return np.pad(value, widths)
