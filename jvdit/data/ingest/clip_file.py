"""What becomes of one video: clips of one size and rate, or reasons why not.

This runs in the children of `ingest`, so it imports little.
"""

import dataclasses
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jvdit.data.cameras import read_camera
from jvdit.data.media.decoding import Budget, Media
from jvdit.data.media.media_error import MediaError
from jvdit.data.media.pictures import PICTURES, film_of
from jvdit.data.media.reader import MediaInfo, decode_clip, probe
from jvdit.data.media.writer import PRESETS, encode_clip
from jvdit.machine.json_files import nearest

NO_CAPTION = "no caption"


class ClipFile(NamedTuple):
    """A video to prepare, or what was found in its place.

    Attributes:
        key: name that is unique among the items.
        path: where the file is.
        caption: "" if there is none.
        reason: one of `REASONS` why it is not even tried; "": it is.
        detail: what was found.
        note: where a caption was looked for, if there is none.
        guide: second video of what is seen, such as its depth; "": there is none.
        camera: file of the camera's path; "": there is none.
    """

    key: str
    path: str
    caption: str
    reason: str = ""
    detail: str = ""
    note: str = ""
    guide: str = ""
    camera: str = ""

    @property
    def beside(self) -> dict[str, str]:
        """The files beside it, by the name of what they are."""
        files = {"guide": self.guide, "camera": self.camera}
        return {name: path for name, path in files.items() if path}


_RANGES = {
    "frames": (1, 100_000),
    "fps": (0.01, 1000.0),
    "audio_rate": (0, 192_000),
    "crf": (0, 51),
    "max_upsample": (0.01, 1000.0),
    "max_repeat": (0.0, 1.0),
    "max_pixels": (256, 2**31),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How clips are cut out of videos.

    Attributes:
        frames, fps: frames of a clip, and frames per second.
        sizes: (height, width) in pixels of the buckets; a video goes into the one whose
            aspect ratio is nearest to its own.
        windows: "first", "all" (consecutive) or a number of evenly spaced ones.
        audio_rate: Hz of the stereo sound; 0: none.
        crf, preset: x264's quality and preset of the stored clips.
        max_upsample: largest enlargement of a picture.
        max_repeat: largest share of frames that may repeat the one before, because the
            video's own rate is lower than `fps`.
        max_pixels: most pixels of a source frame.
        require_caption: whether videos without a caption are left out.
    """

    frames: int = 81
    fps: float | int = 16.0
    sizes: tuple[tuple[int, int], ...] = ((480, 832),)
    windows: str = "first"
    audio_rate: int = 48_000
    crf: int = 18
    preset: str = "medium"
    max_upsample: float | int = 2.0
    max_repeat: float | int = 0.5
    max_pixels: int = 4096 * 2304
    require_caption: bool = False

    def __post_init__(self):
        for name, (low, high) in _RANGES.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise ValueError(f"`{name}` (={value}) must be from {low} to {high}.")
        if self.preset not in PRESETS:
            near = nearest(self.preset, PRESETS)
            raise ValueError(
                f"`preset` (={self.preset!r}) must be one of {', '.join(PRESETS)}; the "
                f"nearest is {near}."
            )
        for height, width in self.sizes:
            if height < 16 or width < 16 or height % 2 or width % 2:
                raise ValueError(
                    f"Size {height}x{width} must be even and at least 16x16."
                )
        if self.windows not in ("first", "all") and not (
            self.windows.isdigit() and int(self.windows) > 0
        ):
            raise ValueError(
                f"`windows` (={self.windows!r}) must be 'first', 'all' or a number."
            )


def prepare_file(item: ClipFile, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Cuts the clips out of one video.

    Yields:
        {"clip": example of `CLIP_FEATURES`, "notes": [str]} for every clip taken, and
        {"reason", "detail"} for every window that was not, or for the whole file.
    """
    budget = Budget(pixels=recipe.max_pixels, seconds=math.inf)
    source: Media = item.path
    try:
        if recipe.require_caption and not item.caption:
            raise MediaError("no_caption", item.note)
        if Path(item.path).suffix.lower() in PICTURES:
            recipe, source = _as_film(item.path, recipe, budget)
        info = probe(source, scan=recipe.windows != "first", budget=budget)
        height, width = choose_size(info, recipe)
    except MediaError as e:
        yield {"reason": e.reason, "detail": e.detail}
        return
    window = {"frames": recipe.frames, "height": height, "width": width}
    window["fps"] = recipe.fps
    for start in window_starts(info, recipe):
        try:
            made = _prepare_window(item, source, recipe, budget, start, window)
            if item.beside:
                made["clip"] |= _beside(item, info, recipe, budget, start, window)
            yield made
        except MediaError as e:
            yield {"reason": e.reason, "detail": e.detail}


def _as_film(path: str, recipe: Recipe, budget: Budget) -> tuple[Recipe, bytes]:
    """A picture as a video, and how to cut it: a still one is a clip of one frame."""
    try:
        film = film_of(path)
    except (OSError, ValueError) as error:
        raise MediaError("unreadable", str(error)) from None
    if probe(film, scan=True, budget=budget).frames > 1:
        return recipe, film
    return dataclasses.replace(recipe, frames=1, windows="first"), film


def choose_size(info: MediaInfo, recipe: Recipe) -> tuple[int, int]:
    """Returns the bucket of a video: nearest aspect ratio, then the largest that fits.

    Raises:
        MediaError: even that one would enlarge the picture too much.
    """

    def distance(size: tuple[int, int]) -> float:
        return abs(math.log(size[1] / size[0] * info.height / info.width))

    def enlargement(size: tuple[int, int]) -> float:
        return max(size[0] / info.height, size[1] / info.width)

    nearest = min(map(distance, recipe.sizes))
    near = [s for s in recipe.sizes if distance(s) < nearest + 0.02]
    fitting = [s for s in near if enlargement(s) <= 1]
    if fitting:
        return max(fitting, key=lambda s: s[0] * s[1])
    size = min(near, key=lambda s: s[0] * s[1])
    if enlargement(size) > recipe.max_upsample:
        raise MediaError(
            "too_small",
            f"{info.width}x{info.height} would be enlarged "
            f"{enlargement(size):.2f} times to {size[1]}x{size[0]}",
        )
    return size


def window_starts(info: MediaInfo, recipe: Recipe) -> list[float]:
    """Returns where the windows of a video start, in seconds; at least one."""
    if recipe.windows == "first":
        return [0.0]
    length = recipe.frames / recipe.fps
    # Only the start of a window's last frame has to lie within the video.
    room = info.duration - (recipe.frames - 1) / recipe.fps
    if info.fps:
        room += max(0.0, 0.5 / recipe.fps - 1 / info.fps)
    fitting = max(1, math.floor(room / length - 1e-6) + 1)
    if recipe.windows == "all":
        return [round(k * length, 6) for k in range(fitting)]
    count = min(int(recipe.windows), fitting)
    last = max(0.0, room - 1 / recipe.fps)
    return [round(float(s), 6) for s in np.linspace(0, last, count)]


def _prepare_window(
    item: ClipFile,
    media: Media,
    recipe: Recipe,
    budget: Budget,
    start: float,
    window: dict[str, Any],
) -> dict[str, Any]:
    """Returns one clip as an example and what is worth knowing of it."""
    how = {"start_seconds": start, "audio_rate": recipe.audio_rate, "budget": budget}
    clip = decode_clip(media, **window, **how)
    source = clip["source"]
    repeated = 1 - source["distinct_frames"] / recipe.frames
    if repeated > recipe.max_repeat:
        raise MediaError(
            "low_rate",
            f"{source['distinct_frames']} different frames of {recipe.frames} "
            f"({source['source_fps']:g} fps)",
        )
    meta = source | {"start_seconds": start, "file": item.key}
    sound = clip["audio"] if clip["has_audio"] else None
    example = {
        "key": f"{item.key}@{start:.3f}",
        "video": _encoded(recipe, clip["video"], sound),
        "caption": item.caption,
        "meta": json.dumps(meta, sort_keys=True),
        **window,
        "has_audio": clip["has_audio"],
    }
    return {"clip": example, "notes": _notes(source, repeated, item)}


def _beside(
    item: ClipFile,
    info: MediaInfo,
    recipe: Recipe,
    budget: Budget,
    start: float,
    window: dict[str, Any],
) -> dict[str, Any]:
    """What lies beside a clip, cut, scaled and cropped as the clip was."""
    found: dict[str, Any] = {}
    if item.guide:
        try:
            source: Media = item.guide
            if Path(item.guide).suffix.lower() in PICTURES:
                source = film_of(item.guide)
            other = probe(source, budget=budget)
            if abs(other.width / other.height * info.height / info.width - 1) > 0.02:
                raise ValueError(
                    f"it is {other.width}x{other.height} and the video "
                    f"{info.width}x{info.height}: give one of the same shape"
                )
            clip = decode_clip(source, **window, start_seconds=start, budget=budget)
        except (OSError, ValueError) as error:
            raise MediaError("bad_guide", f"{item.guide}: {error}") from None
        found |= {"guide": _encoded(recipe, clip["video"]), "has_guide": True}
    if item.camera:
        try:
            path = read_camera(item.camera)
            path.check_shape(info.height, info.width)
            path = path.window(**window, start=start)
        except (OSError, ValueError) as error:
            told = str(error)
            told = told if item.camera in told else f"{item.camera}: {told}"
            raise MediaError("bad_camera", told) from None
        found |= {"camera": path.json(), "has_camera": True}
    return found


def _encoded(
    recipe: Recipe, video: np.ndarray, audio: np.ndarray | None = None
) -> bytes:
    """A clip as the file that is stored."""
    buffer, sound = io.BytesIO(), {"audio": audio, "audio_rate": recipe.audio_rate}
    how = {"crf": recipe.crf, "preset": recipe.preset}
    encode_clip(buffer, video, recipe.fps, **sound, **how)
    return buffer.getvalue()


def _notes(source: dict[str, Any], repeated: float, item: ClipFile) -> list[str]:
    """Says what was done to a clip that its owner may want to know."""
    sound = source.get("audio", "whole")  # absent if none was asked for
    notes = {
        f"cropped {source['cropped']:.0%}": source["cropped"] > 0.01,
        f"enlarged {source['scale']:.2f}x": source["scale"] > 1,
        f"rotated {source['rotation']}": source["rotation"],
        "over black": source["transparent"],
        f"repeats {repeated:.0%}": repeated > 0,
        f"sound {sound}": sound != "whole",
        f"{source.get('hdr')} tone-mapped": "hdr" in source,
        f"{NO_CAPTION} ({item.note})": item.note and not item.caption,
        NO_CAPTION: not item.note and not item.caption,
    }
    return [note for note, worth in notes.items() if worth]
