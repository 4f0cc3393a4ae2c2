"""How a released folder's scheduler samples, in our terms.

Diffusers' classes differ in their solver, in how they space times before the shift, and
in the timesteps that the network is shown: whole ones, or any.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jvdit.weights.recipes import POLICY, TIMESTEPS

# Ours that do the same, and what the classes whose names begin or end otherwise are
# nearest to, by a part of the name: the first match.
_SAME = {
    "UniPCMultistepScheduler": "unipc",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}
_NEAREST = {"Heun": "heun", "FlowMatch": "euler", "DPM": "dpmpp_2m", "": "unipc"}
# Without these it is another model; FlowMatch classes have no choice in the first two.
_NEEDED = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
# What else a file may ask for, as ours do it.
_OURS = {
    "solver_order": 2,
    "solver_type": {"unipc": "bh2", "dpmpp_2m": "midpoint"},
    "algorithm_type": "dpmsolver++",
    "predict_x0": True,
    "solver_p": None,
    "disable_corrector": [],
    "lower_order_final": True,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "thresholding": False,
    "stochastic_sampling": False,
    "use_dynamic_shifting": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "shift_terminal": None,
    "invert_sigmas": False,
}


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """What a folder says of its solver and its times.

    Attributes:
        kind: its class in diffusers; "": the folder has none, and goes by its authors.
        shift: of the times; None: it says none.
        notes: a sentence for each thing that is asked for and that we do otherwise.
    """

    kind: str = ""
    shift: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def solver(self) -> str:
        """The name of `SOLVERS` that is the same, or the nearest one."""
        return _solver(self.kind)

    @property
    def timesteps(self) -> int:
        """Of `NoisePath`: of how many the network is shown one, or 0."""
        return 0 if _flow_match(self.kind) else TIMESTEPS

    def policy(self, shift: float) -> dict[str, Any]:
        """Fields of `TimestepPolicy`, for times moved by this shift."""
        spacing: dict[str, Any] = {}
        if _flow_match(self.kind):
            # It shifts the end of the spacing, and then all of it.
            end = shift / (TIMESTEPS + shift - 1)
            spacing = {"grid": (1.0, end), "reach_end": True}
        elif self.kind == "DPMSolverMultistepScheduler":
            spacing = {"grid": (1.0, 0.0), "start": 1 - 1 / TIMESTEPS}
        return {"shift": shift, **POLICY, **spacing}


def scheduler_of(kind: str, config: Mapping[str, Any]) -> Scheduler:
    """What a `scheduler_config.json` means.

    Args:
        kind: class of the scheduler, or "" where it isn't known.
        config: what the file holds.

    Raises:
        ValueError: it is the scheduler of a model that isn't one of Wan's.
    """
    needed = {} if _flow_match(kind) else dict(_NEEDED)
    for name, value in (needed | {"num_train_timesteps": TIMESTEPS}).items():
        if config.get(name, value) != value:
            raise ValueError(
                f"`{name}` (={config[name]!r}) of the {kind or 'scheduler'} must be "
                f"{value!r}, as Wan's networks were trained; correct its "
                "scheduler_config.json."
            )
    solver, notes = _solver(kind), []
    if kind and kind not in _SAME:
        notes.append(
            f"{kind} isn't among our solvers; the nearest, {solver!r}, is taken."
        )
    for name, value in _OURS.items():
        if isinstance(value, dict):
            value = value.get(solver, config.get(name))
        if kind in _SAME and config.get(name, value) != value:
            notes.append(
                f"`{name}` (={config[name]!r}) of {kind} isn't followed; {solver!r} "
                f"samples as with {value!r}."
            )
    names = ("shift", "flow_shift")
    first, second = names if _flow_match(kind) else names[::-1]
    shift = config.get(first, config.get(second))
    return Scheduler(kind, None if shift is None else float(shift), tuple(notes))


def _solver(kind: str) -> str:
    nearest = next(ours for part, ours in _NEAREST.items() if part in kind)
    return _SAME.get(kind, nearest)


def _flow_match(kind: str) -> bool:
    return kind.startswith("FlowMatch")
