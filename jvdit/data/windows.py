"""Windows of encoded videos: which clips a set of videos holds, and decoding them."""

from collections.abc import Mapping

import numpy as np

from jvdit.data.clips import Clip, OneByOne, make_index
from jvdit.data.media.reader import decode_clip


class VideoWindows(OneByOne):
    """Windows of encoded videos, decoded when they are read.

    Args:
        videos: index of whole videos.
        frames: of a clip. None: all that the video has.
        height, width: pixels; the video is scaled to cover the size and cropped. None:
            as is.
        fps: frames per second of a clip. None: those of the video.
        windows: "first": one clip a video, from its start; "all": as many clips, one
            after another, as fit.
        audio_rate: Hz of the sound; 0: none.
        channels: of the sound.

    Attributes:
        left_out: number of videos that are shorter than a window.

    Raises:
        ValueError: no video is long enough, or `windows` is unknown.
    """

    def __init__(
        self,
        videos: Mapping[str, np.ndarray],
        *,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: float | None = None,
        windows: str = "first",
        audio_rate: int = 0,
        channels: int = 2,
    ):
        if windows not in ("first", "all"):
            raise ValueError(f"`windows` (={windows!r}) must be 'first' or 'all'.")
        rate = videos["fps"] if fps is None else np.full(len(videos["fps"]), fps)
        if frames is None and fps is None:
            length = videos["frames"]
        elif frames is None:
            length = np.floor(videos["frames"] / videos["fps"] * rate + 1e-6)
        else:
            length = np.full(len(rate), frames)
        # Half a frame of tolerance: the nearest frame is shown.
        fitting = (videos["frames"] + 0.5) / videos["fps"] / (length / rate)
        count = np.floor(fitting).astype(np.int64) * (length > 0)
        if windows == "first":
            count = np.minimum(count, 1)
        self.left_out = int((count == 0).sum())
        if not count.any():
            raise ValueError(
                f"None of {len(count)} videos lasts for `frames` (={frames}) at `fps` "
                f"(={fps}); the longest has {videos['frames'].max()} frames."
            )
        self._video = video = np.repeat(np.arange(len(count)), count)
        number = np.arange(len(video)) - np.repeat(np.cumsum(count) - count, count)
        self._start = number * (length / rate)[video]
        self._audio_rate, self._channels = audio_rate, channels
        self.index = make_index(
            len(video),
            frames=length[video],
            height=videos["height"][video] if height is None else height,
            width=videos["width"][video] if width is None else width,
            fps=rate[video],
            has_audio=(videos["has_audio"][video] & (audio_rate > 0)),
        )
        self._settings = [frames, height, width, fps, windows, audio_rate, channels]

    def _encoded(self, video: int) -> tuple[bytes, str]:
        """Returns the file and the caption of a video."""
        raise LookupError(video)

    def _read_one(self, i: int) -> Clip:
        data, caption = self._encoded(int(self._video[i]))
        clip = decode_clip(
            data,
            frames=int(self.index["frames"][i]),
            height=int(self.index["height"][i]),
            width=int(self.index["width"][i]),
            fps=float(self.index["fps"][i]),
            start_seconds=float(self._start[i]),
            audio_rate=self._audio_rate,
            channels=self._channels,
        )
        return clip | {"caption": caption}
