"""Ranges of settings: one table, checked before anything is made.

A setting is named as in a config, `loss.mse`. The first row of `RANGES` whose pattern
matches the whole name holds for it, and for each number of a tuple.
"""

import dataclasses
import fnmatch
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a number may have.

    Attributes:
        low, high: the ends; an infinite one isn't a value itself.
        whole: whether it must be a whole number.
        without: ends that are no values: "", "low", "high" or "both".
    """

    low: int | float = -math.inf
    high: int | float = math.inf
    whole: bool = False
    without: str = ""

    def holds(self, value: int | float) -> bool:
        """Whether a number lies in the range; NaN, or one beyond floats, never does."""
        if isinstance(value, int) and abs(value) > sys.float_info.max:
            return False
        if not self.whole:
            value = float(np.float32(value))  # as which it is computed with
        low = self.low < value or (self.low == value and not self._open("low"))
        high = value < self.high or (self.high == value and not self._open("high"))
        whole = not self.whole or float(value).is_integer()
        return bool(low and high and whole and math.isfinite(value))

    def __str__(self):
        kind = "a whole number" if self.whole else "a number"
        low = f"above {self.low:g}" if self._open("low") else f"of at least {self.low}"
        if self.high == math.inf:
            return "a finite number" if self.low == -math.inf else f"{kind} {low}"
        if not self.without:
            return f"{kind} from {self.low} to {self.high}"
        below = f"below {self.high}" if self._open("high") else f"up to {self.high}"
        return f"{kind} {low} and {below}"

    def _open(self, end: str) -> bool:
        return self.without in (end, "both")


_ANY = Range()
_SHARE = Range(0, 1)
_WEIGHT = Range(0)
_POSITIVE = Range(0, without="low")
_SCALE = Range(0, 1000)  # what is larger makes numbers that aren't finite
_DECAY = Range(0, 1, without="high")
_NONE_OR_MORE = Range(0, whole=True)
_COUNT = Range(1, whole=True)
_SEED = Range(0, 2**32 - 1, whole=True)
_TYPES = ("bfloat16", "float16", "float32", "float64")

# Patterns of fnmatch. Of None, which leaves a value open, no range is asked.
RANGES: dict[str, Range | tuple[str, ...]] = {
    "*dtype": _TYPES,
    "seed": _SEED,
    "*guidance_rescale": _SHARE,
    "*guidance_interval": _SHARE,
    "*guidance_scale*": _SCALE,
    "*sync_scale": _SCALE,
    "*fps": Range(0.01, 1000),
    "steps": _COUNT,
    "strength": _SHARE,
    "frames": _COUNT,
    "height": _COUNT,
    "width": _COUNT,
    "rows": _COUNT,
    "reuse_threshold": _WEIGHT,
    "sample.scored": _NONE_OR_MORE,
    "sample.*": _COUNT,
    "*_every": _NONE_OR_MORE,
    "keep_checkpoints": _COUNT,
    "max_skipped": _COUNT,
    "validation_times": _SHARE,
    "mesh.*": Range(-1, whole=True),
    "*optim*.lr": _POSITIVE,
    "*optim*.clip": _POSITIVE,
    "*optim*.eps": _POSITIVE,
    "*optim*.weight_decay": _WEIGHT,
    "*optim*.warmup": _NONE_OR_MORE,
    "*optim*.accumulate": _COUNT,
    "*optim*": _DECAY,  # b1, b2, ema
    "critic.start": _NONE_OR_MORE,
    "critic.network.*": _COUNT,
    "critic.*": _WEIGHT,
    "loss.*": _WEIGHT,
    "pairings.*": _WEIGHT,
    "sound_weight": _WEIGHT,
    "given*": _SHARE,
    "forcing.*": _SHARE,
    "data.caption_dropout": _SHARE,
    "cut": _SHARE,
    "boundary": _SHARE,
    "rank": _COUNT,
    "lora.rank": _NONE_OR_MORE,
    "*alpha": _ANY,
    "*dropout": _DECAY,
    "data.weights": _WEIGHT,
    "data.max_bad": _SHARE,
    "data.timeout": _POSITIVE,
    "data.workers": _NONE_OR_MORE,
    "data.sound_budget": _NONE_OR_MORE,
    "data.*": _COUNT,
    "path.timesteps": _NONE_OR_MORE,
    "timesteps.mean": _ANY,
    "timesteps.std": _POSITIVE,
    "timesteps.*shift*": _POSITIVE,
    "timesteps.*": _SHARE,
    "*.num_heads": _NONE_OR_MORE,  # 0: an autoencoder without attention
    "*.eps": _POSITIVE,
    "*.norm_eps": _POSITIVE,
    "*.latents_*": _ANY,
    "dit.position_scale": _POSITIVE,
    "dit.rope_theta": _POSITIVE,
    "dit.time_scale": _POSITIVE,
    "dit.control_*": _NONE_OR_MORE,
    "dit.*cond_channels": _NONE_OR_MORE,
    "dit.image_*": _NONE_OR_MORE,
    "dit.own_blocks": _NONE_OR_MORE,
    "dit.window_frames": _NONE_OR_MORE,
    "dit.*": _COUNT,
    "vae.*": _COUNT,
    "text_encoder.*": _COUNT,
    "vocab_size": _COUNT,
    "text_length": _COUNT,
    "patch_size": _COUNT,
    "shard": _COUNT,
}


def check_ranges(settings: Mapping[str, Any], prefix: str = "") -> None:
    """Checks that each setting lies in its range.

    Args:
        settings: values by name, of any depth. Switches, and texts that name no type,
            have no range.
        prefix: what goes before their names: "sample." for those of sampling.

    Raises:
        ValueError: names the setting, its value and what it must be.
    """
    for name, value in _flat(settings, prefix):
        rule = range_of(name)
        names = isinstance(rule, tuple)
        for each in value if isinstance(value, tuple | list) else (value,):
            if names == isinstance(each, str) and not isinstance(each, bool | None):
                fits = each in rule if names else rule is None or rule.holds(each)
                told = f"one of: {', '.join(rule)}" if names else rule
                if not fits:
                    raise ValueError(f"`{name}` (={value!r}) must be {told}.")


def range_of(name: str) -> Range | tuple[str, ...] | None:
    """The row of `RANGES` for a setting, None if there is none."""
    rows = (row for key, row in RANGES.items() if fnmatch.fnmatchcase(name, key))
    return next(rows, None)


def _flat(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
