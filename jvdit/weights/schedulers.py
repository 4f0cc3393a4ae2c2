"""Translates diffusers' schedulers to our solvers and timestep policies.

Diffusers' classes differ in their solver, in how they space timesteps before the shift,
and in whether the network is given whole timesteps only.
"""

import dataclasses
from typing import Any

import msgspec
from msgspec import UNSET

from jvdit.weights.recipes import POLICY, TIMESTEPS

# Classes whose solver we have; for others the nearest solver, by the first part of the
# name that matches.
_SAME = {
    "UniPCMultistepScheduler": "unipc",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}
_NEAREST = {"Heun": "heun", "FlowMatch": "euler", "DPM": "dpmpp_2m", "": "unipc"}
# The `solver_type` that our solvers implement.
_SOLVER_TYPES = {"unipc": "bh2", "dpmpp_2m": "midpoint"}


class SchedulerConfig(msgspec.Struct, frozen=True):
    """A `scheduler_config.json`; the defaults are what our solvers do.

    With other values of the first three the model isn't one of Wan's. FlowMatch classes
    don't have the first two.
    """

    prediction_type: Any = "flow_prediction"
    use_flow_sigmas: Any = True
    num_train_timesteps: Any = TIMESTEPS
    kind: str = msgspec.field(name="_class_name", default="")
    shift: float | None = None
    flow_shift: float | None = None
    solver_order: Any = 2
    solver_type: Any = UNSET
    algorithm_type: Any = "dpmsolver++"
    predict_x0: Any = True
    solver_p: Any = None
    disable_corrector: Any = []
    lower_order_final: Any = True
    euler_at_final: Any = False
    final_sigmas_type: Any = "zero"
    thresholding: Any = False
    stochastic_sampling: Any = False
    use_dynamic_shifting: Any = False
    use_karras_sigmas: Any = False
    use_exponential_sigmas: Any = False
    use_beta_sigmas: Any = False
    use_lu_lambdas: Any = False
    shift_terminal: Any = None
    invert_sigmas: Any = False


_OURS = msgspec.structs.asdict(SchedulerConfig())
_NEEDED, _FOLLOWED = [*_OURS][:3], [*_OURS][6:]


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """The solver and timestep spacing of a released model.

    Attributes:
        kind: the scheduler's class in diffusers; "": the folder has none.
        shift: the scheduler's timestep shift; None: it has none.
        notes: a sentence for each setting that isn't followed.
    """

    kind: str = ""
    shift: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def solver(self) -> str:
        """The name in `SOLVERS` of the same solver, or of the nearest one."""
        return _solver(self.kind)

    @property
    def timesteps(self) -> int:
        """`NoisePath.timesteps`: how many discrete timesteps there are; 0: any t."""
        return 0 if _flow_match(self.kind) else TIMESTEPS

    def policy(self, shift: float) -> dict[str, Any]:
        """The fields of `TimestepPolicy` that space times as this scheduler does."""
        spacing: dict[str, Any] = {}
        if _flow_match(self.kind):
            # It shifts the end of the spacing twice: by itself, then with the rest.
            end = shift / (TIMESTEPS + shift - 1)
            spacing = {"grid": (1.0, end), "reach_end": True}
        elif self.kind == "DPMSolverMultistepScheduler":
            spacing = {"grid": (1.0, 0.0), "start": 1 - 1 / TIMESTEPS}
        return {"shift": shift, **POLICY, **spacing}


def scheduler_of(kind: str, config: SchedulerConfig) -> Scheduler:
    """Translates a `scheduler_config.json`.

    Args:
        kind: the scheduler's class in diffusers, or "" if it isn't known.
        config: the contents of the file.

    Raises:
        ValueError: it is the scheduler of a model that isn't one of Wan's.
    """
    for name in _NEEDED[2:] if _flow_match(kind) else _NEEDED:
        if (found := getattr(config, name)) != _OURS[name]:
            raise ValueError(
                f"`{name}` (={found!r}) of the {kind or 'scheduler'} must be "
                f"{_OURS[name]!r}, as Wan's networks were trained; correct its "
                "scheduler_config.json."
            )
    solver, notes = _solver(kind), []
    if kind and kind not in _SAME:
        notes.append(
            f"{kind} isn't among our solvers; the nearest, {solver!r}, is taken."
        )
    ours = _OURS | {"solver_type": _SOLVER_TYPES.get(solver, config.solver_type)}
    for name in _FOLLOWED if kind in _SAME else ():
        if (found := getattr(config, name)) not in (ours[name], UNSET):
            notes.append(
                f"`{name}` (={found!r}) of {kind} isn't followed; {solver!r} "
                f"samples as with {ours[name]!r}."
            )
    first, second = config.shift, config.flow_shift
    if not _flow_match(kind):
        first, second = second, first
    return Scheduler(kind, second if first is None else first, tuple(notes))


def _solver(kind: str) -> str:
    nearest = next(ours for part, ours in _NEAREST.items() if part in kind)
    return _SAME.get(kind, nearest)


def _flow_match(kind: str) -> bool:
    return kind.startswith("FlowMatch")
