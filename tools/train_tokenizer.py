"""Trains a caption tokenizer and writes its sentencepiece model.

    python tools/train_tokenizer.py --output tokenizer.model --world 20000
    python tools/train_tokenizer.py --output tokenizer.model --captions captions.txt

Captions come from a text file (one a line; several files are joined), from a record
data set, or from the procedural world. Seconds for tens of thousands of captions.
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
    """Returns what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="the model file")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--max_captions", type=int, default=1_000_000)
    parser.add_argument("--captions", type=Path, nargs="*", default=[], metavar="FILE")
    parser.add_argument("--records", type=Path, nargs="*", default=[], metavar="DIR")
    parser.add_argument("--split", default="train", help="split of the records")
    parser.add_argument(
        "--world", type=int, default=0, metavar="N", help="captions of N world clips"
    )
    parser.add_argument(
        "--no_byte_fallback",
        action="store_true",
        help="unknown characters become one unknown id, not bytes",
    )
    arguments = parser.parse_args()
    if not (arguments.captions or arguments.records or arguments.world):
        parser.error("no captions: give --captions, --records or --world")
    return arguments


def read_captions(arguments: argparse.Namespace) -> Iterator[str]:
    """Yields the captions of every place that was named."""
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
    """Trains, writes, and says what came of it."""
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
