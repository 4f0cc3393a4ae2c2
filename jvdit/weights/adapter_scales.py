"""The scale alpha / rank of adapters.

It comes from `.alpha` tensors, from an `adapter_config.json` beside the file (PEFT), or
from the file's metadata (diffusers); otherwise it is 1.
"""

import pathlib
import re
from typing import Any

import msgspec

from jvdit.machine.json_files import fit_json, parse_json, read_json
from jvdit.weights.tensors import TensorFiles


class _Settings(msgspec.Struct, frozen=True):
    """The fields of PEFT's `adapter_config.json` that decide the scale."""

    lora_alpha: float | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None


class Alphas:
    """The alpha of each layer, from the file's tensors, settings or metadata."""

    def __init__(self, path: pathlib.Path, tensors: TensorFiles):
        self.path, self.by_layer = path, {}
        for name in [x for x in tensors if x.endswith(".alpha")]:
            if tensors[name].size != 1:
                raise ValueError(f"{path}: {name} must hold one number.")
            self.by_layer[name.removesuffix(".alpha")] = float(tensors[name].ravel()[0])
        file = (path if path.is_dir() else path.parent) / "adapter_config.json"
        # By what the names of the layers begin with.
        self.settings, again = {}, "save the adapters again"
        if file.exists():
            self.settings[""] = read_json(file, again, _Settings)
        elif text := tensors.metadata.get("lora_adapter_metadata"):
            # diffusers: {"transformer.r": 8, "transformer_2.lora_alpha": 16, …}
            where = f"lora_adapter_metadata of {path}"
            fields: dict[str, dict[str, Any]] = {}
            for name, value in parse_json(text, where, dict[str, Any], again).items():
                word, _, field = name.rpartition(".")
                fields.setdefault(word, {})[field] = value
            for word, held in fields.items():
                self.settings[word] = fit_json(held, where, _Settings, again)

    def of(self, layer: str, rank: int) -> float:
        """The alpha of a layer; its adapter is scaled by alpha / rank."""
        if layer in self.by_layer:
            return self.by_layer[layer]
        some = next(iter(self.settings.values()), _Settings())
        settings = self.settings.get(layer.partition(".")[0], some)
        alpha = float(rank) if settings.lora_alpha is None else settings.lora_alpha
        for pattern, special in (settings.alpha_pattern or {}).items():
            try:
                if re.search(rf"(^|\.)({pattern})$", layer):
                    alpha = special
            except re.error as error:
                raise ValueError(
                    f"`alpha_pattern` of {self.path} holds {pattern!r}, which is no "
                    f"regular expression ({error}); save the adapters again."
                ) from None
        return alpha * rank**0.5 if settings.use_rslora else alpha
