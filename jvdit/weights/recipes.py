"""Sampling settings that the authors of each released model recommend.

They come from the configurations of github.com/Wan-Video/Wan2.1 and Wan2.2.
"""

from collections.abc import Mapping
from typing import Any

from jvdit.models.backbones import MODELS

# The negative prompt of all releases, in Chinese: garish, overexposed, static, blurred
# details, subtitles, …
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，"
    "静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)

TIMESTEPS = 1000
TEXT_LENGTH = 512
# Fields of `TimestepPolicy`. Sampling starts just below t = 1, so that the first
# timestep is 999, as in Wan.
POLICY = {"shift_range": (1e-3, 1e3), "grid": (1 - 1e-6, 1 / TIMESTEPS)}


def _wan(**changes: Any) -> dict[str, Any]:
    """The settings that most releases share, but for some changes."""
    how = {"steps": 50, "shift": 5.0, "guidance_scale": 5.0, "solver": "unipc"}
    size = {"frames": 81, "fps": 16.0, "height": 720, "width": 1280}
    shared = {"boundary": 0.0, "negative_prompt": NEGATIVE_PROMPT}
    return how | shared | size | changes


_480P = {"height": 480, "width": 832}
_SHAKING, _CUTS = f"镜头晃动，{NEGATIVE_PROMPT}", f"镜头切换，{NEGATIVE_PROMPT}"
# By name, as in `dit.VARIANTS`. For 720p, wan2.1-i2v-14b needs a shift of 5.
RECIPES: dict[str, dict[str, Any]] = {
    "wan2.1-t2v-1.3b": _wan(shift=8.0, guidance_scale=6.0, **_480P),
    "wan2.1-t2v-14b": _wan(),
    "wan2.1-i2v-14b": _wan(steps=40, shift=3.0, negative_prompt=_SHAKING, **_480P),
    "wan2.1-flf2v-14b": _wan(shift=16.0, negative_prompt=_CUTS),
    "wan2.1-vace-1.3b": _wan(shift=16.0, **_480P),
    "wan2.1-vace-14b": _wan(shift=16.0),
    "wan2.2-t2v-a14b": _wan(
        steps=40, shift=12.0, guidance_scale=4.0, guidance_scale_2=3.0, boundary=0.875
    ),
    "wan2.2-i2v-a14b": _wan(
        steps=40, guidance_scale=3.5, guidance_scale_2=3.5, boundary=0.9
    ),
    "wan2.2-ti2v-5b": _wan(frames=121, fps=24.0, height=704),
}


# Fields of the branches that only some networks have.
_BRANCHES = ("cond_channels", "control_channels", "image_width", "image_length")


def name_of(fields: Mapping[str, Any], experts: bool) -> str | None:
    """Identifies the release of a network by its sizes; None if no release has them.

    Args:
        fields: the fields of its `DiT`.
        experts: whether the model has two experts.
    """
    for name, recipe in RECIPES.items():
        row = {**dict.fromkeys(_BRANCHES, 0), **MODELS["dit"].variants[name]}
        alike = all(_plain(fields.get(key)) == _plain(row[key]) for key in row)
        if alike and experts == (recipe["boundary"] > 0):
            return name
    return None


def _plain(value: Any) -> Any:
    """A field, as it is compared: JSON has lists, and None stands for 0."""
    return tuple(value) if isinstance(value, list) else value or 0
