"""Scenes of the procedural world: what a clip holds before it moves, shows or sounds.

A scene is a pure function of (seed, split, id) and of the shape of the frame. Its
attributes come from the counter-based splitmix64 generator, so there is no state and
no rejection, and only additions, multiplications, divisions and square roots
follow, which IEEE arithmetic rounds identically on every machine.

Units: the short side of the frame is 1; x points right and y down from the top left
corner; time is in seconds, speed in short sides per second. Dimensions: b clips,
o object slots (always 4, of which the first `count` are filled), t times.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
HUES = (0, 30, 60, 120, 180, 228, 272, 322)  # degrees, one per color
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
SIZES = ("small", "large")
MATERIALS = ("rubber", "wooden", "metal", "glass")
DIRECTIONS = (  # of the initial velocity, in steps of 45 degrees from +x towards +y
    *("right", "down-right", "down", "down-left"),
    *("left", "up-left", "up", "up-right"),
)
SPEEDS = ("slowly", "quickly")
TONES = ("black", "grey", "pale")
TEXTURES = ("plain", "striped", "checkered")
SPLITS = (  # Appending leaves old ones alone.
    *("train", "val", "test", "comp", "ood_speed", "ood_size", "ood_count", "single"),
    *("pair", "falling"),
)

MAX_OBJECTS = 4
# Of objects, in all scenes.
_COUNTS = {"ood_count": MAX_OBJECTS, "single": 1, "pair": 2, "falling": 1}
_QUIET = ("single", "pair", "falling")  # no bar, steady light and camera
GRAVITY = 1.2  # short sides per second squared
RADII, RADII_OOD = (0.090, 0.135), (0.070, 0.165)  # of the disc of equal area
RATES, RATES_OOD = (0.40, 0.75), (0.20, 1.10)  # slow and fast
RADIUS_SPREAD, RATE_SPREAD = 0.06, 0.10  # relative half width
HEADING_SPREAD = math.tan(math.radians(12))  # of the initial direction
RAMP_SECONDS = 2.0  # light and camera move for so long, then hold
PAN_REACH = 0.08  # the scenery is shifted from one side to the other by twice this
DARKEST = 0.45  # light gain at the dark end of a ramp

_SQUARE = math.sqrt(math.pi) / 2
_INRADIUS = math.sqrt(math.pi / (3 * math.sqrt(3)))  # equilateral triangle
_DIAMOND = math.sqrt(math.pi / 2)
CROSS_THICKNESS = 0.36  # half thickness of an arm over its length
_CROSS = math.sqrt(math.pi / (8 * CROSS_THICKNESS - 4 * CROSS_THICKNESS**2))
# How far each shape reaches from its centre towards (left, top) and (right, bottom),
# in units of its radius. All shapes have the area of a disc of that radius.
HALF_EXTENTS = np.array(
    [
        [[1.0, 1.0]] * 2,
        [[_SQUARE] * 2] * 2,
        [[math.sqrt(3) * _INRADIUS, 2 * _INRADIUS]]
        + [[math.sqrt(3) * _INRADIUS, _INRADIUS]],
        [[_DIAMOND] * 2] * 2,
        [[_CROSS] * 2] * 2,
    ]
)

_CLEARANCE = 0.01  # free space around each object at the start
_RUNWAY_SECONDS = 0.3  # of free flight before the first wall, so motion can be seen
_DIAGONAL = math.sqrt(0.5)
_HEADINGS = np.array(
    [[1, 0], [_DIAGONAL] * 2, [0, 1], [-_DIAGONAL, _DIAGONAL]]
    + [[-1, 0], [-_DIAGONAL] * 2, [0, -1], [_DIAGONAL, -_DIAGONAL]]
)
# Independent uniform numbers of one scene, by use. Appending leaves old ones alone.
_DRAWS = {
    **dict.fromkeys(("count", "gravity", "bar", "tone", "texture"), 1),
    **dict.fromkeys(("light", "pan", "noise"), 1),
    "color": len(COLORS),
    **dict.fromkeys(("shape", "material", "direction", "size", "speed"), MAX_OBJECTS),
    **dict.fromkeys(("radius", "rate", "heading", "cell", "x", "y"), MAX_OBJECTS),
}


def splitmix64(
    state: UInt64[np.ndarray, "*streams"], count: int
) -> UInt64[np.ndarray, "*streams {count}"]:
    """First `count` outputs of splitmix64 (Steele et al. 2014) from each state."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = state[..., None] + steps
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(
    state: UInt64[np.ndarray, "*streams"], count: int
) -> Float[np.ndarray, "*streams {count}"]:
    """Uniform float64 numbers in [0, 1) from each splitmix64 state."""
    return (splitmix64(state, count) >> np.uint64(11)) * 2.0**-53


def held_out(
    color: Int[np.ndarray, "*n"],
    shape: Int[np.ndarray, "*n"],
    direction: Int[np.ndarray, "*n"],
) -> Bool[np.ndarray, "*n"]:
    """Whether a (color, shape, direction) is one of the 40 of 320 held-out triples.

    They occur in split "comp" alone, as the first object of each of its scenes. Every
    pair of values occurs in training.
    """
    return (color + 2 * shape + 3 * direction) % len(COLORS) == 0


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Ground truth of a batch of clips at time 0; see the module for units.

    Attributes index the tables above: `COLORS[scenes.color[row, slot]]`. Slots from
    `count` on hold values that mean nothing.

    Attributes:
        ids: index of each clip in its split.
        width, height: of the frame, in short sides.
        count: objects in the scene, 1 to 4.
        gravity: whether all objects are accelerated downwards by `GRAVITY`.
        bar: whether an upright bar stands before the objects and hides them.
        bar_span: left and right edge of that bar (where there is one).
        tone, texture: of the background.
        light: 1 brightens, -1 dims, 0 is steady.
        pan: 1 moves the scenery right (the camera pans left), -1 left, 0 stands.
        noise: in [0, 1), where in the noise table the sound's floor starts.
        arena: (left, top) and (right, bottom) of the walls, before any pan.
        color: all different within a scene.
        shape: upright; never turns.
        size: 0 small, 1 large.
        material: heard, not seen.
        direction: of the initial velocity, within 12 degrees.
        speed: 0 slow, 1 fast; of the initial velocity.
        radius: of the disc of the same area, which is also what collides.
        position, velocity: (x, y) of the centroid at time 0.
    """

    ids: Int[np.ndarray, " b"]
    width: float
    height: float
    count: Int[np.ndarray, " b"]
    gravity: Bool[np.ndarray, " b"]
    bar: Bool[np.ndarray, " b"]
    bar_span: Float[np.ndarray, "b 2"]
    tone: Int[np.ndarray, " b"]
    texture: Int[np.ndarray, " b"]
    light: Int[np.ndarray, " b"]
    pan: Int[np.ndarray, " b"]
    noise: Float[np.ndarray, " b"]
    arena: Float[np.ndarray, "b 2 2"]
    color: Int[np.ndarray, "b o"]
    shape: Int[np.ndarray, "b o"]
    size: Int[np.ndarray, "b o"]
    material: Int[np.ndarray, "b o"]
    direction: Int[np.ndarray, "b o"]
    speed: Int[np.ndarray, "b o"]
    radius: Float[np.ndarray, "b o"]
    position: Float[np.ndarray, "b o 2"]
    velocity: Float[np.ndarray, "b o 2"]

    def choose(self, rows: slice | np.ndarray) -> "Scenes":
        """Selects some of the scenes, by a slice or by indices."""
        fields = {k: x[rows] for k, x in vars(self).items() if np.ndim(x)}
        return dataclasses.replace(self, **fields)

    @property
    def present(self) -> Bool[np.ndarray, "b o"]:
        """Which slots are filled."""
        return np.arange(MAX_OBJECTS) < self.count[:, None]

    @property
    def half_extents(self) -> Float[np.ndarray, "b o 2 2"]:
        """Reach of each object from its centroid to (left, top), (right, bottom)."""
        return HALF_EXTENTS[self.shape] * self.radius[..., None, None]

    @property
    def limits(self) -> Float[np.ndarray, "b o 2 2"]:
        """Smallest and largest (x, y) that each centroid can have inside the walls."""
        return self.arena[:, None] + self.half_extents * np.array([[1], [-1]])

    def pan_offset(self, times: Float[np.ndarray, " t"]) -> Float[np.ndarray, "b t"]:
        """Shift of walls and objects (not of the bar) to the right at each time."""
        ramp = np.minimum(times / RAMP_SECONDS, 1)
        return self.pan[:, None] * PAN_REACH * (2 * ramp - 1)

    def light_gain(self, times: Float[np.ndarray, " t"]) -> Float[np.ndarray, "b t"]:
        """Factor on all pixel values at each time, in [0.45, 1]."""
        return light_course(self.light, times)


def light_course(
    light: Int[np.ndarray, " b"], times: Float[np.ndarray, " t"]
) -> Float[np.ndarray, "b t"]:
    """Factor on all pixel values under each light: 1, -1 or 0, as in `Scenes`."""
    ramp, light = np.minimum(times / RAMP_SECONDS, 1), light[:, None]
    brightness = np.where(light > 0, ramp, np.where(light < 0, 1 - ramp, 1.0))
    return DARKEST + (1 - DARKEST) * brightness


def sample_scenes(
    seed: int, split: str, ids: Int[np.ndarray, " b"], aspect: float = 1.0
) -> Scenes:
    """Draws the scenes of the given ids.

    Args:
        seed: of the whole world, at least 0.
        split: one of `SPLITS`; their scenes are independent of one another.
        ids: any integers from 0 on.
        aspect: frame width over height. It moves walls and starting points, nothing
            that a caption tells.
    """
    u = _draw(seed, split, ids)
    stage = _sample_stage(u, split)
    objects = _sample_objects(u, split, stage["count"], stage["bar"])
    frame = np.array([max(aspect, 1.0), max(1 / aspect, 1.0)])
    margin = np.where(stage["pan"] != 0, 0.12, 0.05)[:, None]
    arena = np.stack([np.broadcast_to(margin, (len(ids), 2)), frame - margin], 1)
    centre = np.where(objects["direction"][:, 0] == 0, 0.49, frame[0] - 0.49)
    return Scenes(
        ids=ids,
        width=float(frame[0]),
        height=float(frame[1]),
        noise=u["noise"],
        arena=arena,
        bar_span=centre[:, None] + np.array([-0.13, 0.13]),
        position=_sample_positions(u, arena, objects, stage["count"], stage["bar"]),
        **stage,
        **objects,
    )


def _draw(seed: int, split: str, ids: np.ndarray) -> dict[str, np.ndarray]:
    """All uniform numbers of the scenes, by use."""
    state = np.zeros(len(ids), np.uint64)
    for word in (np.uint64(seed), np.uint64(SPLITS.index(split)), ids.astype("uint64")):
        state = splitmix64(state ^ word, 1)[:, 0]
    numbers = uniform(state, sum(_DRAWS.values()))
    draws, start = {}, 0
    for name, size in _DRAWS.items():
        block = numbers[:, start : start + size]
        draws[name] = block[:, 0] if size == 1 else block
        start += size
    return draws


def _choose(u: np.ndarray, options: tuple) -> np.ndarray:
    """Index of an option, all equally likely."""
    return (u * len(options)).astype(np.int64)


def _sample_stage(u: dict[str, np.ndarray], split: str) -> dict[str, np.ndarray]:
    """Attributes of the scene as a whole."""
    count = np.searchsorted([0.45, 0.85], u["count"], side="right") + 1
    if split in _COUNTS:
        count = np.full_like(count, _COUNTS[split])
    eventful = split not in _QUIET
    gravity = (u["gravity"] < 0.25) & eventful | (split == "falling")
    # A bar asks for its own size and speed, which the ood splits must not dilute.
    barred = eventful and not split.startswith("ood")
    bar = (u["bar"] < 0.2) & ~gravity & (count == 1) & barred
    still = bar | (count >= (2 if split == "ood_size" else 3))  # else too crowded
    return {
        "count": count,
        "gravity": gravity,
        "bar": bar,
        "tone": _choose(u["tone"], TONES),
        "texture": _choose(u["texture"], TEXTURES),
        "light": (u["light"] < 0.3 * eventful) * np.where(u["light"] < 0.15, -1, 1),
        "pan": (u["pan"] < 0.2 * eventful) * np.where(u["pan"] < 0.1, -1, 1) * ~still,
    }


def _sample_objects(
    u: dict[str, np.ndarray], split: str, count: np.ndarray, bar: np.ndarray
) -> dict[str, np.ndarray]:
    """Attributes of the objects, all but where they start."""
    first = np.arange(MAX_OBJECTS) == 0
    barred = bar[:, None] & first  # one small slow object passes behind the bar
    shape = _choose(u["shape"], SHAPES)
    shape = np.where(barred & (shape == SHAPES.index("triangle")), 0, shape)
    direction = _choose(u["direction"], DIRECTIONS)
    direction = np.where(barred, direction // 4 * 4, direction)  # right or left

    # The hold-out needs no rejection: the first object shifts its color, trading it
    # with the object that has it, and then the others turn by 45 degrees.
    color = np.argsort(u["color"], axis=1)
    if split == "comp":
        wanted = -(2 * shape + 3 * direction)[:, :1] % len(COLORS)
    else:
        out = held_out(color[:, :1], shape[:, :1], direction[:, :1])
        wanted = (color[:, :1] + out) % len(COLORS)
    color = np.where(color == wanted, color[:, :1], color)
    color = np.concatenate([wanted, color[:, 1:MAX_OBJECTS]], axis=1)
    turned = held_out(color, shape, direction) & ~first
    direction = (direction + turned) % len(DIRECTIONS)

    size = (u["size"] < 0.5) & (count < 3)[:, None] & ~barred
    speed = (u["speed"] < 0.5) & ~barred
    small, large = RADII_OOD if split == "ood_size" else RADII
    radius = np.where(size, large, small) * np.where(barred, 0.78, 1)
    radius = radius * (1 + RADIUS_SPREAD * (2 * u["radius"] - 1))
    slow, fast = RATES_OOD if split == "ood_speed" else RATES
    rate = np.where(speed, fast, slow) * (1 + RATE_SPREAD * (2 * u["rate"] - 1))
    # Half the spread behind a bar, where the object must not drift off its line.
    lean = HEADING_SPREAD * (2 * u["heading"] - 1) * np.where(barred, 0.5, 1)
    ahead = _HEADINGS[direction]
    aside = np.stack([-ahead[..., 1], ahead[..., 0]], -1)
    heading = (ahead + lean[..., None] * aside) / np.sqrt(1 + lean**2)[..., None]
    return {
        "color": color,
        "shape": shape,
        "size": size.astype(np.int64),
        "material": _choose(u["material"], MATERIALS),
        "direction": direction,
        "speed": speed.astype(np.int64),
        "radius": radius,
        "velocity": rate[..., None] * heading,
    }


def _assign_cells(u, count, velocity) -> tuple[np.ndarray, np.ndarray]:
    """Cells along each axis (b 1 2), and each object's own place along them (b o 2).

    One object has the arena, two have a half each, more a quarter each. The halves
    are lanes along which the two move rather than towards each other.
    """
    crowd = (count > 2)[:, None, None]
    drift = np.abs(velocity[:, :2]).sum(1)
    across_x = drift[:, 0] < drift[:, 1]
    halved = (count == 2)[:, None] & np.stack([across_x, ~across_x], -1)
    grid = np.where(crowd, 2, 1 + halved[:, None])
    quarter = np.argsort(u, axis=1)
    half = (np.arange(MAX_OBJECTS) + (u[:, :1] < 0.5)) % 2
    place = np.where(
        crowd,
        np.stack([quarter % 2, quarter // 2], -1),
        halved[:, None] * half[..., None],
    )
    return grid, place


def _sample_positions(u, arena, objects, count, bar) -> np.ndarray:
    """Starting points, each in its cell and with free flight ahead."""
    extents = HALF_EXTENTS[objects["shape"]]
    radius, velocity = objects["radius"][..., None, None], objects["velocity"]
    grid, place = _assign_cells(u["cell"], count, velocity)
    # Discs collide, so a cell must hold the disc too where the shape is slimmer.
    reach = np.maximum(extents, 1) * radius + _CLEARANCE
    corner, span = arena[:, :1], (arena[:, 1:] - arena[:, :1]) / grid
    low = corner + place * span + reach[..., 0, :]
    high = corner + (place + 1) * span - reach[..., 1, :]
    middle = (low + high) / 2
    low, high = np.minimum(low, middle), np.maximum(high, middle)
    runway = _RUNWAY_SECONDS * velocity
    last = (place == grid - 1) & (velocity > 0)
    high = np.where(last, np.maximum(high - runway, low), high)
    first = (place == 0) & (velocity < 0)
    low = np.where(first, np.minimum(low - runway, high), low)
    position = low + (high - low) * np.stack([u["x"], u["y"]], -1)

    # Behind a bar: from the wall at its back, near the middle of the height.
    least, most = np.moveaxis(arena[:, None] + extents * radius * [[1], [-1]], 2, 0)
    rightwards = velocity[..., 0] > 0
    x = np.where(rightwards, least[..., 0] + _CLEARANCE, most[..., 0] - _CLEARANCE)
    top, bottom = arena[:, :1, 1], arena[:, 1:, 1]
    y = top + (bottom - top) * (0.35 + 0.3 * u["y"])
    position = np.where(bar[:, None, None], np.stack([x, y], -1), position)
    return np.clip(position, least, most)
