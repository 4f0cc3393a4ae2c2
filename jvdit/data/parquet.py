"""Parquet files, whose damage is reported in one line."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def parquet_errors(file: Path, remedy: str) -> Iterator[None]:
    """Turns whatever reading a damaged parquet file raises into one line.

    Args:
        file: the file.
        remedy: advice for the error message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it can't be read; the message names it.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    # Damage raises OSError, KeyError, MemoryError and others, beside arrow's own.
    except Exception as error:
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{file} can't be read ({told}); {remedy}.") from error
