"""Sampling settings of models that were distilled to few steps, by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from jvdit.diffusion.noise_path import TimestepPolicy


def _few(steps: Sequence[int], shift: float, solver: str) -> dict[str, Any]:
    """Settings for the timesteps of a distillation, 1000 being pure noise."""
    levels = TimestepPolicy(shift=shift).shifted_levels([x / 1000 for x in steps])
    scales = {"guidance_scale": 1.0, "guidance_scale_2": 1.0}
    return {"solver": solver, "levels": levels, "steps": len(levels), **scales}


_FOUR = (1000, 750, 500, 250)
# lightx2v's distillations (github.com/ModelTC/LightX2V) and Wan2.2-Lightning, whose
# experts take two of the four steps each. FastWan (github.com/hao-ai-lab/FastVideo)
# names its noise levels themselves.
PRESETS: Mapping[str, dict[str, Any]] = {
    "lightx2v-4": _few(_FOUR, 5.0, "renoise"),
    "lightx2v-2+2": _few(_FOUR, 5.0, "renoise"),
    "lightning-2+2": _few(_FOUR, 5.0, "euler"),
    "fastwan-3": _few((1000, 757, 522), 1.0, "renoise"),
}


def preset_settings(name: str, experts: bool = True) -> dict[str, Any]:
    """The settings of a preset, by their names in `Settings`.

    Args:
        name: a name in `PRESETS`.
        experts: whether the model has two experts.

    Raises:
        ValueError: the name is unknown, or the preset is for two experts.
    """
    if name not in PRESETS:
        raise ValueError(f"`preset` (={name!r}) is unknown; choose of {[*PRESETS]}.")
    if "+" in name and not experts:
        raise ValueError(f"`preset` (={name!r}) is for two experts; take 'lightx2v-4'.")
    return PRESETS[name]
