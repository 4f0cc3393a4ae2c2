"""How well the watermark of a model's clips is found, and what it costs.

    python tools/watermark_table.py --n 64

Makes clips of the procedural world's prompts with a watermark and without, from the
same seeds. Prints how many signs agree and how many clips are found, raw and after
H.264, by the right key and by others; and the oracle's scores of both sets.
"""

import io
from collections.abc import Sequence

import numpy as np
from absl import flags

from jvdit.box import FOLDER
from jvdit.data.media.reader import decode_clip
from jvdit.data.media.writer import encode_clip
from jvdit.data.world import World
from jvdit.evaluation.oracle import score, summary
from jvdit.generation.generator import Generator
from jvdit.generation.inversion import inverted
from jvdit.generation.request import Request
from jvdit.generation.watermark import Watermark
from jvdit.machine import flag_parser
from jvdit.machine.command import refuse_arguments, told_in_a_line
from jvdit.machine.compilation import keep_compilations

_WORKDIR = flags.DEFINE_string("workdir", str(FOLDER), "Folder of the model.")
_SPLIT = flags.DEFINE_string("split", "single", "Split of the world.")
_N = flags.DEFINE_integer("n", 64, "Clips of each set that are scored.", lower_bound=2)
_FOUND = flags.DEFINE_integer(
    "found", 32, "Clips of each set that are searched.", lower_bound=2
)
_PROMPTS = flags.DEFINE_boolean("prompts", False, "Invert with the clips' prompts.")
_STEPS = flags.DEFINE_integer("steps", 50, "Steps of the inversion.", lower_bound=1)
_CRF = flags.DEFINE_list("crf", ["28"], "Qualities of H.264 to try.")
_SCALE = flags.DEFINE_integer(
    "scale", 8, "How many times clips are enlarged before H.264, as in their files."
)
_WRONG = flags.DEFINE_integer("wrong", 8, "Wrong keys that are tried.", lower_bound=1)
_LIMITS = 1e-3, 1e-6  # p-values below which a mark counts as found
_SCORES = "all", "color", "count", "size", "shape", "direction", "physics"


def compressed(video: np.ndarray, fps: float, crf: int) -> np.ndarray:
    """A clip as it is read from its file."""
    large = video.repeat(_SCALE.value, 1).repeat(_SCALE.value, 2)
    encode_clip(buffer := io.BytesIO(), large, fps, crf=crf)
    frames, height, width, _ = video.shape
    size = {"frames": frames, "height": height, "width": width}
    return decode_clip(buffer.getvalue(), fps=fps, **size)["video"]


def main(argv: Sequence[str]) -> None:
    """Prints the tables."""
    refuse_arguments(argv)
    with told_in_a_line("stopped."):
        keep_compilations()
        generator = Generator.load(_WORKDIR.value)
        usual = generator.complete(Request(""))
        frames, height, width = usual.size
        fps = float(usual.fps or 8.0)
        size = {"frames": frames, "height": height, "width": width, "fps": fps}
        world, ids = World(_SPLIT.value, seed=1, **size), np.arange(_N.value)
        captions = world.captions(ids)
        requests = [
            Request(caption, "", seed=int(i), sound=False)
            for i, caption in zip(ids, captions, strict=True)
        ]
        captions = captions[: _FOUND.value]
        right, *wrong = (
            Watermark(f"key {i} of the table".encode()) for i in range(_WRONG.value + 1)
        )
        sets = {}
        for name, mark in (("marked", right), ("unmarked", None)):
            generator.watermark = mark
            sets[name] = [x.video for x in generator(requests, rows=32)]
            told = summary(score(np.stack(sets[name]), world.scenes(ids), world.fps))
            cells = (f"{x} {told[x][0]:.3f}" for x in _SCORES)
            print(f"{name}: {', '.join(cells)}", flush=True)
        print("clips | signs agreeing | z median (least) | found at 1e-3, 1e-6", end="")
        print(f" | the same with {_WRONG.value} wrong keys, largest z", flush=True)
        for name, videos in sets.items():
            videos = videos[: _FOUND.value]
            ways = {"raw": videos}
            for crf in map(int, _CRF.value):
                ways[f"crf {crf}"] = [compressed(x, fps, crf) for x in videos]
            for way, clips in ways.items():
                told = captions if _PROMPTS.value else [""] * len(clips)
                noise = inverted(
                    generator, clips, told, fps, steps=_STEPS.value, rows=32
                )
                found = right.find(noise)
                others = [x for key in wrong for x in key.find(noise)]
                share = np.mean([x.agreeing / x.values for x in found])
                z, high = [x.z for x in found], max(x.z for x in others)
                rates = [
                    ", ".join(
                        f"{sum(x.p_value < p for x in group)}/{len(group)}"
                        for p in _LIMITS
                    )
                    for group in (found, others)
                ]
                print(
                    f"{name}, {way} | {share:.3f} of {found[0].values} | "
                    f"{np.median(z):.1f} ({min(z):.1f}) | {rates[0]} | {rates[1]}, "
                    f"{high:.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    flag_parser.run(main)
