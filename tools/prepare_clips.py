"""Makes a data set of clips out of videos.

    python tools/prepare_clips.py VIDEOS --out data/clips --frames 81 --fps 16 \
        --size 480x832 832x480 --windows all --val 0.02

VIDEOS is a folder of videos with a .txt caption beside each, a folder with
metadata.jsonl (file_name, caption), or a table (csv, tsv, json, jsonl, parquet) with
a column of paths and one of captions. Killed, it goes on where it was when it is run
again. What was skipped, and why, is in report.md of the data set.
"""

import argparse
import sys
from dataclasses import fields

from jvdit.data.ingest.clip_file import Recipe
from jvdit.data.ingest.ingest import ingest
from jvdit.data.record_format import dataset_directory


def size(text: str) -> tuple[int, int]:
    """Reads HxW."""
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not HxW, such as 480x832")
    return int(height), int(width)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", help="folders, tables, videos")
    add("--out", required=True, help="directory of the data set")
    add("--root", help="what relative paths in tables are relative to")
    add("--frames", type=int, default=recipe.frames, help="frames of a clip")
    add("--fps", type=float, default=recipe.fps, help="frames per second")
    add("--size", type=size, nargs="+", default=recipe.sizes, metavar="HxW")
    add("--windows", default=recipe.windows, help="first, all, or how many of a video")
    add("--audio-rate", type=int, default=recipe.audio_rate, help="Hz; 0: no sound")
    add("--crf", type=int, default=recipe.crf, help="quality; lower is better")
    add("--preset", default=recipe.preset, help="of x264; slower is smaller")
    add("--max-upsample", type=float, default=recipe.max_upsample)
    add("--max-repeat", type=float, default=recipe.max_repeat)
    add("--max-pixels", type=int, default=recipe.max_pixels)
    add("--require-caption", action="store_true", help="skip videos without one")
    add("--val", type=float, default=0.0, help="share of the files held out")
    add("--shard-size", type=int, default=64, help="source files of a shard")
    add("--workers", type=int, help="processes; default: one for each core")
    add("--timeout", type=float, default=120.0, help="seconds that a clip may take")
    add("--max-reject-rate", type=float, default=0.5, help="else it exits with 1")
    add("--overwrite", action="store_true", help="start anew")
    args = parser.parse_args(arguments)
    args.sizes = tuple(args.size)
    return args


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = parse(arguments)
    try:
        recipe = Recipe(
            **{field.name: getattr(args, field.name) for field in fields(Recipe)}
        )
        report = ingest(
            args.inputs,
            args.out,
            recipe,
            root=args.root,
            val_fraction=args.val,
            shard_size=args.shard_size,
            workers=args.workers,
            timeout=args.timeout,
            overwrite=args.overwrite,
        )
    except (ValueError, OSError) as e:
        print(f"prepare_clips: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare_clips: stopped; the same command goes on", file=sys.stderr)
        return 130
    directory = dataset_directory(args.out)
    print(f"{report.summary()}\n{directory / 'report.md'}")
    if report.reject_rate > args.max_reject_rate:
        print(
            f"prepare_clips: {report.reject_rate:.0%} of the files were skipped, more "
            f"than --max-reject-rate {args.max_reject_rate:.0%}.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
