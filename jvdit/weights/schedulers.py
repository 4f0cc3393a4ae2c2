"""How a released folder's scheduler samples, in our terms.

Diffusers' classes differ in their solver, in how they space times before the shift, and
in the timesteps that the network is shown: whole ones, or any.
"""

import dataclasses
from typing import Any

import msgspec
from msgspec import UNSET

from jvdit.weights.recipes import POLICY, TIMESTEPS

# Ours that do the same, and what the classes whose names begin or end otherwise are
# nearest to, by a part of the name: the first match.
_SAME = {
    "UniPCMultistepScheduler": "unipc",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}
_NEAREST = {"Heun": "heun", "FlowMatch": "euler", "DPM": "dpmpp_2m", "": "unipc"}
# What `solver_type` says of ours.
_SOLVER_TYPES = {"unipc": "bh2", "dpmpp_2m": "midpoint"}


class SchedulerConfig(msgspec.Struct, frozen=True):
    """A `scheduler_config.json`. The defaults are what we do where it says nothing.

    Without the first three it is another model; FlowMatch classes have no choice in the
    first two.
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


def scheduler_of(kind: str, config: SchedulerConfig) -> Scheduler:
    """What a `scheduler_config.json` means.

    Args:
        kind: class of the scheduler, or "" where it isn't known.
        config: what the file holds.

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
