"""Why a media file, or a window of one, cannot be used."""

import contextlib
from collections.abc import Iterator

from av.error import DecoderNotFoundError, FFmpegError

REASONS = {
    "missing": "there is no such file",
    "unreadable": "not a media file, or its header is damaged",
    "no_video": "it has no video stream",
    "unsupported": "this build of FFmpeg cannot decode its codec or convert its pixels",
    "corrupt": "damaged, encrypted or incomplete: it does not decode cleanly",
    "short": "it ends before the window does",
    "too_small": "its picture is too small",
    "too_large": "its picture is too large",
    "interlaced": "it is interlaced",
    "hdr": "its colours are coded in a way that can't be converted (ICtCp, …)",
    "size_change": "its picture changes size",
    "low_rate": "its frame rate is so low that too many frames would be repeated",
    "over_budget": "too many frames had to be decoded",
    "timeout": "it took too long",
    "crash": "the decoder died of it",
    "no_caption": "it has no caption",
    "duplicate": "the same file is there under another name",
    "bad_row": "its row of the table, or the caption in it, can't be read",
    "bad_caption": "the caption beside it can't be read",
    "bad_guide": "the guide beside it can't be used",
    "bad_camera": "the camera path beside it can't be used",
    "unlisted": "the table in its folder doesn't name it",
    "other": "it is no video or picture of a kind that is known here",
    "failed": "preparing it failed in a way that was not foreseen",
}


class MediaError(ValueError):
    """A file, or a window of it, that cannot be used.

    Args:
        reason: one of `REASONS`.
        detail: what was found.
    """

    def __init__(self, reason: str, detail: str = ""):
        if reason not in REASONS:
            raise KeyError(f"{reason!r} is none of {sorted(REASONS)}.")
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail or REASONS[self.reason]}"


@contextlib.contextmanager
def media_errors(reason: str = "corrupt", *passing: type[Exception]) -> Iterator[None]:
    """Turns whatever a damaged file makes FFmpeg or PyAV raise into a MediaError.

    Args:
        reason: one of `REASONS`, where the error tells none.
        passing: errors that aren't the file's fault.
    """
    try:
        yield
    except (MediaError, MemoryError, *passing):
        raise
    except FileNotFoundError as e:
        raise MediaError("missing", str(e.filename)) from None
    except TimeoutError as e:  # of sound, where a MediaError would mean that it is bad
        raise MediaError("timeout", str(e)) from None
    except (DecoderNotFoundError, NotImplementedError) as e:
        raise MediaError("unsupported", str(e)) from None
    except FFmpegError as e:
        raise MediaError(reason, str(e.strerror)) from None
    except Exception as e:  # AttributeError, IndexError, UnicodeDecodeError were seen
        raise MediaError(reason, f"{type(e).__name__}: {e}"[:200]) from None
