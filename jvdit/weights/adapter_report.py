"""Tells what of a file of adapters a model reads, and checks the way back to a file."""

import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from jvdit.models.lora import A, B
from jvdit.weights.adapters import ANY, left_out, part_of, write_lora
from jvdit.weights.bundle import Bundle
from jvdit.weights.hub import adapter_file
from jvdit.weights.opening import adapters_of
from jvdit.weights.released_configs import patch_channels
from jvdit.weights.rules import paths_of
from jvdit.weights.tensors import TensorFiles
from jvdit.weights.wan import dit_rules

_WORDS = {
    "a": "layers with factors",
    "magnitude": "magnitudes (DoRA)",
    "weight": "differences of weights",
    "bias": "differences of biases",
    "scaled_bias": "differences of biases",
    "modulation": "differences of modulations",
}


def report_adapters(model: Bundle, file: str | os.PathLike[str]) -> str:
    """Reads a file of adapters, writes it in diffusers' format, and reads that again.

    Args:
        model: the model that the adapters are for.
        file: the file, or its folder.

    Returns:
        Lines that tell what was read, what was left out and why, and whether the file
        that jvdit writes of it does the same.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: nothing in the file is for this model.
    """
    path = adapter_file(file)
    found = adapters_of(model, path)
    read = [name for name in TensorFiles(path) if name not in found.left]
    counts = Counter(_WORDS[x] for x in map(part_of, read) if x in _WORDS)
    told = ", ".join(f"{count} {word}" for word, count in counts.items())
    lines = [f"{file}: {len(read)} tensors are read: {told}."]
    if experts := [name for name in found.trees if name != ANY]:
        lines.append(f"The names tell the expert: {' and '.join(experts)}.")
    why = f": {left_out(found.left)}" if found.left else ""
    lines.append(f"{len(found.left)} tensors are left out{why}.")
    rules = dit_rules(channels=patch_channels(model.dit))
    for tree in found.trees.values():
        with tempfile.TemporaryDirectory() as folder:
            again = adapters_of(model, write_lora(folder, tree, rules)).trees[ANY]
            before, after = _effects(tree), _effects(again)
        apart = max(np.abs(after[path] - before[path]).max() for path in before)
        same = "the same" if apart == 0 else f"the same but for {apart:.1g}"
        lines.append(f"Written in diffusers' format and read again, it does {same}.")
    return "\n".join(lines)


def _effects(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What is added to each kernel, and all else as it is."""
    flat = paths_of(tree)
    pairs = {path.removesuffix(A): x for path, x in flat.items() if path.endswith(A)}
    products = {f"{layer}kernel": a @ flat[layer + B] for layer, a in pairs.items()}
    rest = {path: x for path, x in flat.items() if not path.endswith((A, B))}
    return {f"{path} added": x for path, x in rest.items()} | products
