"""The model that a server offers: what it takes, and what it says of each clip."""

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jvdit.data.conditions import CONDITIONS
from jvdit.data.patches import token_grid
from jvdit.generation.generator import Generator
from jvdit.generation.request import SEVERAL, Request, size_like
from jvdit.generation.settings import Settings
from jvdit.serving.slots import ALIGNED
from jvdit.serving.video_request import VideoRequest

# How a browser may choose a file for a condition; all others are pictures.
_FILMS = "video", "mask", "from_video", "prefix", "suffix", "interpolate", "upscale"
_FILMS += "edges", "restyle"
_ACCEPTS = dict.fromkeys(_FILMS, "video/*")
_ACCEPTS |= {"from_sound": "audio/*", "mask": "image/*,video/*"}
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
        model.check_given([name for name in paths if name != "restyle"])
        if asked.strength is not None and "restyle" not in paths:
            raise ValueError("`strength` says how far `restyle` goes; give both.")
        if asked.sound and "restyle" in paths:
            raise ValueError(
                "`sound` isn't made with `restyle`; add it afterwards, with "
                "`from_video`."
            )
        fps = model.defaults.get("fps", 8.0)
        request = asked.request(fps, model.vae.temporal_compression, paths)
        settings = asked.settings.complete(model.defaults)
        if (settings.steps or 1) > self.steps:
            raise ValueError(
                f"`steps` (={settings.steps}) must be at most {self.steps} here."
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
        model = self.generator.model
        size = model.vae.latent_shape(frames, height, width)
        return math.prod(token_grid(size, model.patch_size))

    def _check_tokens(self, request: Request) -> None:
        """Raises a ValueError with the largest clip that fits, unless this one does."""
        frames, height, width = request.size
        if (count := self.tokens_of(frames, height, width)) <= self.tokens:
            return
        most = self._most_frames(height, width)
        unit, pixels = self.generator.unit, height * width
        per_frame = self.tokens / self.tokens_of(frames, unit, unit)
        small = size_like((height, width), int(min(pixels, per_frame * unit**2)), unit)
        told = []
        if most:
            told.append(f"{most} frames of {width}x{height}")
        if self.tokens_of(frames, *small) <= self.tokens:
            told.append(f"{frames} frames of {small[1]}x{small[0]}")
        raise ValueError(
            f"`size` and `num_frames` ({frames} frames of {width}x{height}) make "
            f"{count} tokens, and this server takes {self.tokens} of a clip; the "
            f"largest that can be made are {' or '.join(told) or 'smaller in both'}."
        )

    def _most_frames(self, height: int, width: int) -> int:
        """The most frames of this size; 0: not even one fits."""
        period, most = self.generator.model.vae.temporal_compression, 0
        while self.tokens_of(most + period if most else 1, height, width) <= (
            self.tokens
        ):
            most = most + period if most else 1
        return most

    def told(self, request: Request, settings: Settings) -> dict[str, Any]:
        """What the API adds of a clip: its size, settings, and how to make it anew."""
        frames, height, width = request.size
        fps = request.fps or 8.0
        fields = {
            "num_frames": frames,
            "fps": fps,
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "seed": request.seed,
            "negative_prompt": request.negative_prompt or "",
            "sound": bool(request.sound),
            "conditions": given_names(request),
        }
        if request.restyle is not None:
            fields["strength"] = settings.strength
        return {
            "size": f"{width}x{height}",
            "seconds": f"{frames / fps:.6g}",
            "settings": fields,
            "command": self._command(request, settings),
            "python": self._python(request, settings),
        }

    def _recipe(self, request: Request, settings: Settings) -> dict[str, Any]:
        """What a clip is made of, by our own names; given files by a placeholder."""
        fields: dict[str, Any] = {"seed": request.seed}
        if request.negative_prompt:
            fields["negative_prompt"] = request.negative_prompt
        fields |= {"frames": request.frames, "fps": request.fps}
        fields |= {"steps": settings.steps, "guidance_scale": settings.guidance_scale}
        if self.generator.model.has_sound:
            fields["sound"] = request.sound
        if request.restyle is not None:
            fields["strength"] = settings.strength
        return fields | {
            name: _stand_in(request, name) for name in given_names(request)
        }

    def _command(self, request: Request, settings: Settings) -> str:
        """The command that makes the same clip."""
        words = ["python", "-m", "jvdit.sample", request.prompt]
        words += [f"--{name}={value}" for name, value in self.source.items()]
        words.append(f"--size={request.height}x{request.width}")
        for name, value in self._recipe(request, settings).items():
            name = {"last_image": "last"}.get(name, name)
            if isinstance(value, bool):
                words.append(f"--{'' if value else 'no'}{name}")
            elif isinstance(value, tuple):  # of files, some with their seconds
                parts = [x if isinstance(x, str) else f"{x[0]:g}:{x[1]}" for x in value]
                words.append(f"--{name}={','.join(parts)}")
            else:
                words.append(f"--{name}={value}")
        return shlex.join(words)

    def _python(self, request: Request, settings: Settings) -> str:
        """The Python that makes the same clip."""
        fields = {"height": request.height, "width": request.width}
        fields |= self._recipe(request, settings)
        source = self.source
        folder = source.get("workdir") or source.get("pretrained")
        opened = [] if folder is None else [repr(folder)]
        if form := source.get("quantize"):
            opened.append(f"quantize={form!r}")
        lines = [f"    {name}={value!r}," for name, value in fields.items()]
        return "\n".join(
            [
                "from jvdit import Generator",
                "",
                f"generator = Generator.load({', '.join(opened)})",
                "clip = generator(",
                f"    {request.prompt!r},",
                *lines,
                ")",
                'clip.save("clip.mp4", scale=clip.viewing_scale)',
            ]
        )

    @cached_property
    def card(self) -> dict[str, Any]:
        """What `/v1/models` says of it: what it takes, its defaults and its bounds."""
        model, suits = self.generator.model, self.generator.complete(Request(""))
        settings = Settings().complete(model.defaults)
        rows = [CONDITIONS[name] for name in model.conditions]
        needed = {name for row in rows for name in row.needs}
        names = (name for row in rows for name in row.takes)
        taken = dict.fromkeys((*names, "restyle"))
        taken.pop(_NO_FILE, None)
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
                "num_frames": suits.frames,
                "fps": suits.fps,
                "num_inference_steps": settings.steps,
                "guidance_scale": settings.guidance_scale,
                "negative_prompt": suits.negative_prompt or "",
                "strength": settings.strength,
            },
            "limits": {"tokens": self.tokens, "num_inference_steps": self.steps},
            "unit": self.generator.unit,
            "period": model.vae.temporal_compression,
        }


def given_names(request: Request) -> list[str]:
    """The names of all that a request gives besides its prompt."""
    return [*request.given, *["restyle"] * (request.restyle is not None)]


def _stand_in(request: Request, name: str) -> Any:
    """What stands for the given files of a condition in a command that is shown."""
    if name not in SEVERAL:
        return f"your_{name}"
    files = [f"your_{name}_{i + 1}" for i in range(len(getattr(request, name)))]
    if name == "keyframes":
        return (*zip((time for time, _ in request.keyframes), files, strict=True),)
    return (*files,)
