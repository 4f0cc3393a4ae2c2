"""Clips of the procedural world that are wrong in one respect, to test its oracle with.

Each row of `WRONG` says in what, and which score has to fall. `DEGRADED` are clips
whose content is right, though coarsely shown.
"""

import dataclasses
import io
from collections.abc import Callable
from typing import NamedTuple

import av
import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy.ndimage import gaussian_filter

from jvdit.data.media.writer import encode_clip
from jvdit.data.world import World
from jvdit.data.world.mechanics import PAIR, Motion
from jvdit.data.world.render import render
from jvdit.data.world.scene import COLORS, RATES, Scenes

Video = UInt8[np.ndarray, "b T H W 3"]
Draw = Callable[[World, Scenes], Video]


class Wrong(NamedTuple):
    """A way to get clips wrong.

    Attributes:
        seen: what they show.
        score: the score that has to fall.
        draw: makes them of the scenes that captions tell of.
        concerns: which of the scenes it changes. None: all.
    """

    seen: str
    score: str
    draw: Draw
    concerns: Callable[[World, Scenes], Bool[np.ndarray, " b"]] | None = None


def real(world: World, scenes: Scenes) -> Video:
    """The clips that captions tell of."""
    return world.render(scenes, world.simulate(scenes))


def _with(**fields: Callable[[np.ndarray], np.ndarray]) -> Draw:
    """Draws scenes of other values, each computed of the true ones."""

    def draw(world: World, scenes: Scenes) -> Video:
        new = {name: value(getattr(scenes, name)) for name, value in fields.items()}
        return real(world, dataclasses.replace(scenes, **new))

    return draw


def _other_pace(world: World, scenes: Scenes) -> Video:
    ratio = RATES[0] / RATES[1]
    factor = np.where(scenes.speed == 1, ratio, 1 / ratio)[..., None]
    return real(world, dataclasses.replace(scenes, velocity=scenes.velocity * factor))


def _for_a_third(change: Draw) -> Draw:
    def draw(world: World, scenes: Scenes) -> Video:
        video, third = real(world, scenes), world.frames // 3
        middle = slice(third, 2 * third + 1)
        video[:, middle] = change(world, scenes)[:, middle]
        return video

    return draw


def _one_more(world: World, scenes: Scenes) -> Video:
    count = np.minimum(scenes.count + 1, 4)
    position = scenes.position.copy()
    position[np.arange(len(count)), count - 1] = 0.5
    return real(world, dataclasses.replace(scenes, count=count, position=position))


def _first_recolored(world: World, scenes: Scenes) -> Video:
    color = scenes.color.copy()
    color[:, 0] = (color[:, 0] + 4) % len(COLORS)
    return real(world, dataclasses.replace(scenes, color=color))


def _flickering(world: World, scenes: Scenes) -> Video:
    factor = np.where(np.arange(world.frames) % 2, 1.0, 0.7)[:, None, None, None]
    return (real(world, scenes) * factor).astype(np.uint8)


def _tired(walls: float, pairs: float) -> Draw:
    """Objects that have less speed after each bounce, by these factors."""

    def draw(world: World, scenes: Scenes) -> Video:
        return world.render(scenes, world.simulate(scenes, (walls, pairs)))

    return draw


def _meet_early(world: World, scenes: Scenes) -> Bool[np.ndarray, " b"]:
    motion = world.simulate(scenes)
    early = motion.time < 0.7 * world.duration
    return ((motion.kind == PAIR) & early).any(1)


@dataclasses.dataclass(frozen=True)
class _Slowing(Motion):
    """Motion that slows down to 40 % of its speed at `end`, in seconds."""

    end: float

    def positions(self, times: Float[np.ndarray, " t"]) -> Float[np.ndarray, "b t o 2"]:
        return super().positions(times - 0.3 * times**2 / self.end)


def _slowing(world: World, scenes: Scenes) -> Video:
    motion = _Slowing(**vars(world.simulate(scenes)), end=world.duration)
    return world.render(scenes, motion)


def _polygon(corners: Float[np.ndarray, "n 2"]) -> Draw:
    """Draws the same polygon in the place of every object, of its area."""
    after = np.roll(corners, -1, 0)
    cross = corners[:, 0] * after[:, 1] - corners[:, 1] * after[:, 0]
    middle = ((corners + after) * cross[:, None]).sum(0) / (3 * cross.sum())
    corners = (corners - middle) * np.sqrt(2 * np.pi / abs(cross.sum()))

    def distance(shape, x, y, radius):
        x, y = np.broadcast_arrays(x / radius, y / radius)
        nearest, inside = np.full(x.shape, np.inf), np.zeros(x.shape, bool)
        for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0), strict=True):
            ex, ey = bx - ax, by - ay
            t = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
            nearest = np.minimum(nearest, np.hypot(x - ax - t * ex, y - ay - t * ey))
            beyond = ax + ex * (y - ay) / (ey + 1e-12)
            inside ^= ((ay > y) != (by > y)) & (x < beyond)
        return (np.where(inside, -nearest, nearest) * radius).astype(np.float32)

    def draw(world: World, scenes: Scenes) -> Video:
        size = world.frames, world.height, world.width, world.fps
        extents = np.full((5, 2, 2), np.abs(corners).max())
        return render(scenes, world.simulate(scenes), *size, distance, extents)

    return draw


_TURN = np.linspace(0, 2 * np.pi, 60, endpoint=False)
_X, _Y = np.cos(_TURN), np.sin(_TURN)
_HEART = 5 * np.cos(2 * _TURN) + 2 * np.cos(3 * _TURN) + np.cos(4 * _TURN) - 13 * _X
_DENTS = 1 + 0.12 * np.cos(2 * _TURN + 1) + 0.08 * np.cos(3 * _TURN + 2)


def _regular(sides: int, turn: float) -> Draw:
    angle = np.radians(turn) + 2 * np.pi * np.arange(sides) / sides
    return _polygon(np.stack([np.cos(angle), np.sin(angle)], 1))


OUTLINES = {  # y points down
    "hearts": _polygon(np.stack([16 * _Y**3, _HEART], 1)),
    "ovals": _polygon(np.stack([1.4 * _X, _Y], 1)),
    "blobs": _polygon(np.stack([_DENTS * _X, _DENTS * _Y], 1)),
    "triangles on their side": _regular(3, 90.0),
    "squares turned by 22 degrees": _regular(4, 22.0),
    "squares turned by 30 degrees": _regular(4, 30.0),
    "pentagons": _regular(5, 0.0),
    "hexagons": _regular(6, 0.0),
}

WRONG = {
    "speed": Wrong("slow for fast, fast for slow", "speed", _other_pace),
    "tone": Wrong("another tone", "background", _with(tone=lambda x: (x + 1) % 3)),
    "texture": Wrong(
        "another texture", "background", _with(texture=lambda x: (x + 1) % 3)
    ),
    "light": Wrong(
        "light that changes otherwise",
        "light",
        _with(light=lambda x: np.where(x == 0, 1, -x)),
    ),
    "flicker": Wrong("brightness that flickers between 1 and .7", "light", _flickering),
    "pan": Wrong(
        "a pan where none is told, none where one is",
        "camera",
        _with(pan=lambda x: np.where(x == 0, 1, 0)),
    ),
    "bar": Wrong(
        "no bar where one is told",
        "bar",
        _with(bar=lambda x: x & False),
        lambda world, scenes: scenes.bar,
    ),
    "gravity": Wrong(
        "gravity where none is told, none where it is",
        "falling",
        _with(gravity=lambda x: ~x),
    ),
    "gone": Wrong(
        "an object gone for a third of the clip",
        "lasting",
        _for_a_third(_with(count=lambda x: x - 1)),
    ),
    "extra": Wrong("one more for a third", "lasting", _for_a_third(_one_more)),
    "color": Wrong(
        "another color for a third", "lasting", _for_a_third(_first_recolored)
    ),
    **{name: Wrong(name, "shape", draw) for name, draw in OUTLINES.items()},
    "bounces": Wrong("bounces with .6 of the speed", "physics", _tired(0.6, 0.6)),
    "collisions": Wrong(
        "collisions with .2 of the speed", "physics", _tired(1.0, 0.2), _meet_early
    ),
    "slowing": Wrong("slowing down to 40 %", "physics", _slowing),
}


def blurred(sigma: float) -> Draw:
    """Draws real clips blurred by a Gaussian, in pixels."""

    def draw(world: World, scenes: Scenes) -> Video:
        video = real(world, scenes).astype(np.float32)
        return gaussian_filter(video, (0, 0, sigma, sigma, 0)).astype(np.uint8)

    return draw


def coded(crf: int) -> Draw:
    """Draws real clips as H.264 shows them."""

    def decoded(clip: np.ndarray, fps: float) -> np.ndarray:
        file = io.BytesIO()
        encode_clip(file, clip, fps, crf=crf)
        with av.open(io.BytesIO(file.getvalue()), "r") as read:
            frames = read.decode(video=0)
            return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])

    def draw(world: World, scenes: Scenes) -> Video:
        return np.stack([decoded(clip, world.fps) for clip in real(world, scenes)])

    return draw


DEGRADED = {
    "blurred": Wrong("real, blurred by one pixel", "shape", blurred(1.0)),
    "coded": Wrong("real, H.264 at crf 18", "shape", coded(18)),
}
