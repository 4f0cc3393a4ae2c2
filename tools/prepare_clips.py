r"""Prepares a data set of clips from videos.

    python tools/prepare_clips.py VIDEOS --out data/clips --frames 81 --fps 16 \
        --size 480x832 832x480 --windows all --val 0.02

VIDEOS is a folder of videos and pictures with a .txt caption beside each, a folder with
metadata.jsonl (file_name, caption) or with videos.txt and prompt.txt, or a table (csv,
tsv, json, jsonl, parquet) with a column of paths and one of captions. A picture becomes
a clip of one frame. NAME.guide.mp4 beside NAME.mp4 is its guide, a second video of
what is seen (depth, pose, segmentation, …), and NAME.camera.json the path of its camera
(jvdit/data/cameras.py says how); in a table, columns guide_path and camera_path. They
are cut, scaled and cropped as the video is. If it is killed, the same command resumes.
The data set's report.md lists what was skipped, and why.

With `pip install 'jvdit[beam]'`, Apache Beam prepares the shards: --runner and all of
Beam's own options are passed on. Every worker must mount VIDEOS and --out at one place.

    python tools/prepare_clips.py VIDEOS --out data/clips --runner=DirectRunner \
        --direct_running_mode=multi_processing --direct_num_workers=8
    python tools/prepare_clips.py /mnt/videos --out /mnt/clips --runner=DataflowRunner \
        --project=P --region=us-central1 --temp_location=gs://B/tmp \
        --sdk_container_image=IMAGE --max_num_workers=200
    … --runner=FlinkRunner --flink_master=HOST:8081 --environment_type=DOCKER
    … --runner=SparkRunner --spark_master_url=spark://HOST:7077
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from jvdit.data.grid import ClipGrid
from jvdit.data.ingest.beam import beam_engine
from jvdit.data.ingest.clip_file import ClipFile, Recipe
from jvdit.data.ingest.ingest import ingest
from jvdit.data.manifest import dataset_directory
from jvdit.machine.json_files import nearest


def size(text: str) -> tuple[int, int]:
    """Parses a size written HxW into (height, width) in pixels."""
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not HxW, such as 480x832")
    return int(height), int(width)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    known = []

    def add(name: str, **options: Any) -> None:
        known.append(name)
        parser.add_argument(name, **options)

    add("inputs", nargs="+", help="folders of videos, tables, or video files")
    add("--out", required=True, help="folder of the data set")
    add("--root", help="folder that relative paths in tables start from")
    add(
        "--frames",
        type=int,
        default=recipe.frames,
        help="frames of a clip (default: %(default)s)",
    )
    add(
        "--fps",
        type=float,
        default=recipe.fps,
        help="frames per second of a clip (default: %(default)s)",
    )
    add(
        "--size",
        type=size,
        nargs="+",
        default=recipe.sizes,
        metavar="HxW",
        help="sizes of clips in pixels; each video takes the one with the nearest "
        "aspect ratio (default: 480x832)",
    )
    add(
        "--windows",
        default=recipe.windows,
        help="clips to cut from each video: first, all (consecutive ones), or a number "
        "of evenly spaced ones (default: %(default)s)",
    )
    add(
        "--audio-rate",
        type=int,
        default=recipe.audio_rate,
        help="sample rate of the sound in Hz; 0: no sound (default: %(default)s)",
    )
    add(
        "--crf",
        type=int,
        default=recipe.crf,
        help="x264 quality of the stored clips; lower is better (default: %(default)s)",
    )
    add(
        "--preset",
        default=recipe.preset,
        help="x264 preset; a slower one makes smaller files (default: %(default)s)",
    )
    add(
        "--max-upsample",
        type=float,
        default=recipe.max_upsample,
        help="largest factor by which frames may be enlarged (default: %(default)s)",
    )
    add(
        "--max-repeat",
        type=float,
        default=recipe.max_repeat,
        help="largest share of repeated frames, where a video's own frame rate is "
        "lower than --fps (default: %(default)s)",
    )
    add(
        "--max-pixels",
        type=int,
        default=recipe.max_pixels,
        help="most pixels of a source frame (default: %(default)s)",
    )
    add(
        "--for",
        dest="config",
        metavar="CONFIG",
        help="config that the clips are for: refuse sizes that its model doesn't take",
    )
    add("--require-caption", action="store_true", help="skip videos without a caption")
    add(
        "--val",
        type=float,
        default=0.0,
        help="share of the files to hold out for validation (default: %(default)s)",
    )
    add(
        "--shard-size",
        type=int,
        default=64,
        help="source files that go into a shard (default: %(default)s)",
    )
    add(
        "--workers",
        type=int,
        help="worker processes (default: one for each core; with --runner, for each "
        "shard)",
    )
    add("--runner", help="runner of Apache Beam (default: processes of this machine)")
    add(
        "--timeout",
        type=float,
        default=120.0,
        help="most seconds that a clip may take (default: %(default)s)",
    )
    add(
        "--max-reject-rate",
        type=float,
        default=0.5,
        help="share of skipped files above which the exit status is 1 "
        "(default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="start over, deleting earlier output")
    given = [
        _as_defined(x, known)
        for x in (sys.argv[1:] if arguments is None else arguments)
    ]
    args, beam = parser.parse_known_args(given)
    if beam and args.runner is None:
        near = nearest(beam[0].partition("=")[0], known)
        parser.error(f"unrecognized arguments: {' '.join(beam)}; did you mean {near}?")
    args.beam = [f"--runner={args.runner}", *beam]
    args.sizes = tuple(args.size)
    return args


def _as_defined(argument: str, known: Sequence[str]) -> str:
    """An argument, with hyphens for the underscores that other commands have."""
    name, equals, value = argument.partition("=")
    other = name.replace("_", "-")
    return f"{other}{equals}{value}" if other in known else argument


def _tell(text: str) -> None:
    print(f"prepare_clips: {text}", file=sys.stderr)


def _check_sizes(recipe: Recipe, config: str | None) -> ClipGrid:
    """Refuses sizes that a config's model doesn't take; without one, says so.

    Raises:
        ValueError: a size doesn't fit the config.
    """
    grid = ClipGrid()
    if config is not None:  # imports JAX
        from jvdit.tasks.config_grid import grid_of, read_config

        grid = grid_of(read_config(config))
    faults = [x for size in recipe.sizes for x in grid.faults(recipe.frames, *size)]
    told = "; ".join(dict.fromkeys(faults))
    if told and config is not None:
        raise ValueError(f"for {config}, {told}.")
    if told:
        _tell(f"warning: for most models, {told} (--for CONFIG checks it for one)")
    return grid


def _check_captions(items: Sequence[ClipFile], grid: ClipGrid) -> None:
    """Says before the work begins that nothing has a caption.

    Raises:
        ValueError: the training that the clips are for needs some.
    """
    if any(item.caption for item in items):
        return
    places = ", ".join({item.note: 0 for item in items if item.note})
    told = f"none of the videos has a caption{places and f' ({places})'}"
    if grid.needs_captions:
        raise ValueError(f"{told}, which --for needs; write them first.")
    _tell(f"warning: {told}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = parse(arguments)
    try:
        recipe = Recipe(
            **{field.name: getattr(args, field.name) for field in fields(Recipe)}
        )
        grid = _check_sizes(recipe, args.config)
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
            engine=None if args.runner is None else beam_engine(args.beam),
            listed=lambda items: _check_captions(items, grid),
        )
    except (ValueError, OSError) as e:
        _tell(str(e))
        return 2
    except KeyboardInterrupt:
        _tell("stopped; the same command goes on")
        return 130
    directory = dataset_directory(args.out)
    print(f"{report.summary()}\n{directory / 'report.md'}")
    if report.reject_rate > args.max_reject_rate:
        _tell(
            f"{report.reject_rate:.0%} of the files were skipped, more than "
            f"--max-reject-rate {args.max_reject_rate:.0%}."
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
