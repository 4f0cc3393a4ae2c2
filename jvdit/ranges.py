"""Ranges of settings: one table, checked before anything is made.

A setting is named as in a config, `loss.mse`. The first row of `RANGES` of which a
pattern matches the whole name holds for it, and for each number of a tuple.
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
        without: the end that is no value: "low", "high", or "" for none.
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
        low = self.low < value or (self.low == value and self.without != "low")
        high = value < self.high or (self.high == value and self.without != "high")
        whole = not self.whole or float(value).is_integer()
        return bool(low and high and whole and math.isfinite(value))

    def __str__(self):
        kind = "a whole number" if self.whole else "a number"
        low = f"of at least {self.low}"
        if self.without == "low":
            low = f"above {self.low:g}"
        if self.high == math.inf:
            return "a finite number" if self.low == -math.inf else f"{kind} {low}"
        if not self.without:
            return f"{kind} from {self.low} to {self.high}"
        return f"{kind} {low} and below {self.high}"


_SHARE = Range(0, 1)
_WEIGHT = Range(0)
_POSITIVE = Range(0, without="low")
_DECAY = Range(0, 1, without="high")
_NONE_OR_MORE = Range(0, whole=True)
_COUNT = Range(1, whole=True)

# Patterns of fnmatch, with blanks between. Of None, which leaves a value open, no range
# is asked.
RANGES: dict[str, Range | tuple[str, ...]] = {
    "*dtype": ("bfloat16", "float16", "float32", "float64"),
    "seed": Range(0, 2**32 - 1, whole=True),
    "*guidance_rescale *guidance_interval strength": _SHARE,
    "*guidance_scale* *sync_scale": Range(0, 1000),  # beyond, numbers aren't finite
    "*fps": Range(0.01, 1000),
    "steps frames height width rows": _COUNT,
    "reuse_threshold": _WEIGHT,
    "sample.scored *_every": _NONE_OR_MORE,
    "sample.* keep_checkpoints max_skipped": _COUNT,
    "validation_times": _SHARE,
    "mesh.*": Range(-1, whole=True),
    "*optim*.lr *optim*.clip *optim*.eps": _POSITIVE,
    "*optim*.weight_decay": _WEIGHT,
    "*optim*.warmup": _NONE_OR_MORE,
    "*optim*.accumulate": _COUNT,
    "*optim*": _DECAY,  # b1, b2, ema
    "critic.start": _NONE_OR_MORE,
    "critic.network.*": _COUNT,
    "critic.* loss.* pairings.* sound_weight data.weights": _WEIGHT,
    "given* forcing.* data.caption_dropout data.max_bad cut boundary": _SHARE,
    "rank": _COUNT,
    "lora.rank": _NONE_OR_MORE,
    "*alpha timesteps.mean": Range(),
    "*dropout": _DECAY,
    "data.timeout timesteps.std timesteps.*shift*": _POSITIVE,
    "data.workers data.sound_budget path.timesteps": _NONE_OR_MORE,
    "data.*": _COUNT,
    "timesteps.*": _SHARE,
    "*.num_heads": _NONE_OR_MORE,  # 0: an autoencoder without attention
    "*.eps *.norm_eps dit.position_scale dit.rope_theta dit.time_scale": _POSITIVE,
    "*.latents_*": Range(),
    "dit.control_* dit.*cond_channels dit.image_*": _NONE_OR_MORE,
    "dit.own_blocks dit.window_frames": _NONE_OR_MORE,
    "dit.* vae.* text_encoder.*": _COUNT,
    "vocab_size text_length patch_size shard": _COUNT,
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
    for patterns, row in RANGES.items():
        if any(fnmatch.fnmatchcase(name, x) for x in patterns.split()):
            return row
    return None


def _flat(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
