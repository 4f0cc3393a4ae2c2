"""Requests: the prompt, size, seed and conditioning images of a clip to generate."""

import dataclasses
import os
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import ImageOps

from jvdit.data.cameras import CameraPath, read_camera
from jvdit.data.conditions.known import Tail
from jvdit.data.media.audio import read_sound
from jvdit.data.media.reader import probe
from jvdit.data.sounds import in_channels
from jvdit.generation import footage, sound_spans
from jvdit.generation.footage import FOOTAGE, Pictures
from jvdit.generation.sound_spans import LENIENT, Spans
from jvdit.ranges import check_ranges

COARSE = 8000  # Hz at which the length of a sound is measured

PICTURES = ("image", "last_image", *FOOTAGE, "from_sound")
SEVERAL = ("references", "keyframes", "keep_sound")
LATENTS = ("tail",)
PATHS = ("camera",)
FIELDS_GIVEN = (*PICTURES, *SEVERAL, *LATENTS, *PATHS)
STATES = ("prompt_embeds", "negative_prompt_embeds")


@dataclasses.dataclass(frozen=True)
class Request:
    """A clip to generate. Fields that are None take the model's defaults (`complete`).

    Images of another size are resized to cover the clip and center-cropped. Which
    images a model accepts depends on what it was trained with (`Generator.check`).

    Attributes:
        prompt: text that describes the clip.
        negative_prompt: text that guidance steers away from.
        frames: number of frames; 1 is a picture.
        height, width: size in pixels. With a first frame and neither of them, the clip
            has the image's aspect ratio.
        fps: frames per second of the clip.
        seed: seed of the initial noise. The same seed gives the same clip, whatever
            else is generated in the same batch.
        image: picture that is the first frame.
        last_image: picture that is the last frame.
        video: a control signal (depth, pose, …) to follow, or footage to keep or
            extend where `mask` is black.
        mask: white where to generate, black where `video` is kept: a video, or an image
            for all frames; by default all is white.
        references: pictures of what is to appear in the clip.
        keyframes: seconds, and the picture that is to be seen then, of each.
        prefix: footage that the clip begins with, and goes on from.
        suffix: footage that the clip ends with.
        interpolate: footage of half the frame rate, as long as the clip.
        upscale: footage of half the size, as long as the clip.
        edges: footage whose edges the clip follows.
        guide: a video that tells what the clip shows and where, such as depth, a pose
            or a segmentation, as the model was trained with.
        camera: path of the camera: a JSON file with a matrix of each frame and the
            intrinsics, as `jvdit.data.cameras` describes it; from Python a `CameraPath`
            as well.
        restyle: footage to make anew, as the prompt has it, from a part of its noise
            (`strength`).
        tail: latents that the clip goes on from. It begins amid a longer clip: of its
            first latent frame there is nothing.
        sound: whether the clip has sound; by default if its model can make some.
        from_video: footage to make sound for; the clip keeps its picture.
        from_sound: sound to make a picture for, which the clip keeps, and lasts as
            long: a file, or from Python float32 [a e] at the model's rate in [-1, 1].
        keep_sound: spans of `from_sound` to keep, as seconds from and until, while the
            rest of the sound is made; by default all is kept.
        prompt_embeds, negative_prompt_embeds: states of the text encoder, float [s e],
            in the place of those of the prompts.

    Raises:
        ValueError: a number is out of its range.
    """

    prompt: str
    negative_prompt: str | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    seed: int = 0
    image: Pictures | None = None
    last_image: Pictures | None = None
    video: Pictures | None = None
    mask: Pictures | None = None
    references: tuple[Pictures, ...] = ()
    keyframes: tuple[tuple[float, Pictures], ...] = ()
    prefix: Pictures | None = None
    suffix: Pictures | None = None
    interpolate: Pictures | None = None
    upscale: Pictures | None = None
    edges: Pictures | None = None
    guide: Pictures | None = None
    camera: str | os.PathLike[str] | CameraPath | None = None
    restyle: Pictures | None = None
    tail: Tail | None = None
    sound: bool | None = None
    from_video: Pictures | None = None
    from_sound: Pictures | None = None
    keep_sound: Spans = ()
    prompt_embeds: np.ndarray | None = None
    negative_prompt_embeds: np.ndarray | None = None

    def __post_init__(self):
        names = "frames", "height", "width", "fps", "seed"
        check_ranges({name: getattr(self, name) for name in names})
        sound_spans.check_spans(self.keep_sound)

    @property
    def frame_rate(self) -> float:
        """Frames per second; 1 where that is left open, as a picture may."""
        return float(self.fps or 1.0)

    @property
    def size(self) -> tuple[int, int, int]:
        """Number of frames, and their height and width in pixels.

        Raises:
            ValueError: the request leaves its size to the model; call `complete` first.
        """
        if self.frames is None or self.height is None or self.width is None:
            raise ValueError("this request leaves its size to a model; complete it.")
        return self.frames, self.height, self.width

    @property
    def given(self) -> list[str]:
        """The names of the fields that hold images or video."""
        open_fields = [name for name in SEVERAL if not getattr(self, name)]
        names = [name for name in FIELDS_GIVEN if name not in open_fields]
        return [name for name in names if getattr(self, name) is not None]

    @property
    def settings(self) -> dict[str, Any]:
        """The fields as JSON values; images and video as file name, or as shape."""
        fields = {x.name: getattr(self, x.name) for x in dataclasses.fields(self)}
        fields |= {name: _named(fields[name]) for name in PICTURES}
        fields["references"] = [_named(x) for x in self.references]
        fields["keyframes"] = [[time, _named(x)] for time, x in self.keyframes]
        fields["keep_sound"] = sound_spans.told_spans(self.keep_sound)
        fields.pop("tail")
        if isinstance(path := fields["camera"], CameraPath):
            fields["camera"] = f"poses {len(path.world_to_camera)}"
        elif path is not None:
            fields["camera"] = os.fspath(path)
        for name in STATES:
            if (states := fields[name]) is not None:
                fields[name] = f"states {'x'.join(map(str, states.shape))}"
        return {k: v for k, v in fields.items() if v is not None and v != []}

    @property
    def pictures(self) -> list[np.ndarray]:
        """The given first and last frames as uint8 `[H W 3]`, at their own sizes."""
        ends = (("image", self.image), ("last_image", self.last_image))
        return [footage.read_still(x, name) for name, x in ends if x is not None]

    @property
    def ends(self) -> list[np.ndarray]:
        """The given first and last frames as uint8 `[H W 3]`, at the clip's size."""
        return [self.fitted(x) for x in self.pictures]

    def end(self, name: str) -> np.ndarray | None:
        """One of them, `image` or `last_image`; None: it isn't given."""
        if (picture := getattr(self, name)) is None:
            return None
        return self.fitted(footage.read_still(picture, name))

    def read_given(self) -> None:
        """Reads all that is given, so that a damaged file is found before the work.

        Raises:
            FileNotFoundError: a file doesn't exist.
            ValueError: one is damaged, or too short for the clip.
        """
        _ = self.ends, self.reference_pictures(), self.pictures_in_time()
        _ = self.waveform(COARSE, 1), self.sound_spans(), self.poses()
        _ = [self.clip(name) for name in FOOTAGE]

    def samples(self, rate: int) -> int:
        """Samples of a sound as long as the clip, at `rate` Hz."""
        return round(self.size[0] / self.frame_rate * rate)

    def waveform(self, rate: int, channels: int) -> np.ndarray | None:
        """Reads `from_sound` as float32 `[a e]`, as long as the clip.

        Args:
            rate: samples per second.
            channels: 1: mixed down; 2: one channel is repeated.

        Returns:
            The samples; None if the request has no such field.

        Raises:
            ValueError: there is no sound in it, or it lasts longer or shorter.
            FileNotFoundError: the file doesn't exist.
        """
        if self.from_sound is None:
            return None
        audio, wanted = self.from_sound, self.samples(rate)
        if not isinstance(audio, np.ndarray):
            audio = read_sound(audio, rate)
        if audio.ndim != 2 or audio.shape[1] not in (1, 2):
            raise ValueError(
                f"`from_sound` is {list(audio.shape)}; give [a e] with 1 or 2 channels."
            )
        if abs(len(audio) - wanted) > LENIENT * rate:
            raise ValueError(
                f"`from_sound` lasts {len(audio) / rate:.2f} s and the clip "
                f"{wanted / rate:.2f} s: cut or lengthen it, or ask for other `frames`."
            )
        audio = in_channels(audio, channels).astype(np.float32)[:wanted]
        return np.pad(audio, ((0, wanted - len(audio)), (0, 0)))

    def sound_spans(self) -> tuple[tuple[float, float], ...]:
        """The spans of `keep_sound`; infinity is the end of the clip.

        Raises:
            ValueError: one ends after the clip.
        """
        return sound_spans.spans_within(self.keep_sound, self.size[0] / self.frame_rate)

    def sound_kept(
        self, made: Float[np.ndarray, "a e"], rate: int
    ) -> Float[np.ndarray, "a e"]:
        """A generated sound, in which the spans that were kept are as they were.

        Args:
            made: as long as the clip.
            rate: samples per second.
        """
        audio = self.waveform(rate, made.shape[1]) if self.keep_sound else None
        if audio is None:
            return made
        return sound_spans.blended(made, audio, self.sound_spans(), rate)

    def sound_of(self, name: str, rate: int, channels: int) -> np.ndarray | None:
        """The sound of footage that the clip begins with, as float32 `[a e]`.

        Args:
            name: of the field.
            rate: samples per second.
            channels: 1: mixed down; 2: one channel is repeated.

        Returns:
            The samples; None if the file has none.
        """
        source = getattr(self, name)
        if isinstance(source, np.ndarray) or not probe(source).has_audio:
            return None
        frames = footage.footage_length(source, name, self.frame_rate)
        audio = in_channels(read_sound(source, rate), channels).astype(np.float32)
        return audio[: round(frames / self.frame_rate * rate)]

    def fitted(self, picture: np.ndarray) -> np.ndarray:
        """Resizes an image to cover the clip's size, and center-crops it."""
        return footage.resized(picture, self.size[1:], ImageOps.fit)

    def clip(self, name: str) -> np.ndarray | None:
        """Reads a field of footage as uint8 `[T H W 3]`, as the clip needs it.

        Args:
            name: a row of `FOOTAGE`, which says of what rate, size and length.

        Returns:
            The pixels; None if the request has no such field.

        Raises:
            ValueError: its length or size doesn't go with the clip's.
            FileNotFoundError: the file doesn't exist.
        """
        source = getattr(self, name)
        if source is None:
            return None
        return footage.read_footage(source, name, self.size, self.frame_rate)

    def kept(
        self, video: UInt8[np.ndarray, "T H W 3"], masked: bool
    ) -> UInt8[np.ndarray, "T H W 3"]:
        """A generated clip, in which pixels that were given are as they were.

        Args:
            video: the clip.
            masked: `video` stays where `mask` is black.
        """
        if (given := self.clip("from_video")) is not None:
            return given
        video = video.copy()
        if (given := self.clip("prefix")) is not None:
            video[: len(given)] = given
        given, mask = self.clip("video"), self.clip("mask")
        if masked and given is not None and mask is not None:
            video = np.where(mask[..., :1] > 127, video, given)
        return video

    def pictures_in_time(self) -> list[tuple[float, np.ndarray]]:
        """The keyframes: seconds, and uint8 `[H W 3]` at the clip's size.

        Raises:
            ValueError: one lies beyond the end of the clip.
        """
        fps, found = self.frame_rate, []
        last = (self.size[0] - 1) / fps
        for time, picture in self.keyframes:
            if not 0 <= time <= last + 0.5 / fps:
                raise ValueError(
                    f"a keyframe at {time:g} s lies outside the clip, whose frames are "
                    f"from 0 to {last:g} s."
                )
            at = round(time * fps) / fps  # a frame's own time
            found.append((at, self.fitted(footage.read_still(picture, "keyframes"))))
        return found

    @property
    def camera_path(self) -> CameraPath | None:
        """The camera's path, read if it is a file; errors as of `poses`."""
        if self.camera is None or isinstance(self.camera, CameraPath):
            return self.camera
        return read_camera(footage.existing(self.camera, "camera"))

    def poses(self) -> Float[np.ndarray, "T 16"] | None:
        """The camera of each frame, see `cameras.Poses`; None: it isn't given.

        Raises:
            ValueError: its path is shorter than the clip, or isn't one.
            FileNotFoundError: the file doesn't exist.
        """
        if (path := self.camera_path) is None:
            return None
        told = "`camera`"
        if not isinstance(self.camera, CameraPath):
            told = f"{told} (={self.camera})"
        try:
            return path.poses(*self.size, self.frame_rate)
        except ValueError as error:
            raise ValueError(f"{told}: {error}") from None

    def reference_pictures(self) -> list[np.ndarray]:
        """The reference images as uint8 `[H W 3]`, padded with white to the clip."""
        size, white = self.size[1:], {"color": "white"}
        pictures = (footage.read_still(x, "references") for x in self.references)
        return [footage.resized(x, size, ImageOps.pad, **white) for x in pictures]


def _named(source: Pictures | None) -> str | None:
    if isinstance(source, np.ndarray):
        return f"pixels {'x'.join(map(str, source.shape))}"
    return None if source is None else os.fspath(source)
