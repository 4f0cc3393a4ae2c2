"""How a clip is made anew: as a command, and as Python."""

import math
import shlex
from collections.abc import Mapping
from typing import Any

from jvdit.generation.request import SEVERAL, Request
from jvdit.generation.settings import Settings


def command_of(
    request: Request, settings: Settings, source: Mapping[str, str], sound: bool
) -> str:
    """The command that makes a clip anew.

    Args:
        request: complete.
        settings: likewise.
        source: flags that open the model.
        sound: whether it can make some.
    """
    words = ["python", "-m", "jvdit.sample", request.prompt]
    words += [f"--{name}={value}" for name, value in source.items()]
    words.append(f"--size={request.height}x{request.width}")
    for name, value in _fields(request, settings, sound).items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no'}{name}")
        elif isinstance(value, tuple):
            words.append(f"--{name}={','.join(map(_timed, value))}")
        else:
            words.append(f"--{name}={value}")
    return shlex.join(words)


def python_of(
    request: Request, settings: Settings, source: Mapping[str, str], sound: bool
) -> str:
    """The Python that makes a clip anew; see `command_of`."""
    fields = {"height": request.height, "width": request.width}
    fields |= _fields(request, settings, sound)
    folder = source.get("workdir") or source.get("pretrained")
    imports = ["from jvdit import Generator"]
    opened = [] if folder is None else [repr(folder)]
    if form := source.get("quantize"):
        opened.append(f"quantize={form!r}")
    told = {name: repr(value) for name, value in fields.items()}
    if request.keep_sound:
        told["keep_sound"] = told["keep_sound"].replace("inf", 'float("inf")')
    lines = [f"    {name}={value}," for name, value in told.items()]
    more = []
    if files := source.get("lora"):
        imports.append("from jvdit.weights.adapters import strengths")
        imports.append("from jvdit.weights.opening import with_adapters")
        more.append(f"model = with_adapters(generator.model, strengths([{files!r}]))")
        more.append("generator = generator.beside(model)")
    if key := source.get("watermark"):
        imports.append("from jvdit.generation.watermark import Watermark")
        more.append(f"generator.watermark = Watermark.read({key!r})")
    return "\n".join(
        [
            *imports,
            "",
            f"generator = Generator.load({', '.join(opened)})",
            *more,
            "clip = generator(",
            f"    {request.prompt!r},",
            *lines,
            ")",
            'clip.save("clip.mp4", scale=clip.viewing_scale)',
        ]
    )


def _fields(request: Request, settings: Settings, sound: bool) -> dict[str, Any]:
    """What a clip is made of, by our own names; given files by a stand-in."""
    fields: dict[str, Any] = {"seed": request.seed}
    if request.negative_prompt:
        fields["negative_prompt"] = request.negative_prompt
    fields |= {"frames": request.frames, "fps": request.fps}
    fields |= {"steps": settings.steps, "guidance_scale": settings.guidance_scale}
    if sound:
        fields["sound"] = request.sound
    if request.restyle is not None:
        fields["strength"] = settings.strength
    return fields | {name: _stand_in(request, name) for name in request.given}


def _timed(part: Any) -> str:
    """A file, a file with its seconds, or a span, as a flag has them."""
    if isinstance(part, str):
        return part
    start, what = part
    if not isinstance(what, str):
        what = "" if what == math.inf else f"{what:g}"
    return f"{start:g}:{what}"


def _stand_in(request: Request, name: str) -> Any:
    """What stands for the files of a condition."""
    if name == "keep_sound":
        return request.keep_sound
    if name not in SEVERAL:
        return f"your_{name}"
    files = [f"your_{name}_{i + 1}" for i in range(len(getattr(request, name)))]
    if name == "keyframes":
        return (*zip((time for time, _ in request.keyframes), files, strict=True),)
    return (*files,)
