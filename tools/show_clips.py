"""Shows clips of a data set: a sheet of frames, captions and the sound's spectrograms.

    python tools/show_clips.py data/clips --out clips.png
    python tools/show_clips.py 'world:pair:17x64x64@8:12' --out world.png --n 12

The first argument is a source as in a config's `data.sources`. Clips are taken evenly
from all of it; those that can't be read are told, with the reason.
"""

import argparse
import pathlib
import sys

import numpy as np

from jvdit.data.clips import BadClip
from jvdit.data.sheets import contact_sheet, write_png
from jvdit.data.sources import open_source
from jvdit.data.spectrum import spectrogram
from jvdit.machine.command import MISTAKES

_RATE = 16_000  # Hz, of the spectrograms


def show(name: str, count: int, out: pathlib.Path) -> list[str]:
    """Writes the sheet.

    Args:
        name: of the source.
        count: most clips to show.
        out: file of the sheet.

    Returns:
        What is to be told of clips that can't be read, and of all of them.

    Raises:
        ValueError: no clip can be read, or the source holds latents.
    """
    source, told = open_source(name, audio_rate=_RATE), []
    ids = np.unique(
        np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)
    )
    videos, captions, sounds = [], [], []
    for i, clip in zip(ids, source.read(ids), strict=True):
        if isinstance(clip, BadClip):
            told.append(f"clip {i} can't be read: {clip.reason}")
            continue
        if "video" not in clip:
            raise ValueError(f"{name} holds latents; show the clips that became them.")
        videos.append(clip["video"])
        captions.append(clip["caption"] or "(no caption)")
        audio = clip.get("audio")
        heard = audio is not None and np.any(audio)
        sounds.append(spectrogram(audio, _RATE, width=512) if heard else None)
    if not videos:
        raise ValueError(f"none of the clips of {name} can be read: {told[:1]}.")
    write_png(out, contact_sheet(videos, captions, sounds=sounds))
    return [*told, f"{len(source)} clips, {len(videos)} of them in {out}"]


def main() -> None:
    """Parses the command line, and turns mistakes of the user into one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="clips, as in a config's data.sources")
    parser.add_argument(
        "--out", type=pathlib.Path, default="clips.png", help="file of the sheet"
    )
    parser.add_argument("--n", type=int, default=16, help="clips to show, at the most")
    args = parser.parse_args()
    if args.n < 1:
        parser.error(f"--n (={args.n}) must be at least 1")
    try:
        print("\n".join(show(args.source, args.n, args.out)))
    except MISTAKES as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
