"""Bodies of `POST /v1/videos`, in the shape of OpenAI's API, as requests of ours."""

import dataclasses
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

from jvdit.generation.request import FIELDS_GIVEN, SEVERAL, Request
from jvdit.generation.settings import Settings
from jvdit.machine.json_files import fit_json
from jvdit.machine.text_files import check_text

_LONGEST = 20_000  # characters of a prompt
_Prompt = Annotated[str, msgspec.Meta(max_length=_LONGEST)]
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
# What our settings are called in this API, for the messages of errors.
_NAMES = {"frames": "num_frames", "steps": "num_inference_steps"}
_NAMES |= {"T": "num_frames", "H": "height", "W": "width"}
_OF_SIZE = ("height", "width")


class VideoRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is asked of a clip. Fields that are None take the model's defaults.

    Attributes:
        prompt: text that describes the clip.
        model: name of the model; None: the one that is served.
        seconds: how long the clip lasts, as near as the model can.
        size: "WIDTHxHEIGHT" in pixels.
        negative_prompt: text that guidance steers away from.
        num_frames: frames of the clip, in the place of `seconds`; 1 is a picture.
        fps: frames per second.
        num_inference_steps: steps of the solver.
        guidance_scale: how strongly to follow the prompt.
        seed: of the noise; None: a random one, which the job tells.
        lora: name of an adapter.
        sound: whether the clip has sound; None: if the model can make some.
        strength: how far `restyle` goes, 0 to 1.
        keyframes: seconds of the pictures of that condition; not a field of a body.
        keep_sound: the spans of that condition; likewise.
    """

    prompt: _Prompt
    model: str | None = None
    seconds: float | None = None
    size: str | None = None
    negative_prompt: _Prompt | None = None
    num_frames: int | None = None
    fps: float | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    lora: str | None = None
    sound: bool | None = None
    strength: float | None = None
    keyframes: tuple[float, ...] = ()
    keep_sound: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of(
        cls,
        fields: Mapping[str, Any],
        keyframes: Sequence[float] = (),
        keep_sound: Sequence[tuple[float, float]] = (),
    ) -> "VideoRequest":
        """Reads the fields of a body, in which numbers may be text, and picks a seed.

        Args:
            fields: of the body, without its conditions.
            keyframes: seconds of its keyframes.
            keep_sound: spans of its sound that are kept.

        Raises:
            ValueError: names the field that is unknown, or of the wrong type.
        """
        given = {**fields, "keyframes": [*keyframes], "keep_sound": [*keep_sound]}
        found = fit_json(given, "the request", cls, "correct it", strict=False)
        for name in ("prompt", "negative_prompt"):
            check_text(getattr(found, name) or "", f"`{name}`")
        if found.seconds is not None and found.num_frames is not None:
            raise ValueError("`seconds` and `num_frames` are both given; give one.")
        seed = secrets.randbelow(1 << 32) if found.seed is None else found.seed
        return msgspec.structs.replace(found, seed=seed)

    def request(
        self, fps: float, period: int, files: Mapping[str, Sequence[str]]
    ) -> Request:
        """The request that this is.

        Args:
            fps: the model's own frames per second.
            period: frames are 1 plus a multiple of this.
            files: paths of the given pictures and sounds, by condition.

        Raises:
            ValueError: a number is out of its range.
        """
        fields: dict[str, Any] = {
            name: tuple(paths) if name in SEVERAL else paths[0]
            for name, paths in files.items()
        }
        if "keyframes" in fields:
            timed = zip(self.keyframes, files["keyframes"], strict=True)
            fields["keyframes"] = (*timed,)
        if self.keep_sound:
            fields["keep_sound"] = self.keep_sound
        if self.size is not None:
            if (match := _SIZE.fullmatch(self.size)) is None:
                raise ValueError(
                    f"`size` (={self.size[:40]!r}) must read WIDTHxHEIGHT, such as "
                    "64x48."
                )
            fields |= {"width": int(match[1]), "height": int(match[2])}
        fields |= {x: getattr(self, x) for x in ("negative_prompt", "fps", "sound")}
        frames = self._frames(self.fps or fps, period)
        return Request(self.prompt, frames=frames, seed=self.seed or 0, **fields)

    def _frames(self, fps: float, period: int) -> int | None:
        if self.seconds is None:
            return self.num_frames
        if not (0 < self.seconds < math.inf and 0 < self.seconds * fps < 1e6):
            raise ValueError(f"`seconds` (={self.seconds}) must be a length above 0.")
        return 1 + max(round((self.seconds * fps - 1) / period), 0) * period

    @property
    def settings(self) -> Settings:
        """The sampling settings that this asks for.

        Raises:
            ValueError: a number is out of its range.
        """
        found = Settings(self.num_inference_steps, guidance_scale=self.guidance_scale)
        if self.strength is None:
            return found
        return dataclasses.replace(found, strength=self.strength)


def in_api_words(message: str) -> tuple[str, str | None]:
    """An error's message with the names that settings have in this API.

    Returns:
        The message, and the field that it is about, if it says so.
    """
    for ours, theirs in _NAMES.items():
        message = message.replace(f"`{ours}`", f"`{theirs}`")
    named = re.search(r"`(?:conditions[.\[])?(\w+)[`.\]]", message)
    field = named and named[1]
    if field in FIELDS_GIVEN:
        return message, f"conditions.{field}"
    return message, "size" if field in _OF_SIZE else field
