"""Trains a caption tokenizer and writes its sentencepiece model.

    python tools/train_tokenizer.py --output tokenizer.model --world 20000
    python tools/train_tokenizer.py --output tokenizer.model --captions captions.txt

Captions come from text files (one caption a line), from record data sets, or from the
procedural world; several sources are joined. Tens of thousands take seconds.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jvdit.data.records import RecordDataset
from jvdit.data.tokenizer import Tokenizer, train_tokenizer
from jvdit.data.world import World


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="file to write the sentencepiece model to",
    )
    parser.add_argument(
        "--vocab_size",
        type=int,
        default=4096,
        help="size of the vocabulary (default: %(default)s)",
    )
    parser.add_argument(
        "--max_captions",
        type=int,
        default=1_000_000,
        help="most captions to train on (default: %(default)s)",
    )
    parser.add_argument(
        "--captions",
        type=Path,
        nargs="*",
        default=[],
        metavar="FILE",
        help="text files with one caption a line",
    )
    parser.add_argument(
        "--records",
        type=Path,
        nargs="*",
        default=[],
        metavar="DIR",
        help="folders of record data sets",
    )
    parser.add_argument(
        "--split",
        default="train",
        help="split of the record data sets (default: %(default)s)",
    )
    parser.add_argument(
        "--world",
        type=int,
        default=0,
        metavar="N",
        help="use the captions of N clips of the procedural world",
    )
    parser.add_argument(
        "--no_byte_fallback",
        action="store_true",
        help="encode unknown characters as one unknown token instead of their bytes",
    )
    arguments = parser.parse_args()
    if not (arguments.captions or arguments.records or arguments.world):
        parser.error("no captions: give --captions, --records or --world")
    return arguments


def read_captions(arguments: argparse.Namespace) -> Iterator[str]:
    """Yields the captions of all sources on the command line."""
    for path in arguments.captions:
        with open(path, encoding="utf-8") as lines:
            yield from (line.rstrip("\n") for line in lines)
    for path in arguments.records:
        records = RecordDataset(path, arguments.split)
        yield from (records[i]["caption"] for i in range(len(records)))
    if arguments.world:
        for ids in np.array_split(
            np.arange(arguments.world), -(-arguments.world // 1024)
        ):
            yield from World().captions(ids)


def main() -> None:
    """Trains the tokenizer, writes it, and prints its statistics."""
    arguments = parse_arguments()
    captions = list(itertools.islice(read_captions(arguments), arguments.max_captions))
    model = train_tokenizer(
        captions,
        arguments.vocab_size,
        arguments.output,
        byte_fallback=not arguments.no_byte_fallback,
    )
    tokenizer = Tokenizer(model)
    lengths = sorted(len(tokenizer.encode(caption)) for caption in captions)
    print(
        f"{arguments.output}: {tokenizer.vocab_size} pieces from {len(captions)} "
        f"captions; {lengths[len(lengths) // 2]} tokens a caption (median), "
        f"{lengths[-1]} at most"
    )


if __name__ == "__main__":
    main()
