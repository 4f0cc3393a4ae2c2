"""Optimizers and learning-rate schedules."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import optax

from jvdit.ranges import check_ranges
from jvdit.training.muon import scale_by_muon

# Paths of the parameters that weight decay reaches.
DECAYING = re.compile(r"(.*/)?(kernel|token_embed/embedding|lora_a|lora_b)")
_SHARED = {"ema", "accumulate", "networks"}  # the same for all networks


@dataclasses.dataclass(frozen=True)
class Optim:
    """Optimizer settings: AdamW or Muon, schedule, clipping, EMA and accumulation.

    Attributes:
        name: "adamw" (arXiv:1711.05101), or "muon": orthogonalised momentum for the
            kernels of dense layers and convolutions, AdamW for everything else.
        lr: peak learning rate. Muon's updates are scaled to the size of AdamW's
            (arXiv:2502.16982, Eq. 4), so that the same rate suits both.
        schedule: learning rate after warm-up: "constant", or "cosine" or "linear" decay
            to 0 at the last step.
        warmup: steps of linear warm-up.
        b1, b2, eps: moment decays and epsilon of AdamW.
        weight_decay: weight decay of the kernels of dense layers and convolutions, of
            token embeddings, and of adapters (`DECAYING`). Biases, norm scales, and the
            tables of modulation and of positions never decay.
        clip: largest global norm of the gradient.
        ema: decay of the moving average of the weights. After n updates it is
            min(ema, (1 + n) / (10 + n)), so that early weights are soon forgotten.
        accumulate: gradient accumulation: into how many parts a batch is split to save
            memory. The update is that of the whole batch.
        networks: fields that differ for some networks, by network name, such as
            {"critic": {"lr": 1e-5}}. The gradient of each such network is clipped by
            itself, that of all others together.

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
        numbers = {k: v for k, v in vars(self).items() if k != "networks"}
        check_ranges(numbers, "optim.")
        for name, fields in self.networks.items():
            known = {field.name for field in dataclasses.fields(self)} - _SHARED
            if unknown := set(fields) - known:
                raise ValueError(
                    f"`optim.networks.{name}` has {', '.join(sorted(unknown))}, and "
                    f"what may differ are {', '.join(sorted(known))}."
                )
            self._of(name)

    def _of(self, network: str) -> "Optim":
        """The settings of a network that differs from the others."""
        fields = dict(self.networks[network])
        return dataclasses.replace(self, **fields, networks={})

    def learning_rate(self, steps: int) -> optax.Schedule:
        """The learning-rate schedule of a run of `steps` steps."""
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
        """The optimizer, with gradient clipping, for a run of `steps` steps.

        Raises:
            ValueError: `networks` names a network that isn't trained; raised when the
                optimizer's state is initialised.
        """
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
    """A tree of booleans: which parameters have weight decay; see `Optim`."""
    return jax.tree_util.tree_map_with_path(
        lambda p, _: DECAYING.fullmatch("/".join(map(_name, p))) is not None, params
    )


def kinds(params: Any) -> Any:
    """Which optimizer updates each parameter in a run with Muon.

    "muon" for the kernels of dense layers and convolutions; "adamw" for everything
    else: tables and vectors.
    """
    return jax.tree_util.tree_map_with_path(
        lambda p, _: "muon" if _name(p[-1]) == "kernel" else "adamw", params
    )


def _name(key: Any) -> str:
    return str(getattr(key, "key", key))
