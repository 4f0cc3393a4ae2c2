"""The model that a server offers: what it takes, and what it says of each clip."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jvdit.data.conditions import CONDITIONS
from jvdit.generation.completion import size_like
from jvdit.generation.footage import FOOTAGE
from jvdit.generation.generator import Generator
from jvdit.generation.request import SEVERAL, Request
from jvdit.generation.settings import Settings
from jvdit.serving.recipe import command_of, python_of
from jvdit.serving.slots import ALIGNED
from jvdit.serving.token_counts import clip_tokens, picture_tokens, stills_of
from jvdit.serving.video_request import VideoRequest

# How a browser may choose a file for a condition; all others are pictures.
_ACCEPTS = dict.fromkeys(FOOTAGE, "video/*")
_ACCEPTS |= {"from_sound": "audio/*", "mask": "image/*,video/*"}
_ACCEPTS |= {"camera": "application/json", "keep_sound": "spans"}
_NO_FILE = "tail"  # a condition that only films have


@dataclasses.dataclass(frozen=True)
class Served:
    """A model that is served.

    Attributes:
        generator: makes clips with it.
        name: that it goes by.
        tokens: most tokens of a clip; 0: as many as two of the model's
            own take.
        steps: most steps of a clip.
        source: flags of `jvdit.sample` that open this model.
        loras: generators with an adapter, by the name that requests give it.
    """

    generator: Generator
    name: str
    tokens: int = 0
    steps: int = 100
    source: Mapping[str, str] = dataclasses.field(default_factory=dict)
    loras: Mapping[str, Generator] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not self.tokens:
            usual = self.generator.complete(Request("")).size
            count = self.tokens_of(*usual)
            both = -(-count // ALIGNED) * ALIGNED + count
            object.__setattr__(self, "tokens", both)

    def order(
        self, asked: VideoRequest, paths: Mapping[str, Sequence[str]]
    ) -> tuple[Request, Settings]:
        """The complete request and settings of what is asked.

        Args:
            asked: what is asked.
            paths: of the given files, by condition.

        Raises:
            ValueError: the model can't make it, or it is larger than this server takes.
            OSError: a given file can't be read.
        """
        model = self.generator.model
        if asked.model not in (None, self.name):
            raise ValueError(
                f"`model` (={asked.model[:60]!r}) isn't served here; take "
                f"{self.name!r}, or leave it out."
            )
        if asked.lora is not None and asked.lora not in self.loras:
            raise ValueError(
                f"`lora` (={asked.lora[:60]!r}) isn't offered here; "
                f"{', '.join(self.loras) or 'none'} is (--offer_lora)."
            )
        given = [name for name in paths if name != "restyle"]
        model.check_given(given + ["keep_sound"] * bool(asked.keep_sound))
        if asked.strength is not None and "restyle" not in paths:
            raise ValueError("`strength` says how far `restyle` goes; give both.")
        if asked.sound and "restyle" in paths:
            raise ValueError(
                "`sound` isn't made with `restyle`; add it afterwards, with "
                "`from_video`."
            )
        if self.generator.watermark is not None and "restyle" in paths:
            raise ValueError(
                "`restyle` begins with footage, and this server marks the noise that "
                "clips begin with (--watermark)."
            )
        fps = model.defaults.get("fps", 8.0)
        request = asked.request(fps, model.vae.temporal_compression, paths)
        settings = asked.settings.complete(model.defaults)
        if (settings.steps or 1) > self.steps:
            raise ValueError(
                f"`steps` (={settings.steps}) must be at most {self.steps}."
            )
        request = self.generator.complete(request)
        self.generator.check(request)
        self._check_tokens(request)
        return request, settings

    def maker(self, asked: VideoRequest) -> Generator:
        """The generator for what is asked, with its adapter if it names one."""
        return self.generator if asked.lora is None else self.loras[asked.lora]

    def tokens_of(self, frames: int, height: int, width: int) -> int:
        """Tokens of the picture of a clip."""
        return clip_tokens(self.generator.model, frames, height, width)

    def _check_tokens(self, request: Request) -> None:
        """Raises a ValueError with the largest clip that fits, unless this one does."""
        model, (frames, height, width) = self.generator.model, request.size
        stills = stills_of(model, request)
        count = picture_tokens(model, request, stills=stills)
        if count <= self.tokens:
            return
        most = self._most_frames(request, stills)
        unit, share = self.generator.unit, self.tokens / count
        small = size_like((height, width), int(height * width * share), unit)
        told = [f"{most} frames of {width}x{height}"] if most else []
        if self._fits(request, (frames, *small), stills):
            told.append(f"{frames} frames of {small[1]}x{small[0]}")
        given = [f"`{name}`" for name in request.given]
        beside = f" with {', '.join(given)}" if given else ""
        raise ValueError(
            f"`size` and `num_frames` ({frames} frames of {width}x{height}) make "
            f"{count} tokens{beside}, and this server takes {self.tokens} of a clip; "
            f"the largest are {' or '.join(told) or 'smaller in both'}."
        )

    def _most_frames(self, request: Request, stills: int) -> int:
        """The most frames of a request's size that fit; 0: not even one does."""
        model, (frames, *sides) = self.generator.model, request.size
        last = max((time for time, _ in request.keyframes), default=0.0)
        least = 1 + round(last * request.frame_rate)
        most = 0
        for fewer in range(1, frames, model.vae.temporal_compression):
            size = fewer, sides[0], sides[1]
            if self.tokens_of(*size) > self.tokens:
                break
            if fewer >= least and self._fits(request, size, stills):
                most = fewer
        return most

    def _fits(self, request: Request, size: tuple[int, int, int], stills: int) -> bool:
        """Whether a request fits at another size, at which it may not be possible."""
        try:
            count = picture_tokens(self.generator.model, request, size, stills)
        except ValueError:
            return False
        return count <= self.tokens

    def told(
        self, request: Request, settings: Settings, lora: str | None = None
    ) -> dict[str, Any]:
        """What the API adds of a clip: its size, settings, and how to make it anew.

        Args:
            request: complete.
            settings: likewise.
            lora: name of the adapter that was asked for.
        """
        frames, height, width = request.size
        fps = request.fps or 8.0
        fields = _in_api(request, settings) | {
            "seed": request.seed,
            "sound": bool(request.sound),
            "conditions": request.given,
        }
        if request.restyle is not None:
            fields["strength"] = settings.strength
        if self.generator.watermark is not None:
            fields["watermark"] = "gaussian shading"
        source = dict(self.source)
        if lora is not None:
            files = source.get("lora"), f"your_{lora}"
            source["lora"] = ",".join(filter(None, files))
        how = source, self.generator.model.has_sound
        return {
            "size": f"{width}x{height}",
            "seconds": f"{frames / fps:.6g}",
            "settings": fields,
            "command": command_of(request, settings, *how),
            "python": python_of(request, settings, *how),
        }

    @cached_property
    def card(self) -> dict[str, Any]:
        """What `/v1/models` says of it: what it takes, its defaults and its bounds."""
        model, suits = self.generator.model, self.generator.complete(Request(""))
        settings = Settings().complete(model.defaults)
        # In the order of the table, which begins with what is asked for most.
        rows = [row for name, row in CONDITIONS.items() if name in model.conditions]
        needed = {name for row in rows for name in row.needs}
        names = (name for row in rows for name in row.takes)
        taken = dict.fromkeys((*names, "restyle"))
        taken.pop(_NO_FILE, None)
        if self.generator.watermark is not None:
            taken.pop("restyle")
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "jvdit",
            "conditions": [
                {
                    "name": name,
                    "accepts": _ACCEPTS.get(name, "image/*"),
                    "needed": name in needed,
                    "several": name in SEVERAL,
                    "timed": name == "keyframes",
                }
                for name in taken
            ],
            "sound": model.has_sound,
            "loras": [*self.loras],
            "defaults": {
                "size": f"{suits.width}x{suits.height}",
                "strength": settings.strength,
                **_in_api(suits, settings),
            },
            "limits": {"tokens": self.tokens, "num_inference_steps": self.steps},
            "unit": self.generator.unit,
            "period": model.vae.temporal_compression,
        }


def _in_api(request: Request, settings: Settings) -> dict[str, Any]:
    """What every model lets a client choose, by its names in the API."""
    return {
        "num_frames": request.frames,
        "fps": request.fps,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "negative_prompt": request.negative_prompt or "",
    }
