"""Sampling settings: solver, steps and guidance, with the model's defaults."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jvdit.diffusion.denoise import Guidance
from jvdit.diffusion.solvers import check_solver
from jvdit.ranges import check_ranges

# Defaults for the settings that neither the caller nor the model sets.
_SUITS: Mapping[str, Any] = {
    "steps": 30,
    "solver": "unipc",
    "guidance_scale": 4.0,
    "draft": False,
    "sound_after": False,
    "sync_scale": 1.0,
    "sound_sync_scale": 1.0,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sampling settings. Fields that are None take the model's defaults (`complete`).

    Attributes:
        steps: how many steps the solver takes.
        solver: a name in `SOLVERS`.
        guidance_scale: classifier-free guidance scale; 1 turns guidance off, which is
            twice as fast.
        guidance_scale_2: guidance scale of the low-noise expert, in a model with two.
        guidance_interval: guide only while t is between these two, in [0, 1].
        sound_guidance_scale: guidance scale of the sound; None: that of the picture.
        sync_scale: how strongly the picture is guided towards what is in step with the
            sound; 1 turns it off, which saves a third of the time.
        sound_sync_scale: the same of the sound.
        guidance_rescale: 0 to 1, how far to bring each clip's standard deviation back
            to what it is without guidance (arXiv:2305.08891, 3.4).
        draft: generate an image first, then a clip that has it as its first frame.
        sound_after: generate the picture first, then the sound for it.

    Raises:
        ValueError: the solver is unknown, or a number is out of range.
    """

    steps: int | None = None
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

    def __post_init__(self):
        if self.solver is not None:
            check_solver(self.solver)
        check_ranges({"steps": self.steps})
        for scale in (self.guidance_scale, self.guidance_scale_2):
            self._guidance(scale)

    def complete(self, defaults: Mapping[str, Any]) -> "Settings":
        """Fills the settings that were left open.

        Args:
            defaults: the model's own defaults. Its `guidance_scale_2` belongs with its
                `guidance_scale`, so it is ignored if a scale was given.
        """
        suits = {**_SUITS, **{k: v for k, v in defaults.items() if k in NAMES}}
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
            "solver": self.solver,
            "guidance": self._guidance(self.guidance_scale),
            "low_guidance": self._guidance(self.guidance_scale_2),
        }

    def _guidance(self, scale: float | None) -> Guidance:
        scale = 1.0 if scale is None else scale
        sync = self.sync_scale, self.sound_sync_scale
        return Guidance(
            scale,
            self.guidance_interval,
            self.guidance_rescale,
            self.sound_guidance_scale,
            (1.0 if sync[0] is None else sync[0], 1.0 if sync[1] is None else sync[1]),
        )


NAMES = tuple(field.name for field in dataclasses.fields(Settings))
