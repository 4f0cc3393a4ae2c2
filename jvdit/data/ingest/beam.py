"""Shards prepared by Apache Beam: by the processes of a machine, or by many machines.

An element of the pipeline is a shard's list of files. Only such lists travel: the
videos are read, and the shards written, where they lie, on a file system that all
workers mount. A shard that is prepared twice, because a worker died or was slow, is the
same to the byte.
"""

import argparse
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from jvdit.machine.command import MISTAKES

Engine = Callable[[Callable[[Any], None], Sequence[Any]], None]


def beam_engine(flags: Sequence[str]) -> Engine:
    """Returns what runs a function over jobs as a Beam pipeline.

    Args:
        flags: Beam's own options, such as `--runner=DirectRunner`,
            `--direct_running_mode=multi_processing`, `--direct_num_workers=8`.

    Raises:
        ValueError: Beam isn't installed, or has no such option.
    """
    try:
        beam: Any = importlib.import_module("apache_beam")
        options: Any = importlib.import_module("apache_beam.options.pipeline_options")
    except ImportError as error:
        raise ValueError(
            f"--runner needs Apache Beam ({error}): pip install 'jvdit[beam]'."
        ) from error
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for group in options.PipelineOptions.__subclasses__():
        group._add_argparse_args(parser)
    if unknown := parser.parse_known_args(list(flags))[1]:
        raise ValueError(f"{unknown[0]!r} is no option of prepare_clips or of Beam.")

    def run(work: Callable[[Any], None], jobs: Sequence[Any]) -> None:
        try:
            with beam.Pipeline(options=options.PipelineOptions(list(flags))) as made:
                each = made | beam.Create(jobs) | beam.Reshuffle()
                _ = each | "PrepareShard" >> beam.Map(work)
        except Exception as error:
            if isinstance(error, MISTAKES):
                raise
            told = str(error).strip().splitlines() or [type(error).__name__]
            raise OSError(
                f"the Beam job failed ({told[-1][:300]}); the same command goes on."
            ) from error

    return run
