"""The optimizers, and how their steps grow and shrink over a run."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from jvdit.training.muon import scale_by_muon

# Paths of the parameters that weight decay reaches.
DECAYING = re.compile(r"(.*/)?(kernel|token_embed/embedding|lora_a|lora_b)")
_LEAST, _MOST = float(np.finfo(np.float32).tiny), math.inf
_SHARED = {"ema", "accumulate", "networks"}  # of all networks
# Between what each number lies, as the float32 that it becomes, and what is told else.
_RANGES = {
    "lr": (_LEAST, _MOST, "be > 0 and finite; try 1e-4"),
    "clip": (_LEAST, _MOST, "be > 0 and finite; try 1, or 1e9 to clip nothing"),
    "eps": (_LEAST, _MOST, "be > 0 and finite; try 1e-8"),
    "weight_decay": (0, _MOST, "be >= 0 and finite; try 0.01, or 0 for none"),
    "warmup": (0, _MOST, "be >= 0 and finite; try 500, or 0 for none"),
    "accumulate": (1, _MOST, "be >= 1 and finite; 1 takes a batch whole"),
    "b1": (0, 1, "lie in [0, 1); try 0.9"),
    "b2": (0, 1, "lie in [0, 1); try 0.99"),
    "ema": (0, 1, "lie in [0, 1); try 0.999"),
}


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW or Muon with warm-up and decay, clipping, EMA and accumulation.

    Attributes:
        name: "adamw" (arXiv:1711.05101), or "muon": matrices and convolutions move by
            their orthogonalised momentum, whatever else by AdamW.
        lr: peak learning rate. Muon's steps are scaled to the size of AdamW's
            (arXiv:2502.16982, Eq. 4), so that both take the same.
        schedule: after warm-up, "constant", "cosine" (to 0 at the last step) or
            "linear" (likewise).
        warmup: steps of linear warm-up.
        b1, b2, eps: of AdamW.
        weight_decay: of the kernels of dense layers and convolutions, of embeddings of
            tokens, and of adapters (`DECAYING`). Biases and norm scales never decay,
            nor do tables that are added: of modulation and of positions. Names decide,
            not axes, so that a stack of layers decays as its layers do.
        clip: largest global norm of a gradient.
        ema: decay of the average; smaller at first, min(ema, (1 + n) / (10 + n)).
        accumulate: parts that a batch is taken in, to save memory; the update is that
            of the whole batch.
        networks: what differs for some networks, by name: {"critic": {"lr": 1e-5}}.
            Each of those is clipped by itself, all others together.

    Raises:
        ValueError: a value is out of range.
    """

    name: str = "adamw"
    lr: float = 1e-4
    schedule: str = "constant"
    warmup: int = 500
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    accumulate: int = 1
    networks: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            raise ValueError(
                f"`optim.name` (={self.name!r}) must be one of: "
                f"{', '.join(OPTIMIZERS)}."
            )
        if self.schedule not in ("constant", "cosine", "linear"):
            raise ValueError(
                f"`optim.schedule` (={self.schedule!r}) must be constant, cosine or "
                "linear."
            )
        for name, (low, high, rule) in _RANGES.items():
            value = getattr(self, name)
            if not low <= np.float32(value) < high:  # nor is it, if it is no number
                raise ValueError(f"`optim.{name}` (={value}) must {rule}.")
        for name, fields in self.networks.items():
            known = {field.name for field in dataclasses.fields(self)} - _SHARED
            if unknown := set(fields) - known:
                raise ValueError(
                    f"`optim.networks.{name}` has {', '.join(sorted(unknown))}, and "
                    f"what may differ are {', '.join(sorted(known))}."
                )
            self._of(name)

    def _of(self, network: str) -> "Optim":
        """The optimizer of a network that differs."""
        fields = dict(self.networks[network])
        return dataclasses.replace(self, **fields, networks={})

    def learning_rate(self, steps: int) -> optax.Schedule:
        """The learning rate at each step of a run of `steps`."""
        rest = max(steps - self.warmup, 1)
        after = {
            "constant": optax.constant_schedule(self.lr),
            "cosine": optax.cosine_decay_schedule(self.lr, rest),
            "linear": optax.linear_schedule(self.lr, 0.0, rest),
        }[self.schedule]
        if self.warmup == 0:
            return after
        warmup = optax.linear_schedule(self.lr / self.warmup, self.lr, self.warmup)
        return optax.join_schedules([warmup, after], [self.warmup])

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """The clipped optimizer for a run of `steps`."""
        common = optax.chain(
            optax.clip_by_global_norm(self.clip),
            OPTIMIZERS[self.name](self, self.learning_rate(steps)),
        )
        if not self.networks:
            return common
        parts = {name: self._of(name).optimizer(steps) for name in self.networks}

        def part_of(params: Mapping[str, Any]) -> dict[str, Any]:
            if missing := set(parts) - set(params):
                raise ValueError(
                    f"`optim.networks` has {', '.join(sorted(missing))}, and this run "
                    f"trains {', '.join(params)}."
                )
            return {
                name: jax.tree.map(lambda _, n=name: n if n in parts else "", tree)
                for name, tree in params.items()
            }

        return optax.partition({"": common, **parts}, part_of)


def _adamw(optim: Optim, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        learning_rate,
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        mask=decaying,
    )


def _muon(optim: Optim, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    muon = optax.chain(
        scale_by_muon(),
        optax.add_decayed_weights(optim.weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    return optax.partition({"muon": muon, "adamw": _adamw(optim, learning_rate)}, kinds)


OPTIMIZERS: dict[str, Any] = {"adamw": _adamw, "muon": _muon}


def decaying(params: Any) -> Any:
    """Which parameters `weight_decay` reaches; see `Optim`."""
    return jax.tree_util.tree_map_with_path(
        lambda p, _: DECAYING.fullmatch("/".join(map(_name, p))) is not None, params
    )


def kinds(params: Any) -> Any:
    """Which optimizer moves each parameter of a run with Muon.

    "muon" moves the kernels of dense layers and convolutions, "adamw" whatever else
    there is: tables and vectors.
    """
    return jax.tree_util.tree_map_with_path(
        lambda p, _: "muon" if _name(p[-1]) == "kernel" else "adamw", params
    )


def _name(key: Any) -> str:
    return str(getattr(key, "key", key))
