"""Says whether clips carry the watermark of a key.

    python -m jvdit.sample "…" --workdir M --watermark key --out samples
    python tools/detect_watermark.py samples/*.mp4 --workdir M --key key

Encodes each clip, goes back to the noise that the model would have made it from, and
compares its signs with those of the key (docs/provenance.md). Needs the model that made
the clips. Prints, of each, how many signs agree, the p-value, and the verdict.
"""

import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from jvdit.box import FOLDER
from jvdit.data.clips import SIZE
from jvdit.data.media.reader import decode_clip, read_metadata
from jvdit.generation.completion import size_fields
from jvdit.generation.generator import Generator
from jvdit.generation.inversion import inverted
from jvdit.generation.request import Request
from jvdit.generation.watermark import STREAMS, Found, Watermark, together
from jvdit.machine import flag_parser
from jvdit.machine.command import MISTAKES, told_in_a_line
from jvdit.machine.compilation import keep_compilations

_WORKDIR = flags.DEFINE_string(
    "workdir", str(FOLDER), "Folder of the model, or of a released one."
)
_KEY = flags.DEFINE_string("key", None, "File of the key.")
_PROMPT = flags.DEFINE_string(
    "prompt", None, "Prompt of the clips (default: as their files say, or none)."
)
_SIZE = flags.DEFINE_string(
    "size", None, "HEIGHTxWIDTH that the model made (default: as their files say)."
)
_FRAMES = flags.DEFINE_integer("frames", None, "Frames that the model made.")
_FPS = flags.DEFINE_float("fps", None, "Frames per second that the model made.")
_STEPS = flags.DEFINE_integer("steps", 50, "Steps of the inversion.", lower_bound=1)
_REFINE = flags.DEFINE_integer(
    "refine", 3, "How often the encoder's latents are corrected.", lower_bound=0
)
_FALSE = flags.DEFINE_float(
    "false_positives", 1e-6, "Share of unmarked clips that may be called marked."
)


def search(generator: Generator, key: Watermark, path: str) -> Found:
    """Searches a clip for the mark.

    Raises:
        ValueError: it can't be read, or isn't of a size that the model makes.
        OSError: there is no such file.
    """
    told = read_metadata(path).get("jvdit", {})
    usual = generator.complete(Request(""))
    names = (*SIZE, "fps")
    size: dict[str, Any] = {k: told.get(k, getattr(usual, k)) for k in names}
    size |= size_fields({}, _SIZE.value, _FRAMES.value, _FPS.value)
    clip = decode_clip(path, **size)
    prompt = told.get("prompt", "") if _PROMPT.value is None else _PROMPT.value
    how = {"steps": _STEPS.value, "refine": _REFINE.value}
    noise = inverted(generator, [clip["video"]], [prompt], float(size["fps"]), **how)
    return key.find(noise)[0]


def main(argv: Sequence[str]) -> None:
    """Prints a line for each clip."""
    with told_in_a_line("stopped."):
        if _KEY.value is None or len(argv) < 2:
            raise ValueError("give clips, and the --key that may have marked them.")
        key = Watermark.read(_KEY.value)
        keep_compilations()
        generator, found, refused = Generator.load(_WORKDIR.value), [], 0
        for path in argv[1:]:
            try:
                found.append(one := search(generator, key, path))
            except MISTAKES as error:
                print(f"left out: {path}: {error}", file=sys.stderr)
                refused += 1
                continue
            verdict = "present" if one.p_value < _FALSE.value else "not found"
            print(
                f"{path}: {verdict}: {one.agreeing} of {one.values} signs agree "
                f"({one.agreeing / one.values:.1%}), z {one.z:.1f}, p <= "
                f"{one.p_value:.2g} (best of {STREAMS} streams)",
                flush=True,
            )
        if len(found) > 1:
            print(f"all {len(found)} together: p <= {together(found):.2g}")
        if refused:
            raise ValueError(f"{refused} of {len(argv) - 1} clips were left out.")


if __name__ == "__main__":
    flag_parser.run(main)
