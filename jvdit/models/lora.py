"""Low-rank adapters of linear layers (LoRA, arXiv:2106.09685).

An adapter adds `x A B` to what a layer makes of x, with A `[i r]` and B `[r o]` of a
small rank r. Adapters are a tree like that of the parameters, with the leaves `lora_a`
and `lora_b` in the place of a layer's `kernel`; a module applies them when it is given
the tree as its collection "lora" (see `dense.Dense`). Their strength is part of B.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, path_aware_map, unflatten_dict
from jaxtyping import Array, PRNGKeyArray

from jvdit.models.kinds import SUFFIXES
from jvdit.ranges import check_ranges

A, B, RATE = "lora_a", "lora_b", "lora_rate"


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which layers get adapters, and of what kind.

    Attributes:
        rank: r.
        alpha: adapters act with the strength alpha / rank.
        dropout: share of a layer's inputs that its adapter doesn't see in training.
        targets: regular expressions; a layer whose path one of them finds gets one, and
            so does the one of sound beside it.

    Raises:
        ValueError: the rank is not positive, or the dropout not in [0, 1).
    """

    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = (r"attention/(query|key|value|out)$",)

    def __post_init__(self):
        check_ranges(dataclasses.asdict(self))

    @property
    def strength(self) -> float:
        """What B is multiplied with."""
        return self.alpha / self.rank

    def init(self, key: PRNGKeyArray, params: Mapping[str, Any]) -> dict[str, Any]:
        """New adapters, which change nothing yet: B is zero.

        Args:
            key: of the random A.
            params: of the network, or their shapes; layers may be stacked.

        Raises:
            ValueError: no layer matches, or what matches is no linear layer.
        """
        layers = {
            path.removesuffix("/kernel"): leaf
            for path, leaf in _flat(params).items()
            if path.endswith("/kernel")
        }
        # What only sound goes through is found with what pictures do.
        names = {path: path.removesuffix(SUFFIXES[1]) for path in layers}
        found = [
            p for p, x in names.items() if any(re.search(t, x) for t in self.targets)
        ]
        if not found:
            raise ValueError(
                f"`lora.targets` (={self.targets}) find no layer; layers are for "
                f"example {', '.join(sorted(layers)[:5])}."
            )
        adapters = {}
        for path, each in zip(found, jax.random.split(key, len(found)), strict=True):
            *stack, i, o = layers[path].shape
            if len(stack) > 1:
                raise ValueError(
                    f"`lora.targets` find `{path}`, which is no linear layer; name "
                    "others."
                )
            bound, shape = i**-0.5, (*stack, i, self.rank)
            adapters[f"{path}/{A}"] = jax.random.uniform(
                each, shape, float, -bound, bound
            )
            adapters[f"{path}/{B}"] = jnp.zeros((*stack, self.rank, o))
        return unflatten_dict(adapters, sep="/")

    def active(self, adapters: Mapping[str, Any], training: bool) -> dict[str, Any]:
        """The collection "lora" that a module takes, at their strength.

        In training with dropout the module needs a stream of random numbers "lora".
        """
        tree = scaled(adapters, self.strength)
        if not (training and self.dropout):
            return tree
        flat = _flat(tree)
        for path in [p for p in flat if p.endswith(A)]:
            shape = flat[path].shape[:-2]
            flat[path.removesuffix(A) + RATE] = jnp.full(shape, self.dropout)
        return unflatten_dict(flat, sep="/")


def scaled(adapters: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """The same adapters, so many times as strong."""
    found = path_aware_map(lambda p, x: x * factor if p[-1] == B else x, {**adapters})
    return dict(found)


def stacked(several: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One tree of adapters that does what several do together.

    Each may adapt other layers, with another rank; ranks add up.
    """
    joined: dict[str, Array] = {}
    for adapters in several:
        for path, x in _flat(adapters).items():
            axis = -1 if path.endswith(A) else -2
            known = joined.get(path)
            joined[path] = x if known is None else jnp.concatenate([known, x], axis)
    return unflatten_dict(joined, sep="/")


def check(params: Mapping[str, Any], adapters: Mapping[str, Any]) -> None:
    """Raises ValueError if adapters don't fit the network with these parameters."""
    flat, low = _flat(params), _flat(adapters)
    wrong = []
    for layer in dict.fromkeys(path.rpartition("/")[0] + "/" for path in low):
        kernel = flat.get(layer + "kernel")
        if layer + A not in low or layer + B not in low:
            wrong.append(f"{layer.rstrip('/')} has one factor only")
            continue
        a, b = low[layer + A].shape, low[layer + B].shape
        if kernel is None:
            wrong.append(f"there is no layer {layer.rstrip('/')}")
        elif (*a[:-1], b[-1]) != kernel.shape or a[-1] != b[-2]:
            wrong.append(f"{layer.rstrip('/')} is {kernel.shape}, adapted by {a}, {b}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"the adapters are of another network: {'; '.join(wrong[:3])}{more}."
        )


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return flatten_dict(dict(tree), sep="/")  # type: ignore[return-value]
