"""A procedural captioned audio-visual world: the embedded default data set.

Colored shapes bounce in an arena, and sound when they do; a caption tells what there
is and how it starts to move. Everything is known exactly, so `scenes` and `simulate`
are a ground truth to evaluate generated clips against. Nothing is stored or
downloaded: clip i is a pure function of (seed, split, i), at any size and rate.

    world = World("train")
    world.clips(np.arange(64))   # {"video": ..., "audio": ..., "caption": ...}

Splits "train", "val" and "test" are alike. "comp" shows combinations of color, shape
and direction that these never show (`held_out`), "ood_speed" and "ood_size" other
speeds and sizes, "ood_count" four objects. "single", "pair" and "falling" are to learn
from in minutes: one object, two, and one under gravity (which the others have not); no
bar, steady light and camera.
"""

import dataclasses
import difflib
import math
import numbers
import re
from collections.abc import Collection

import numpy as np
from jaxtyping import Float, Int, UInt8

from jvdit.data.world.impacts import synthesize
from jvdit.data.world.mechanics import Motion, simulate
from jvdit.data.world.render import classify, render
from jvdit.data.world.scene import (
    COLORS,
    DIRECTIONS,
    MATERIALS,
    SHAPES,
    SIZES,
    SPEEDS,
    SPLITS,
    TEXTURES,
    TONES,
    Scenes,
    sample_scenes,
)

BESIDE = ("guide", "camera")  # what there is of a clip besides, if it is wanted
NUMBERS = ("one", "two", "three", "four")

_HEADS = ("{} object: ", "{} objects: ")
_WORDS = (  # of an object's attributes
    *(("size", SIZES), ("color", COLORS), ("material", MATERIALS)),
    *(("shape", SHAPES), ("speed", SPEEDS), ("direction", DIRECTIONS)),
)
_OBJECT = "a {size} {color} {material} {shape} moving {speed} {direction}"
_BACKGROUND = " on a {tone} {texture} background"
_GRAVITY = ", falling under gravity"
_BAR = ", passing behind a grey bar"
_LIGHTS = {1: ", the light brightens", -1: ", the light dims"}
_PANS = {1: ", the camera pans left", -1: ", the camera pans right"}

_SMALLEST, _MOST_OBLONG = 16, 4.0


@dataclasses.dataclass(frozen=True)
class World:
    """Clips of one split at one size and rate.

    All methods that take ids (integers from 0 on, in any order) return the same for
    an id whatever the others are. Frame k shows time k / fps of a scene that depends
    on neither fps, nor frames, nor resolution (but on the aspect): a longer or larger
    clip of an id is the same story.

    Attributes:
        split: one of `SPLITS`.
        seed: of the whole world.
        frames: per clip.
        height, width: in pixels.
        fps: frames per second.
        audio_rate: audio samples per second.

    Raises:
        ValueError: a value is out of range.
    """

    split: str = "train"
    seed: int = 0
    frames: int = 17
    height: int = 64
    width: int = 64
    fps: int | float = 8.0
    audio_rate: int = 16000

    def __post_init__(self):
        if self.split not in SPLITS:
            near = difflib.get_close_matches(str(self.split), SPLITS, 1, 0)
            raise ValueError(
                f"`split` (={self.split!r}) must be one of {SPLITS}; try {near[0]!r}."
            )
        limits = {"seed": (0, 2**64 - 1), "frames": (1, math.inf)}
        limits |= dict.fromkeys(("height", "width"), (_SMALLEST, math.inf))
        for name, (least, most) in (limits | {"audio_rate": (8000, math.inf)}).items():
            value = getattr(self, name)
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if not whole or not least <= value <= most:
                raise ValueError(
                    f"`{name}` (={value!r}) must be an integer from {least} to {most};"
                    f" try {getattr(World, name)}."
                )
            object.__setattr__(self, name, int(value))
        aspect = self.width / self.height
        if not 1 / _MOST_OBLONG <= aspect <= _MOST_OBLONG:
            raise ValueError(
                f"`width` (={self.width}) over `height` (={self.height}) must be from "
                f"1/{_MOST_OBLONG:g} to {_MOST_OBLONG:g}; "
                f"try {'64x112' if aspect < 1 else '112x64'}."
            )
        if not (isinstance(self.fps, numbers.Real) and 0 < self.fps < math.inf):
            raise ValueError(
                f"`fps` (={self.fps!r}) must be a positive, finite number of frames "
                "per second; try 8.0."
            )
        object.__setattr__(self, "fps", float(self.fps))

    @property
    def duration(self) -> float:
        """Seconds that a clip lasts, its last frame included."""
        return self.frames / self.fps

    @property
    def samples(self) -> int:
        """Audio samples per clip."""
        return round(self.duration * self.audio_rate)

    def clips(
        self,
        ids: Int[np.ndarray, " b"],
        *,
        audio: bool = True,
        beside: Collection[str] = (),
    ) -> dict[str, np.ndarray | list]:
        """Whole clips, with or without their sound.

        Args:
            ids: of the clips.
            audio: whether there is to be sound.
            beside: what else is wanted, of `BESIDE`.

        Returns:
            "video": uint8 [b T H W 3], RGB in [0, 255]; "audio": float32 [b a 1] in
            [-1, 1], or b times None; "caption": a list of b strings. If it is wanted,
            "guide": uint8 [b T H W 3], see `classify`, and "camera": float32 [b T 16],
            see `cameras`.
        """
        scenes = self.scenes(ids)
        motion = self.simulate(scenes)
        found: dict[str, np.ndarray | list] = {
            "video": self.render(scenes, motion),
            "audio": self.synthesize(scenes, motion) if audio else [None] * len(ids),
            "caption": captions(scenes),
        }
        if "guide" in beside:
            size = self.frames, self.height, self.width
            found["guide"] = classify(scenes, motion, *size, self.fps)
        if "camera" in beside:
            found["camera"] = self.cameras(scenes)
        return found

    def videos(self, ids: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b T H W 3"]:
        """Pictures alone: RGB in [0, 255]."""
        scenes = self.scenes(ids)
        return self.render(scenes, self.simulate(scenes))

    def captions(self, ids: Int[np.ndarray, " b"]) -> list[str]:
        """Captions alone, without simulating or drawing anything."""
        return captions(self.scenes(ids))

    def scenes(self, ids: Int[np.ndarray, " b"]) -> Scenes:
        """Ground truth: what is in the clips, and where it starts."""
        ids = np.asarray(ids)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"`ids` (={ids.dtype} of shape {ids.shape}) must be a list of integers;"
                " try np.arange(8)."
            )
        if ids.size and ids.min() < 0:
            raise ValueError(f"`ids` (down to {ids.min()}) must be 0 or more.")
        return sample_scenes(self.seed, self.split, ids, self.width / self.height)

    def simulate(
        self, scenes: Scenes, restitution: float | tuple[float, float] = 1.0
    ) -> Motion:
        """Ground truth: trajectories and bounces; see `mechanics.simulate`."""
        return simulate(scenes, self.duration, restitution=restitution)

    def render(self, scenes: Scenes, motion: Motion) -> UInt8[np.ndarray, "b T H W 3"]:
        """Pictures of scenes that may have been tampered with: RGB in [0, 255]."""
        size = self.frames, self.height, self.width
        return render(scenes, motion, *size, self.fps)

    def cameras(self, scenes: Scenes) -> Float[np.ndarray, "b T 16"]:
        """The camera of each frame, see `jvdit.data.cameras.Poses`.

        It looks straight at the scenery from one short side of the frame away, with a
        focal length of as much, and moves sideways as the scenery seems to.
        """
        times = np.arange(self.frames) / self.fps
        found = np.zeros((len(scenes.ids), self.frames, 16), np.float32)
        found[..., [0, 5, 10]] = 1
        found[..., 3] = scenes.pan_offset(times)
        short = min(self.height, self.width)
        found[..., 12:] = short / self.width, short / self.height, 0.5, 0.5
        return found

    def synthesize(self, scenes: Scenes, motion: Motion) -> Float[np.ndarray, "b a 1"]:
        """Sound of scenes that may have been tampered with, in [-1, 1]."""
        return synthesize(scenes, motion, self.samples, self.audio_rate)


def captions(scenes: Scenes) -> list[str]:
    """Describes each scene by its attributes, which say nothing of the frame's size."""
    return [_caption(scenes, row) for row in range(len(scenes.ids))]


def _caption(scenes: Scenes, row: int) -> str:
    count = int(scenes.count[row])
    objects = [
        _OBJECT.format(
            **{name: words[getattr(scenes, name)[row, slot]] for name, words in _WORDS}
        )
        for slot in range(count)
    ]
    tone, texture = TONES[scenes.tone[row]], TEXTURES[scenes.texture[row]]
    return (
        _HEADS[count > 1].format(NUMBERS[count - 1])
        + ", ".join(objects)
        + _BACKGROUND.format(tone=tone, texture=texture)
        + _GRAVITY * bool(scenes.gravity[row])
        + _BAR * bool(scenes.bar[row])
        + _LIGHTS.get(int(scenes.light[row]), "")
        + _PANS.get(int(scenes.pan[row]), "")
        + "."
    )


def vocabulary() -> list[str]:
    """All words that a caption of any split can hold, without punctuation, sorted."""
    frames = (*_HEADS, _OBJECT, _BACKGROUND, _GRAVITY, _BAR)
    lines = [re.sub(r"{\w*}", "", line) for line in frames]
    lines += [*_LIGHTS.values(), *_PANS.values()]
    words = {*NUMBERS, *TONES, *TEXTURES}.union(*(table for _, table in _WORDS))
    return sorted(words.union(*(re.findall(r"[a-z-]+", line) for line in lines)))
