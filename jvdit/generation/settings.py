"""How clips are generated: what a call asks for, completed by what suits the model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jvdit.diffusion.denoise import Guidance
from jvdit.diffusion.solvers import check_solver

# What settings are completed with where their model says nothing.
_SUITS: Mapping[str, Any] = {
    "steps": 30,
    "solver": "unipc",
    "guidance_scale": 4.0,
    "draft": False,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to generate. Fields that are None are as suits the model (`complete`).

    Attributes:
        steps: of the solver.
        solver: a name of `SOLVERS`.
        guidance_scale: how strongly to follow the prompt; 1: as trained, faster.
        guidance_scale_2: the same of the expert for low noise, where there is one.
        guidance_interval: the times between which to guide.
        guidance_rescale: 0 to 1, see `Guidance`.
        draft: a picture first, and then the clip that begins with it; see `draft.py`.

    Raises:
        ValueError: the solver is unknown, or a number is out of range.
    """

    steps: int | None = None
    solver: str | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    draft: bool | None = None

    def __post_init__(self):
        if self.solver is not None:
            check_solver(self.solver)
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"`steps` (={self.steps}) must be at least 1.")
        for scale in (self.guidance_scale, self.guidance_scale_2):
            self._guidance(scale)

    def complete(self, defaults: Mapping[str, Any]) -> "Settings":
        """The settings with every field that was left open.

        Args:
            defaults: fields that suit the model. Its scale for low noise goes with its
                other one, and is left aside if a scale was given.
        """
        suits = {**_SUITS, **{k: v for k, v in defaults.items() if k in _NAMES}}
        if self.guidance_scale is not None:
            suits.pop("guidance_scale_2", None)
        fields = {k: v for k, v in suits.items() if getattr(self, k) is None}
        found = dataclasses.replace(self, **fields)
        if found.guidance_scale_2 is None:
            found = dataclasses.replace(found, guidance_scale_2=found.guidance_scale)
        return found

    @property
    def solving(self) -> dict[str, Any]:
        """Arguments of `Generator.latents`."""
        return {
            "steps": self.steps,
            "solver": self.solver,
            "guidance": self._guidance(self.guidance_scale),
            "low_guidance": self._guidance(self.guidance_scale_2),
        }

    def _guidance(self, scale: float | None) -> Guidance:
        scale = 1.0 if scale is None else scale
        return Guidance(scale, self.guidance_interval, self.guidance_rescale)


_NAMES = tuple(field.name for field in dataclasses.fields(Settings))
