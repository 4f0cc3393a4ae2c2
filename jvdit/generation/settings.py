"""Sampling settings: solver, steps and guidance, with the model's defaults.

Those of models that were distilled to few steps have names (`PRESETS`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jvdit.diffusion.denoise import Guidance
from jvdit.diffusion.noise_path import TimestepPolicy
from jvdit.diffusion.solvers import check_solver
from jvdit.ranges import check_ranges

# Defaults for the settings that neither the caller nor the model sets.
SUITS: dict[str, Any] = {"steps": 30, "solver": "unipc", "guidance_scale": 4.0}
SUITS |= {"draft": False, "sound_after": False}
SUITS |= {"sync_scale": 1.0, "sound_sync_scale": 1.0}


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


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sampling settings. Fields that are None take the model's defaults (`complete`).

    Attributes:
        steps: how many steps the solver takes; fewer are faster.
        preset: solver, noise levels and guidance of models distilled to few steps, a
            row of `PRESETS`; they come before the model's own.
        levels: noise levels of the steps, falling from at most 1, in the place of even
            spacing and the model's shift; the last step goes to 0.
        solver: name of the solver, a row of `SOLVERS`.
        guidance_scale: classifier-free guidance scale, how strongly the prompt is
            followed; 1 turns guidance off, which is twice as fast.
        guidance_scale_2: guidance scale of the low-noise expert, in a model with two.
        guidance_interval: guide only while t is between these two, in [0, 1].
        sound_guidance_scale: guidance scale of the sound; by default that of the
            picture.
        sync_scale: how strongly the picture is guided towards what is in step with the
            sound; 1 turns it off, which saves a third of the time.
        sound_sync_scale: how strongly the sound is guided towards what is in step with
            the picture; 1 turns it off.
        guidance_rescale: 0 to 1, how far to bring each clip's standard deviation, its
            contrast, back to what it is without guidance (arXiv:2305.08891, 3.4).
        draft: generate an image first, then a clip that has it as its first frame.
        sound_after: generate the picture first, then the sound for it.
        control_guidance_scale: guidance scale of what is given by channels beside the
            noise, `edges`, `guide` or `camera`; 1 turns it off, which saves an
            evaluation.
        conditioning_scale: how strongly `video` and `references` are followed (VACE):
            one factor for all layers, or one for each that takes hints.
        strength: of requests with `restyle`, share of the steps that are taken, 0 to 1:
            the larger, the less of the footage is left.

    Raises:
        ValueError: the solver is unknown, or a number is out of range.
    """

    steps: int | None = None
    preset: str | None = None
    levels: tuple[float, ...] | None = None
    solver: str | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    sound_guidance_scale: float | None = None
    sync_scale: float | None = None
    sound_sync_scale: float | None = None
    draft: bool | None = None
    sound_after: bool | None = None
    control_guidance_scale: float = 1.0
    conditioning_scale: float | tuple[float, ...] = 1.0
    strength: float = 0.6

    def __post_init__(self):
        if self.solver is not None:
            check_solver(self.solver)
        check_ranges({"steps": self.steps, "strength": self.strength})
        if self.preset is not None:
            preset_settings(self.preset)
        TimestepPolicy(levels=tuple(self.levels or ()))
        for scale in (self.guidance_scale, self.guidance_scale_2):
            self._guidance(scale)

    def complete(self, defaults: Mapping[str, Any]) -> "Settings":
        """Fills the settings that were left open.

        Args:
            defaults: the model's own defaults. Its `guidance_scale_2` belongs with its
                `guidance_scale`, so it is ignored if a scale was given.
        """
        suits = {**SUITS, **{k: v for k, v in defaults.items() if k in NAMES}}
        if self.preset is not None:
            suits |= preset_settings(self.preset, bool(defaults.get("boundary")))
        if self.levels is not None:
            suits["steps"] = len(self.levels)
        if self.guidance_scale is not None:
            suits.pop("guidance_scale_2", None)
        fields = {k: v for k, v in suits.items() if getattr(self, k) is None}
        found = dataclasses.replace(self, **fields)
        if found.guidance_scale_2 is None:
            found = dataclasses.replace(found, guidance_scale_2=found.guidance_scale)
        return found

    @property
    def solving(self) -> dict[str, Any]:
        """The settings as keyword arguments of `Generator.solve`."""
        return {
            "steps": self.steps,
            "levels": self.levels,
            "solver": self.solver,
            "guidance": self._guidance(self.guidance_scale),
            "low_guidance": self._guidance(self.guidance_scale_2),
            "conditioning_scale": self.conditioning_scale,
        }

    def _guidance(self, scale: float | None) -> Guidance:
        scales = scale, self.sync_scale, self.sound_sync_scale
        text, picture, sound = (1.0 if x is None else x for x in scales)
        how = self.guidance_interval, self.guidance_rescale, self.sound_guidance_scale
        return Guidance(text, *how, (picture, sound), self.control_guidance_scale)


NAMES = tuple(field.name for field in dataclasses.fields(Settings))
